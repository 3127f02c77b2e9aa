package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// waitingMax bounds the requests of an open loop that are due and not yet sent.
const waitingMax = 1 << 20

// measured is the result of a drive.
type measured struct {
	Mode        string  `json:"mode"`
	Operations  int     `json:"operations"`
	Errors      int     `json:"errors"`
	Conflicts   int     `json:"conflicts"`
	FirstError  string  `json:"first_error,omitempty"`
	PerSecond   float64 `json:"per_second"`
	P50         float64 `json:"p50_ms"`
	P99         float64 `json:"p99_ms"`
	P999        float64 `json:"p999_ms"`
	Max         float64 `json:"max_ms"`
	ServerCPU   float64 `json:"server_cpu_us_per_operation"`
	ServerCores float64 `json:"server_cores"`
	ServerRSS   float64 `json:"server_rss_mib"`
}

// tally is what one worker has measured.
type tally struct {
	latencies []float64 // milliseconds
	conflicts int
	errors    int
	first     error
}

// drive lets workers repeat an operation and measures after a warm-up.
func drive(o options, clients []*clientv3.Client, operate func(context.Context, *worker) error,
) measured {
	var measuring atomic.Bool
	stop := make(chan struct{})
	due := schedule(o.rate, stop)
	tallies := make([]tally, o.clients)
	var workers sync.WaitGroup
	for id := range o.clients {
		w := &worker{id: id, client: clients[id%len(clients)], revisions: map[int]int64{},
			random: uint64(id)*2654435761 + 12345}
		workers.Go(func() { repeat(o, w, operate, due, stop, &measuring, &tallies[id]) })
	}
	time.Sleep(o.warmUp)
	before, start := usageOf(o.pids), time.Now()
	measuring.Store(true)
	time.Sleep(o.duration)
	measuring.Store(false)
	after, elapsed := usageOf(o.pids), time.Since(start).Seconds()
	close(stop)
	workers.Wait()
	return summary(o, tallies, before, after, elapsed)
}

// schedule sends the times at which requests of an open loop are due; a closed loop has none.
func schedule(rate float64, stop <-chan struct{}) <-chan time.Time {
	if rate <= 0 {
		return nil
	}
	due := make(chan time.Time, waitingMax)
	go func() {
		start := time.Now()
		for n := 0; ; n++ {
			at := start.Add(time.Duration(float64(n) / rate * float64(time.Second)))
			time.Sleep(time.Until(at))
			select {
			case <-stop:
				return
			case due <- at:
			}
		}
	}()
	return due
}

// turn waits until the next request is due and returns since when it is; false is the end.
func turn(due <-chan time.Time, stop <-chan struct{}) (time.Time, bool) {
	if due == nil {
		select {
		case <-stop:
			return time.Time{}, false
		default:
			return time.Now(), true
		}
	}
	select {
	case <-stop:
		return time.Time{}, false
	case at := <-due:
		return at, true
	}
}

// repeat operates until stopped. In an open loop a request's time begins when it was due, so
// that what waits behind a slow one counts as slow too.
func repeat(o options, w *worker, operate func(context.Context, *worker) error,
	due <-chan time.Time, stop <-chan struct{}, measuring *atomic.Bool, t *tally) {
	for {
		begin, ok := turn(due, stop)
		if !ok {
			return
		}
		// deadlines vary as kube-apiserver's do, so grpc-timeout is a new header value each time
		jitter := time.Duration(w.draw(5_000_000)) * time.Microsecond
		ctx, cancel := context.WithTimeout(context.Background(), o.timeout-jitter)
		err := operate(ctx, w)
		cancel()
		w.done++
		if measuring.Load() {
			t.count(time.Since(begin), err)
		}
	}
}

func (t *tally) count(elapsed time.Duration, err error) {
	switch {
	case err == nil:
		t.latencies = append(t.latencies, float64(elapsed.Microseconds())/1000)
	case errors.Is(err, errConflict):
		t.conflicts++
	default:
		t.errors++
		if t.first == nil {
			t.first = err
		}
	}
}

func summary(o options, tallies []tally, before, after usage, elapsed float64) measured {
	m := measured{Mode: o.mode, ServerRSS: after.rssMiB}
	var latencies []float64
	for _, t := range tallies {
		latencies = append(latencies, t.latencies...)
		m.Conflicts += t.conflicts
		m.Errors += t.errors
		if m.FirstError == "" && t.first != nil {
			m.FirstError = t.first.Error()
		}
	}
	slices.Sort(latencies)
	m.Operations = len(latencies)
	m.PerSecond = float64(m.Operations) / elapsed
	m.P50, m.P99 = quantile(latencies, .5), quantile(latencies, .99)
	m.P999, m.Max = quantile(latencies, .999), quantile(latencies, 1)
	m.ServerCores = (after.cpuSeconds - before.cpuSeconds) / elapsed
	if m.Operations > 0 {
		m.ServerCPU = (after.cpuSeconds - before.cpuSeconds) * 1e6 / float64(m.Operations)
	}
	return m
}

// quantile of sorted numbers; 0 if there are none.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}
