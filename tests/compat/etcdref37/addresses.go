package main

import (
	"net"
	"net/url"

	"go.etcd.io/etcd/server/v3/embed"
)

// addresses makes cfg a cluster of one: clients at listen, the peer port any free one on loopback.
func addresses(cfg *embed.Config, listen string) error {
	client, err := url.Parse(listen)
	if err != nil {
		return err
	}
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	peer := url.URL{Scheme: "http", Host: probe.Addr().String()}
	if err := probe.Close(); err != nil {
		return err
	}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	return nil
}
