package compat

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
)

// TestRangeStream compares streamed reads with etcd 3.7, which brought them.
func TestRangeStream(t *testing.T) {
	compare(t, reference37, []conversation{
		{name: "keys and range ends", run: streamKeys},
		{name: "limit, count and more", run: streamLimits},
		{name: "nothing found", run: streamNothing},
		{name: "old, compacted and future revisions", run: streamRevisions},
		{name: "keys only and count only", run: streamParts},
		{name: "options that are refused", run: streamRefused},
		{name: "many keys", run: streamMany},
		{name: "large values", run: streamLarge},
	})
}

// stream reads a range by RangeStream, joins its chunks and notes them as one answer; how many
// keys a chunk holds is the server's choice, but not which chunk has header, count and more.
func (s *session) stream(requests ...*pb.RangeRequest) {
	for _, request := range requests {
		joined, err := s.chunks(request)
		s.note("stream %s -> %s", s.message(request), s.outcome(joined, err))
	}
}

func (s *session) chunks(request *pb.RangeRequest) (*pb.RangeResponse, error) {
	stream, err := s.conn.NewStream(s.ctx, &grpc.StreamDesc{ServerStreams: true},
		"/etcdserverpb.KV/RangeStream", grpc.ForceCodec(rawCodec{}))
	if err != nil {
		return nil, err
	}
	message, err := request.Marshal()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(stream.SendMsg(&message), stream.CloseSend()); err != nil {
		return nil, err
	}
	joined, last := &pb.RangeResponse{}, &pb.RangeResponse{}
	for first := true; ; first = false {
		var chunk []byte
		err := stream.RecvMsg(&chunk)
		if errors.Is(err, io.EOF) {
			joined.Header, joined.Count, joined.More = last.Header, last.Count, last.More
			return joined, nil
		}
		if err != nil {
			return nil, err
		}
		if !first {
			s.checkInnerChunk(last)
		}
		if last, err = rangeResponseOf(chunk); err != nil {
			return nil, err
		}
		joined.Kvs = append(joined.Kvs, last.Kvs...)
	}
}

// checkInnerChunk notes what only the last chunk of a stream may have, and a lack of keys.
func (s *session) checkInnerChunk(chunk *pb.RangeResponse) {
	if chunk.Header != nil || chunk.Count != 0 || chunk.More {
		s.note("inner chunk with header %v, count %d, more %v", chunk.Header != nil, chunk.Count,
			chunk.More)
	}
	if len(chunk.Kvs) == 0 {
		s.note("inner chunk without keys")
	}
}

// rangeResponseOf takes the only field, number 1, out of a RangeStreamResponse.
func rangeResponseOf(message []byte) (*pb.RangeResponse, error) {
	response := &pb.RangeResponse{}
	for len(message) > 0 {
		number, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		field, length := protowire.ConsumeBytes(message[size:])
		if number != 1 || kind != protowire.BytesType || length < 0 {
			return nil, fmt.Errorf("field %d of kind %d", number, kind)
		}
		if err := response.Unmarshal(field); err != nil {
			return nil, err
		}
		message = message[size+length:]
	}
	return response, nil
}

func streamKeys(s *session) {
	s.quietly(put("a", "1"), put("ab", "2"), put("b", "3"), put("c", "4"), put("\xff", "5"))
	s.stream(get("a"), get("missing"), get(""), span("a", "c"), prefix("a"), span("b", "\x00"),
		everything(), span("c", "a"), span("a", "a"), span("", "b"))
}

func streamLimits(s *session) {
	for i := range 50 {
		s.quietly(put(fmt.Sprintf("k%02d", i), "v"))
	}
	for _, limit := range []int64{0, 1, 9, 10, 11, 30, 49, 50, 51, -1} {
		r := prefix("k")
		r.Limit = limit
		s.stream(r)
	}
}

func streamNothing(s *session) {
	s.stream(everything(), get("a"), at(s.rev(0), everything()))
	s.quietly(put("a", "1"), remove("a"))
	s.stream(everything(), at(s.rev(1), everything()))
}

func streamRevisions(s *session) {
	s.quietly(put("a", "1"), put("b", "1"), put("a", "2"), remove("b"), put("c", "1"))
	for n := int64(0); n <= 6; n++ {
		s.stream(at(s.rev(n), everything()))
	}
	s.do(compact(s.rev(3)))
	for n := int64(2); n <= 6; n++ {
		s.stream(at(s.rev(n), everything()), at(s.rev(n), get("a")), at(s.rev(n), span("z", "a")))
	}
	s.stream(at(-1, everything()))
}

func streamParts(s *session) {
	s.quietly(grant(161, 1000))
	for i := range 25 {
		s.quietly(putLeased(fmt.Sprintf("k%02d", i), "v", 161))
	}
	s.stream(&pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), KeysOnly: true},
		&pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), KeysOnly: true, Limit: 12},
		&pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), CountOnly: true},
		&pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), CountOnly: true, Limit: 3},
		&pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), Serializable: true})
}

func streamRefused(s *session) {
	s.quietly(put("a", "1"), put("b", "2"))
	for target := pb.RangeRequest_KEY; target <= pb.RangeRequest_VALUE+1; target++ {
		for order := pb.RangeRequest_NONE; order <= pb.RangeRequest_DESCEND+1; order++ {
			s.stream(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"),
				SortTarget: target, SortOrder: order})
		}
	}
	s.stream(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MinModRevision: s.rev(1)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MaxModRevision: s.rev(1)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MinCreateRevision: s.rev(1)},
		&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), MaxCreateRevision: s.rev(1)},
		&pb.RangeRequest{MinModRevision: s.rev(1)})
}

func streamMany(s *session) {
	for i := range 1500 {
		s.quietly(put(fmt.Sprintf("k%04d", i), fmt.Sprint(i)))
	}
	limited := prefix("k")
	limited.Limit = 1234
	s.stream(prefix("k"), limited, at(s.rev(700), prefix("k")))
}

func streamLarge(s *session) {
	for i := range 40 {
		s.quietly(put(fmt.Sprintf("k%02d", i), strings.Repeat("v", (i%8)*128*1024)))
	}
	s.stream(prefix("k"), at(s.rev(11), prefix("k")))
}
