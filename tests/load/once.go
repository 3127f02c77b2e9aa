package main

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	startTimeout = 5 * time.Minute
	startPoll    = 5 * time.Millisecond
)

// once is what modes report that do one thing.
type once struct {
	Mode    string  `json:"mode"`
	Seconds float64 `json:"seconds"`
	Keys    int     `json:"keys"`
}

// first waits until a server that is starting answers a read of a key that it has.
func first(o options) (once, error) {
	retry := backoff.Config{BaseDelay: startPoll, Multiplier: 1, MaxDelay: startPoll}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{o.endpoint}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry})},
	})
	if err != nil {
		return once{}, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	for {
		found, err := client.Get(ctx, o.key(0))
		if err == nil && len(found.Kvs) == 0 {
			return once{}, errors.New("the server has lost its keys")
		}
		if err == nil {
			return once{o.mode, time.Since(time.Unix(0, o.since)).Seconds(), 1}, nil
		}
		if ctx.Err() != nil {
			return once{}, err
		}
		time.Sleep(startPoll)
	}
}

// scan reads all keys in one answer.
func scan(o options, client *clientv3.Client) (once, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	start := time.Now()
	found, err := client.Get(ctx, o.prefix, clientv3.WithPrefix())
	if err != nil {
		return once{}, err
	}
	return once{o.mode, time.Since(start).Seconds(), len(found.Kvs)}, nil
}
