package kube

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
)

// The API server compares each watch cache with the store every 10 to 15 s.
const consistencyWithin = 90 * time.Second

// checks counts the comparisons of one resource's watch cache with the store.
type checks struct{ success, failure, err float64 }

// consistencyChecks returns the counts of every resource that has a watch cache.
func (c *cluster) consistencyChecks(t *testing.T) map[string]checks {
	t.Helper()
	body, err := c.typed.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(c.ctx)
	check(t, err)
	var parser expfmt.TextParser
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	check(t, err)
	counts := map[string]checks{}
	for _, metric := range families["apiserver_watch_cache_initializations_total"].GetMetric() {
		labels := map[string]string{}
		for _, label := range metric.GetLabel() {
			labels[label.GetName()] = label.GetValue()
		}
		counts[labels["resource"]+"."+labels["group"]] = checks{}
	}
	for _, metric := range families["apiserver_storage_consistency_checks_total"].GetMetric() {
		labels := map[string]string{}
		for _, label := range metric.GetLabel() {
			labels[label.GetName()] = label.GetValue()
		}
		resource := labels["resource"] + "." + labels["group"]
		count, value := counts[resource], metric.GetCounter().GetValue()
		switch labels["status"] {
		case "success":
			count.success = value
		case "failure":
			count.failure = value
		default:
			count.err = value
		}
		counts[resource] = count
	}
	return counts
}

// requireConsistent waits until each of the resources, or every cached one if none
// is named, was found equal to the store once more than at the call. A difference
// fails t at once.
func (c *cluster) requireConsistent(t *testing.T, resources ...string) {
	t.Helper()
	before := c.consistencyChecks(t)
	began := time.Now()
	if len(resources) == 0 {
		for resource := range before {
			resources = append(resources, resource)
		}
	}
	what := "every watch cache is compared with the store"
	c.eventually(t, what, consistencyWithin, func() error {
		var waiting []string
		now := c.consistencyChecks(t)
		for _, resource := range resources {
			if now[resource].failure > 0 {
				t.Fatalf("the watch cache of %s differs from the store", resource)
			}
			if now[resource].success <= before[resource].success {
				waiting = append(waiting, resource)
			}
		}
		if len(waiting) > 0 {
			return fmt.Errorf("%d of %d not yet: %s",
				len(waiting), len(resources), strings.Join(waiting, " "))
		}
		return nil
	})
	t.Logf("%d watch caches equal the store (waited %s)",
		len(resources), time.Since(began).Round(time.Second))
}

// requireNoCheckErrors fails t if a comparison could not be made.
func (c *cluster) requireNoCheckErrors(t *testing.T) {
	t.Helper()
	for resource, count := range c.consistencyChecks(t) {
		if count.err > 0 {
			t.Errorf("%v comparisons of %s with the store failed; see %s",
				count.err, resource, c.api.LogPath)
		}
	}
}
