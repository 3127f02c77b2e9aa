// Package kube proves that a store serves an unmodified kube-apiserver.
//
// Every test starts its own store and its own API server on free loopback ports
// and removes both. The store's command comes from KVSTORE_CMD, so the same suite
// runs against etcd itself; what passes there and fails here is a bug in the store.
// The API server panics when a watch cache differs from the store, and the tests
// ask its metrics that the comparison was made.
package kube

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"kvstore.test/kube/controlplane"
)

const (
	storeCommand = "../../.venv/bin/kvstore serve --data-dir {dir}" +
		" --listen-client-urls http://127.0.0.1:{port}"
	storeAnswersWithin = 30 * time.Second
	conditionWithin    = 60 * time.Second
	pollEvery          = 20 * time.Millisecond
	stopWithin         = 20 * time.Second
	logLines           = 15
)

// store is the server under test; it keeps its directory and port over a restart.
type store struct {
	*controlplane.Process
	argv    []string
	url     string
	logPath string
}

var shards = flag.Bool("shards", false, "our own store has the map of shards.yaml")

// usualCommand is the command of a store for which a test asks nothing in particular.
func usualCommand() string {
	command := os.Getenv("KVSTORE_CMD")
	if command == "" {
		command = storeCommand
		if *shards {
			command += " --config shards.yaml"
		}
	}
	return command
}

func newStore(t *testing.T, dir, command string) *store {
	t.Helper()
	port, err := controlplane.FreePort()
	check(t, err)
	data := filepath.Join(dir, "store")
	check(t, os.Mkdir(data, 0o700))
	fill := strings.NewReplacer("{dir}", data, "{port}", strconv.Itoa(port))
	s := &store{
		url:     fmt.Sprintf("http://127.0.0.1:%d", port),
		logPath: filepath.Join(dir, "store.log"),
	}
	for _, word := range strings.Fields(command) {
		s.argv = append(s.argv, fill.Replace(word))
	}
	s.start(t)
	return s
}

// start starts the store and waits until it accepts connections.
func (s *store) start(t *testing.T) {
	t.Helper()
	process, err := controlplane.StartProcess(s.logPath, nil, s.argv...)
	if err != nil {
		t.Fatalf("the store (`make venv` installs it, KVSTORE_CMD names another): %v", err)
	}
	s.Process = process
	eventually(t, "the store accepts connections", storeAnswersWithin, func() error {
		if !s.Running() {
			t.Fatal(s.Failure(logLines))
		}
		connection, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			return err
		}
		return connection.Close()
	})
}

func (s *store) client(t *testing.T) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{s.url},
		Logger:    zap.NewNop(), // an expected refusal is no warning
	})
	check(t, err)
	t.Cleanup(func() { client.Close() })
	return client
}

// cluster is an API server on a store, with clients that act as its administrator.
type cluster struct {
	ctx     context.Context
	dir     string
	store   *store
	api     *controlplane.APIServer
	typed   kubernetes.Interface
	dynamic dynamic.Interface
}

// newCluster starts a store and an API server with extra flags, and stops them when t ends.
// The directory with both logs is kept and named if t failed.
func newCluster(t *testing.T, flags ...string) *cluster {
	t.Helper()
	return newClusterOn(t, usualCommand(), flags...)
}

// newClusterOn is newCluster with a store of that command.
func newClusterOn(t *testing.T, command string, flags ...string) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "kube-suite-")
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	c := &cluster{ctx: ctx, dir: dir}
	t.Cleanup(func() {
		cancel()
		c.close(t)
	})
	c.store = newStore(t, dir, command)
	c.startAPI(t, flags...)
	return c
}

func (c *cluster) startAPI(t *testing.T, flags ...string) {
	t.Helper()
	port, err := controlplane.FreePort()
	check(t, err)
	c.api, err = controlplane.Start(controlplane.Options{
		Binary: "bin/kube-apiserver",
		Dir:    filepath.Join(c.dir, "kube"),
		Store:  c.store.url,
		Port:   port,
		Flags:  flags,
		Env:    []string{"KUBE_WATCHCACHE_CONSISTENCY_CHECKER=true"},
	})
	check(t, err)
	began := time.Now()
	check(t, c.api.WaitReady(c.ctx))
	t.Logf("kube-apiserver was ready after %s", time.Since(began).Round(time.Millisecond))
	config, err := c.api.Config()
	check(t, err)
	c.typed, err = kubernetes.NewForConfig(config)
	check(t, err)
	c.dynamic, err = dynamic.NewForConfig(config)
	check(t, err)
}

func (c *cluster) close(t *testing.T) {
	if c.store != nil && !c.store.Running() && c.api != nil && c.api.Running() {
		c.api.Kill() // without its store it would not stop
	} else if c.api != nil {
		c.stop(t, c.api.Process)
	}
	if c.store != nil {
		c.stop(t, c.store.Process)
	}
	if t.Failed() {
		t.Logf("the logs are kept in %s", c.dir)
		return
	}
	check(t, os.RemoveAll(c.dir))
}

// stop fails t if the process had ended by itself or does not stop.
func (c *cluster) stop(t *testing.T, process *controlplane.Process) {
	if !process.Running() {
		t.Error(process.Failure(logLines))
	}
	if err := process.Stop(stopWithin); err != nil {
		t.Error(err)
	}
}

// namespace makes a namespace for one test.
func (c *cluster) namespace(t *testing.T, name string) string {
	t.Helper()
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	_, err := c.typed.CoreV1().Namespaces().Create(c.ctx, object, metav1.CreateOptions{})
	check(t, err)
	return name
}

func (c *cluster) resource(
	of schema.GroupVersionResource, namespace string,
) dynamic.ResourceInterface {
	return c.dynamic.Resource(of).Namespace(namespace)
}

// create makes count objects of a kind, named prefix-0 and so on, from several goroutines.
func (c *cluster) create(t *testing.T, of kind, namespace, prefix string, count int) {
	t.Helper()
	resource := c.resource(of.of, namespace)
	inParallel(t, count, func(i int) error {
		o := of.empty(fmt.Sprintf("%s-%03d", prefix, i))
		_, err := resource.Create(c.ctx, o, metav1.CreateOptions{})
		return err
	})
}

// eventually is the function of that name, and fails t at once if the store or the
// API server has ended by itself.
func (c *cluster) eventually(
	t *testing.T, what string, within time.Duration, condition func() error,
) {
	t.Helper()
	eventually(t, what, within, func() error {
		if !c.store.Running() || !c.api.Running() {
			t.Fatalf("waiting until %s: a server has ended", what) // close shows its log
		}
		return condition()
	})
}

// eventually waits until condition returns nil and fails t with its last error when the time is up.
func eventually(t *testing.T, what string, within time.Duration, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s: %v", within, what, err)
		}
		time.Sleep(pollEvery)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
