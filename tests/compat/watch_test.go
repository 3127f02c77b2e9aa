package compat

import (
	"context"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"
)

// TestWatch compares watches: what is answered, which events come, and in which order.
func TestWatch(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "created responses and ids", run: watchIDs},
		{name: "duplicate ids", run: watchDuplicateIDs},
		{name: "ids of cancelled watchers", run: watchReusedIDs},
		{name: "events from now on", run: watchNow},
		{name: "keys and range ends", run: watchKeys},
		{name: "empty ranges", run: watchEmptyRanges},
		{name: "start in the past", run: watchPast},
		{name: "start in the future", run: watchFuture},
		{name: "negative start", run: watchNegative},
		{name: "compacted start", run: watchCompacted},
		{name: "start at the compacted revision", run: watchAtCompacted},
		{name: "compaction does not end synced watchers", run: watchOverCompaction},
		{name: "filters", run: watchFilters},
		{name: "previous pairs", run: watchPrevious},
		{name: "previous pairs at compaction", run: watchPreviousCompacted},
		{name: "a transaction is one response", run: watchTxn},
		{name: "several revisions", run: watchRevisions},
		{name: "long history", run: watchLongHistory},
		{name: "many watchers on one stream", run: watchMany},
		{name: "cancel", run: watchCancel},
		{name: "cancel of unknown watchers", run: watchCancelUnknown},
		{name: "fragments", run: watchFragments},
		{name: "no fragments unless asked for", run: watchUnfragmented},
		{name: "progress on request", run: watchProgress},
		{name: "progress without watchers", run: watchProgressAlone},
		{name: "progress before a future start", run: watchProgressFuture},
		{name: "progress after events", run: watchProgressOrder},
		{name: "progress at an interval", run: watchProgressPeriodic},
		{name: "no progress unless asked for", run: watchProgressUnasked},
		{name: "with a leader required", run: watchLeader},
		{name: "requests without meaning", run: watchMeaningless},
		{name: "half-closed streams", run: watchHalfClosed},
		{name: "values of events", run: watchValues},
	})
}

func watchIDs(s *session) {
	s.quietly(put("a", "1"))
	w := s.watch()
	w.create(from(0, "a", ""), from(0, "a", ""),
		&pb.WatchCreateRequest{Key: []byte("b"), WatchId: 7}, from(0, "b", ""),
		&pb.WatchCreateRequest{Key: []byte("b"), WatchId: -9}, from(0, "c", "d"))
	s.do(put("b", "1"))
	w.events(3)
	second := s.watch()
	second.create(from(0, "a", ""), &pb.WatchCreateRequest{Key: []byte("b"), WatchId: 7})
}

func watchDuplicateIDs(s *session) {
	w := s.watch()
	w.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 5},
		&pb.WatchCreateRequest{Key: []byte("b"), WatchId: 5},
		&pb.WatchCreateRequest{Key: []byte("b"), WatchId: 5, StartRevision: s.rev(9)},
		from(0, "c", ""))
	s.do(put("a", "1"), put("b", "1"), put("c", "1"))
	w.events(2)
	w.cancel(-1)
	w.silence()
}

// watchReusedIDs takes an id that automatic numbering has passed, and one that it will reach.
func watchReusedIDs(s *session) {
	w := s.watch()
	w.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1}, from(0, "a", ""), from(0, "a", ""))
	w.cancel(1)
	w.response()
	w.create(&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 1}, from(0, "a", ""))
	w.cancel(0)
	w.response()
	w.create(from(0, "a", ""))
}

func watchNow(s *session) {
	s.quietly(put("a", "old"))
	w := s.watch()
	w.create(from(0, "a", ""))
	for _, request := range []any{put("a", "1"), put("a", "2"), remove("a"), put("a", "3")} {
		s.do(request)
		w.response()
	}
	s.do(put("b", "1"), remove("missing"), remove("b"), get("a"))
	w.silence()
}

func watchKeys(s *session) {
	w := s.watch()
	w.create(from(0, "b", ""), from(0, "b", "d"), from(0, "b", "\x00"), from(0, "\x00", "\x00"),
		from(0, "", ""), from(0, "", "b"), from(0, "", "\x00"), from(0, "\x00", ""))
	s.do(put("a", "1"), put("b", "1"), put("b\x00", "1"), put("c", "1"), put("d", "1"), put("\x00",
		"1"),
		put("\xff\xff", "1"), removeSpan("\x00", "\x00"))
	w.events(2 + 6 + 10 + 14 + 2 + 4 + 14 + 2)
	w.silence()
}

func watchEmptyRanges(s *session) {
	w := s.watch()
	w.create(from(0, "b", "a"), from(0, "b", "b"), from(s.rev(9), "b", "a"), from(-1, "b", "a"),
		&pb.WatchCreateRequest{Key: []byte("b"), RangeEnd: []byte("a"), WatchId: 3},
		from(0, "b", "b\x00"))
	s.do(put("b", "1"))
	w.response()
}

func watchPast(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("a", "2"), remove("b"), put("a", "3"))
	for n := int64(1); n <= 5; n++ {
		w := s.watch()
		w.create(from(s.rev(n), "\x00", "\x00"))
		w.events(5)
		s.do(put("later", fmt.Sprint(n)))
		w.response()
	}
	w := s.watch()
	w.create(from(s.rev(2), "a", ""), from(s.rev(3), "b", ""), everyKey(s.rev(1)))
	w.events(2 + 1 + 10)
}

func watchFuture(s *session) {
	w := s.watch()
	w.create(from(s.rev(3), "a", ""), from(s.rev(1), "a", ""), everyKey(s.rev(5)))
	s.do(put("a", "1"))
	w.response()
	s.do(put("a", "2"))
	w.response()
	w.silence()
	s.do(put("a", "3"))
	w.events(2)
	s.do(put("a", "4"), put("b", "5"))
	w.events(3)
}

func watchNegative(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), compact(s.rev(2)))
	w := s.watch()
	w.create(from(-1, "a", ""), from(-largest, "a", ""),
		&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: -1, WatchId: 4}, from(0, "a", ""))
	w.silence()
}

func watchCompacted(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("a", "3"), put("b", "1"), compact(s.rev(3)))
	w := s.watch()
	for n := int64(1); n <= 2; n++ {
		w.create(from(s.rev(n), "a", ""))
		w.response()
	}
	w.create(from(s.rev(0), "\x00", "\x00"))
	w.response()
	w.create(&pb.WatchCreateRequest{Key: []byte("unused"), StartRevision: s.rev(1), WatchId: 12})
	w.response()
	w.create(from(0, "a", ""))
	s.do(put("a", "4"))
	w.response()
	w.silence()
}

func watchAtCompacted(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), remove("b"), put("c", "1"))
	for n := int64(1); n <= 4; n++ {
		s.do(compact(s.rev(n)))
		w := s.watch()
		w.create(everyKey(s.rev(n)))
		w.events(int(5 - n))
	}
	s.quietly(always(put("d", "1"), put("e", "1"), remove("a")), put("f", "1"), compact(s.rev(5)))
	w := s.watch()
	w.create(everyKey(s.rev(5)))
	w.events(4)
}

func watchOverCompaction(s *session) {
	w := s.watch()
	w.create(from(0, "a", ""), from(s.rev(6), "a", ""))
	s.quietly(put("a", "1"), put("a", "2"), put("a", "3"))
	w.events(3)
	s.do(compact(s.rev(3)))
	w.silence()
	s.do(put("a", "4"), compact(s.rev(4)), put("b", "1"), put("a", "6"))
	w.events(3)
}

func watchFilters(s *session) {
	const noPut, noDelete = pb.WatchCreateRequest_NOPUT, pb.WatchCreateRequest_NODELETE
	filtered := func(filters ...pb.WatchCreateRequest_FilterType) *pb.WatchCreateRequest {
		create := everyKey(s.rev(1))
		create.Filters = filters
		return create
	}
	s.quietly(put("a", "1"), remove("a"), put("a", "2"), put("b", "1"), removeSpan("a", "c"))
	w := s.watch()
	w.create(filtered(noPut))
	w.events(3)
	w.create(filtered(noDelete))
	w.events(3)
	w.create(filtered(noPut, noDelete), filtered(noPut, noPut), filtered(9))
	w.events(3 + 6)
	s.do(always(put("c", "1"), put("d", "1")), always(put("e", "1"), remove("c")), remove("d"))
	w.events((1 + 1) + 3 + (1 + 1) + (3 + 2))
	w.silence()
}

func watchPrevious(s *session) {
	s.quietly(grant(95, 1000), putLeased("a", "1", 95), put("b", "1"))
	w := s.watch()
	w.create(everyKey(0), from(0, "\x00", "\x00"))
	s.do(put("a", "2"), remove("a"), put("a", "3"), always(put("a", "4"), remove("b"), put("c", "1")))
	w.events(2 * 6)
	replay := s.watch()
	replay.create(everyKey(s.rev(1)))
	replay.events(8)
}

func watchPreviousCompacted(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("a", "2"), put("b", "2"), remove("a"), put("a", "3"))
	for _, n := range []int64{2, 3, 4, 5, 6} {
		s.do(compact(s.rev(n)))
		w := s.watch()
		w.create(everyKey(s.rev(n)))
		w.events(int(7 - n))
	}
}

func watchTxn(s *session) {
	w := s.watch()
	w.create(everyKey(0))
	s.do(always(put("c", "1"), put("a", "1"), put("b", "1")))
	w.response()
	s.do(always(remove("c"), get("a"), put("a", "2"), always(put("d", "1")), remove("b")))
	w.response()
	s.do(removeSpan("a", "z"))
	w.response()
	s.do(always(put("x", "1"), remove("missing")))
	w.response()
	s.do(txn(when(versionIs("x", equal, 9)), ops(put("y", "1")), ops(get("x"))), always(remove("y")))
	w.silence()
	replay := s.watch()
	replay.create(everyKey(s.rev(1)))
	replay.events(10)
	one := s.watch()
	one.create(from(s.rev(1), "a", ""))
	one.events(3)
}

func watchRevisions(s *session) {
	w := s.watch()
	w.create(everyKey(0))
	total := 0
	for i := range 60 {
		s.quietly(always(put("a", fmt.Sprint(i)), put("b", fmt.Sprint(i)), put(fmt.Sprint(i), "")))
		total += 3
	}
	w.events(total)
	replay := s.watch()
	replay.create(everyKey(s.rev(11)))
	replay.events(total - 30)
}

// watchLongHistory replays more revisions than etcd puts into one batch, while writes go on.
func watchLongHistory(s *session) {
	const batches, batch = 14, 100
	for i := range batches {
		for j := range batch {
			s.quietly(put(fmt.Sprintf("k%d", j%7), fmt.Sprint(i*batch+j)))
		}
	}
	w := s.watch()
	w.create(everyKey(s.rev(1)))
	s.quietly(put("k1", "later"), remove("k2"))
	w.events(batches*batch + 2)
	s.do(put("k3", "last"))
	w.response()
}

func watchMany(s *session) {
	const watchers = 150
	w := s.watch()
	for i := range watchers {
		w.create(from(0, fmt.Sprintf("k%d", i%10), ""))
	}
	w.create(from(0, "k", "l"))
	for i := range 10 {
		s.quietly(put(fmt.Sprintf("k%d", i), "1"))
	}
	w.events(watchers + 10)
}

func watchCancel(s *session) {
	w := s.watch()
	w.create(from(0, "a", ""), from(0, "a", ""), from(s.rev(9), "a", ""))
	w.cancel(0)
	w.response()
	s.do(put("a", "1"))
	w.response()
	w.cancel(1)
	w.response()
	w.cancel(2)
	w.response()
	s.do(put("a", "2"))
	w.silence()
	w.cancel(0)
	w.silence()
	w.create(from(0, "a", ""))
}

func watchCancelUnknown(s *session) {
	w := s.watch()
	w.cancel(0)
	w.cancel(77)
	w.cancel(-1)
	w.create(from(0, "a", ""))
	s.do(put("a", "1"))
	w.response()
	w.silence()
}

// watchFragments has one revision of 12 events of half a MiB, which does not fit one message.
func watchFragments(s *session) {
	fragmented := everyKey(0)
	fragmented.Fragment = true
	w := s.watch()
	w.create(fragmented)
	large := strings.Repeat("v", 512*1024)
	for i := range 12 {
		s.quietly(put(fmt.Sprintf("k%02d", i), large))
	}
	w.events(12)
	s.do(removeSpan("k", "l"))
	for fragment := true; fragment; {
		r, ok := w.next(responseTimeout)
		if !ok || r.err != nil || len(r.response.Events) == 0 {
			s.note("watch -> %v %s", ok, s.outcome(r.response, r.err))
			return
		}
		fragment = r.response.Fragment
		s.note("fragment %v, header %s, id %d: %s", fragment, s.revision(r.response.Header.Revision),
			r.response.WatchId, s.describe(r.response.Events))
	}
	s.do(put("k", "small"))
	w.response()
}

func watchUnfragmented(s *session) {
	w := s.watch()
	w.create(everyKey(0))
	large := strings.Repeat("v", 512*1024)
	for i := range 12 {
		s.quietly(put(fmt.Sprintf("k%02d", i), large))
	}
	w.events(12)
	s.do(removeSpan("k", "l"))
	w.response()
}

func watchProgress(s *session) {
	s.quietly(put("a", "1"))
	w := s.watch()
	w.create(from(0, "a", ""))
	w.progress()
	w.response()
	s.do(put("b", "1"))
	w.progress()
	w.response()
	w.create(from(0, "b", ""))
	w.progress()
	w.response()
	w.cancel(0)
	w.response()
	w.progress()
	w.response()
	w.silence()
}

func watchProgressAlone(s *session) {
	w := s.watch()
	w.progress()
	w.silence()
	w.create(from(0, "a", ""))
	w.cancel(0)
	w.response()
	w.progress()
	w.silence()
}

func watchProgressFuture(s *session) {
	w := s.watch()
	w.create(from(0, "a", ""), from(s.rev(3), "a", ""))
	w.progress()
	w.silence()
	s.do(put("b", "1"), put("b", "2"))
	w.progress()
	w.silence()
	s.do(put("b", "3"))
	w.progress()
	w.response()
}

func watchProgressOrder(s *session) {
	w := s.watch()
	w.create(everyKey(0))
	for i := range 20 {
		s.quietly(put("a", fmt.Sprint(i)))
	}
	w.events(20)
	w.progress()
	w.response()
}

func watchProgressPeriodic(s *session) {
	s.quietly(put("a", "1"))
	notified := from(0, "a", "")
	notified.ProgressNotify = true
	w := s.watch()
	w.create(notified)
	w.response()
	s.do(put("b", "1"), put("b", "2"))
	w.response()
	s.do(put("a", "2"))
	w.response()
	w.response()
}

func watchProgressUnasked(s *session) {
	notified := from(s.rev(50), "a", "")
	notified.ProgressNotify = true
	w := s.watch()
	w.create(from(0, "a", ""), notified)
	w.silence()
	w.silence()
}

func watchLeader(s *session) {
	w := s.watchIn(metadata.AppendToOutgoingContext(s.ctx, "hasleader", "true"))
	w.create(from(0, "a", ""))
	s.do(put("a", "1"))
	w.response()
	w.progress()
	w.response()
}

func watchMeaningless(s *session) {
	w := s.watch()
	w.send(&pb.WatchRequest{})
	w.silence()
	w.create(from(0, "a", ""))
	s.do(put("a", "1"))
	w.response()
}

func watchHalfClosed(s *session) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	w := s.watchIn(ctx)
	w.create(from(0, "a", ""))
	if err := w.stream.CloseSend(); err != nil {
		s.note("close -> %s", failure(err))
	}
	s.do(put("a", "1"))
	w.response()
}

func watchValues(s *session) {
	s.quietly(grant(96, 1000))
	w := s.watch()
	w.create(everyKey(0))
	s.do(putLeased("a", "\x00\xff", 96), put("a", ""), &pb.PutRequest{Key: []byte("a"),
		IgnoreValue: true},
		putLeased("a", "4", 96), &pb.PutRequest{Key: []byte("a"), Value: []byte("5"), IgnoreLease: true},
		revoke(96))
	w.events(6)
}
