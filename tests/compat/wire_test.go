package compat

import (
	"context"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// TestWire compares what is below the API: methods, health, metadata, malformed messages.
func TestWire(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "unknown methods", run: wireUnknown},
		{name: "health", run: wireHealth},
		{name: "malformed messages", run: wireMalformed},
		{name: "unknown fields", run: wireUnknownFields},
		{name: "fields of the wrong type", run: wireWrongTypes,
			open: "Python's protobuf skips a field of the wrong wire type, Go's refuses it"},
		{name: "compressed messages", run: wireCompressed, open: "compressed requests are refused"},
		{name: "metadata", run: wireMetadata},
		{name: "deadlines", run: wireDeadlines},
		{name: "many requests at once", run: wireConcurrent},
	})
}

// rawCodec passes message bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }

func (rawCodec) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = append([]byte(nil), data...)
	return nil
}

// raw calls a method with the bytes of a message and returns the bytes of the answer.
func (s *session) raw(method string, request []byte) ([]byte, error) {
	var response []byte
	err := s.conn.Invoke(s.ctx, method, &request, &response, grpc.ForceCodec(rawCodec{}))
	return response, err
}

func wireUnknown(s *session) {
	for _, method := range []string{"/etcdserverpb.KV/Nothing", "/etcdserverpb.Nothing/Range",
		"/nothing/at/all", "/etcdserverpb.KV/range"} {
		_, err := s.raw(method, nil)
		s.note("%s -> %s", method, failure(err))
	}
}

func wireHealth(s *session) {
	client := grpc_health_v1.NewHealthClient(s.conn)
	for _, service := range []string{"", "etcdserverpb.KV", "nothing"} {
		request := &grpc_health_v1.HealthCheckRequest{Service: service}
		response, err := client.Check(s.ctx, request)
		s.note("check %q -> %v %v", service, response.GetStatus(), err)
		stream, err := client.Watch(s.ctx, request)
		if !s.check("health stream", err) {
			return
		}
		response, err = stream.Recv()
		s.note("watch %q -> %v %v", service, response.GetStatus(), err)
	}
}

func wireMalformed(s *session) {
	for _, data := range []string{"\x0a", "\x0a\x05ab", "\xff\xff\xff", "\x0a\x01a\x0a"} {
		for _, method := range []string{"KV/Range", "KV/Put", "KV/Txn", "Lease/LeaseGrant"} {
			_, err := s.raw("/etcdserverpb."+method, []byte(data))
			s.note("%s %q -> %s", method, data, status.Code(err))
		}
	}
	s.do(put("a", "1"))
}

// wireWrongTypes gives a number where the field with that number is of bytes.
func wireWrongTypes(s *session) {
	for _, method := range []string{"KV/Range", "KV/Put", "KV/Txn"} {
		_, err := s.raw("/etcdserverpb."+method, []byte("\x08\x01"))
		s.note("%s -> %s", method, status.Code(err))
	}
}

// wireUnknownFields puts with a field that no version has, which is to be ignored.
func wireUnknownFields(s *session) {
	response, err := s.raw("/etcdserverpb.KV/Put", []byte("\x0a\x01a\x12\x011\xda\x3e\x03new"))
	s.note("put -> %v %v", len(response) > 0, err)
	_, err = s.raw("/etcdserverpb.KV/Put", []byte("\x0a\x01b\x0a\x01c\x12\x011\x12\x012"))
	s.note("put with repeated fields -> %v", err)
	_, err = s.raw("/etcdserverpb.KV/Put", nil)
	s.note("put of nothing -> %s", failure(err))
	s.do(everything())
}

func wireCompressed(s *session) {
	kv := pb.NewKVClient(s.conn)
	response, err := kv.Put(s.ctx, put("a", "1"), grpc.UseCompressor(gzip.Name))
	s.note("put -> %s", s.outcome(response, err))
	s.do(get("a"))
}

func wireMetadata(s *session) {
	kv := pb.NewKVClient(s.conn)
	for _, pairs := range [][]string{
		{"client-api-version", "3.6"}, {"client-api-version", "9.9"}, {"client-api-version", ""},
		{"client-api-version", "nonsense"}, {"hasleader", "true"}, {"hasleader", "nonsense"},
		{"binary-bin", "\x00\xff"}, {"x-long", fmt.Sprintf("%04000d", 1)},
	} {
		ctx := metadata.AppendToOutgoingContext(s.ctx, pairs...)
		response, err := kv.Put(ctx, put("a", "1"))
		s.note("%s %.20q -> %s", pairs[0], pairs[1], s.outcome(response, err))
	}
}

func wireDeadlines(s *session) {
	ctx, cancel := context.WithTimeout(s.ctx, 24*time.Hour)
	defer cancel()
	kv := pb.NewKVClient(s.conn)
	response, err := kv.Put(ctx, put("a", "1"))
	s.note("a day -> %s", s.outcome(response, err))
	watching, stop := context.WithTimeout(s.ctx, 300*time.Millisecond)
	defer stop()
	w := s.watchIn(watching)
	w.create(from(0, "a", ""))
	r, ok := w.next(responseTimeout)
	s.note("watch past its deadline -> %v %s", ok, status.Code(r.err))
}

// wireConcurrent has more requests in flight than one frame or flow control window holds.
func wireConcurrent(s *session) {
	const inFlight = 200
	value := string(make([]byte, 32*1024))
	done := make(chan error, inFlight)
	for i := range inFlight {
		go func() {
			_, err := s.call(put(fmt.Sprintf("k%03d", i), value))
			done <- err
		}()
	}
	for range inFlight {
		if err := <-done; err != nil {
			s.note("put -> %s", failure(err))
		}
	}
	count := everything()
	count.CountOnly = true
	s.do(count)
	response, err := s.call(everything())
	if err != nil {
		s.note("range -> %s", failure(err))
		return
	}
	seen := map[int64]bool{}
	for _, kv := range response.(*pb.RangeResponse).Kvs {
		seen[kv.ModRevision-s.base] = true
	}
	s.note("%d revisions up to %s", len(seen),
		s.revision(response.(*pb.RangeResponse).Header.Revision))
}
