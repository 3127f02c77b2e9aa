package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// filled is what mode fill reports.
type filled struct {
	Mode      string  `json:"mode"`
	Keys      int     `json:"keys"`
	PerSecond float64 `json:"per_second"`
}

// fill writes all keys, many in each transaction: it makes data, it does not measure.
func fill(o options, clients []*clientv3.Client) (filled, error) {
	const keysPerTxn = 100
	value, start := o.value(), time.Now()
	var next atomic.Int64
	var workers sync.WaitGroup
	failures := make(chan error, o.clients)
	for id := range o.clients {
		workers.Go(func() {
			for {
				end := int(next.Add(keysPerTxn))
				if end-keysPerTxn >= o.keys || len(failures) > 0 {
					return
				}
				var puts []clientv3.Op
				for i := end - keysPerTxn; i < min(end, o.keys); i++ {
					puts = append(puts, clientv3.OpPut(o.key(i), value))
				}
				ctx, cancel := context.WithTimeout(context.Background(), o.timeout)
				_, err := clients[id%len(clients)].Txn(ctx).Then(puts...).Commit()
				cancel()
				if err != nil {
					failures <- err
					return
				}
			}
		})
	}
	workers.Wait()
	close(failures)
	rate := float64(o.keys) / time.Since(start).Seconds()
	return filled{Mode: o.mode, Keys: o.keys, PerSecond: rate}, <-failures
}
