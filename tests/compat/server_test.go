package compat

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	readyTimeout     = 60 * time.Second
	stopTimeout      = 20 * time.Second
	progressInterval = 500 * time.Millisecond
	receiveBytesMax  = 1 << 30

	reference36 = "bin/etcdref36 -dir {dir} -listen http://127.0.0.1:{port}"
	reference37 = "bin/etcdref37 -dir {dir} -listen http://127.0.0.1:{port}"
)

var shards = flag.Bool("shards", false, "the server of this checkout has the map of shards.yaml")

// subjectCommand is the template of the server under test; {dir} and {port} are filled in.
func subjectCommand() string {
	if !ownServer() {
		return os.Getenv("KVSTORE_CMD")
	}
	command := "../../.venv/bin/kvstore serve" +
		" --data-dir {dir} --listen-client-urls http://127.0.0.1:{port}"
	if *shards {
		command += " --config shards.yaml"
	}
	return command
}

// ownServer tells whether the server under test is that of this checkout.
func ownServer() bool { return os.Getenv("KVSTORE_CMD") == "" }

// A server is one process that speaks the etcd API on a loopback port, with its own data.
type server struct {
	command  []string
	endpoint string
	log      string
	process  *exec.Cmd
	exited   chan struct{}
}

// newServer starts a server on an empty directory; it is stopped when the test ends.
func newServer(t *testing.T, template string, flags ...string) *server {
	t.Helper()
	folder := t.TempDir()
	port := freePort(t)
	filled := strings.NewReplacer(
		"{dir}", filepath.Join(folder, "data"),
		"{port}", fmt.Sprint(port),
	).Replace(template)
	s := &server{
		command:  append(strings.Fields(filled), flags...),
		endpoint: fmt.Sprintf("127.0.0.1:%d", port),
		log:      filepath.Join(folder, "log"),
	}
	t.Cleanup(func() {
		s.stop(t, syscall.SIGTERM)
		if t.Failed() {
			t.Logf("%s said:\n%s", s.command[0], s.tail())
		}
	})
	s.start(t)
	return s
}

var ports struct {
	sync.Mutex
	next int
}

// freePort returns a port that nobody has and that the system gives to nobody unasked: it is below
// those that connections get. A process asks for each port once.
func freePort(t *testing.T) int {
	t.Helper()
	const first, count = 20000, 12000
	ports.Lock()
	defer ports.Unlock()
	if ports.next == 0 {
		ports.next = rand.IntN(count)
	}
	for range count {
		ports.next++
		port := first + ports.next%count
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			listener.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// start runs the command and returns once a linearizable read is answered.
func (s *server) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.process = exec.Command(s.command[0], s.command[1:]...)
	s.process.Stdout, s.process.Stderr = log, log
	s.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := s.process.Start(); err != nil {
		t.Fatalf("cannot start %q: %v", s.command, err)
	}
	exited := make(chan struct{})
	s.exited = exited
	go func(process *exec.Cmd) {
		_ = process.Wait()
		close(exited)
	}(s.process)

	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	go func() {
		select {
		case <-exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	conn := s.dial(t)
	defer conn.Close()
	request := &etcdserverpb.RangeRequest{Key: []byte("ready")}
	_, err = etcdserverpb.NewKVClient(conn).Range(ctx, request, grpc.WaitForReady(true))
	if err != nil {
		t.Fatalf("%q is not ready: %v\n%s", s.command, err, s.tail())
	}
}

// stop ends the process with the signal, or with SIGKILL if it takes too long; no-op once ended.
func (s *server) stop(t *testing.T, signal syscall.Signal) {
	t.Helper()
	if s.exited == nil {
		return
	}
	_ = s.process.Process.Signal(signal)
	select {
	case <-s.exited:
	case <-time.After(stopTimeout):
		t.Errorf("%q outlived %v by %v", s.command, signal, stopTimeout)
		_ = syscall.Kill(-s.process.Process.Pid, syscall.SIGKILL)
		<-s.exited
	}
	s.exited = nil
}

// dial opens a connection that retries quickly, as a server may be about to open its port.
func (s *server) dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	retry := backoff.Config{
		BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond,
	}
	conn, err := grpc.NewClient(s.endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: retry, MinConnectTimeout: callTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(receiveBytesMax)),
	)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// tail returns the end of what the process wrote.
func (s *server) tail() string {
	const bytesMax = 4000
	text, err := os.ReadFile(s.log)
	if err != nil {
		return err.Error()
	}
	if len(text) > bytesMax {
		text = text[len(text)-bytesMax:]
	}
	return string(text)
}

// A pair is the reference and the server under test, which are to answer alike.
type pair struct {
	reference, subject *server
}

// newPair starts both servers at the same time, with unasked watch progress at a short interval.
func newPair(t *testing.T, referenceCommand string) pair {
	t.Helper()
	flag := "--watch-progress-notify-interval=" + progressInterval.String()
	return pair{
		reference: newServer(t, referenceCommand, flag),
		subject:   newServer(t, subjectCommand(), flag),
	}
}
