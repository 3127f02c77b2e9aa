package compat

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestTxn compares transactions: what they compare, do, refuse, and show of their own writes.
func TestTxn(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "compare every target by every result", run: txnCompares},
		{name: "compare missing keys", run: txnComparesMissing},
		{name: "compare ranges", run: txnComparesRanges},
		{name: "compare values of old and new keys", run: txnComparesValues},
		{name: "unusual comparisons", run: txnComparesUnusual},
		{name: "several comparisons", run: txnComparesSeveral},
		{name: "later operations see earlier ones", run: txnOwnWrites},
		{name: "headers of operations", run: txnHeaders},
		{name: "read only", run: txnReadOnly},
		{name: "empty", run: txnEmpty},
		{name: "duplicate keys", run: txnDuplicates},
		{name: "overlapping puts and deletes", run: txnOverlaps},
		{name: "nested", run: txnNested},
		{name: "nested compares come first", run: txnNestedCompares},
		{name: "too many operations", run: txnBudget},
		{name: "invalid operations", run: txnInvalid},
		{name: "all or nothing", run: txnAllOrNothing},
		{name: "kube-apiserver's shapes", run: txnKubernetes},
		{name: "previous pairs and leases", run: txnPrevious},
		{name: "order of validation", run: txnValidationOrder},
	})
}

// txnCompares has a leased key at version 2, so that every target has a neighbour on both sides.
func txnCompares(s *session) {
	s.quietly(grant(91, 1000), put("other", ""), put("a", "l"), put("other", "1"),
		putLeased("a", "m", 91))
	for result := equal; result <= notEqual; result++ {
		for delta := int64(-1); delta <= 1; delta++ {
			value := string(rune('m' + delta))
			for _, c := range when(versionIs("a", result, 2+delta),
				createIs("a", result, s.rev(2+delta)), modIs("a", result, s.rev(4+delta)),
				valueIs("a", result, value), leaseIs("a", result, 91+delta)) {
				s.do(txn(when(c), nil, nil))
			}
		}
	}
}

func txnComparesMissing(s *session) {
	s.quietly(put("gone", "x"), remove("gone"))
	for _, key := range []string{"never", "gone"} {
		for result := equal; result <= notEqual; result++ {
			for number := int64(-1); number <= 1; number++ {
				s.do(txn(when(versionIs(key, result, number)), nil, nil),
					txn(when(createIs(key, result, number)), nil, nil),
					txn(when(modIs(key, result, number)), nil, nil),
					txn(when(leaseIs(key, result, number)), nil, nil))
			}
			s.do(txn(when(valueIs(key, result, "")), nil, nil),
				txn(when(valueIs(key, result, "x")), nil, nil))
		}
	}
}

func txnComparesRanges(s *session) {
	s.quietly(put("a", "5"), put("b", "5"), put("c", "6"), put("b", "5"))
	for _, end := range []string{"b", "c", "d", "\x00", "a", "0"} {
		s.do(txn(when(over(end, valueIs("a", equal, "5"))), ops(get("a")), nil),
			txn(when(over(end, valueIs("a", greater, "4"))), nil, nil),
			txn(when(over(end, versionIs("a", equal, 1))), nil, nil),
			txn(when(over(end, versionIs("a", less, 3))), nil, nil),
			txn(when(over(end, modIs("a", greater, s.rev(0)))), nil, nil),
			txn(when(over(end, createIs("a", notEqual, s.rev(2)))), nil, nil),
			txn(when(over(end, leaseIs("a", equal, 0))), nil, nil))
	}
	s.do(txn(when(over("z", versionIs("x", equal, 0))), nil, nil),
		txn(when(over("z", versionIs("x", greater, 0))), nil, nil),
		txn(when(over("z", valueIs("x", notEqual, "1"))), nil, nil),
		txn(when(over("\x00", versionIs("\x00", greater, 0))), nil, nil))
}

func txnComparesValues(s *session) {
	s.do(put("a", ""), txn(when(valueIs("a", equal, "")), nil, nil),
		txn(when(valueIs("a", less, "\x00")), nil, nil))
	s.do(put("a", "\xff"), txn(when(valueIs("a", greater, "\x7f\xff")), nil, nil),
		txn(when(valueIs("a", less, "\xff\x00")), nil, nil))
	s.do(remove("a"), txn(when(valueIs("a", notEqual, "\xff")), nil, nil), put("a", "again"),
		txn(when(valueIs("a", equal, "again"), versionIs("a", equal, 1)), nil, nil))
	for i := range 20 {
		s.quietly(put(fmt.Sprintf("k%02d", i), fmt.Sprint(i%2)))
	}
	s.do(txn(when(over("l", valueIs("k", less, "2"))), nil, nil),
		txn(when(over("l", valueIs("k", equal, "0"))), nil, nil))
}

// txnComparesUnusual leaves out the union or gives one that is not the target's.
func txnComparesUnusual(s *session) {
	s.quietly(put("a", "1"))
	s.do(txn(when(&pb.Compare{Key: []byte("a"), Target: pb.Compare_VERSION}), nil, nil),
		txn(when(&pb.Compare{Key: []byte("b"), Target: pb.Compare_VERSION}), nil, nil),
		txn(when(&pb.Compare{Key: []byte("b"), Target: pb.Compare_MOD}), nil, nil),
		txn(when(&pb.Compare{Key: []byte("b"), Target: pb.Compare_LEASE}), nil, nil),
		txn(when(&pb.Compare{Key: []byte("a"), Target: pb.Compare_VERSION,
			TargetUnion: &pb.Compare_ModRevision{ModRevision: 1}}), nil, nil),
		txn(when(&pb.Compare{Key: []byte("a"), Result: 9, Target: pb.Compare_VERSION,
			TargetUnion: &pb.Compare_Version{Version: 1}}), nil, nil),
		txn(when(&pb.Compare{Key: []byte("a"), Target: 9}), nil, nil),
		txn(when(versionIs("", equal, 0)), nil, nil),
		txn(when(over("z", versionIs("", greater, 0))), nil, nil))
}

func txnComparesSeveral(s *session) {
	s.quietly(put("a", "1"), put("b", "2"))
	good, bad := versionIs("a", equal, 1), valueIs("b", equal, "9")
	s.do(txn(when(good, versionIs("b", equal, 1)), ops(get("a")), ops(get("b"))),
		txn(when(good, bad), ops(get("a")), ops(get("b"))),
		txn(when(bad, good), ops(put("a", "no")), ops(put("b", "yes"))),
		txn(when(bad), ops(put("a", "no")), nil), everything())
}

func txnOwnWrites(s *session) {
	s.quietly(put("a", "old"), put("b", "old"))
	s.do(always(get("a"), put("a", "new"), get("a"), everything()))
	s.do(always(put("c", "1"), span("a", "d"), remove("b"), span("a", "d"), get("b")))
	s.do(always(remove("a"), remove("a"), get("a")))
	s.do(always(put("m", "1"), &pb.RangeRequest{Key: []byte("m"), CountOnly: true},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: 1},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
			SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_DESCEND}))
	s.do(always(put("n", "1"), at(s.rev(2), everything()), at(s.rev(5), get("n"))))
	s.do(always(put("o", "1"), at(s.rev(7), everything())))
	s.do(always(at(s.rev(7), get("a"))), everything())
}

func txnHeaders(s *session) {
	s.quietly(put("a", "1"))
	s.do(always(remove("missing"), get("a"), put("b", "1"), remove("missing"), get("a"),
		put("c", "1")))
	s.do(always(remove("missing")), always(get("a"), always(put("d", "1")), get("a")))
	s.do(always(always(remove("missing")), always(get("a")), put("e", "1")))
	s.do(txn(when(versionIs("a", equal, 5)), nil, ops(remove("missing"), put("f", "1"))))
}

func txnReadOnly(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("b", "1"))
	s.do(always(get("a"), at(s.rev(1), get("a")), prefix("b")),
		always(at(s.rev(9), get("a"))), always(get("a"), at(s.rev(4), get("a"))),
		always(&pb.RangeRequest{Key: []byte("a"), Serializable: true}),
		always(get("a"), always(get("b"), always(get("c")))))
	s.do(compact(s.rev(2)), always(get("a"), at(s.rev(1), get("a"))), always(at(s.rev(2), get("a"))),
		txn(when(versionIs("a", equal, 7)), ops(at(s.rev(1), get("a"))), ops(get("a"))))
}

func txnEmpty(s *session) {
	s.do(always(), txn(when(versionIs("a", greater, 0)), nil, nil), &pb.TxnRequest{}, always(always()))
	s.do(put("a", "1"), always(), txn(when(versionIs("a", greater, 0)), nil, nil))
}

func txnDuplicates(s *session) {
	twice := ops(put("a", "1"), put("a", "2"))
	s.do(txn(nil, twice, nil), txn(nil, nil, twice), txn(when(versionIs("a", equal, 0)), nil, twice))
	s.do(txn(nil, ops(put("a", "1")), ops(put("a", "2"))), get("a"))
	s.do(always(put("a", "1"), always(put("a", "2"))),
		always(always(put("a", "1")), put("a", "2")),
		always(always(put("a", "1")), always(put("a", "2"))),
		always(always(put("b", "1"), always(put("c", "1"))), always(put("d", "1"), put("c", "2"))))
	s.do(always(txn(when(versionIs("a", greater, 0)), ops(put("a", "3")), ops(put("a", "4")))),
		get("a"))
	s.do(always(put("z", "1"),
		txn(when(versionIs("a", greater, 0)), ops(get("a")), ops(put("z", "4")))))
	s.do(always(remove("a"), remove("a")), always(get("a"), get("a"), put("a", "1")), everything())
}

func txnOverlaps(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("c", "1"))
	s.do(always(put("b", "2"), remove("b")), always(remove("b"), put("b", "2")),
		always(put("b", "2"), removeSpan("a", "c")), always(removeSpan("a", "c"), put("b", "2")),
		always(put("c", "2"), removeSpan("a", "c")), always(put("a", "3"), removeSpan("b", "\x00")),
		always(put("q", "2"), removeSpan("\x00", "\x00")), always(put("a", "4"), removeSpan("b", "a")))
	s.do(everything(), always(removeSpan("a", "c"), removeSpan("b", "d"), remove("a")), everything())
	s.do(always(always(put("b", "2")), removeSpan("a", "c")),
		always(removeSpan("a", "c"), always(put("b", "2"))),
		txn(nil, ops(put("b", "3")), ops(remove("b"))),
		always(txn(nil, ops(put("b", "5")), ops(removeSpan("a", "c")))),
		txn(when(versionIs("b", equal, 99)), ops(put("b", "6"), remove("b")), nil), everything())
}

func txnNested(s *session) {
	s.quietly(put("a", "1"))
	inner := func(n int64, yes, no string) *pb.TxnRequest {
		return txn(when(versionIs("a", equal, n)), ops(put(yes, "yes")), ops(put(no, "no"), get("a")))
	}
	s.do(always(inner(1, "b", "c"), inner(2, "d", "e"), get("a")), everything())
	s.do(always(put("f", "1"), always(put("g", "1"), always(put("h", "1"), always(put("i", "1"))))))
	s.do(txn(when(versionIs("a", equal, 9)), nil, ops(inner(1, "j", "k"), inner(3, "l", "m"))))
	s.do(prefix("j"), everything())
}

// txnNestedCompares shows that no comparison sees a write of its own transaction.
func txnNestedCompares(s *session) {
	s.do(always(put("a", "1"),
		txn(when(versionIs("a", equal, 0)), ops(put("b", "before")), ops(put("b", "after")))))
	s.do(always(remove("a"),
		txn(when(versionIs("a", equal, 1)), ops(put("c", "before")), ops(put("c", "after")))))
	s.do(always(put("d", "1"),
		txn(nil, ops(txn(when(valueIs("d", equal, "1")), ops(get("a")), ops(get("b")))), nil)))
	s.do(everything())
}

func txnBudget(s *session) {
	const opsMax = 128
	puts := func(n int, label string) []*pb.RequestOp {
		made := make([]*pb.RequestOp, n)
		for i := range made {
			made[i] = op(put(fmt.Sprintf("%s%03d", label, i), "v"))
		}
		return made
	}
	compares := func(n int) []*pb.Compare {
		made := make([]*pb.Compare, n)
		for i := range made {
			made[i] = versionIs(fmt.Sprintf("c%03d", i), equal, 0)
		}
		return made
	}
	nested := func(outer, inner int) *pb.TxnRequest {
		return txn(nil, append(puts(outer, "o"), op(txn(nil, puts(inner, "i"), nil))), nil)
	}
	for _, n := range []int{opsMax, opsMax + 1} {
		for _, r := range []*pb.TxnRequest{txn(nil, puts(n, "s"), nil), txn(nil, nil, puts(n, "f")),
			txn(compares(n), nil, nil), nested(n-1, 1), nested(0, n), nested(n/2, n/2),
			nested(n/2, n/2-1), nested(1, n-2), nested(1, n-1),
			txn(compares(n), puts(1, "x"), puts(n, "y"))} {
			response, err := s.call(r)
			s.note("%d: %d compares, %d and %d operations -> %s", n, len(r.Compare),
				len(r.Success), len(r.Failure), s.outcome(response, err))
		}
	}
	count := everything()
	count.CountOnly = true
	s.do(count)
}

func txnInvalid(s *session) {
	s.do(&pb.TxnRequest{Success: []*pb.RequestOp{{}}}, &pb.TxnRequest{Failure: []*pb.RequestOp{{}}},
		&pb.TxnRequest{Compare: when(&pb.Compare{})},
		&pb.TxnRequest{Success: []*pb.RequestOp{op(get("a")), {}}})
	s.do(always(put("", "1")), always(get("")), always(remove("")), always(always(put("", "1"))),
		txn(nil, nil, ops(put("", "1"))), txn(nil, nil, ops(always(get("")))))
	s.do(always(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), IgnoreValue: true}),
		always(&pb.PutRequest{Key: []byte("a"), Lease: 1, IgnoreLease: true}),
		txn(nil, nil, ops(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), IgnoreValue: true})),
		always(&pb.RangeRequest{Key: []byte("a"), SortTarget: 9}))
	s.do(everything())
}

func txnAllOrNothing(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("a", "3"), compact(s.rev(2)))
	ignoring := &pb.PutRequest{Key: []byte("missing"), IgnoreValue: true}
	for _, bad := range []any{putLeased("x", "1", 999), at(s.rev(1), get("a")),
		at(s.rev(9), get("a")), ignoring,
		&pb.PutRequest{Key: []byte("missing"), Value: []byte("1"), IgnoreLease: true}} {
		s.do(always(put("b", "1"), bad), always(bad, put("b", "1")),
			always(put("b", "1"), always(put("c", "1"), bad)),
			txn(when(versionIs("a", equal, 0)), ops(bad), ops(put("d", "1"))),
			txn(when(versionIs("a", equal, 0)), nil, ops(put("e", "1"), bad)))
	}
	s.do(always(put("f", "1"), txn(when(versionIs("a", equal, 0)), ops(ignoring), ops(get("a")))))
	s.do(everything())
}

func txnKubernetes(s *session) {
	create := func(key, value string) *pb.TxnRequest {
		return txn(when(modIs(key, equal, 0)), ops(put(key, value)), nil)
	}
	update := func(key, value string, revision int64) *pb.TxnRequest {
		return txn(when(modIs(key, equal, revision)), ops(put(key, value)), ops(get(key)))
	}
	erase := func(key string, revision int64) *pb.TxnRequest {
		return txn(when(modIs(key, equal, revision)), ops(remove(key)), ops(get(key)))
	}
	key := "/registry/pods/default/a"
	s.do(create(key, "1"), create(key, "2"), update(key, "3", s.rev(1)), update(key, "4", s.rev(1)),
		erase(key, s.rev(1)), erase(key, s.rev(2)), erase(key, s.rev(2)), update(key, "5", 0),
		update(key, "6", 0), update("/registry/pods/default/none", "7", s.rev(1)))
	for version := range int64(3) {
		s.do(txn(when(versionIs("compact_rev_key", equal, version)),
			ops(put("compact_rev_key", fmt.Sprint(version+10))), ops(get("compact_rev_key"))))
		s.do(txn(when(versionIs("compact_rev_key", equal, version)),
			ops(put("compact_rev_key", "late")), ops(get("compact_rev_key"))))
	}
}

func txnPrevious(s *session) {
	s.quietly(grant(92, 1000), putLeased("a", "1", 92), put("b", "1"))
	s.do(always(&pb.PutRequest{Key: []byte("a"), Value: []byte("2"), PrevKv: true},
		&pb.DeleteRangeRequest{Key: []byte("b"), PrevKv: true},
		&pb.PutRequest{Key: []byte("n"), Value: []byte("1"), PrevKv: true, Lease: 92},
		&pb.DeleteRangeRequest{Key: []byte("b"), PrevKv: true}))
	s.do(timeToLive(92), always(&pb.PutRequest{Key: []byte("n"), Value: []byte("2"),
		IgnoreLease: true},
		&pb.PutRequest{Key: []byte("a"), IgnoreValue: true, Lease: 92}), everything(), timeToLive(92))
	s.do(always(&pb.DeleteRangeRequest{Key: []byte("\x00"), RangeEnd: []byte("\x00"), PrevKv: true}),
		timeToLive(92))
}

// txnValidationOrder has two faults in each request: which one is reported?
func txnValidationOrder(s *session) {
	many := make([]*pb.RequestOp, 129)
	for i := range many {
		many[i] = op(put("same", "v"))
	}
	s.do(always(put("a", "1"), put("a", "1"), put("", "1")), always(put("", "1"), put("a", "1"),
		put("a", "1")),
		txn(when(versionIs("", equal, 0)), ops(put("a", "1"), put("a", "2")), nil),
		txn(nil, ops(put("a", "1"), put("a", "2")), ops(put("", "1"))),
		txn(nil, nil, ops(put("a", "1"), put("a", "2"), get(""))),
		always(putLeased("a", "1", 999), put("a", "2")),
		always(at(largest, get("a")), put("", "2")),
		always(put("a", "1"), always(put("a", "1"), put("", "1"))))
	_, err := s.call(&pb.TxnRequest{Success: many})
	s.note("too many, all the same -> %s", failure(err))
	s.do(everything())
}
