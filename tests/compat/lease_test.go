package compat

import (
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestLease compares leases: what is granted, renewed, listed, and what happens at the end.
func TestLease(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "grant", run: leaseGrants},
		{name: "limits of the time to live", run: leaseLimits},
		{name: "ids that the server chooses", run: leaseChosenIDs},
		{name: "revoke", run: leaseRevokes},
		{name: "time to live", run: leaseTimeToLive},
		{name: "list", run: leaseList},
		{name: "keep alive", run: leaseKeepAlive},
		{name: "attaching and detaching", run: leaseAttach},
		{name: "revoking several keys is one revision", run: leaseRevokedEvents},
		{name: "expiry", run: leaseExpiry},
		{name: "expiry of a lease without keys", run: leaseExpiryWithoutKeys},
		{name: "expiry after re-attachment", run: leaseExpiryReattached},
		{name: "keep alive prolongs", run: leaseProlonged},
		{name: "leases in transactions", run: leaseTxn},
	})
}

func leaseGrants(s *session) {
	s.do(put("a", "1"), grant(101, 100), grant(101, 100), grant(101, 50), grant(-102, 100),
		grant(largest, 100), grant(-largest, 100), timeToLive(101), timeToLive(-102))
	s.do(revoke(101), grant(101, 60), timeToLive(101), get("a"))
}

func leaseLimits(s *session) {
	const secondsMax = 9_000_000_000
	for i, seconds := range []int64{1, 2, 3, 0, -5, -largest, secondsMax, secondsMax + 1, largest} {
		s.do(grant(int64(110+i), seconds), timeToLive(int64(110+i)))
	}
}

func leaseChosenIDs(s *session) {
	for i := range 3 {
		response, err := s.call(grant(0, 1000))
		if err != nil {
			s.note("grant -> %s", failure(err))
			return
		}
		id := response.(*pb.LeaseGrantResponse).ID
		s.leases[id] = fmt.Sprintf("chosen%d", i)
		s.note("positive %v: %s", id > 0, s.message(response))
		s.do(putLeased("a", "1", id), get("a"), timeToLive(id), grant(id, 1000))
	}
}

func leaseRevokes(s *session) {
	s.do(revoke(999), revoke(0), revoke(-1), grant(120, 100), revoke(120), revoke(120))
	s.do(grant(121, 100), putLeased("a", "1", 121), remove("a"), revoke(121))
	s.do(grant(122, 100), putLeased("b", "1", 122), revoke(122), get("b"), at(s.rev(3), get("b")))
}

func leaseTimeToLive(s *session) {
	s.do(timeToLive(999), timeToLive(0), grant(123, 500))
	s.do(putLeased("c", "1", 123), putLeased("a", "1", 123), putLeased("b", "1", 123), timeToLive(123),
		&pb.LeaseTimeToLiveRequest{ID: 123}, revoke(123), timeToLive(123))
}

func leaseList(s *session) {
	s.do(&pb.LeaseLeasesRequest{}, grant(126, 300), grant(124, 100), grant(125, 200), grant(-7, 400),
		&pb.LeaseLeasesRequest{}, revoke(125), &pb.LeaseLeasesRequest{})
}

// keepAlive renews leases on one stream and notes each answer.
func (s *session) keepAlive(ids ...int64) {
	stream, err := pb.NewLeaseClient(s.conn).LeaseKeepAlive(s.ctx)
	if !s.check("keep alive stream", err) {
		return
	}
	for _, id := range ids {
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
			s.note("send -> %s", failure(err))
			return
		}
		response, err := stream.Recv()
		s.note("keep alive %s -> %s", s.lease(id), s.outcome(response, err))
	}
	if err := stream.CloseSend(); err != nil {
		s.note("close -> %s", failure(err))
	}
	_, err = stream.Recv()
	s.note("end -> %v", err)
}

func leaseKeepAlive(s *session) {
	s.quietly(grant(127, 100), grant(128, 200), put("a", "1"))
	s.keepAlive(127, 999, 128, 127, 0, -1)
	s.do(revoke(127))
	s.keepAlive(127, 128)
	s.do(timeToLive(128))
}

func leaseAttach(s *session) {
	s.quietly(grant(129, 100), grant(130, 100))
	s.do(putLeased("a", "1", 129), putLeased("b", "1", 129), timeToLive(129))
	s.do(putLeased("a", "2", 130), timeToLive(129), timeToLive(130))
	s.do(put("b", "2"), timeToLive(129))
	s.do(&pb.PutRequest{Key: []byte("a"), Value: []byte("3"), IgnoreLease: true}, timeToLive(130))
	s.do(putLeased("a", "4", 130), remove("a"), timeToLive(130), put("a", "5"), timeToLive(130))
	s.do(putLeased("c", "1", 130), removeSpan("a", "z"), revoke(130), revoke(129))
}

func leaseRevokedEvents(s *session) {
	s.quietly(grant(131, 1000), putLeased("c", "1", 131), putLeased("a", "1", 131), put("d", "1"),
		putLeased("b", "1", 131), putLeased("a\x00", "1", 131))
	w := s.watch()
	w.create(everyKey(0))
	s.do(revoke(131))
	w.response()
	s.do(everything(), at(s.rev(5), everything()))
}

func leaseExpiry(s *session) {
	w := s.watch()
	w.create(everyKey(0))
	s.do(grant(132, 2), putLeased("c", "1", 132), putLeased("a", "1", 132), put("k", "stays"),
		always(putLeased("b", "1", 132), putLeased("\xff", "1", 132)))
	w.events(5)
	w.response()
	s.do(everything(), timeToLive(132), putLeased("a", "2", 132), revoke(132),
		&pb.LeaseLeasesRequest{})
	s.keepAlive(132)
}

func leaseExpiryWithoutKeys(s *session) {
	w := s.watch()
	w.create(everyKey(0))
	s.do(grant(133, 2), grant(134, 2), putLeased("a", "1", 134), remove("a"))
	w.events(2)
	s.waitForLeases(0)
	s.do(put("a", "2"))
	w.response()
}

// waitForLeases waits until as many leases are left; the deadline is far above any time to live.
func (s *session) waitForLeases(count int) {
	const expiryTimeout = 15 * time.Second
	for deadline := time.Now().Add(expiryTimeout); time.Now().Before(deadline); {
		response, err := s.call(&pb.LeaseLeasesRequest{})
		if err != nil || len(response.(*pb.LeaseLeasesResponse).Leases) == count {
			s.note("leases -> %s", s.outcome(response, err))
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.note("leases -> never %d", count)
}

func leaseExpiryReattached(s *session) {
	s.do(grant(135, 2), grant(136, 1000), putLeased("moved", "1", 135), putLeased("freed", "1", 135),
		putLeased("again", "1", 135), putLeased("kept", "1", 135))
	s.do(putLeased("moved", "2", 136), put("freed", "2"), remove("again"), put("again", "2"),
		&pb.PutRequest{Key: []byte("kept"), Value: []byte("2"), IgnoreLease: true})
	w := s.watch()
	w.create(everyKey(0))
	w.response()
	s.waitForLeases(1)
	s.do(everything(), timeToLive(135), timeToLive(136))
}

// leaseProlonged renews for longer than the lease was granted, then stops.
func leaseProlonged(s *session) {
	const renewals, interval = 8, 500 * time.Millisecond
	s.do(grant(137, 2), putLeased("a", "1", 137))
	stream, err := pb.NewLeaseClient(s.conn).LeaseKeepAlive(s.ctx)
	if !s.check("keep alive stream", err) {
		return
	}
	for range renewals {
		time.Sleep(interval)
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: 137}); err != nil {
			s.note("send -> %s", failure(err))
		}
		response, err := stream.Recv()
		s.note("renewed -> %s", s.outcome(response, err))
	}
	s.do(get("a"))
	w := s.watch()
	w.create(everyKey(0))
	w.response()
	s.do(get("a"))
}

func leaseTxn(s *session) {
	s.quietly(grant(138, 1000), grant(139, 1000))
	s.do(always(putLeased("a", "1", 138), putLeased("b", "1", 139), put("c", "1")), timeToLive(138))
	s.do(txn(when(leaseIs("a", equal, 138)), ops(putLeased("a", "2", 139)), nil),
		txn(when(leaseIs("a", equal, 138)), nil, ops(get("a"))), timeToLive(138), timeToLive(139))
	s.do(always(remove("a"), putLeased("d", "1", 138)), revoke(139), everything(), timeToLive(138))
	s.do(txn(when(leaseIs("d", equal, 139)), ops(putLeased("x", "1", 999)),
		ops(putLeased("y", "1", 138))))
}
