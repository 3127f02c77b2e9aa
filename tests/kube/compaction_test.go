package kube

import (
	"errors"
	"fmt"
	"maps"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
)

// TestCompaction lets the API server compact the store every few seconds: old
// revisions answer Expired wherever one can ask for them, a list that was cut short
// can be ended, a watch that keeps up notices nothing, and it stays so after both
// the store and the API server were started again.
func TestCompaction(t *testing.T) {
	const interval = "--etcd-compaction-interval=3s"
	c := newCluster(t, interval)
	namespace := c.namespace(t, "compacted")
	resource := c.resource(configMaps, namespace)
	const count = 40
	c.create(t, kind{configMaps, configMap}, namespace, "map", count)
	first, err := resource.List(c.ctx, metav1.ListOptions{Limit: 10})
	check(t, err)
	old := first.GetResourceVersion()
	seen := follow(c.ctx, t, resource)
	churn := newWriter(resource, configMap, "churn", 2)
	stop := c.startWriters([]*writer{churn})

	c.requireExpired(t, resource, old)
	c.requireRestOfList(t, resource, first.GetContinue(), count-10)
	c.requireWatchExpired(t, c.resource(events, namespace), old)
	c.store.Kill()
	c.store.start(t)
	c.waitForWrites(t, []*writer{churn}, writesPerRound)
	c.requireCompacted(t, int64(revisionOf(old)))
	c.requireExpired(t, resource, old)
	// The caches of resources that nobody writes fall behind the compaction.
	c.requireConsistent(t, "configmaps.")
	stop()
	seen.requireEqualToList(t, c, configMap("marker"))
	changes, _, err := seen.snapshot()
	check(t, err)
	churn.requireInHistory(t, changes)

	before, err := resource.List(c.ctx, metav1.ListOptions{})
	check(t, err)
	c.api.Kill()
	c.startAPI(t, interval)
	resource = c.resource(configMaps, namespace)
	after, err := resource.List(c.ctx, metav1.ListOptions{})
	check(t, err)
	if !maps.Equal(revisions(before), revisions(after)) {
		t.Error("the list changed while only the API server was restarted")
	}
	c.requireExpired(t, resource, old)
	c.requireWatchExpired(t, resource, old)
}

// requireExpired waits until a list at exactly that revision is answered with Expired.
func (c *cluster) requireExpired(
	t *testing.T, resource dynamic.ResourceInterface, revision string,
) {
	t.Helper()
	c.eventually(t, "a list of the old revision is expired", conditionWithin, func() error {
		list, err := resource.List(c.ctx, metav1.ListOptions{
			ResourceVersion:      revision,
			ResourceVersionMatch: metav1.ResourceVersionMatchExact,
		})
		switch {
		case apierrors.IsResourceExpired(err):
			return nil
		case err != nil:
			return err
		}
		return fmt.Errorf("it still lists %d objects", len(list.Items))
	})
}

// requireRestOfList continues a list whose revision is gone: the answer is Expired
// with a new token, and that one ends the list at the present revision.
func (c *cluster) requireRestOfList(
	t *testing.T, resource dynamic.ResourceInterface, token string, atLeast int,
) {
	t.Helper()
	_, err := resource.List(c.ctx, metav1.ListOptions{Limit: 10, Continue: token})
	var status apierrors.APIStatus
	if !apierrors.IsResourceExpired(err) || !errors.As(err, &status) {
		t.Fatalf("the continue token was answered with %v, not Expired", err)
	}
	fresh := status.Status().ListMeta.Continue
	rest, err := resource.List(c.ctx, metav1.ListOptions{Continue: fresh})
	check(t, err)
	if len(rest.Items) < atLeast {
		t.Errorf("the new token gave %d objects, not %d or more", len(rest.Items), atLeast)
	}
}

// requireWatchExpired fails t unless a watch from that revision is ended with Expired.
func (c *cluster) requireWatchExpired(
	t *testing.T, resource dynamic.ResourceInterface, revision string,
) {
	t.Helper()
	watcher, err := resource.Watch(c.ctx, metav1.ListOptions{ResourceVersion: revision})
	if err == nil {
		defer watcher.Stop()
		event := <-watcher.ResultChan()
		if event.Type != watch.Error {
			t.Fatalf("the watch from revision %s began with %v", revision, event)
		}
		err = apierrors.FromObject(event.Object)
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Fatalf("the watch from revision %s was answered with %v, not Expired", revision, err)
	}
}

// requireCompacted asks the store itself.
func (c *cluster) requireCompacted(t *testing.T, revision int64) {
	t.Helper()
	_, err := c.store.client(t).Get(c.ctx, "/registry/", clientv3.WithPrefix(),
		clientv3.WithCountOnly(), clientv3.WithRev(revision))
	if !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("the store reads revision %d with %v", revision, err)
	}
}
