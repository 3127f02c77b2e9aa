// Command local-kube starts a kube-apiserver on a running store and keeps it
// until it is interrupted. deploy/local-kube.sh builds and calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"kvstore.test/kube/controlplane"
)

const (
	dialWithin = 3 * time.Second
	stopWithin = 10 * time.Second // open watches keep it longer; killing it loses nothing
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	store := flag.String("store", "http://127.0.0.1:2379", "client `URL` of the store")
	dir := flag.String("dir", "data/kube", "`directory` for keys, kubeconfig and log")
	port := flag.Int("port", 6443, "HTTPS `port` of the API server on 127.0.0.1")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(),
			"usage: local-kube.sh [--store URL] [--dir DIRECTORY] [--port PORT]"+
				" [-- KUBE-APISERVER FLAGS]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := run(ctx, *store, *dir, *port, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "local-kube:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, store, dir string, port int, flags []string) error {
	if err := reachable(store); err != nil {
		return err
	}
	if err := free(port); err != nil {
		return err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	bin := filepath.Dir(self)
	// The log is of one start, so that it does not grow for ever.
	err = os.Remove(filepath.Join(dir, controlplane.LogName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	server, err := controlplane.Start(controlplane.Options{
		Binary: filepath.Join(bin, "kube-apiserver"),
		Dir:    dir,
		Store:  store,
		Port:   port,
		Flags:  flags,
	})
	if err != nil {
		return err
	}
	fmt.Printf("starting kube-apiserver on %s; its log is %s\n", store, server.LogPath)
	if err := server.WaitReady(ctx); err != nil {
		_ = server.Stop(stopWithin) // the reason to stop is the error to show
		return err
	}
	fmt.Printf("ready on %s; nothing but the API server runs: objects are stored and watched,\n"+
		"but no controller or node acts on them, and a deleted namespace stays Terminating\n"+
		"try\n  %s --kubeconfig %s get namespaces\nCtrl-C stops it\n",
		server.URL, filepath.Join(bin, "kubectl"), server.Kubeconfig)
	select {
	case <-server.Done():
		return server.Failure(5)
	case <-ctx.Done():
		fmt.Println("stopping")
		_ = server.Stop(stopWithin)
		return nil
	}
}

func reachable(store string) error {
	target, err := url.Parse(store)
	if err != nil || target.Host == "" || target.Port() == "" {
		return fmt.Errorf("--store %s is not a URL like http://127.0.0.1:2379", store)
	}
	connection, err := net.DialTimeout("tcp", target.Host, dialWithin)
	if err != nil {
		return fmt.Errorf("no store on %s (start one with `make run`): %w", store, err)
	}
	return connection.Close()
}

func free(port int) error {
	listener, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return fmt.Errorf("port %d is not free (choose another with --port): %w", port, err)
	}
	return listener.Close()
}
