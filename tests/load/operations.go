package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// A worker is one request in flight after the other; it alone uses its fields.
type worker struct {
	id        int
	client    *clientv3.Client
	random    uint64
	done      int
	revisions map[int]int64 // update: the revision that each of its keys should have
	next      string        // page: where the next page starts
	pinned    int64         // page: the revision of the pages, 0 before the first
	seen      int64         // compact: the revision one interval ago
}

// draw returns a number below n, of a cheap sequence that differs per worker.
func (w *worker) draw(n int) int {
	w.random = w.random*6364136223846793005 + 1442695040888963407
	return int(w.random>>33) % n
}

var errConflict = errors.New("somebody else's revision")

// operation returns what a worker repeats in the mode.
func operation(o options) (func(context.Context, *worker) error, error) {
	value, run := o.value(), time.Now().UnixNano()
	switch o.mode {
	case "put":
		return func(ctx context.Context, w *worker) error {
			_, err := w.client.Put(ctx, o.key(w.draw(o.keys)), value)
			return err
		}, nil
	case "create":
		return func(ctx context.Context, w *worker) error {
			key := fmt.Sprintf("%s%screate-%d-%d-%d", o.prefix, o.part(w), run, w.id, w.done)
			return create(ctx, w.client, key, value)
		}, nil
	case "update":
		return func(ctx context.Context, w *worker) error { return update(ctx, w, o, run, value) }, nil
	case "get":
		return func(ctx context.Context, w *worker) error {
			found, err := w.client.Get(ctx, o.key(w.draw(o.keys)))
			if err == nil && len(found.Kvs) != 1 {
				return errors.New("a key is missing")
			}
			return err
		}, nil
	case "list":
		return func(ctx context.Context, w *worker) error {
			_, err := list(ctx, w, o, o.prefix)
			return err
		}, nil
	case "page":
		return func(ctx context.Context, w *worker) error { return page(ctx, w, o) }, nil
	case "compact":
		return func(ctx context.Context, w *worker) error { return compact(ctx, w, o) }, nil
	default:
		return nil, fmt.Errorf("no mode %q", o.mode)
	}
}

// part is the folder that a worker writes to, if they are to be spread over several.
func (o options) part(w *worker) string {
	if o.spread == 0 {
		return ""
	}
	return fmt.Sprintf("%d/", w.id%o.spread)
}

func create(ctx context.Context, client *clientv3.Client, key, value string) error {
	response, err := client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, value)).Commit()
	if err == nil && !response.Succeeded {
		return errConflict
	}
	return err
}

// update writes one of a worker's own keys at the revision that it knows, as GuaranteedUpdate does.
// The keys are those of the run: nobody else, not even a run before, has written them.
func update(ctx context.Context, w *worker, o options, run int64, value string) error {
	const keysOfWorker = 8
	own := w.draw(keysOfWorker)
	key := fmt.Sprintf("%s%supdate-%d-%d-%d", o.prefix, o.part(w), run, w.id, own)
	response, err := w.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", w.revisions[own])).
		Then(clientv3.OpPut(key, value)).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return err
	}
	if response.Succeeded {
		w.revisions[own] = response.Header.Revision
		return nil
	}
	w.revisions[own] = 0
	for _, kv := range response.Responses[0].GetResponseRange().Kvs {
		w.revisions[own] = kv.ModRevision
	}
	return errConflict
}

// list reads the first objects from a key on, at the worker's revision.
func list(ctx context.Context, w *worker, o options, from string) (*clientv3.GetResponse, error) {
	found, err := w.client.Get(ctx, from, clientv3.WithLimit(o.limit), clientv3.WithRev(w.pinned),
		clientv3.WithRange(clientv3.GetPrefixRangeEnd(o.prefix)))
	if err == nil && len(found.Kvs) == 0 {
		return found, errors.New("nothing is listed")
	}
	return found, err
}

// page lists as a client that pages does: all pages at the revision of the first, and from the
// start again after the last. Each worker begins at a key of its own.
func page(ctx context.Context, w *worker, o options) error {
	if w.next == "" {
		w.next, w.pinned = o.prefix, 0
		if w.done == 0 {
			w.next = o.key(w.draw(o.keys))
		}
	}
	found, err := list(ctx, w, o, w.next)
	w.next = ""
	if err != nil {
		return err
	}
	if w.pinned == 0 {
		w.pinned = found.Header.Revision
	}
	if int64(len(found.Kvs)) < found.Count {
		w.next = string(found.Kvs[len(found.Kvs)-1].Key) + "\x00"
	}
	return nil
}

// compact compacts, once per interval, to the revision of one interval ago.
func compact(ctx context.Context, w *worker, o options) error {
	time.Sleep(o.interval)
	found, err := w.client.Get(ctx, "/registry/health")
	if err != nil {
		return err
	}
	seen := w.seen
	w.seen = found.Header.Revision
	if seen == 0 || seen == w.seen {
		return nil
	}
	_, err = w.client.Compact(ctx, seen)
	return err
}
