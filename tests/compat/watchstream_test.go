package compat

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

const (
	responseTimeout = 10 * time.Second
	// quiet is how long a stream is listened to before it counts as silent.
	quiet = 400 * time.Millisecond
	// responsesMax is far above what any case provokes, so that the receiver never waits.
	responsesMax = 4096
)

// A watchStream is one Watch call. Its responses are noted in full by response, or, where the
// grouping of events into responses is the server's own choice, by events.
type watchStream struct {
	s        *session
	stream   pb.Watch_WatchClient
	received chan received
	held     []received // what came while another watcher was being created
}

type received struct {
	response *pb.WatchResponse
	err      error
}

// watch opens a stream, which ends with the case.
func (s *session) watch() *watchStream { return s.watchIn(s.ctx) }

func (s *session) watchIn(ctx context.Context) *watchStream {
	w := &watchStream{s: s, received: make(chan received, responsesMax)}
	stream, err := pb.NewWatchClient(s.conn).Watch(ctx)
	if err != nil {
		w.received <- received{nil, err}
		return w
	}
	w.stream = stream
	go func() {
		for {
			response, err := stream.Recv()
			w.received <- received{response, err}
			if err != nil {
				return
			}
		}
	}()
	return w
}

// send sends a request without waiting for anything.
func (w *watchStream) send(request *pb.WatchRequest) {
	if w.stream == nil {
		return
	}
	if err := w.stream.Send(request); err != nil {
		w.s.note("send -> %s", failure(err))
	}
}

// create asks for watchers and notes the response to each. History of others may come before it.
func (w *watchStream) create(creates ...*pb.WatchCreateRequest) {
	for _, create := range creates {
		w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}})
		w.s.note("create %s", w.s.message(create))
		earlier := w.held
		w.held = nil
		r, ok := w.next(responseTimeout)
		for ok && r.err == nil && !r.response.Created {
			earlier = append(earlier, r)
			r, ok = w.next(responseTimeout)
		}
		w.held = earlier
		w.answered(r, ok)
	}
}

// cancel asks for the end of a watcher; the answer is noted by response.
func (w *watchStream) cancel(id int64) {
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{
		CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
	w.s.note("cancel %d", id)
}

// progress asks how far the stream is; the answer is noted by response.
func (w *watchStream) progress() {
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{
		ProgressRequest: &pb.WatchProgressRequest{}}})
	w.s.note("progress")
}

func (w *watchStream) next(timeout time.Duration) (received, bool) {
	if len(w.held) > 0 {
		r := w.held[0]
		w.held = w.held[1:]
		return r, true
	}
	select {
	case r := <-w.received:
		return r, true
	case <-time.After(timeout):
		return received{}, false
	}
}

// response notes the next response in full.
func (w *watchStream) response() {
	w.answered(w.next(responseTimeout))
}

func (w *watchStream) answered(r received, ok bool) {
	if !ok {
		w.s.note("watch -> no response")
		return
	}
	w.s.note("watch -> %s", w.s.outcome(r.response, r.err))
}

// silence notes whether the stream stays silent.
func (w *watchStream) silence() {
	if r, ok := w.next(quiet); ok {
		w.s.note("watch, expected silent -> %s", w.s.outcome(r.response, r.err))
		return
	}
	w.s.note("watch -> silence")
}

// events waits for count events in all and notes those of each watcher in order.
//
// The grouping of revisions into responses is the server's choice within rules that are noted when
// broken: the header is not behind the events, and a revision is not split unless by fragments.
func (w *watchStream) events(count int) {
	byWatcher := map[int64][]string{}
	split := splitDetector{}
	var ended string
	for count > 0 && ended == "" {
		r, ok := w.next(responseTimeout)
		switch {
		case !ok:
			ended = fmt.Sprintf("no response, %d events missing", count)
		case r.err != nil || r.response.Canceled || r.response.Created:
			ended = w.s.outcome(r.response, r.err)
		default:
			w.s.checkResponse(r.response, split)
			for _, event := range r.response.Events {
				id := r.response.WatchId
				byWatcher[id] = append(byWatcher[id], w.s.message(event))
			}
			count -= len(r.response.Events)
		}
	}
	ids := make([]int64, 0, len(byWatcher))
	for id := range byWatcher {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		w.s.note("watcher %d -> %d events", id, len(byWatcher[id]))
		for _, event := range byWatcher[id] {
			w.s.note("  %s", event)
		}
	}
	if ended != "" {
		w.s.note("watch -> %s", ended)
	}
}

// through notes the events of the only watcher up to those of a revision.
func (w *watchStream) through(revision int64) {
	split := splitDetector{}
	for last := int64(0); last < revision; {
		r, ok := w.next(responseTimeout)
		if !ok || r.err != nil || r.response.Canceled {
			w.s.note("watch -> ended %v %s", ok, w.s.outcome(r.response, r.err))
			return
		}
		w.s.checkResponse(r.response, split)
		for _, event := range r.response.Events {
			w.s.note("  %s", w.s.message(event))
			last = event.Kv.ModRevision
		}
	}
}

// splitDetector holds for each watcher the last revision that a complete response ended with.
type splitDetector map[int64]int64

func (s *session) checkResponse(response *pb.WatchResponse, ended splitDetector) {
	if len(response.Events) == 0 {
		return
	}
	first := response.Events[0].Kv.ModRevision
	last := response.Events[len(response.Events)-1].Kv.ModRevision
	if ended[response.WatchId] == first {
		s.note("watcher %d: revision %s is split", response.WatchId, s.revision(first))
	}
	if response.Header.Revision < last {
		s.note("watcher %d: header %s is behind event %s", response.WatchId,
			s.revision(response.Header.Revision), s.revision(last))
	}
	if !response.Fragment {
		ended[response.WatchId] = last
	}
}

// describe is a short form of events for cases that have many.
func (s *session) describe(events []*mvccpb.Event) string {
	parts := make([]string, len(events))
	for i, event := range events {
		parts[i] = fmt.Sprintf("%s %q@%s", event.Type, event.Kv.Key,
			s.revision(event.Kv.ModRevision))
	}
	return strings.Join(parts, ", ")
}

// everyKey watches all keys from a revision on, with previous pairs.
func everyKey(start int64) *pb.WatchCreateRequest {
	return &pb.WatchCreateRequest{
		Key: []byte("\x00"), RangeEnd: []byte("\x00"), StartRevision: start, PrevKv: true,
	}
}

// from watches [key, end) from a revision on; an empty end means the key alone.
func from(start int64, key, end string) *pb.WatchCreateRequest {
	create := &pb.WatchCreateRequest{Key: []byte(key), StartRevision: start}
	if end != "" {
		create.RangeEnd = []byte(end)
	}
	return create
}
