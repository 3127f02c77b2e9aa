package main

import (
	"net/url"

	"go.etcd.io/etcd/server/v3/embed"
)

// addresses makes cfg a cluster of one, with clients at listen. The member listens for peers
// wherever there is room and advertises an address at which nobody is: nobody looks for it.
func addresses(cfg *embed.Config, listen string) error {
	client, err := url.Parse(listen)
	if err != nil {
		return err
	}
	anywhere := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	nowhere := url.URL{Scheme: "http", Host: "127.0.0.1:1"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{anywhere}, []url.URL{nowhere}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	return nil
}
