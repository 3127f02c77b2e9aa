package compat

import (
	"context"
	"fmt"
	"syscall"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestRestart compares what is left of a history after the servers were stopped and killed:
// keys, old revisions, the compacted revision, leases, alarms, and the history for watches.
func TestRestart(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "stopped", fresh: true, run: func(s *session) { restarts(s, syscall.SIGTERM) }},
		{name: "killed", fresh: true, run: func(s *session) { restarts(s, syscall.SIGKILL) }},
	})
}

func restarts(s *session, signal syscall.Signal) {
	s.quietly(grant(171, 1000), grant(172, 2000), putLeased("a", "1", 171), put("a", "2"), put("b",
		"1"),
		always(put("c", "1"), putLeased("d", "1", 172), remove("b")), put("e", "1"), remove("e"),
		compact(4), put("f", "1"), removeSpan("f", "g"))
	for i := range 100 {
		s.quietly(put(fmt.Sprintf("k%02d", i%30), fmt.Sprint(i)))
	}
	s.look()
	before := s.memberID()
	s.restart(signal)
	s.note("same member %v", s.memberID() == before)
	s.look()
	s.do(put("a", "3"), putLeased("g", "1", 172), revoke(172), compact(7), compact(7))
	s.restart(signal)
	s.look()
	s.do(put("h", "1"), get("h"))
}

// restart ends the server by the signal, starts it on the same data and connects anew.
func (s *session) restart(signal syscall.Signal) {
	s.server.stop(s.t, signal)
	s.server.start(s.t)
	s.check("connect", s.connect())
}

// look notes all that a client can see of a store.
func (s *session) look() {
	s.do(everything(), at(3, everything()), at(4, everything()), at(7, everything()),
		at(50, everything()), timeToLive(171), timeToLive(172), &pb.LeaseLeasesRequest{},
		&pb.AlarmRequest{}, &pb.HashKVRequest{Revision: 20})
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel() // an open stream delays the end of etcd
	w := s.watchIn(ctx)
	w.create(everyKey(8))
	w.through(s.current())
	w.create(from(2, "a", ""))
	w.response()
}
