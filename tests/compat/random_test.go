package compat

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

var (
	seed  = flag.Uint64("seed", 1, "first seed of the random histories")
	seeds = flag.Uint64("seeds", 8, "how many random histories to compare")
	steps = flag.Int("steps", 600, "requests in each random history")
)

// TestRandom compares histories of random requests: each answer, then all that a watch tells of
// them. A history is given by its seed, which is the name of its case.
func TestRandom(t *testing.T) {
	var cases []conversation
	for n := *seed; n < *seed+*seeds; n++ {
		cases = append(cases, conversation{
			name: fmt.Sprintf("seed %d", n),
			run:  func(s *session) { randomHistory(s, n, *steps) },
		})
	}
	compare(t, reference36, cases)
}

// A generator makes requests over few keys, so that they meet. It knows the store only by its
// current and compacted revision, as counted from the start of the case.
type generator struct {
	*rand.Rand
	s         *session
	current   int64
	compacted int64
}

var (
	randomKeys   = []string{"a", "a\x00", "aa", "b", "ba", "c", "\xff"}
	randomValues = []string{"", "0", "1", "2", "\x00\xff"}
	randomLeases = []int64{201, 202, 203}
)

// lease is mostly none, else one that mostly exists.
func (g *generator) lease() int64 {
	if g.oneIn(2) {
		return 0
	}
	if g.oneIn(20) {
		return 999
	}
	return pick(g, randomLeases)
}

func pick[T any](g *generator, choices []T) T { return choices[g.IntN(len(choices))] }

// oneIn is true once in n times on average.
func (g *generator) oneIn(n int) bool { return g.IntN(n) == 0 }

func randomHistory(s *session, seed uint64, steps int) {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 0)), s: s}
	for _, id := range randomLeases {
		s.do(grant(id, 1000))
	}
	for range steps {
		request := g.request()
		response, err := s.call(request)
		s.note("%s -> %s", s.message(request), s.outcome(inKeyOrder(response), err))
		g.learn(request, response, err)
	}
	s.do(put("end", "of the history"))
	w := s.watch()
	w.create(everyKey(s.rev(g.compacted + 1)))
	w.through(s.current())
	if g.compacted > 0 {
		again := s.watch()
		again.create(from(s.rev(g.compacted-1), "\x00", "\x00"))
		again.response()
	}
}

// inKeyOrder undoes a sort by anything but the key, because the order of ties is not defined.
func inKeyOrder(response any) any {
	if found, ok := response.(*pb.RangeResponse); ok && found != nil {
		slices.SortFunc(found.Kvs, func(a, b *mvccpb.KeyValue) int {
			return slices.Compare(a.Key, b.Key)
		})
	}
	return response
}

// learn takes from an answer what later requests build on.
func (g *generator) learn(request, response any, err error) {
	if err != nil {
		return
	}
	if headed, ok := response.(interface{ GetHeader() *pb.ResponseHeader }); ok {
		g.current = headed.GetHeader().GetRevision() - g.s.base
	}
	if compaction, ok := request.(*pb.CompactionRequest); ok {
		g.compacted = compaction.Revision - g.s.base
	}
}

func (g *generator) request() any {
	switch n := g.IntN(100); {
	case n < 30:
		return g.put()
	case n < 42:
		return g.deleteRange()
	case n < 65:
		return g.rangeRequest()
	case n < 90:
		return g.txn(2)
	case n < 93:
		return compact(g.s.rev(g.compacted + g.Int64N(g.current-g.compacted+2)))
	case n < 96:
		return grant(pick(g, randomLeases), 1000)
	case n < 97:
		return revoke(pick(g, randomLeases))
	default:
		return timeToLive(pick(g, randomLeases))
	}
}

func (g *generator) span() (key, end []byte) {
	key = []byte(pick(g, randomKeys))
	switch g.IntN(6) {
	case 0:
		return []byte{0}, []byte{0}
	case 1:
		return key, []byte{0}
	case 2:
		return key, []byte(pick(g, randomKeys))
	default:
		return key, nil
	}
}

func (g *generator) put() *pb.PutRequest {
	r := &pb.PutRequest{Key: []byte(pick(g, randomKeys)), PrevKv: g.oneIn(3)}
	if r.IgnoreValue = g.oneIn(8); !r.IgnoreValue || g.oneIn(5) {
		r.Value = []byte(pick(g, randomValues))
	}
	if r.IgnoreLease = g.oneIn(8); !r.IgnoreLease || g.oneIn(5) {
		r.Lease = g.lease()
	}
	return r
}

func (g *generator) deleteRange() *pb.DeleteRangeRequest {
	key, end := g.span()
	return &pb.DeleteRangeRequest{Key: key, RangeEnd: end, PrevKv: g.oneIn(3)}
}

// revision is mostly one that can be read, else just outside.
func (g *generator) revision() int64 {
	return g.s.rev(g.compacted - 1 + g.Int64N(g.current-g.compacted+3))
}

// rangeRequest has no limit where it sorts by a target that has ties.
func (g *generator) rangeRequest() *pb.RangeRequest {
	key, end := g.span()
	r := &pb.RangeRequest{Key: key, RangeEnd: end, KeysOnly: g.oneIn(6), CountOnly: g.oneIn(8),
		Serializable: g.oneIn(6)}
	if g.oneIn(3) {
		r.Revision = g.revision()
	}
	if g.oneIn(4) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.IntN(5))
	}
	if r.SortTarget == pb.RangeRequest_KEY && g.oneIn(3) {
		r.Limit = g.Int64N(4)
	}
	for _, bound := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision,
		&r.MaxCreateRevision} {
		if g.oneIn(10) {
			*bound = g.revision()
		}
	}
	return r
}

func (g *generator) compare() *pb.Compare {
	key, end := g.span()
	c := &pb.Compare{Key: key, Result: pb.Compare_CompareResult(g.IntN(4))}
	if g.oneIn(3) {
		c.RangeEnd = end
	}
	switch c.Target = pb.Compare_CompareTarget(g.IntN(5)); c.Target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: g.revision()}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: g.revision()}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: []byte(pick(g, randomValues))}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: g.lease()}
	}
	return c
}

// txn nests at most depth levels below itself.
func (g *generator) txn(depth int) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for range g.IntN(3) {
		r.Compare = append(r.Compare, g.compare())
	}
	for range g.IntN(4) {
		r.Success = append(r.Success, g.op(depth))
	}
	for range g.IntN(3) {
		r.Failure = append(r.Failure, g.op(depth))
	}
	return r
}

// op sorts no range, as answers inside a transaction are compared in their own order. It deletes
// no range without an end: etcd does not see that such a one overlaps a put, and stops itself when
// the put then misses the key whose value or lease it was to keep.
func (g *generator) op(depth int) *pb.RequestOp {
	switch n := g.IntN(10); {
	case n < 4:
		return op(g.put())
	case n < 6:
		r := g.deleteRange()
		if string(r.RangeEnd) == "\x00" {
			r.RangeEnd = nil
		}
		return op(r)
	case n < 9 || depth == 0:
		r := g.rangeRequest()
		r.SortOrder, r.SortTarget = pb.RangeRequest_NONE, pb.RangeRequest_KEY
		return op(r)
	default:
		return op(g.txn(depth - 1))
	}
}
