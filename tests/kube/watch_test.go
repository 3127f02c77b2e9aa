package kube

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
)

// valueAnnotation holds what a writer last wrote; any kind of object has room for it.
const valueAnnotation = "kube-suite/value"

// change is one watch event.
type change struct {
	kind     watch.EventType
	name     string
	value    string
	revision uint64
}

// history is what one watch has delivered since a list. When the connection ends
// it resumes after the last revision seen, as an informer does.
type history struct {
	resource dynamic.ResourceInterface
	initial  map[string]uint64

	mu       sync.Mutex // guards the rest
	revision uint64
	changes  []change
	resumed  int
	err      error
}

// follow lists resource and watches it until ctx is done.
func follow(ctx context.Context, t *testing.T, resource dynamic.ResourceInterface) *history {
	t.Helper()
	list, err := resource.List(ctx, metav1.ListOptions{})
	check(t, err)
	h := &history{
		resource: resource,
		initial:  revisions(list),
		revision: revisionOf(list.GetResourceVersion()),
	}
	go h.run(ctx)
	return h
}

func (h *history) run(ctx context.Context) {
	for ctx.Err() == nil {
		h.mu.Lock()
		options := metav1.ListOptions{
			ResourceVersion:     strconv.FormatUint(h.revision, 10),
			AllowWatchBookmarks: true,
		}
		h.mu.Unlock()
		watcher, err := h.resource.Watch(ctx, options)
		if err == nil {
			err = h.receive(watcher)
			watcher.Stop()
		}
		if ctx.Err() != nil {
			return
		}
		time.Sleep(pollEvery)
		h.mu.Lock()
		h.resumed++
		// Anything else is an interruption, which a client answers by resuming.
		if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
			h.err = fmt.Errorf("resuming after revision %d: %w", h.revision, err)
		}
		failed := h.err != nil
		h.mu.Unlock()
		if failed {
			return
		}
	}
}

// receive records events until the watch ends; it returns the error that ended it, if one was sent.
func (h *history) receive(watcher watch.Interface) error {
	for event := range watcher.ResultChan() {
		if event.Type == watch.Error {
			return apierrors.FromObject(event.Object)
		}
		object, err := meta.Accessor(event.Object)
		if err != nil {
			return err
		}
		h.add(event.Type, object)
	}
	return nil
}

func (h *history) add(kind watch.EventType, object metav1.Object) {
	h.mu.Lock()
	defer h.mu.Unlock()
	revision := revisionOf(object.GetResourceVersion())
	if kind == watch.Bookmark {
		h.revision = max(h.revision, revision)
		return
	}
	if h.err == nil && !h.inOrder(kind, object.GetName(), revision) {
		h.err = fmt.Errorf("%s %s at revision %d was delivered after revision %d",
			kind, object.GetName(), revision, h.revision)
	}
	h.revision = revision
	h.changes = append(h.changes, change{
		kind:     kind,
		name:     object.GetName(),
		value:    object.GetAnnotations()[valueAnnotation],
		revision: revision,
	})
}

// inOrder tells whether a change may follow what was delivered. Only the deletions
// of an expired lease's objects share a revision.
func (h *history) inOrder(kind watch.EventType, name string, revision uint64) bool {
	if revision != h.revision {
		return revision > h.revision
	}
	last := len(h.changes) - 1
	shared := false
	for i := last; i >= 0 && h.changes[i].revision == revision; i-- {
		if h.changes[i].name == name {
			return false
		}
		shared = kind == watch.Deleted && h.changes[i].kind == watch.Deleted
	}
	return shared
}

// snapshot returns the changes so far, how often the watch was resumed, and what went wrong.
func (h *history) snapshot() ([]change, int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changes[:len(h.changes):len(h.changes)], h.resumed, h.err
}

// reached returns nil once the watch has delivered everything up to revision.
func (h *history) reached(revision uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil && h.revision < revision {
		return fmt.Errorf("the watch is at revision %d of %d", h.revision, revision)
	}
	return nil
}

// stateAt returns the revision of every object that existed at revision, by what was watched.
func (h *history) stateAt(revision uint64) map[string]uint64 {
	changes, _, _ := h.snapshot()
	state := maps.Clone(h.initial)
	for _, c := range changes {
		switch {
		case c.revision > revision:
			return state
		case c.kind == watch.Deleted:
			delete(state, c.name)
		default:
			state[c.name] = c.revision
		}
	}
	return state
}

// requireEqualToList lists the resource and fails t unless the watch built the same
// state. The list's revision may be nobody's change, so marker, made after the
// list, is what the watch must show before the two are compared.
func (h *history) requireEqualToList(
	t *testing.T, c *cluster, marker *unstructured.Unstructured,
) {
	t.Helper()
	list, err := h.resource.List(c.ctx, metav1.ListOptions{})
	check(t, err)
	marked, err := h.resource.Create(c.ctx, marker, metav1.CreateOptions{})
	check(t, err)
	until := revisionOf(marked.GetResourceVersion())
	c.eventually(t, "the watch delivers the marker", conditionWithin, func() error {
		return h.reached(until)
	})
	_, resumed, err := h.snapshot()
	check(t, err)
	listed, watched := revisions(list), h.stateAt(revisionOf(list.GetResourceVersion()))
	if !maps.Equal(listed, watched) {
		t.Fatalf("list and watch differ at revision %s:\nlist  %v\nwatch %v",
			list.GetResourceVersion(), listed, watched)
	}
	t.Logf("%s: watch resumed %d times, %d objects equal the list",
		marker.GetKind(), resumed, len(listed))
}

func revisions(list *unstructured.UnstructuredList) map[string]uint64 {
	state := make(map[string]uint64, len(list.Items))
	for _, item := range list.Items {
		state[item.GetName()] = revisionOf(item.GetResourceVersion())
	}
	return state
}

// revisionOf reads a resource version, which is the store's revision in decimal.
func revisionOf(resourceVersion string) uint64 {
	revision, err := strconv.ParseUint(resourceVersion, 10, 64)
	if err != nil {
		panic(fmt.Sprintf("resource version %q is not a revision", resourceVersion))
	}
	return revision
}
