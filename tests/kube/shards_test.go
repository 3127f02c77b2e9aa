package kube

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	outages          = 2
	writesPerOutage  = 25 // of each writer of another kind, while the shard is out
	postgresProgram  = "../../.venv/bin/python -m tests.backends.postgres_on_call"
	postgresNoneHere = 3 // its exit code

	shardsWithPostgres = `
shards:
  - {name: core,      backend: "sqlite:core.db"}
  - {name: events,    backend: "sqlite:events.db"}
  - {name: sandboxes, backend: "%s"}
routes:
  - {prefix: /registry/events/,     shard: events}
  - {prefix: /registry/suite.test/, shard: sandboxes}
`
)

// TestShardOut kills the PostgreSQL that holds a custom resource, in the middle of writes and
// watches, and starts it again. Meanwhile the resource is refused and no write of another kind
// fails; afterwards writes go on, nothing acknowledged is lost, and watches through the cache and
// past it have delivered every change once and in order, without having ended.
func TestShardOut(t *testing.T) {
	if os.Getenv("KVSTORE_CMD") != "" {
		t.Skip("KVSTORE_CMD names a store whose shards are not known")
	}
	postgres := newPostgres(t)
	config := filepath.Join(t.TempDir(), "shards.yaml")
	content := fmt.Sprintf(shardsWithPostgres, postgres.url)
	check(t, os.WriteFile(config, []byte(content), 0o600))
	c := newClusterOn(t, storeCommand+" --shard-timeout 2s --config "+config,
		"--etcd-compaction-interval=0")
	namespace := c.namespace(t, "out")
	c.defineSandboxes(t)
	watching, stopWatching := context.WithCancel(c.ctx)
	defer stopWatching()

	kinds := []kind{
		{sandboxes, sandbox}, // first, as below
		{configMaps, configMap}, {leases, lease}, {events, event(namespace)},
	}
	var histories []*history
	var writers []*writer
	for i, kind := range kinds {
		resource := c.resource(kind.of, namespace)
		histories = append(histories, follow(watching, t, resource))
		writers = append(writers, newWriter(resource, kind.empty, kind.of.Resource, uint64(i)))
	}
	stop := c.startWriters(writers)
	for range outages {
		c.waitForWrites(t, writers, writesPerRound)
		postgres.tell(t, "kill")
		c.requireRefused(t, namespace)
		c.waitForWrites(t, writers[1:], writesPerOutage)
		c.requireRefused(t, namespace)
		postgres.tell(t, "start")
		c.waitForWrites(t, writers, writesPerRound)
	}
	stop()

	c.requireConsistent(t)
	for i, kind := range kinds {
		histories[i].requireEqualToList(t, c, kind.empty("marker"))
		changes, resumed, err := histories[i].snapshot()
		check(t, err)
		writers[i].requireInHistory(t, changes)
		if failed := writers[i].errors; i > 0 && failed > 0 {
			t.Errorf("%d writes of %s failed: their shard was well", failed, kind.of.Resource)
		}
		if resumed > 0 {
			t.Errorf("the watch of %s ended %d times", kind.of.Resource, resumed)
		}
	}
	requireUniqueRevisions(t, histories)
}

// requireRefused fails t unless writes and reads of the custom resource are answered with an
// error of the store, each before its client would have given up.
func (c *cluster) requireRefused(t *testing.T, namespace string) {
	t.Helper()
	resource := c.resource(sandboxes, namespace)
	for what, call := range map[string]func(ctx context.Context) error{
		"write": func(ctx context.Context) error {
			_, err := resource.Create(ctx, sandbox("refused"), metav1.CreateOptions{})
			return err
		},
		"read": func(ctx context.Context) error {
			_, err := resource.Get(ctx, "refused", metav1.GetOptions{})
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(c.ctx, callWithin)
		began := time.Now()
		err := call(ctx)
		gaveUp := ctx.Err() != nil
		cancel()
		if err == nil || gaveUp || !strings.Contains(err.Error(), "request timed out") {
			t.Errorf("a %s on a shard that is out: %v", what, err)
		}
		t.Logf("the %s was refused after %s", what, time.Since(began).Round(time.Millisecond))
	}
}

// postgres is a PostgreSQL of the test's own.
type postgres struct {
	url     string
	words   io.Writer
	answers *bufio.Scanner
}

// newPostgres starts one, which is removed when t ends; t is skipped where none is installed.
func newPostgres(t *testing.T) *postgres {
	t.Helper()
	argv := strings.Fields(postgresProgram)
	argv[0], _ = filepath.Abs(argv[0])
	process := exec.Command(argv[0], argv[1:]...)
	process.Dir = "../.."
	process.Stderr = os.Stderr
	words, err := process.StdinPipe()
	check(t, err)
	output, err := process.StdoutPipe()
	check(t, err)
	check(t, process.Start())
	p := &postgres{words: words, answers: bufio.NewScanner(output)}
	p.url = p.answer()
	if !strings.HasPrefix(p.url, "postgresql://") {
		var exit *exec.ExitError
		err := process.Wait()
		if errors.As(err, &exit) && exit.ExitCode() == postgresNoneHere {
			t.Skip(p.url)
		}
		t.Fatalf("PostgreSQL does not start: %v: %s", err, p.url)
	}
	t.Cleanup(func() {
		words.Close() // the sign to end
		check(t, process.Wait())
	})
	return p
}

// tell has it killed or started, and returns when that is done.
func (p *postgres) tell(t *testing.T, word string) {
	t.Helper()
	_, err := fmt.Fprintln(p.words, word)
	check(t, err)
	if answer := p.answer(); answer != "done" {
		t.Fatalf("PostgreSQL, told to %s, answered %q", word, answer)
	}
}

func (p *postgres) answer() string {
	p.answers.Scan()
	return p.answers.Text()
}
