package kube

import (
	"fmt"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// TestEventsExpire creates events that live for some seconds and kills the store
// under them: the restarted store still has each event and its lease, and when that
// ends, a watch that began before sees each of them deleted once.
func TestEventsExpire(t *testing.T) {
	const count = 20
	c := newCluster(t, "--etcd-compaction-interval=0", "--event-ttl=10s")
	namespace := c.namespace(t, "expiring")
	resource := c.resource(events, namespace)
	seen := follow(c.ctx, t, resource)
	c.create(t, kind{events, event(namespace)}, namespace, "short", count)
	c.store.Kill()
	c.store.start(t)
	list, err := resource.List(c.ctx, metav1.ListOptions{})
	check(t, err)
	if len(list.Items) != count {
		t.Fatalf("%d of %d events are there after the restart", len(list.Items), count)
	}

	deletions := map[string]int{}
	c.eventually(t, "all events expire", conditionWithin, func() error {
		changes, _, err := seen.snapshot()
		check(t, err)
		clear(deletions)
		for _, change := range changes {
			if change.kind == watch.Deleted {
				deletions[change.name]++
			}
		}
		if len(deletions) < count {
			return fmt.Errorf("%d of %d expired", len(deletions), count)
		}
		return nil
	})
	for name, times := range deletions {
		if times != 1 {
			t.Errorf("%s was deleted %d times", name, times)
		}
	}
	seen.requireEqualToList(t, c, event(namespace)("marker"))
}
