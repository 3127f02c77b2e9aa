package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// LogName is the API server's log in its directory; every start appends to it.
const LogName = "kube-apiserver.log"

const (
	serviceRange = "10.96.0.0/16"
	// The API server refuses a loopback address in the endpoints of its own
	// service. This one is reserved for documentation (RFC 5737): it is stored,
	// renewed with a lease every ten seconds, and never connected to.
	advertiseAddress = "192.0.2.1"

	readyWithin = 90 * time.Second
	pollEvery   = 50 * time.Millisecond
)

// serviceAddress is the first of serviceRange, which the API server takes for its own service.
var serviceAddress = net.IPv4(10, 96, 0, 1)

// Options say which API server to start, where, and on which store.
type Options struct {
	Binary string   // the kube-apiserver executable
	Dir    string   // keys, kubeconfig and log
	Store  string   // client URL of the store
	Port   int      // HTTPS port on 127.0.0.1
	Flags  []string // further flags; a repeated flag overrides ours
	Env    []string // added to the environment, NAME=value
}

// APIServer is a running kube-apiserver.
type APIServer struct {
	*Process
	URL        string
	Kubeconfig string
	LogPath    string
}

// Start makes keys and starts the API server. It does not wait: see WaitReady.
func Start(o Options) (*APIServer, error) {
	url := fmt.Sprintf("https://127.0.0.1:%d", o.Port)
	if err := writeKeys(o.Dir, url); err != nil {
		return nil, fmt.Errorf("keys in %s: %w", o.Dir, err)
	}
	s := &APIServer{
		URL:        url,
		Kubeconfig: filepath.Join(o.Dir, "kubeconfig"),
		LogPath:    filepath.Join(o.Dir, LogName),
	}
	process, err := StartProcess(s.LogPath, o.Env, append([]string{o.Binary}, flags(o)...)...)
	if err != nil {
		return nil, err
	}
	s.Process = process
	return s, nil
}

// flags leave out what needs other components: pods need no service account,
// because no controller would make one, and nothing is routed to nodes.
func flags(o Options) []string {
	in := func(name string) string { return filepath.Join(o.Dir, name) }
	return append([]string{
		"--etcd-servers=" + o.Store,
		"--bind-address=127.0.0.1",
		"--secure-port=" + strconv.Itoa(o.Port),
		"--advertise-address=" + advertiseAddress,
		"--cert-dir=" + o.Dir,
		"--tls-cert-file=" + in("apiserver.crt"),
		"--tls-private-key-file=" + in("apiserver.key"),
		"--client-ca-file=" + in("ca.crt"),
		"--anonymous-auth=false",
		"--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + in("service-account.key"),
		"--service-account-signing-key-file=" + in("service-account.key"),
		"--service-cluster-ip-range=" + serviceRange,
		"--disable-admission-plugins=ServiceAccount",
		"--profiling=false",
	}, o.Flags...)
}

// Config returns a client configuration for the administrator, without client-side rate limits.
func (s *APIServer) Config() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS = -1
	return config, nil
}

// WaitReady returns nil once /readyz answers 200. It returns an error when the
// API server ends, ctx is done, or ninety seconds have passed.
func (s *APIServer) WaitReady(ctx context.Context) error {
	config, err := s.Config()
	if err != nil {
		return err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	client.Timeout = 5 * time.Second
	deadline := time.After(readyWithin)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.Done():
			return s.Failure(5)
		case <-deadline:
			return errors.Join(
				fmt.Errorf("kube-apiserver was not ready within %s", readyWithin), s.Failure(5))
		case <-tick.C:
			if ready(client, s.URL+"/readyz") {
				return nil
			}
		}
	}
}

func ready(client *http.Client, url string) bool {
	answer, err := client.Get(url)
	if err != nil {
		return false
	}
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

// FreePort returns a TCP port on 127.0.0.1 that nobody listens on.
func FreePort() (int, error) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}
