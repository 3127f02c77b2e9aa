package kube

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
)

const (
	namesPerWriter = 12
	callWithin     = 15 * time.Second
)

// write is one change that a writer asked for. When certain is false the answer
// was an error and reading afterwards did not show the change: it may be in the
// history once or not at all.
type write struct {
	kind     watch.EventType
	value    string
	revision uint64 // 0 if the answer did not carry it
	certain  bool
}

// stored is what a writer believes that one name holds.
type stored struct {
	value           string // "" if absent
	resourceVersion string
}

// writer creates, updates and deletes objects under names that nobody else writes,
// every write conditional on the version before it, and remembers what was acknowledged.
type writer struct {
	resource dynamic.ResourceInterface
	empty    func(name string) *unstructured.Unstructured
	prefix   string
	random   *rand.Rand
	counter  int
	state    map[string]stored

	mu           sync.Mutex // guards the rest
	log          map[string][]write
	acknowledged int
	errors       int
	broken       error
}

func newWriter(
	resource dynamic.ResourceInterface,
	empty func(name string) *unstructured.Unstructured,
	prefix string,
	seed uint64,
) *writer {
	return &writer{
		resource: resource,
		empty:    empty,
		prefix:   prefix,
		random:   rand.New(rand.NewPCG(seed, 0)),
		state:    map[string]stored{},
		log:      map[string][]write{},
	}
}

// run writes until ctx is done or the store contradicts what it acknowledged.
func (w *writer) run(ctx context.Context) {
	for ctx.Err() == nil {
		name := fmt.Sprintf("%s-%d", w.prefix, w.random.IntN(namesPerWriter))
		if err := w.step(ctx, name); err != nil {
			w.mu.Lock()
			w.broken = fmt.Errorf("%s: %w", name, err)
			w.mu.Unlock()
			return
		}
	}
}

// step makes one write and, if the answer is an error, reads until the outcome is known.
func (w *writer) step(ctx context.Context, name string) error {
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callWithin)
	defer cancel()
	before := w.state[name]
	wanted, result, err := w.attempt(call, name, before)
	if err != nil {
		return w.settle(ctx, name, before, wanted)
	}
	after := stored{value: wanted.value}
	if result != nil {
		after.resourceVersion = result.GetResourceVersion()
		wanted.revision = revisionOf(after.resourceVersion)
	}
	w.acknowledge(name, wanted, after)
	return nil
}

func (w *writer) attempt(
	ctx context.Context, name string, before stored,
) (write, *unstructured.Unstructured, error) {
	if before.value != "" && w.random.IntN(10) < 3 {
		err := w.resource.Delete(ctx, name, metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{ResourceVersion: &before.resourceVersion},
		})
		return write{kind: watch.Deleted}, nil, err
	}
	w.counter++
	object := w.empty(name)
	value := strconv.Itoa(w.counter)
	object.SetAnnotations(map[string]string{valueAnnotation: value})
	if before.value == "" {
		result, err := w.resource.Create(ctx, object, metav1.CreateOptions{})
		return write{kind: watch.Added, value: value}, result, err
	}
	object.SetResourceVersion(before.resourceVersion)
	result, err := w.resource.Update(ctx, object, metav1.UpdateOptions{})
	return write{kind: watch.Modified, value: value}, result, err
}

// settle reads name until the store answers and decides whether wanted happened.
// A write that is still under way may yet happen, so it stays uncertain.
func (w *writer) settle(ctx context.Context, name string, before stored, wanted write) error {
	w.mu.Lock()
	w.errors++
	w.mu.Unlock()
	var now stored
	for {
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callWithin)
		object, err := w.resource.Get(call, name, metav1.GetOptions{})
		cancel()
		if err == nil {
			now = stored{object.GetAnnotations()[valueAnnotation], object.GetResourceVersion()}
			break
		}
		if apierrors.IsNotFound(err) {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("no answer to a read: %w", err)
		}
		time.Sleep(pollEvery)
	}
	switch {
	case now.value == wanted.value:
		if now.value != "" {
			wanted.revision = revisionOf(now.resourceVersion)
		}
		w.acknowledge(name, wanted, now)
	case now == before || w.adoptLate(name, now):
		w.record(name, wanted)
		w.state[name] = now
	default:
		return fmt.Errorf("holds %v after a failed %v; it was %v before", now, wanted, before)
	}
	return nil
}

// adoptLate tells whether now is the outcome of an earlier uncertain write.
func (w *writer) adoptLate(name string, now stored) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, earlier := range w.log[name] {
		if !earlier.certain && earlier.value == now.value {
			return true
		}
	}
	return false
}

func (w *writer) acknowledge(name string, done write, after stored) {
	done.certain = true
	w.record(name, done)
	w.state[name] = after
}

func (w *writer) record(name string, done write) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log[name] = append(w.log[name], done)
	if done.certain {
		w.acknowledged++
	}
}

// progress returns how many writes were acknowledged, and what the store contradicted.
func (w *writer) progress() (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acknowledged, w.broken
}

// requireInHistory fails t unless, name by name, the watch delivered every
// acknowledged write, in order, with the revision that was acknowledged, and
// nothing else but uncertain writes.
func (w *writer) requireInHistory(t *testing.T, changes []change) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken != nil {
		t.Fatalf("%s: %v", w.prefix, w.broken)
	}
	delivered := map[string][]change{}
	for _, c := range changes {
		delivered[c.name] = append(delivered[c.name], c)
	}
	for name, writes := range w.log {
		if err := match(writes, delivered[name]); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	t.Logf("%s: %d acknowledged writes are all in the watch, %d answers were errors",
		w.prefix, w.acknowledged, w.errors)
}

// match compares the writes to one name with the changes delivered for it. An
// uncertain write is tried both as missing and as delivered: one deletion looks
// like the next.
func match(writes []write, changes []change) error {
	if len(writes) == 0 {
		if len(changes) > 0 {
			return fmt.Errorf("the watch delivered changes that nobody made: %+v", changes)
		}
		return nil
	}
	w := writes[0]
	if !w.certain && match(writes[1:], changes) == nil {
		return nil
	}
	if len(changes) > 0 && w.is(changes[0]) {
		return match(writes[1:], changes[1:])
	}
	if !w.certain {
		return match(writes[1:], changes)
	}
	return fmt.Errorf("the acknowledged write %+v is missing; the watch goes on with %+v",
		w, changes[:min(3, len(changes))])
}

// is tells whether c can be what the watch says of w.
func (w write) is(c change) bool {
	return c.kind == w.kind &&
		(w.kind == watch.Deleted || c.value == w.value) &&
		(w.revision == 0 || c.revision == w.revision)
}

// TestMatch shows what a watch may say of the writes to one name, and what it may not.
func TestMatch(t *testing.T) {
	added := write{watch.Added, "1", 5, true}
	maybe, deleted := write{kind: watch.Deleted}, write{kind: watch.Deleted, certain: true}
	create, remove := change{watch.Added, "x", "1", 5}, change{watch.Deleted, "x", "1", 7}
	for name, c := range map[string]struct {
		writes  []write
		changes []change
		fits    bool
	}{
		"all":               {[]write{added, deleted}, []change{create, remove}, true},
		"one of two":        {[]write{added, maybe, deleted}, []change{create, remove}, true},
		"uncertain, made":   {[]write{added, maybe}, []change{create, remove}, true},
		"uncertain, not":    {[]write{added, maybe}, []change{create}, true},
		"lost":              {[]write{added, deleted}, []change{create}, false},
		"invented":          {[]write{added}, []change{create, remove}, false},
		"twice":             {[]write{added}, []change{create, create}, false},
		"out of order":      {[]write{added, deleted}, []change{remove, create}, false},
		"of other revision": {[]write{added}, []change{{watch.Added, "x", "1", 6}}, false},
	} {
		if err := match(c.writes, c.changes); (err == nil) != c.fits {
			t.Errorf("%s: %v", name, err)
		}
	}
}
