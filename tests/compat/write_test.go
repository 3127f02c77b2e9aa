package compat

import (
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestWrite compares puts, range deletes, and the revisions and headers that writes produce.
func TestWrite(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "the first revisions of a store", fresh: true, run: firstRevisions},
		{name: "revisions move with changes only", run: revisionsMove},
		{name: "put", run: puts},
		{name: "put with the previous pair", run: putsPrevious},
		{name: "put ignoring value or lease", run: putsIgnoring},
		{name: "put with leases", run: putsLeased},
		{name: "version and create revision", run: putsVersions},
		{name: "delete range", run: deletes},
		{name: "delete range with the previous pairs", run: deletesPrevious},
		{name: "requests that are too large", run: tooLarge},
		{name: "keys and values of many sizes", run: sizes},
	})
}

func firstRevisions(s *session) {
	s.do(everything(), &pb.LeaseLeasesRequest{}, remove("a"))
	s.do(always(), txn(when(versionIs("a", equal, 0)), ops(get("a")), nil))
	s.do(at(1, get("a")), at(2, get("a")))
	s.do(put("a", "1"), get("a"), put("b", "1"), everything(), at(1, everything()))
}

func revisionsMove(s *session) {
	s.do(put("a", "1"), get("a"), everything(), remove("missing"), removeSpan("x", "z"))
	s.do(txn(when(modIs("a", equal, 1)), ops(put("a", "2")), ops(get("a"))))
	s.do(always(get("a"), remove("missing")), always())
	s.do(grant(81, 1000), timeToLive(81), &pb.LeaseLeasesRequest{}, revoke(81))
	s.do(put("a", "1"))
	s.do(grant(82, 1000), putLeased("b", "1", 82), putLeased("c", "1", 82), revoke(82), get("b"))
	s.do(always(put("d", "1"), put("e", "1"), put("f", "1")), everything())
	s.do(compact(s.rev(3)), get("d"))
	s.do(removeSpan("\x00", "\x00"), removeSpan("\x00", "\x00"))
}

func puts(s *session) {
	s.do(put("a", "1"), put("a", "2"), put("a", ""), get("a"), put("a", "2"), put("a", "2"), get("a"))
	s.do(put("", "1"), put("", ""), put("\x00", "zero"), get("\x00"), put("\xff", "\x00\xff"),
		get("\xff"))
	s.do(&pb.PutRequest{Key: []byte("b")}, get("b"))
}

func putsPrevious(s *session) {
	previous := func(key, value string) *pb.PutRequest {
		return &pb.PutRequest{Key: []byte(key), Value: []byte(value), PrevKv: true}
	}
	s.quietly(grant(83, 1000))
	s.do(previous("a", "1"), previous("a", "2"), previous("a", ""), previous("a", "3"))
	s.do(putLeased("a", "4", 83), previous("a", "5"), remove("a"), previous("a", "6"))
	s.do(&pb.PutRequest{Key: []byte("a"), PrevKv: true, IgnoreValue: true}, get("a"))
	s.do(&pb.PutRequest{Key: []byte("n"), PrevKv: true, IgnoreValue: true})
	s.do(always(previous("a", "7"), previous("b", "1")))
}

func putsIgnoring(s *session) {
	s.quietly(grant(84, 1000), grant(85, 1000), putLeased("a", "1", 84))
	s.do(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true}, get("a"))
	s.do(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true, Lease: 85}, get("a"))
	s.do(&pb.PutRequest{Key: []byte("a"), Value: []byte("2"), IgnoreLease: true}, get("a"))
	s.do(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true, IgnoreLease: true}, get("a"))
	s.do(&pb.PutRequest{Key: []byte("a"), Value: []byte("3"), IgnoreValue: true})
	s.do(&pb.PutRequest{Key: []byte("a"), Lease: 84, IgnoreLease: true})
	s.do(&pb.PutRequest{Key: []byte("a"), Value: []byte("3"), Lease: 84, IgnoreValue: true,
		IgnoreLease: true})
	s.do(&pb.PutRequest{Key: []byte("n"), IgnoreValue: true},
		&pb.PutRequest{Key: []byte("n"), Value: []byte("1"), IgnoreLease: true},
		&pb.PutRequest{Key: []byte("n"), IgnoreValue: true, IgnoreLease: true},
		&pb.PutRequest{IgnoreValue: true}, &pb.PutRequest{Value: []byte("1"), IgnoreValue: true})
	s.do(remove("a"), &pb.PutRequest{Key: []byte("a"), IgnoreValue: true})
	s.do(&pb.PutRequest{Key: []byte("n"), IgnoreValue: true, Lease: 999}, everything())
	s.do(always(put("f", "1"), &pb.PutRequest{Key: []byte("f"), IgnoreValue: true}))
	s.do(always(remove("f")), everything(), timeToLive(84), timeToLive(85))
}

func putsLeased(s *session) {
	s.quietly(grant(86, 1000), grant(87, 1000))
	s.do(putLeased("a", "1", 999), get("a"), putLeased("a", "1", -5))
	s.do(putLeased("a", "1", 86), putLeased("b", "1", 86), get("a"), timeToLive(86))
	s.do(putLeased("a", "2", 87), timeToLive(86), timeToLive(87))
	s.do(put("b", "2"), get("b"), timeToLive(86), remove("a"), timeToLive(87))
	s.do(putLeased("c", "1", 87), revoke(87), get("c"), putLeased("c", "2", 87))
	s.do(&pb.PutRequest{Key: []byte("c"), Value: []byte("2"), Lease: 87, PrevKv: true})
}

func putsVersions(s *session) {
	s.do(put("a", "1"), put("a", "2"), get("a"), remove("a"), get("a"), put("a", "3"), get("a"))
	s.do(always(put("a", "4"), put("b", "1")), everything())
	s.do(always(remove("a"), get("a")), put("a", "5"), get("a"))
	s.do(removeSpan("a", "c"), always(put("b", "2"), put("a", "6")), everything())
}

func deletes(s *session) {
	s.quietly(put("a", "1"), put("ab", "1"), put("b", "1"), put("c", "1"), put("d", "1"))
	s.do(remove("a"), remove("a"), remove(""), removeSpan("", "b"), removeSpan("c", "b"),
		removeSpan("c", "c"), removeSpan("a", "b"), everything())
	s.do(removeSpan("c", "\x00"), everything(), removeSpan("\x00", "\x00"), everything())
	s.do(removeSpan("\x00", "\x00"), put("a", "2"), get("a"))
}

func deletesPrevious(s *session) {
	s.quietly(grant(88, 1000), put("b", "1"), putLeased("a", "1", 88), put("c", "1"), put("b", "2"))
	s.do(&pb.DeleteRangeRequest{Key: []byte("c"), PrevKv: true},
		&pb.DeleteRangeRequest{Key: []byte("c"), PrevKv: true},
		&pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), PrevKv: true},
		&pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), PrevKv: true})
	s.do(timeToLive(88), at(s.rev(4), everything()))
}

// tooLarge stays around the default of 1.5 MiB a request; beyond 2 MiB the transport refuses.
func tooLarge(s *session) {
	const requestBytesMax = 1536 * 1024
	value := func(bytes int) string { return strings.Repeat("v", bytes) }
	s.do(put("a", value(requestBytesMax-1024)), get("a"))
	s.do(put("a", value(requestBytesMax+1)), put("a", value(2*1024*1024-1024)), get("a"))
	s.do(always(put("b", value(requestBytesMax/2)), put("c", value(requestBytesMax/2+1024))))
	_, err := s.call(put("a", value(3*1024*1024)))
	s.note("put of 3 MiB -> %v", err != nil)
	s.do(span("b", "d"), put("d", "small"))
}

func sizes(s *session) {
	for bytes := 1; bytes <= 1<<20; bytes *= 4 {
		key := strings.Repeat("k", min(bytes, 4096))
		s.do(put(key, strings.Repeat("v", bytes-1)), get(key))
	}
}
