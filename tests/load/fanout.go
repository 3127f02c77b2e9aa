package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	stampBytes   = 19 // of Unix nanoseconds in decimal
	drainTimeout = 30 * time.Second
	// one watcher in so many measures the lag, which costs the client time
	watchersPerLag = 10
)

// delivery is what mode fanout reports.
type delivery struct {
	Mode          string  `json:"mode"`
	Watchers      int     `json:"watchers"`
	Puts          int     `json:"operations"`
	Errors        int     `json:"errors"`
	Delivered     int64   `json:"delivered"`
	PerSecond     float64 `json:"delivered_per_second"`
	Disordered    int64   `json:"disordered_or_twice"`
	Incomplete    int     `json:"watchers_incomplete"`
	LagP50        float64 `json:"lag_p50_ms"`
	LagP99        float64 `json:"lag_p99_ms"`
	LagMax        float64 `json:"lag_max_ms"`
	ServerCPU     float64 `json:"server_cpu_us_per_event"`
	ServerRSS     float64 `json:"server_rss_mib"`
	ServerSeconds float64 `json:"server_cpu_seconds"`
}

// A watcher counts events up to the last key and checks their order.
type watcher struct {
	events     int
	disordered int64
	revision   int64
	measures   bool
	lags       []float64 // milliseconds
	done       chan struct{}
}

// fanout lets every watcher watch all that some writers put. Each must get each event once, in
// order; the last key, put when the writers are done, tells a watcher that nothing more comes.
func fanout(o options, clients []*clientv3.Client) (delivery, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	prefix := fmt.Sprintf("%sfanout-%d/", o.prefix, time.Now().UnixNano())
	last := prefix + "~last"
	watchers := make([]*watcher, o.watchers)
	for i := range watchers {
		watchers[i] = &watcher{measures: i%watchersPerLag == 0, done: make(chan struct{})}
		events := clients[i%len(clients)].Watch(ctx, prefix, clientv3.WithPrefix(),
			clientv3.WithPrevKV(), clientv3.WithCreatedNotify())
		if created := <-events; created.Err() != nil {
			return delivery{}, created.Err()
		}
		go watchers[i].follow(events, last)
	}
	before, start := usageOf(o.pids), time.Now()
	puts, failed := write(ctx, o, clients, prefix)
	if _, err := clients[0].Put(ctx, last, stamped("")); err != nil {
		return delivery{}, err
	}
	incomplete := await(watchers)
	elapsed, after := time.Since(start).Seconds(), usageOf(o.pids)
	d := delivery{Mode: o.mode, Watchers: o.watchers, Puts: puts, Errors: failed,
		Incomplete: incomplete, ServerRSS: after.rssMiB,
		ServerSeconds: after.cpuSeconds - before.cpuSeconds}
	d.gather(watchers, puts, elapsed)
	return d, nil
}

// await returns how many watchers did not see the last key in time.
func await(watchers []*watcher) int {
	deadline, late := time.After(drainTimeout), 0
	for i, w := range watchers {
		select {
		case <-w.done:
		case <-deadline:
			for _, rest := range watchers[i:] {
				select {
				case <-rest.done:
				default:
					late++
				}
			}
			return late
		}
	}
	return 0
}

// gather adds up what complete watchers saw; one that missed an event is incomplete as well.
func (d *delivery) gather(watchers []*watcher, puts int, elapsed float64) {
	var lags []float64
	for _, w := range watchers {
		select {
		case <-w.done:
		default:
			continue
		}
		d.Delivered += int64(w.events)
		d.Disordered += w.disordered
		if w.events != puts {
			d.Incomplete++
		}
		lags = append(lags, w.lags...)
	}
	slices.Sort(lags)
	d.PerSecond = float64(d.Delivered) / elapsed
	d.LagP50, d.LagP99, d.LagMax = quantile(lags, .5), quantile(lags, .99), quantile(lags, 1)
	if d.Delivered > 0 {
		d.ServerCPU = d.ServerSeconds * 1e6 / float64(d.Delivered)
	}
}

func (w *watcher) follow(events clientv3.WatchChan, last string) {
	defer close(w.done)
	for response := range events {
		now := time.Now().UnixNano()
		for _, event := range response.Events {
			if event.Kv.ModRevision <= w.revision {
				w.disordered++
			}
			w.revision = event.Kv.ModRevision
			if string(event.Kv.Key) == last {
				return
			}
			w.events++
			if w.measures {
				sent, _ := strconv.ParseInt(string(event.Kv.Value[:stampBytes]), 10, 64)
				w.lags = append(w.lags, float64(now-sent)/1e6)
			}
		}
	}
}

// write puts from several writers at once for the measured time.
func write(ctx context.Context, o options, clients []*clientv3.Client, prefix string) (int, int) {
	value := o.value()[min(stampBytes, o.valueSize):]
	stop := make(chan struct{})
	due := schedule(o.rate, stop)
	var puts, failed atomic.Int64
	var writers sync.WaitGroup
	for id := range o.clients {
		writers.Go(func() {
			for {
				if _, ok := turn(due, stop); !ok {
					return
				}
				key := fmt.Sprintf("%sk%d", prefix, id)
				if _, err := clients[id%len(clients)].Put(ctx, key, stamped(value)); err != nil {
					failed.Add(1)
					continue
				}
				puts.Add(1)
			}
		})
	}
	time.Sleep(o.duration)
	close(stop)
	writers.Wait()
	return int(puts.Load()), int(failed.Load())
}

// stamped puts the present time before a value.
func stamped(value string) string {
	return fmt.Sprintf("%0*d", stampBytes, time.Now().UnixNano()) + value
}
