package compat

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"regexp"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestMaintenance compares what operators ask for: status, alarms, hashes, members.
func TestMaintenance(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "status", run: statusShape},
		{name: "status of a fresh store", fresh: true, run: statusShape},
		{name: "alarms", run: alarms},
		{name: "quota in the status", run: statusQuota, open: "there is no quota yet"},
		{name: "the alarm of a full store", run: alarmNoSpace, open: "there is no quota yet"},
		{name: "hash", run: hashes},
		{name: "hash of keys by revision", run: hashesKV},
		{name: "hash of keys of a fresh store", fresh: true, run: hashesKVFresh},
		{name: "defragment", run: defragments},
		{name: "move leader", run: movesLeader},
		{name: "downgrade", run: downgrades, open: "there are no downgrades"},
		{name: "snapshot", run: snapshots, open: "there are no snapshots yet"},
		{name: "members", run: members},
		{name: "peer URLs of members", run: memberPeers, open: "nobody is a peer"},
	})
}

func statusShape(s *session) {
	response, err := s.call(&pb.StatusRequest{})
	s.note("status -> %s", s.outcome(response, err))
	if err != nil {
		return
	}
	status := response.(*pb.StatusResponse)
	s.note("version %s", regexp.MustCompile(`^\d+\.\d+`).FindString(status.Version))
	s.note("plain version %v", regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(status.Version))
	s.note("leads itself %v", status.Leader == status.Header.MemberId)
	s.note("in use within allocated %v", status.DbSizeInUse <= status.DbSize)
	s.note("applied up to %v", status.RaftAppliedIndex <= status.RaftIndex)
	s.note("one term %v", status.RaftTerm == status.Header.RaftTerm)
}

func statusQuota(s *session) {
	response, err := s.call(&pb.StatusRequest{})
	if s.check("status", err) {
		s.note("quota %v", response.(*pb.StatusResponse).DbSizeQuota > 0)
	}
}

// memberID is the id of the server's only member.
func (s *session) memberID() uint64 {
	response, err := s.call(get("any"))
	if err != nil {
		s.note("member id -> %s", failure(err))
		return 0
	}
	return response.(*pb.RangeResponse).Header.MemberId
}

// alarms leaves out unknown actions: etcd 3.6 panics on them.
func alarms(s *session) {
	s.do(&pb.AlarmRequest{}, &pb.AlarmRequest{Alarm: pb.AlarmType_NOSPACE},
		&pb.AlarmRequest{Alarm: pb.AlarmType_CORRUPT},
		&pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE})
}

func alarmNoSpace(s *session) {
	member := s.memberID()
	raise := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE,
		MemberID: member}
	clear := &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE,
		MemberID: member}
	s.quietly(put("a", "1"), put("b", "1"), put("c", "1"), grant(141, 1000), putLeased("l", "1", 141))
	s.do(raise, raise, &pb.AlarmRequest{}, &pb.AlarmRequest{Alarm: pb.AlarmType_CORRUPT},
		&pb.StatusRequest{})
	s.statusErrors()
	s.do(put("a", "2"), put("", "2"), grant(142, 100), always(put("a", "2")), always(get("a")),
		txn(when(versionIs("a", equal, 9)), ops(put("a", "2")), ops(get("a"))),
		txn(when(versionIs("a", equal, 1)), ops(remove("a")), ops(put("a", "3"))),
		txn(when(versionIs("b", equal, 1)), ops(remove("b")), nil),
		&pb.PutRequest{Key: []byte("c"), IgnoreValue: true}, putLeased("c", "1", 999))
	s.do(get("a"), remove("c"), compact(s.rev(4)), timeToLive(141), revoke(141), everything())
	s.keepAlive(141)
	s.do(clear, clear, &pb.AlarmRequest{}, put("a", "4"), grant(142, 100))
}

// statusErrors notes the faults that the status tells, without member ids.
func (s *session) statusErrors() {
	response, err := s.call(&pb.StatusRequest{})
	if err != nil {
		s.note("status -> %s", failure(err))
		return
	}
	for _, text := range response.(*pb.StatusResponse).Errors {
		s.note("status error %q", regexp.MustCompile(`\d{2,}`).ReplaceAllString(text, "ID"))
	}
}

func hashes(s *session) {
	s.do(put("a", "1"), &pb.HashRequest{})
}

// hashesKV leaves out the compacted revision itself, where etcd may answer with a hash that it
// kept from the compaction.
func hashesKV(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), remove("a"), put("b", "2"), compact(s.rev(2)))
	for _, n := range []int64{1, 3, 4, 5} {
		s.do(&pb.HashKVRequest{Revision: s.rev(n)})
	}
	s.do(&pb.HashKVRequest{}, &pb.HashKVRequest{Revision: -1}, &pb.HashKVRequest{Revision: largest})
	s.equalHashes(s.rev(4), s.rev(4))
	s.equalHashes(s.rev(3), s.rev(4))
	s.equalHashes(s.rev(4), 0)
}

// equalHashes notes whether the keys hash alike as of two revisions.
func (s *session) equalHashes(first, second int64) {
	one, err1 := s.call(&pb.HashKVRequest{Revision: first})
	two, err2 := s.call(&pb.HashKVRequest{Revision: second})
	if err := errors.Join(err1, err2); err != nil {
		s.note("hashes -> %s", failure(err))
		return
	}
	s.note("equal hashes at %s and %s: %v", s.revision(first), s.revision(second),
		one.(*pb.HashKVResponse).Hash == two.(*pb.HashKVResponse).Hash)
}

func hashesKVFresh(s *session) {
	s.do(&pb.HashKVRequest{}, &pb.HashKVRequest{Revision: 1}, &pb.HashKVRequest{Revision: 2})
}

func defragments(s *session) {
	s.do(put("a", "1"), &pb.DefragmentRequest{}, get("a"), put("a", "2"))
}

func movesLeader(s *session) {
	s.do(&pb.MoveLeaderRequest{}, &pb.MoveLeaderRequest{TargetID: 12345})
}

func downgrades(s *session) {
	validate, cancel := pb.DowngradeRequest_VALIDATE, pb.DowngradeRequest_CANCEL
	s.do(&pb.DowngradeRequest{Action: validate, Version: "nonsense"},
		&pb.DowngradeRequest{Action: validate}, &pb.DowngradeRequest{Action: validate, Version: "1.0"},
		&pb.DowngradeRequest{Action: cancel}, &pb.DowngradeRequest{Action: 9, Version: "3.5.0"})
}

// snapshots looks at the framing of a snapshot: the payload is the server's own format.
func snapshots(s *session) {
	const blobBytesMax = 32 * 1024
	s.quietly(put("a", string(make([]byte, 200*1024))))
	stream, err := pb.NewMaintenanceClient(s.conn).Snapshot(s.ctx, &pb.SnapshotRequest{})
	if !s.check("snapshot stream", err) {
		return
	}
	var payload, last []byte
	remains, counted, bounded := uint64(0), true, true
	for first := true; ; first = false {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.note("snapshot -> %s", failure(err))
			return
		}
		if first {
			remains = response.RemainingBytes + uint64(len(response.Blob))
			s.note("header %s", s.message(response.Header))
			s.note("version %v", response.Version)
		}
		payload, last = append(payload, last...), response.Blob
		bounded = bounded && len(response.Blob) <= blobBytesMax
		if response.RemainingBytes > 0 {
			remains -= uint64(len(response.Blob))
			counted = counted && response.RemainingBytes == remains
		}
	}
	sum := sha256.Sum256(payload)
	s.note("counted down %v, blobs bounded %v, sum last %v", counted, bounded, bytes.Equal(sum[:],
		last))
}

func memberPeers(s *session) {
	list, err := s.call(&pb.MemberListRequest{})
	if s.check("members", err) {
		s.note("%d peer URLs", len(list.(*pb.MemberListResponse).Members[0].PeerURLs))
	}
}

func members(s *session) {
	list, err := s.call(&pb.MemberListRequest{Linearizable: true})
	s.note("members -> %s", s.outcome(list, err))
	if err == nil {
		found := list.(*pb.MemberListResponse)
		s.note("itself %v", found.Members[0].ID == found.Header.MemberId)
		s.note("reachable %v", found.Members[0].ClientURLs[0] == "http://"+s.server.endpoint)
	}
	s.do(&pb.MemberListRequest{}, &pb.MemberAddRequest{},
		&pb.MemberAddRequest{PeerURLs: []string{"::"}},
		&pb.MemberRemoveRequest{ID: 4711},
		&pb.MemberUpdateRequest{ID: 4711, PeerURLs: []string{"http://127.0.0.1:1"}},
		&pb.MemberUpdateRequest{ID: 4711, PeerURLs: []string{"nonsense"}},
		&pb.MemberPromoteRequest{ID: 4711})
}
