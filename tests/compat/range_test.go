package compat

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestRange compares reads: which keys, in which order, how many, and as of when.
func TestRange(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "keys and range ends", run: rangeKeys},
		{name: "keys are bytes in byte order", run: rangeByteOrder},
		{name: "limit, count and more", run: rangeLimits},
		{name: "keys only and count only", run: rangeParts},
		{name: "every sort target and order", run: rangeSorts},
		{name: "unknown sort options", run: rangeUnknownSorts},
		{name: "minimum and maximum revisions", run: rangeFilters},
		{name: "filters do not change the count", run: rangeFilteredCount},
		{name: "old revisions", run: rangeHistory},
		{name: "compacted and future revisions", run: rangeOutside},
		{name: "count at old revisions", run: rangeHistoricCounts},
		{name: "pages at one revision", run: rangePages},
		{name: "serializable", run: rangeSerializable},
		{name: "large answers", run: rangeLarge},
	})
}

func rangeKeys(s *session) {
	s.quietly(put("a", "1"), put("ab", "2"), put("b", "3"), put("c", "4"), put("\xff\xff", "5"))
	s.do(get("a"), get("missing"), get(""), span("", "b"))
	s.do(span("a", "c"), span("a", "b"), prefix("a"))
	s.do(span("b", "\x00"), everything(), span("\x00", "b"), span("\xff", "\x00"))
	s.do(span("c", "a"), span("a", "a"), span("x", "y"), prefix("\xff"))
	s.do(span("a\x00", "b"), span("a", "a\x00"), span("\x00", "\x00\x00"))
}

func rangeByteOrder(s *session) {
	for _, key := range []string{"\x80", "a\x00", "a", "\xff", "\x00", "\x00\x00", "\xc3\xa9", "~",
		"a\xff", "\x7f", "A", "a/", "a\x00b", "\xfe\xff"} {
		s.do(put(key, "v"))
	}
	s.do(everything(), prefix("a"), span("\x7f", "\x81"), get("\x00"), prefix("\xfe\xff"))
}

func rangeLimits(s *session) {
	for i := range 10 {
		s.quietly(put(fmt.Sprintf("k%d", i), "v"))
	}
	for _, limit := range []int64{1, 9, 10, 11, 0, -1, largest} {
		r := prefix("k")
		r.Limit = limit
		s.do(r)
	}
	s.do(&pb.RangeRequest{Key: []byte("k0"), Limit: 1}, &pb.RangeRequest{Key: []byte("k"), Limit: 1})
}

func rangeParts(s *session) {
	s.quietly(grant(71, 1000), put("a", "1"), putLeased("b", "2", 71), put("c", "3"), put("b", "4"),
		putLeased("c", "5", 71))
	s.do(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), KeysOnly: true},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), KeysOnly: true, Limit: 2},
		&pb.RangeRequest{Key: []byte("c"), KeysOnly: true},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), CountOnly: true},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), CountOnly: true, Limit: 1},
		&pb.RangeRequest{Key: []byte("a"), CountOnly: true},
		&pb.RangeRequest{Key: []byte("x"), CountOnly: true},
		&pb.RangeRequest{Key: []byte("z"), RangeEnd: []byte("a"), CountOnly: true},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), CountOnly: true, KeysOnly: true},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), KeysOnly: true,
			SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_DESCEND},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), CountOnly: true,
			MinModRevision: s.rev(4)})
	s.do(at(s.rev(2), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), KeysOnly: true}))
}

// rangeSorts has no ties in any target, as the order of ties is not defined.
func rangeSorts(s *session) {
	s.quietly(put("a", "5"), put("b", "1"), put("c", "4"), put("d", "2"),
		put("b", "3"), put("d", "1"), put("d", "0"), put("a", "9"), put("a", "8"), put("a", "7"))
	for target := pb.RangeRequest_KEY; target <= pb.RangeRequest_VALUE; target++ {
		for order := pb.RangeRequest_NONE; order <= pb.RangeRequest_DESCEND; order++ {
			s.sorted(target, order)
		}
	}
}

func (s *session) sorted(target pb.RangeRequest_SortTarget, order pb.RangeRequest_SortOrder) {
	for _, limit := range []int64{0, 2} {
		r := everything()
		r.SortTarget, r.SortOrder, r.Limit = target, order, limit
		s.do(r)
	}
	filtered := everything()
	filtered.SortTarget, filtered.SortOrder = target, order
	filtered.MinModRevision, filtered.Limit = s.rev(4), 1
	s.do(filtered)
	s.do(at(s.rev(6), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("c"),
		SortTarget: target, SortOrder: order}))
}

func rangeUnknownSorts(s *session) {
	s.quietly(put("a", "1"))
	s.do(&pb.RangeRequest{Key: []byte("a"), SortOrder: 7},
		&pb.RangeRequest{Key: []byte("a"), SortTarget: 9},
		&pb.RangeRequest{Key: []byte("a"), SortOrder: -1},
		&pb.RangeRequest{SortOrder: 7},
		always(&pb.RangeRequest{Key: []byte("a"), SortOrder: 7}))
}

func rangeFilters(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("c", "1"), put("d", "1"), put("a", "2"), put("c", "2"))
	for n := int64(0); n <= 7; n++ {
		s.do(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MinModRevision: s.rev(n)},
			&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MaxModRevision: s.rev(n)},
			&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MinCreateRevision: s.rev(n)},
			&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MaxCreateRevision: s.rev(n)})
	}
	s.do(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
		MinModRevision: s.rev(4), MaxModRevision: s.rev(5)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
			MinModRevision: s.rev(6), MaxModRevision: s.rev(2)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
			MinCreateRevision: s.rev(2), MaxModRevision: s.rev(4)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
			MaxCreateRevision: s.rev(3), MinModRevision: s.rev(5), Limit: 1},
		&pb.RangeRequest{Key: []byte("a"), MinModRevision: s.rev(6)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MinModRevision: -1},
		at(s.rev(4), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
			MinModRevision: s.rev(2)}))
}

func rangeFilteredCount(s *session) {
	const keys, unmatched = 133, 5
	for i := range keys {
		s.quietly(put(fmt.Sprintf("k%03d", i), ""))
	}
	for _, limit := range []int64{0, 5, keys - unmatched, keys} {
		r := prefix("k")
		r.MinModRevision, r.Limit = s.rev(unmatched+1), limit
		s.do(r)
	}
}

func rangeHistory(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("a", "2"), remove("a"), remove("b"), put("a", "3"),
		always(put("b", "2"), put("c", "1")), removeSpan("a", "c"))
	for n := int64(0); n <= 8; n++ {
		s.do(at(s.rev(n), everything()), at(s.rev(n), get("a")), at(s.rev(n), get("b")))
	}
	s.do(at(-1, get("c")), at(-largest, get("c")))
}

func rangeOutside(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("b", "1"), remove("b"), put("a", "3"))
	s.do(at(s.rev(6), get("a")), at(largest, get("a")), at(s.rev(6), get("")))
	s.do(compact(s.rev(4)))
	for n := int64(1); n <= 6; n++ {
		s.do(at(s.rev(n), everything()), at(s.rev(n), get("missing")))
		count := at(s.rev(n), everything())
		count.CountOnly = true
		s.do(count)
	}
	s.do(at(s.rev(1), span("z", "a")), at(s.rev(9), span("z", "a")), at(s.rev(0), get("a")))
}

func rangeHistoricCounts(s *session) {
	for i := range 30 {
		s.quietly(put(fmt.Sprintf("k%02d", i%20), fmt.Sprint(i)))
		if i%4 == 0 {
			s.quietly(remove(fmt.Sprintf("k%02d", (i*7)%20)))
		}
	}
	for n := int64(1); n <= 30; n++ {
		count, page := at(s.rev(n), span("k03", "k17")), at(s.rev(n), prefix("k"))
		count.CountOnly, page.Limit, page.KeysOnly = true, 3, true
		s.do(count, page)
	}
}

// rangePages reads as kube-apiserver does while writers go on: all pages at the first's revision.
func rangePages(s *session) {
	for i := range 25 {
		s.quietly(put(fmt.Sprintf("/pods/%02d", i), fmt.Sprint(i)))
	}
	key, revision := "/pods/", int64(0)
	for range 5 {
		page := at(revision, span(key, "/pods0"))
		page.Limit = 7
		response, err := s.call(page)
		s.note("%s -> %s", s.message(page), s.outcome(response, err))
		if err != nil {
			return
		}
		found := response.(*pb.RangeResponse)
		if revision == 0 {
			revision = found.Header.Revision
		}
		if len(found.Kvs) == 0 {
			return
		}
		last := found.Kvs[len(found.Kvs)-1].Key
		key = string(last) + "\x00"
		s.quietly(remove(string(last)), put("/pods/99", "new"), put(key, "between"))
	}
}

func rangeSerializable(s *session) {
	s.quietly(put("a", "1"), put("b", "2"))
	s.do(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Serializable: true},
		&pb.RangeRequest{Key: []byte("a"), Serializable: true, Revision: s.rev(1)},
		&pb.RangeRequest{Key: []byte("a"), Serializable: true, Revision: s.rev(3)},
		&pb.RangeRequest{Serializable: true})
}

func rangeLarge(s *session) {
	value := string(make([]byte, 1<<20))
	for i := range 12 {
		s.quietly(put(fmt.Sprintf("k%02d", i), value[i:]))
	}
	s.do(prefix("k"), at(s.rev(6), prefix("k")))
	keys := prefix("k")
	keys.KeysOnly = true
	s.do(keys)
}
