package compat

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

const (
	caseTimeout = 60 * time.Second
	callTimeout = 20 * time.Second
)

// A session is one case's conversation with one server; what was said is its transcript.
//
// Cases only act and note. They assert nothing: right is what the reference did.
type session struct {
	renderer
	t          *testing.T
	ctx        context.Context
	server     *server
	conn       *grpc.ClientConn
	transcript []string
}

// newSession makes a session, which can act once it is connected.
func newSession(t *testing.T, ctx context.Context, s *server) *session {
	return &session{
		renderer: renderer{leases: map[int64]string{}},
		t:        t, ctx: ctx, server: s,
	}
}

// connect opens the session's connection, in place of an earlier one, and waits for an answer.
func (s *session) connect() error {
	if s.conn != nil {
		s.conn.Close()
	}
	conn := s.server.dial(s.t)
	s.conn = conn
	s.t.Cleanup(func() { conn.Close() })
	_, err := etcdserverpb.NewKVClient(conn).Range(s.ctx, get("any"), grpc.WaitForReady(true))
	return err
}

// empty removes the keys and leases of an earlier case and makes the current revision this
// case's zero.
func (s *session) empty() error {
	lessor := etcdserverpb.NewLeaseClient(s.conn)
	held, err := lessor.LeaseLeases(s.ctx, &etcdserverpb.LeaseLeasesRequest{})
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	for _, lease := range held.Leases {
		request := &etcdserverpb.LeaseRevokeRequest{ID: lease.ID}
		if _, err := lessor.LeaseRevoke(s.ctx, request); err != nil {
			return fmt.Errorf("revoke: %w", err)
		}
	}
	kv := etcdserverpb.NewKVClient(s.conn)
	deleted, err := kv.DeleteRange(s.ctx, removeSpan("\x00", "\x00"))
	if err != nil {
		return fmt.Errorf("delete range: %w", err)
	}
	s.base = deleted.Header.Revision
	return nil
}

// rev is the revision n changes after the start of the case.
func (s *session) rev(n int64) int64 { return s.base + n }

// current is the store's revision, 0 if it cannot be had.
func (s *session) current() int64 {
	response, err := s.call(get("any"))
	if err != nil {
		s.note("current revision -> %s", failure(err))
		return 0
	}
	return response.(*etcdserverpb.RangeResponse).Header.Revision
}

// note adds a line to the transcript.
func (s *session) note(format string, arguments ...any) {
	s.transcript = append(s.transcript, fmt.Sprintf(format, arguments...))
}

// do sends requests one after the other and notes each with its answer.
func (s *session) do(requests ...any) {
	for _, request := range requests {
		response, err := s.call(request)
		s.note("%s -> %s", s.message(request), s.outcome(response, err))
	}
}

// quietly sends requests that only prepare the case; the first failure is noted.
func (s *session) quietly(requests ...any) {
	for _, request := range requests {
		if _, err := s.call(request); err != nil {
			s.note("%s -> %s", s.message(request), s.outcome(nil, err))
			return
		}
	}
}

// outcome renders an answer: a message, or the code and text of an error.
func (s *session) outcome(response any, err error) string {
	if err != nil {
		return failure(err)
	}
	return s.message(response)
}

// failure renders an error by what clients look at: its code and text.
func failure(err error) string {
	var coded interface{ GRPCStatus() *status.Status }
	if errors.As(err, &coded) {
		return fmt.Sprintf("%s %q", coded.GRPCStatus().Code(), coded.GRPCStatus().Message())
	}
	return fmt.Sprintf("error %q", err)
}

// call sends a request by the method that takes it.
func (s *session) call(request any) (any, error) {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	kv := etcdserverpb.NewKVClient(s.conn)
	lessor := etcdserverpb.NewLeaseClient(s.conn)
	maintenance := etcdserverpb.NewMaintenanceClient(s.conn)
	cluster := etcdserverpb.NewClusterClient(s.conn)
	switch r := request.(type) {
	case *etcdserverpb.RangeRequest:
		return kv.Range(ctx, r)
	case *etcdserverpb.PutRequest:
		return kv.Put(ctx, r)
	case *etcdserverpb.DeleteRangeRequest:
		return kv.DeleteRange(ctx, r)
	case *etcdserverpb.TxnRequest:
		return kv.Txn(ctx, r)
	case *etcdserverpb.CompactionRequest:
		return kv.Compact(ctx, r)
	case *etcdserverpb.LeaseGrantRequest:
		return lessor.LeaseGrant(ctx, r)
	case *etcdserverpb.LeaseRevokeRequest:
		return lessor.LeaseRevoke(ctx, r)
	case *etcdserverpb.LeaseTimeToLiveRequest:
		return lessor.LeaseTimeToLive(ctx, r)
	case *etcdserverpb.LeaseLeasesRequest:
		return lessor.LeaseLeases(ctx, r)
	case *etcdserverpb.StatusRequest:
		return maintenance.Status(ctx, r)
	case *etcdserverpb.AlarmRequest:
		return maintenance.Alarm(ctx, r)
	case *etcdserverpb.HashRequest:
		return maintenance.Hash(ctx, r)
	case *etcdserverpb.HashKVRequest:
		return maintenance.HashKV(ctx, r)
	case *etcdserverpb.DefragmentRequest:
		return maintenance.Defragment(ctx, r)
	case *etcdserverpb.MoveLeaderRequest:
		return maintenance.MoveLeader(ctx, r)
	case *etcdserverpb.DowngradeRequest:
		return maintenance.Downgrade(ctx, r)
	case *etcdserverpb.MemberListRequest:
		return cluster.MemberList(ctx, r)
	case *etcdserverpb.MemberAddRequest:
		return cluster.MemberAdd(ctx, r)
	case *etcdserverpb.MemberRemoveRequest:
		return cluster.MemberRemove(ctx, r)
	case *etcdserverpb.MemberUpdateRequest:
		return cluster.MemberUpdate(ctx, r)
	case *etcdserverpb.MemberPromoteRequest:
		return cluster.MemberPromote(ctx, r)
	default:
		panic(fmt.Sprintf("no method takes %T", request))
	}
}

// client returns etcd's own client, connected to the session's server.
func (s *session) client() *clientv3.Client {
	client, err := clientv3.New(clientv3.Config{
		Context: s.ctx, Endpoints: []string{s.server.endpoint}, DialTimeout: callTimeout,
		Logger: zap.NewNop(),
	})
	if err != nil {
		panic(err) // the configuration above is at fault, not the server
	}
	s.t.Cleanup(func() { client.Close() })
	return client
}

// check notes a step of a client library by its error; it reports whether there was none.
func (s *session) check(step string, err error) bool {
	if err != nil {
		s.note("%s -> %s", step, failure(err))
		return false
	}
	s.note("%s -> done", step)
	return true
}
