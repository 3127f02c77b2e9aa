package kube

import (
	"context"
	"fmt"
	"sync"
	"testing"
)

const (
	kills          = 3
	writesPerRound = 25 // of each writer, before and after each kill
)

// TestStoreKilled kills the store with SIGKILL under a running API server, in the
// middle of writes, and starts it again: writers go on, nothing acknowledged is
// lost, no revision is used twice, and watches through the cache and past it
// deliver every change once and in order.
func TestStoreKilled(t *testing.T) {
	c := newCluster(t, "--etcd-compaction-interval=0")
	namespace := c.namespace(t, "killed")
	c.defineSandboxes(t)
	watching, stopWatching := context.WithCancel(c.ctx)
	defer stopWatching()

	kinds := []kind{
		{configMaps, configMap}, {leases, lease}, {sandboxes, sandbox}, {events, event(namespace)},
	}
	var histories []*history
	var writers []*writer
	for i, kind := range kinds {
		resource := c.resource(kind.of, namespace)
		histories = append(histories, follow(watching, t, resource))
		writers = append(writers, newWriter(resource, kind.empty, kind.of.Resource, uint64(i)))
	}
	stop := c.startWriters(writers)
	for range kills {
		c.waitForWrites(t, writers, writesPerRound)
		c.store.Kill()
		c.store.start(t)
		c.waitForWrites(t, writers, writesPerRound)
	}
	stop()

	c.requireConsistent(t)
	for i, kind := range kinds {
		histories[i].requireEqualToList(t, c, kind.empty("marker"))
		changes, _, err := histories[i].snapshot()
		check(t, err)
		writers[i].requireInHistory(t, changes)
	}
	requireUniqueRevisions(t, histories)
}

// startWriters runs the writers; the function it returns ends them and waits.
func (c *cluster) startWriters(writers []*writer) func() {
	ctx, cancel := context.WithCancel(c.ctx)
	var running sync.WaitGroup
	for _, w := range writers {
		running.Add(1)
		go func() {
			defer running.Done()
			w.run(ctx)
		}()
	}
	return func() {
		cancel()
		running.Wait()
	}
}

// waitForWrites waits until every writer has had count more writes acknowledged.
func (c *cluster) waitForWrites(t *testing.T, writers []*writer, count int) {
	t.Helper()
	since := make([]int, len(writers))
	for i, w := range writers {
		since[i], _ = w.progress() // asked again below
	}
	for i, w := range writers {
		c.eventually(t, "writes are acknowledged", conditionWithin, func() error {
			acknowledged, err := w.progress()
			check(t, err)
			if acknowledged < since[i]+count {
				return fmt.Errorf("%s: %d of %d", w.prefix, acknowledged-since[i], count)
			}
			return nil
		})
	}
}

// requireUniqueRevisions fails t if two changes, of whatever resource, share a revision.
func requireUniqueRevisions(t *testing.T, histories []*history) {
	t.Helper()
	seen := map[uint64]change{}
	for _, h := range histories {
		changes, _, err := h.snapshot()
		check(t, err)
		for _, c := range changes {
			if other, used := seen[c.revision]; used {
				t.Fatalf("%+v and %+v have one revision", c, other)
			}
			seen[c.revision] = c
		}
	}
}
