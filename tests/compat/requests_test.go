package compat

import (
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Short constructors for the requests of which the cases are made.

func get(key string) *pb.RangeRequest { return &pb.RangeRequest{Key: []byte(key)} }

func span(key, end string) *pb.RangeRequest {
	return &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}
}

func everything() *pb.RangeRequest { return span("\x00", "\x00") }

func prefix(key string) *pb.RangeRequest { return span(key, clientv3.GetPrefixRangeEnd(key)) }

// at makes a range read at a revision.
func at(revision int64, r *pb.RangeRequest) *pb.RangeRequest {
	r.Revision = revision
	return r
}

func put(key, value string) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(key), Value: []byte(value)}
}

func putLeased(key, value string, lease int64) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(key), Value: []byte(value), Lease: lease}
}

func remove(key string) *pb.DeleteRangeRequest {
	return &pb.DeleteRangeRequest{Key: []byte(key)}
}

func removeSpan(key, end string) *pb.DeleteRangeRequest {
	return &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}
}

func compact(revision int64) *pb.CompactionRequest {
	return &pb.CompactionRequest{Revision: revision}
}

func grant(id, seconds int64) *pb.LeaseGrantRequest {
	return &pb.LeaseGrantRequest{ID: id, TTL: seconds}
}

func revoke(id int64) *pb.LeaseRevokeRequest { return &pb.LeaseRevokeRequest{ID: id} }

func timeToLive(id int64) *pb.LeaseTimeToLiveRequest {
	return &pb.LeaseTimeToLiveRequest{ID: id, Keys: true}
}

// op wraps a request as an operation of a transaction.
func op(request any) *pb.RequestOp {
	switch r := request.(type) {
	case *pb.RangeRequest:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
	case *pb.PutRequest:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}}
	case *pb.DeleteRangeRequest:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
	case *pb.TxnRequest:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}}
	default:
		panic(fmt.Sprintf("%T is no operation of a transaction", request))
	}
}

func ops(requests ...any) []*pb.RequestOp {
	wrapped := make([]*pb.RequestOp, len(requests))
	for i, request := range requests {
		wrapped[i] = op(request)
	}
	return wrapped
}

func when(compares ...*pb.Compare) []*pb.Compare { return compares }

func txn(compares []*pb.Compare, success, failure []*pb.RequestOp) *pb.TxnRequest {
	return &pb.TxnRequest{Compare: compares, Success: success, Failure: failure}
}

// always is a transaction without a condition.
func always(requests ...any) *pb.TxnRequest { return txn(nil, ops(requests...), nil) }

const (
	equal    = pb.Compare_EQUAL
	greater  = pb.Compare_GREATER
	less     = pb.Compare_LESS
	notEqual = pb.Compare_NOT_EQUAL
)

func versionIs(key string, result pb.Compare_CompareResult, version int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Result: result, Target: pb.Compare_VERSION,
		TargetUnion: &pb.Compare_Version{Version: version}}
}

func createIs(key string, result pb.Compare_CompareResult, revision int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Result: result, Target: pb.Compare_CREATE,
		TargetUnion: &pb.Compare_CreateRevision{CreateRevision: revision}}
}

func modIs(key string, result pb.Compare_CompareResult, revision int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Result: result, Target: pb.Compare_MOD,
		TargetUnion: &pb.Compare_ModRevision{ModRevision: revision}}
}

func valueIs(key string, result pb.Compare_CompareResult, value string) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Result: result, Target: pb.Compare_VALUE,
		TargetUnion: &pb.Compare_Value{Value: []byte(value)}}
}

func leaseIs(key string, result pb.Compare_CompareResult, lease int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Result: result, Target: pb.Compare_LEASE,
		TargetUnion: &pb.Compare_Lease{Lease: lease}}
}

// over makes a comparison hold for every key up to end.
func over(end string, c *pb.Compare) *pb.Compare {
	c.RangeEnd = []byte(end)
	return c
}
