package compat

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/client/v3/leasing"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/ordering"
)

// TestClients compares what etcd's own client packages do on top of the API.
func TestClients(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "concurrency: mutex", run: mutexes},
		{name: "concurrency: mutex of a session that ends", run: mutexOfLostSession},
		{name: "concurrency: many lockers", run: mutexContention},
		{name: "concurrency: election", run: elections},
		{name: "concurrency: transactional memory", run: transactionalMemory},
		{name: "recipes: barrier", run: barriers},
		{name: "recipes: queues", run: queues},
		{name: "recipes: read-write mutex", run: readWriteMutexes},
		{name: "leasing", run: leasings},
		{name: "mirror", run: mirrors},
		{name: "namespace", run: namespaces},
		{name: "ordering", run: orderings},
		{name: "kubernetes", run: kubernetesStore},
		{name: "client watch", run: clientWatch},
		{name: "client keep alive", run: clientKeepAlive},
	})
}

// values notes the pairs of an answer by key and value.
func (s *session) values(what string, response *clientv3.GetResponse, err error) {
	if !s.check(what, err) {
		return
	}
	for _, kv := range response.Kvs {
		s.note("  %q = %q, version %d, revision %s", kv.Key, kv.Value, kv.Version,
			s.revision(kv.ModRevision))
	}
	s.note("  count %d, more %v, header %s", response.Count, response.More,
		s.revision(response.Header.Revision))
}

// valueOf is the value of a pair that may be missing.
func valueOf(kv *mvccpb.KeyValue) string {
	if kv == nil {
		return "(none)"
	}
	return string(kv.Value)
}

func leasings(s *session) {
	client, other := s.client(), s.client()
	kv, closeFirst, err := leasing.NewKV(client, "lease/")
	if !s.check("first", err) {
		return
	}
	defer closeFirst()
	kv2, closeSecond, err := leasing.NewKV(other, "lease/")
	if !s.check("second", err) {
		return
	}
	defer closeSecond()
	_, err = kv.Put(s.ctx, "a", "1")
	s.check("put", err)
	for range 2 {
		found, err := kv.Get(s.ctx, "a")
		s.note("first gets %s %v", found.Kvs[0].Value, err)
	}
	_, err = kv2.Put(s.ctx, "a", "2")
	s.check("put by the other", err)
	for _, reader := range []clientv3.KV{kv, kv2, client} {
		found, err := reader.Get(s.ctx, "a")
		s.note("gets %s %v", found.Kvs[0].Value, err)
	}
	response, err := kv.Txn(s.ctx).If(clientv3.Compare(clientv3.Value("a"), "=", "2")).
		Then(clientv3.OpPut("a", "3"), clientv3.OpGet("a")).Else(clientv3.OpGet("a")).Commit()
	s.note("txn %v %v", response.Succeeded, err)
	deleted, err := kv2.Delete(s.ctx, "a")
	s.note("deleted %d %v", deleted.Deleted, err)
	found, err := kv.Get(s.ctx, "a")
	s.note("then %d %v", len(found.Kvs), err)
}

func mirrors(s *session) {
	const keys = 25
	client := s.client()
	for i := range keys {
		s.quietly(put(fmt.Sprintf("from/%02d", i), fmt.Sprint(i)))
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	syncer := mirror.NewSyncer(client, "from/", 0)
	pages, errs := syncer.SyncBase(ctx)
	for page := range pages {
		s.values("page", &page, nil)
	}
	s.note("base -> %v", <-errs)
	updates := syncer.SyncUpdates(ctx)
	s.do(put("from/00", "new"), put("elsewhere", "1"), remove("from/01"), put("from/99", "more"))
	s.follow(updates, 3)
}

// follow notes events of a watch until there were as many as expected.
func (s *session) follow(events clientv3.WatchChan, expected int) {
	for update := range events {
		if update.Err() != nil {
			s.note("watch -> %s", failure(update.Err()))
			return
		}
		for _, event := range update.Events {
			s.note("%s %q = %q, before %q", event.Type, event.Kv.Key, event.Kv.Value,
				valueOf(event.PrevKv))
			expected--
		}
		if expected <= 0 {
			return
		}
	}
	s.note("watch ended, %d events missing", expected)
}

func namespaces(s *session) {
	client := s.client()
	kv := namespace.NewKV(client.KV, "space/")
	watcher := namespace.NewWatcher(client.Watcher, "space/")
	lessor := namespace.NewLease(client.Lease, "space/")
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	events := watcher.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithPrevKV(),
		clientv3.WithCreatedNotify())
	<-events
	s.quietly(put("outside", "1"), grant(151, 1000))
	_, err := kv.Put(s.ctx, "a", "1", clientv3.WithLease(151))
	s.check("put", err)
	_, err = kv.Put(s.ctx, "b", "1")
	s.check("put", err)
	found, err := kv.Get(s.ctx, "", clientv3.WithPrefix())
	s.values("prefix", found, err)
	found, err = kv.Get(s.ctx, "", clientv3.WithFromKey())
	s.values("from key", found, err)
	response, err := kv.Txn(s.ctx).If(clientv3.Compare(clientv3.Version("a"), "=", 1)).
		Then(clientv3.OpDelete("a", clientv3.WithPrevKV()), clientv3.OpGet("b")).Commit()
	s.note("txn %v %v, previous %q", response.Succeeded, err,
		response.Responses[0].GetResponseDeleteRange().PrevKvs[0].Key)
	s.follow(events, 3)
	left, err := lessor.TimeToLive(s.ctx, 151, clientv3.WithAttachedKeys())
	s.note("keys %q %v", left.Keys, err)
	s.do(everything())
}

func orderings(s *session) {
	client := s.client()
	kv := ordering.NewKV(client.KV, ordering.NewOrderViolationSwitchEndpointClosure(client))
	for i := range 5 {
		_, err := kv.Put(s.ctx, "a", strconv.Itoa(i))
		s.check("put", err)
		found, err := kv.Get(s.ctx, "a", clientv3.WithSerializable())
		s.values("serializable", found, err)
		response, err := kv.Txn(s.ctx).If(clientv3.Compare(clientv3.Value("a"), "=", "3")).
			Then(clientv3.OpGet("a")).Else(clientv3.OpGet("a", clientv3.WithCountOnly())).Commit()
		s.note("txn %v %v", response.Succeeded, err)
	}
}

// kubernetesStore drives the interface by which kube-apiserver does all its storing.
func kubernetesStore(s *session) {
	client, err := kubernetes.New(clientv3.Config{Endpoints: []string{s.server.endpoint}})
	if !s.check("client", err) {
		return
	}
	defer client.Close()
	store := client.Kubernetes
	for i := range 7 {
		response, err := store.OptimisticPut(s.ctx, fmt.Sprintf("/pods/%d", i), []byte("v"), 0,
			kubernetes.PutOptions{})
		s.note("create %v at %s %v", response.Succeeded, s.revision(response.Revision), err)
	}
	again, err := store.OptimisticPut(s.ctx, "/pods/1", []byte("w"), 0,
		kubernetes.PutOptions{GetOnFailure: true})
	s.note("again %v at %s, found %q %v", again.Succeeded, s.revision(again.Revision),
		again.KV.Value, err)
	updated, err := store.OptimisticPut(s.ctx, "/pods/1", []byte("w"), s.rev(2),
		kubernetes.PutOptions{})
	s.note("update %v at %s %v", updated.Succeeded, s.revision(updated.Revision), err)
	got, err := store.Get(s.ctx, "/pods/1", kubernetes.GetOptions{})
	s.note("get %q at %s %v", got.KV.Value, s.revision(got.Revision), err)
	got, err = store.Get(s.ctx, "/pods/1", kubernetes.GetOptions{Revision: s.rev(3)})
	s.note("get %q at %s %v", got.KV.Value, s.revision(got.Revision), err)
	count, err := store.Count(s.ctx, "/pods/", kubernetes.CountOptions{})
	s.note("count %d %v", count, err)
	options := kubernetes.ListOptions{Limit: 3}
	for range 3 {
		page, err := store.List(s.ctx, "/pods/", options)
		s.note("page of %d of %d at %s %v", len(page.Kvs), page.Count, s.revision(page.Revision), err)
		if len(page.Kvs) == 0 {
			return
		}
		options.Revision = page.Revision
		options.Continue = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
	late, err := store.OptimisticDelete(s.ctx, "/pods/1", s.rev(2),
		kubernetes.DeleteOptions{GetOnFailure: true})
	s.note("delete %v at %s, found %q %v", late.Succeeded, s.revision(late.Revision), late.KV.Value,
		err)
	deleted, err := store.OptimisticDelete(s.ctx, "/pods/1", s.rev(8), kubernetes.DeleteOptions{})
	s.note("delete %v at %s %v", deleted.Succeeded, s.revision(deleted.Revision), err)
}

// clientWatch has several watchers share a stream, one of which starts below the compaction.
func clientWatch(s *session) {
	client := s.client()
	s.quietly(put("a", "1"), put("a", "2"), put("a", "3"), compact(s.rev(2)))
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	old := client.Watch(ctx, "a", clientv3.WithRev(s.rev(1)))
	replay := client.Watch(ctx, "a", clientv3.WithRev(s.rev(2)), clientv3.WithPrevKV())
	response := <-old
	s.note("old: compacted at %s, %v", s.revision(response.CompactRevision), response.Err())
	s.follow(replay, 2)
	s.check("request progress", client.RequestProgress(ctx))
	progress := <-replay
	s.note("progress %v at %s", progress.IsProgressNotify(), s.revision(progress.Header.Revision))
	cancel()
	for range replay {
	}
	s.note("closed")
}

func clientKeepAlive(s *session) {
	client := s.client()
	var leases sync.Map
	for i := range 3 {
		granted, err := client.Grant(s.ctx, 5)
		if !s.check("grant", err) {
			return
		}
		leases.Store(i, granted.ID)
		renewals, err := client.KeepAlive(s.ctx, granted.ID)
		if !s.check("keep alive", err) {
			return
		}
		s.note("renewed for %d s", (<-renewals).TTL)
	}
	listed, err := client.Leases(s.ctx)
	s.note("%d leases %v", len(listed.Leases), err)
	first, _ := leases.Load(0)
	_, err = client.Revoke(s.ctx, first.(clientv3.LeaseID))
	s.check("revoke", err)
	_, err = client.KeepAliveOnce(s.ctx, first.(clientv3.LeaseID))
	s.check("keep alive after revocation", err)
}
