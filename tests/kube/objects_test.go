package kube

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/retry"
)

const (
	sandboxCount = 500
	podCount     = 50
	parallel     = 8
)

// TestObjects goes through what clients of an API server do to objects, on a store
// that nothing disturbs: no comparison with the store may fail, not even to be made.
func TestObjects(t *testing.T) {
	c := newCluster(t, "--etcd-compaction-interval=0")
	c.defineSandboxes(t)
	t.Run("pages", func(t *testing.T) { testPages(t, c) })
	t.Run("conflicts", func(t *testing.T) { testConflicts(t, c) })
	t.Run("pods", func(t *testing.T) { testPods(t, c) })
	t.Run("leases", func(t *testing.T) { testLeases(t, c) })
	t.Run("bookmarks", func(t *testing.T) { testBookmarks(t, c) })
	t.Run("initial events", func(t *testing.T) { testInitialEvents(t, c) })
	t.Run("delete collection", func(t *testing.T) { testDeleteCollection(t, c) })
	t.Run("size limit", func(t *testing.T) { testSizeLimit(t, c) })
	t.Run("masterlease", func(t *testing.T) { testMasterlease(t, c) })
	c.requireConsistent(t)
	c.requireNoCheckErrors(t)
}

// inParallel calls do for 0 to count-1 from several goroutines.
func inParallel(t *testing.T, count int, do func(i int) error) {
	t.Helper()
	numbers := make(chan int)
	failures := make([]error, parallel)
	var workers sync.WaitGroup
	for worker := range parallel {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for i := range numbers {
				failures[worker] = errors.Join(failures[worker], do(i))
			}
		}()
	}
	for i := range count {
		numbers <- i
	}
	close(numbers)
	workers.Wait()
	check(t, errors.Join(failures...))
}

// Of writers that read the same version one wins and the others see a conflict;
// with retries no increment is lost.
func testConflicts(t *testing.T, c *cluster) {
	maps := c.typed.CoreV1().ConfigMaps(c.namespace(t, "conflicts"))
	counter := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "counter"}}
	first, err := maps.Create(c.ctx, counter, metav1.CreateOptions{})
	check(t, err)
	_, err = maps.Create(c.ctx, counter, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		t.Errorf("a second create answered %v, not AlreadyExists", err)
	}
	const increments = 80
	var mu sync.Mutex
	conflicts := 0
	inParallel(t, increments, func(int) error {
		patience := retry.DefaultBackoff
		patience.Steps = 50
		return retry.OnError(patience, apierrors.IsConflict, func() error {
			now, err := maps.Get(c.ctx, counter.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			now.Data = map[string]string{"marks": now.Data["marks"] + "|"}
			_, err = maps.Update(c.ctx, now, metav1.UpdateOptions{})
			if apierrors.IsConflict(err) {
				mu.Lock()
				conflicts++
				mu.Unlock()
			}
			return err
		})
	})
	now, err := maps.Get(c.ctx, counter.Name, metav1.GetOptions{})
	check(t, err)
	if marks := len(now.Data["marks"]); marks != increments {
		t.Errorf("%d of %d increments are there", marks, increments)
	}
	if _, err := maps.Update(c.ctx, first, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("an update of the first version answered %v, not Conflict", err)
	}
	t.Logf("%d conflicts", conflicts)
}

// Pods are created, get a status and are deleted; a watch agrees with the list throughout.
func testPods(t *testing.T, c *cluster) {
	namespace := c.namespace(t, "pods")
	pods := c.typed.CoreV1().Pods(namespace)
	seen := follow(c.ctx, t, c.resource(corev1.SchemeGroupVersion.WithResource("pods"), namespace))
	status := []byte(`{"status":{"phase":"Running"}}`)
	inParallel(t, podCount, func(i int) error {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("pod-", i)}}
		pod.Spec.Containers = []corev1.Container{{Name: "main", Image: "none"}}
		if _, err := pods.Create(c.ctx, pod, metav1.CreateOptions{}); err != nil {
			return err
		}
		_, err := pods.Patch(
			c.ctx, pod.Name, types.MergePatchType, status, metav1.PatchOptions{}, "status")
		if err != nil || i%2 == 0 {
			return err
		}
		return pods.Delete(c.ctx, pod.Name, metav1.DeleteOptions{})
	})
	running, err := pods.List(c.ctx, metav1.ListOptions{FieldSelector: "status.phase=Running"})
	check(t, err)
	if len(running.Items) != podCount/2 {
		t.Errorf("%d pods are running, not %d", len(running.Items), podCount/2)
	}
	marker := object("v1", "Pod", "marker", fields{
		"spec": fields{"containers": []any{fields{"name": "main", "image": "none"}}},
	})
	seen.requireEqualToList(t, c, marker)
}

// A holder renews its lease; another that read an older version cannot take it.
func testLeases(t *testing.T, c *cluster) {
	holders := c.typed.CoordinationV1().Leases(c.namespace(t, "leases"))
	wanted := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "leader"}}
	held, err := holders.Create(c.ctx, wanted, metav1.CreateOptions{})
	check(t, err)
	stale := held.DeepCopy()
	for i := range 20 {
		holder, now := "first", metav1.NewMicroTime(time.UnixMicro(int64(i)))
		held.Spec.HolderIdentity, held.Spec.RenewTime = &holder, &now
		held, err = holders.Update(c.ctx, held, metav1.UpdateOptions{})
		check(t, err)
	}
	other := "second"
	stale.Spec.HolderIdentity = &other
	if _, err := holders.Update(c.ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("taking the lease with an old version answered %v, not Conflict", err)
	}
}

// Deleting a collection by label deletes exactly that, and the watch agrees.
func testDeleteCollection(t *testing.T, c *cluster) {
	namespace := c.namespace(t, "collection")
	resource := c.resource(configMaps, namespace)
	seen := follow(c.ctx, t, resource)
	const count = 60
	inParallel(t, count, func(i int) error {
		o := configMap(fmt.Sprint("map-", i))
		o.SetLabels(map[string]string{"third": fmt.Sprint(i % 3)})
		_, err := resource.Create(c.ctx, o, metav1.CreateOptions{})
		return err
	})
	remaining := func(want int) {
		t.Helper()
		list, err := resource.List(c.ctx, metav1.ListOptions{})
		check(t, err)
		if len(list.Items) != want {
			t.Errorf("%d objects remain, not %d", len(list.Items), want)
		}
	}
	third := metav1.ListOptions{LabelSelector: "third=0"}
	check(t, resource.DeleteCollection(c.ctx, metav1.DeleteOptions{}, third))
	remaining(count * 2 / 3)
	check(t, resource.DeleteCollection(c.ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	remaining(0)
	seen.requireEqualToList(t, c, configMap("marker"))
}

// An object above the store's request limit is refused as too large, one below is stored.
func testSizeLimit(t *testing.T, c *cluster) {
	resource := c.resource(sandboxes, c.namespace(t, "sizes"))
	sized := func(name string, bytes int) *unstructured.Unstructured {
		o := sandbox(name)
		o.Object["spec"] = fields{"blob": strings.Repeat("x", bytes)}
		return o
	}
	const mebibyte = 1 << 20
	_, err := resource.Create(c.ctx, sized("large", mebibyte*5/4), metav1.CreateOptions{})
	check(t, err)
	read, err := resource.Get(c.ctx, "large", metav1.GetOptions{})
	check(t, err)
	blob, _, _ := unstructured.NestedString(read.Object, "spec", "blob")
	if len(blob) != mebibyte*5/4 {
		t.Errorf("%d bytes came back", len(blob))
	}
	_, err = resource.Create(c.ctx, sized("too-large", mebibyte*7/4), metav1.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), "request is too large") {
		t.Errorf("a create above the limit answered %v", err)
	}
}

// The API server's own address is rewritten every ten seconds, each time with a new
// lease of 15 s: the key must leave the old lease, so it is never deleted.
func testMasterlease(t *testing.T, c *cluster) {
	store := c.store.client(t)
	get := func() (*clientv3.GetResponse, error) {
		answer, err := store.Get(c.ctx, "/registry/masterleases/", clientv3.WithPrefix())
		if err == nil && len(answer.Kvs) != 1 {
			err = fmt.Errorf("%d masterleases, not one", len(answer.Kvs))
		}
		return answer, err
	}
	first, err := get()
	check(t, err)
	c.eventually(t, "the masterlease outlives its first lease", conditionWithin, func() error {
		now, err := get()
		if err != nil {
			t.Fatal(err)
		}
		if now.Kvs[0].CreateRevision != first.Kvs[0].CreateRevision {
			t.Fatalf("it was deleted and made again: %v, then %v", first.Kvs[0], now.Kvs[0])
		}
		if now.Kvs[0].Version < 4 {
			return fmt.Errorf("it was renewed %d times", now.Kvs[0].Version-1)
		}
		return nil
	})
}
