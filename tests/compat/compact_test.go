package compat

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestCompact compares compaction: what it refuses and what stays readable.
func TestCompact(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "a fresh store", fresh: true, run: compactFresh},
		{name: "order of revisions", run: compactOrder},
		{name: "negative and future revisions", run: compactOutside},
		{name: "what stays readable", run: compactReadable},
		{name: "tombstones", run: compactTombstones},
		{name: "physical", run: compactPhysical},
		{name: "revisions go on", run: compactGoesOn},
		{name: "in the middle of transactions", run: compactTransactions},
	})
}

func compactFresh(s *session) {
	s.do(compact(2), compact(-2), compact(0), compact(0), at(0, get("a")), at(1, get("a")))
	s.do(put("a", "1"), compact(1), compact(1), at(1, get("a")), compact(2), compact(3))
	s.do(at(1, get("a")), at(2, get("a")))
}

func compactOrder(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("a", "3"), put("a", "4"))
	s.do(compact(s.rev(2)), compact(s.rev(2)), compact(s.rev(1)), compact(s.rev(3)), compact(s.rev(4)),
		compact(s.rev(4)), compact(s.rev(5)), get("a"), at(s.rev(3), get("a")))
	s.do(put("a", "5"), compact(s.rev(5)), get("a"))
}

func compactOutside(s *session) {
	s.do(put("a", "1"), compact(s.rev(1)), compact(0), compact(-1), compact(-largest),
		compact(largest), compact(s.rev(2)), get("a"))
}

func compactReadable(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("a", "2"), put("c", "1"), remove("b"), put("a", "3"),
		put("b", "2"), remove("c"), put("d", "1"))
	for _, compacted := range []int64{3, 5, 6, 9} {
		s.do(compact(s.rev(compacted)))
		for n := compacted - 1; n <= 9; n++ {
			s.do(at(s.rev(n), everything()))
		}
	}
}

func compactTombstones(s *session) {
	s.quietly(put("a", "1"), remove("a"), put("b", "1"))
	s.do(compact(s.rev(2)), at(s.rev(2), get("a")), get("a"), put("a", "2"), get("a"))
	s.do(remove("a"), compact(s.rev(5)), get("a"), at(s.rev(5), everything()))
	s.do(put("a", "3"), everything(), removeSpan("a", "z"), compact(s.rev(7)), everything())
	s.do(put("a", "4"), everything())
}

func compactPhysical(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("b", "1"), remove("b"), put("a", "3"))
	s.do(&pb.CompactionRequest{Revision: s.rev(4), Physical: true}, everything(),
		at(s.rev(3), get("a")), at(s.rev(4), everything()),
		&pb.CompactionRequest{Revision: s.rev(4), Physical: true},
		&pb.CompactionRequest{Revision: s.rev(9), Physical: true})
}

func compactGoesOn(s *session) {
	s.do(put("a", "1"), remove("a"), compact(s.rev(2)), put("b", "1"), compact(s.rev(3)), remove("b"),
		compact(s.rev(4)), everything(), put("c", "1"), everything())
}

func compactTransactions(s *session) {
	s.quietly(always(put("a", "1"), put("b", "1"), put("c", "1")), always(remove("a"), put("b", "2")),
		always(put("a", "2"), remove("c"), remove("b")))
	s.do(compact(s.rev(2)), at(s.rev(2), everything()), everything(), at(s.rev(1), everything()),
		always(at(s.rev(2), everything()), put("d", "1")), always(at(s.rev(1), get("a"))),
		compact(s.rev(3)), always(at(s.rev(2), get("a"))), everything())
}
