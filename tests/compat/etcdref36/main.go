// etcdref serves etcd 3.6 as a library: one member, real fsync, defaults except what the flags say.
// It is the reference that tests and measurements compare a server with.
package main

import (
	"flag"
	"log"
	"os"
	"os/signal"
	"syscall"

	"go.etcd.io/etcd/server/v3/embed"
)

func main() {
	cfg := embed.NewConfig()
	cfg.LogLevel = "fatal"
	listen := flag.String("listen", "http://127.0.0.1:2379", "client URL")
	flag.StringVar(&cfg.Dir, "dir", "etcdref.data", "data directory")
	flag.StringVar(&cfg.Name, "name", cfg.Name, "member name")
	flag.StringVar(&cfg.ClientTLSInfo.CertFile, "cert-file", "",
		"server certificate; the client URL is then https")
	flag.StringVar(&cfg.ClientTLSInfo.KeyFile, "key-file", "", "server key")
	flag.DurationVar(&cfg.WatchProgressNotifyInterval, "watch-progress-notify-interval",
		cfg.WatchProgressNotifyInterval, "time between unasked progress notifications")
	flag.Int64Var(&cfg.QuotaBackendBytes, "quota-backend-bytes", cfg.QuotaBackendBytes,
		"size of the data at which writes are refused; 0 is etcd's default")
	flag.UintVar(&cfg.MaxTxnOps, "max-txn-ops", cfg.MaxTxnOps, "operations per transaction")
	flag.Parse()

	if err := addresses(cfg, *listen); err != nil {
		log.Fatal(err)
	}
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer etcd.Close()

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	select {
	case <-stop:
	case err := <-etcd.Err():
		log.Print(err)
	}
}
