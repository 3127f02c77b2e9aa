package main

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const dialTimeout = 20 * time.Second

// dial opens connections with kube-apiserver's keepalive and proves each by a read.
func dial(o options) ([]*clientv3.Client, error) {
	clients := make([]*clientv3.Client, o.conns)
	for i := range clients {
		client, err := clientv3.New(clientv3.Config{
			Endpoints: []string{o.endpoint}, Logger: zap.NewNop(), DialTimeout: dialTimeout,
			DialKeepAliveTime: 30 * time.Second, DialKeepAliveTimeout: 10 * time.Second,
		})
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
		_, err = client.Get(ctx, "/registry/health")
		cancel()
		if err != nil {
			return nil, fmt.Errorf("cannot reach %s: %w", o.endpoint, err)
		}
		clients[i] = client
	}
	return clients, nil
}
