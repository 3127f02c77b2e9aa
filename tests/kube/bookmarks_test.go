package kube

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// A watch through the cache gets a bookmark before it ends, beyond changes that it
// does not select, and resumes from there without seeing anything again.
func testBookmarks(t *testing.T, c *cluster) {
	resource := c.resource(configMaps, c.namespace(t, "bookmarks"))
	elsewhere := c.resource(configMaps, c.namespace(t, "elsewhere"))
	list, err := resource.List(c.ctx, metav1.ListOptions{})
	check(t, err)
	seconds := int64(5) // the bookmark comes two seconds before the end
	watcher, err := resource.Watch(c.ctx, metav1.ListOptions{
		ResourceVersion:     list.GetResourceVersion(),
		AllowWatchBookmarks: true,
		TimeoutSeconds:      &seconds,
	})
	check(t, err)
	defer watcher.Stop()
	_, err = resource.Create(c.ctx, configMap("one"), metav1.CreateOptions{})
	check(t, err)
	unselected, err := elsewhere.Create(c.ctx, configMap("other"), metav1.CreateOptions{})
	check(t, err)

	bookmark := ""
	var delivered []string
	for event := range watcher.ResultChan() {
		o, err := meta.Accessor(event.Object)
		check(t, err)
		if event.Type == watch.Bookmark {
			bookmark = o.GetResourceVersion()
		} else {
			delivered = append(delivered, fmt.Sprint(event.Type, " ", o.GetName()))
		}
	}
	if want := []string{"ADDED one"}; !slices.Equal(delivered, want) {
		t.Errorf("the watch delivered %v, not %v", delivered, want)
	}
	if bookmark == "" || revisionOf(bookmark) < revisionOf(unselected.GetResourceVersion()) {
		t.Fatalf("the bookmark is at %q, the last change at %s",
			bookmark, unselected.GetResourceVersion())
	}

	resumed, err := resource.Watch(c.ctx, metav1.ListOptions{ResourceVersion: bookmark})
	check(t, err)
	defer resumed.Stop()
	_, err = resource.Create(c.ctx, configMap("two"), metav1.CreateOptions{})
	check(t, err)
	requireNext(t, resumed, "two")
}

// requireNext fails t unless the next event adds the object of that name.
func requireNext(t *testing.T, watcher watch.Interface, name string) {
	t.Helper()
	select {
	case event := <-watcher.ResultChan():
		o, err := meta.Accessor(event.Object)
		if err != nil || event.Type != watch.Added || o.GetName() != name {
			t.Errorf("instead of %s came %v", name, event)
		}
	case <-time.After(conditionWithin):
		t.Errorf("%s did not come within %s", name, conditionWithin)
	}
}

// A watch that asks for the initial events gets every object, then a bookmark that
// says so, then changes: through the cache and, for events, from the store.
func testInitialEvents(t *testing.T, c *cluster) {
	namespace := c.namespace(t, "initial")
	initial, wait := true, int64(conditionWithin.Seconds())
	for _, kind := range []kind{{configMaps, configMap}, {events, event(namespace)}} {
		resource := c.resource(kind.of, namespace)
		const count = 30
		c.create(t, kind, namespace, "object", count)
		watcher, err := resource.Watch(c.ctx, metav1.ListOptions{
			SendInitialEvents:    &initial,
			ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
			AllowWatchBookmarks:  true,
			TimeoutSeconds:       &wait,
		})
		check(t, err)
		defer watcher.Stop()
		requireInitialEvents(t, watcher, count)
		_, err = resource.Create(c.ctx, kind.empty("later"), metav1.CreateOptions{})
		check(t, err)
		requireNext(t, watcher, "later")
	}
}

// requireInitialEvents reads count additions of different objects and the bookmark that ends them.
func requireInitialEvents(t *testing.T, watcher watch.Interface, count int) {
	t.Helper()
	names := map[string]bool{}
	for event := range watcher.ResultChan() {
		o, err := meta.Accessor(event.Object)
		check(t, err)
		switch event.Type {
		case watch.Added:
			names[o.GetName()] = true
		case watch.Bookmark:
			if o.GetAnnotations()[metav1.InitialEventsAnnotationKey] != "true" {
				t.Fatalf("a bookmark without the annotation came first: %v", o)
			}
			if len(names) != count {
				t.Errorf("%d objects came before the bookmark, not %d", len(names), count)
			}
			return
		default:
			t.Fatalf("among the initial events came %v", event)
		}
	}
	t.Fatalf("the watch ended after %d objects", len(names))
}
