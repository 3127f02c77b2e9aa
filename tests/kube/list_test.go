package kube

import (
	"context"
	"fmt"
	"maps"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
)

// listed is a list put together from pages.
type listed struct {
	revision string
	state    map[string]uint64
	pages    int
}

// pages reads a list page by page and checks what must hold between them: one
// revision for all, nothing newer than it, no name twice, the right remaining count.
func pages(
	ctx context.Context, resource dynamic.ResourceInterface, options metav1.ListOptions,
) (listed, error) {
	all := listed{state: map[string]uint64{}}
	expected := int64(-1)
	for {
		page, err := resource.List(ctx, options)
		if err != nil {
			return all, fmt.Errorf("page %d: %w", all.pages, err)
		}
		all.pages++
		if all.revision == "" {
			all.revision = page.GetResourceVersion()
		}
		if page.GetResourceVersion() != all.revision {
			return all, fmt.Errorf("page %d is of revision %s, the first of %s",
				all.pages, page.GetResourceVersion(), all.revision)
		}
		for _, item := range page.Items {
			if _, twice := all.state[item.GetName()]; twice {
				return all, fmt.Errorf("%s is on two pages", item.GetName())
			}
			if revisionOf(item.GetResourceVersion()) > revisionOf(all.revision) {
				return all, fmt.Errorf("%s has revision %s in a list of revision %s",
					item.GetName(), item.GetResourceVersion(), all.revision)
			}
			all.state[item.GetName()] = revisionOf(item.GetResourceVersion())
		}
		if remaining := page.GetRemainingItemCount(); remaining != nil {
			total := int64(len(all.state)) + *remaining
			if expected >= 0 && expected != total {
				return all, fmt.Errorf("page %d announces %d objects, an earlier one %d",
					all.pages, total, expected)
			}
			expected = total
		}
		if page.GetContinue() == "" {
			break
		}
		options.Continue = page.GetContinue()
		options.ResourceVersion, options.ResourceVersionMatch = "", ""
	}
	if expected >= 0 && expected != int64(len(all.state)) {
		return all, fmt.Errorf("%d objects were announced, %d came", expected, len(all.state))
	}
	return all, nil
}

// Pages of a list are one snapshot while objects change under it, whatever
// resource version was asked for, and equal to the unpaged list of that revision.
func testPages(t *testing.T, c *cluster) {
	namespace := c.namespace(t, "pages")
	resource := c.resource(sandboxes, namespace)
	c.create(t, kind{sandboxes, sandbox}, namespace, "sandbox", sandboxCount)
	first, err := resource.List(c.ctx, metav1.ListOptions{})
	check(t, err)
	if len(first.Items) != sandboxCount {
		t.Fatalf("%d objects are listed, not %d", len(first.Items), sandboxCount)
	}
	churn := newWriter(resource, sandbox, "sandbox-churn", 1)
	stop := c.startWriters([]*writer{churn})
	defer stop()
	c.waitForWrites(t, []*writer{churn}, 10)

	exact := func(revision string) metav1.ListOptions {
		return metav1.ListOptions{
			ResourceVersion:      revision,
			ResourceVersionMatch: metav1.ResourceVersionMatchExact,
		}
	}
	notOlder := metav1.ListOptions{
		ResourceVersion:      first.GetResourceVersion(),
		ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
	}
	for name, options := range map[string]metav1.ListOptions{
		"most recent":    {},
		"any":            {ResourceVersion: "0"},
		"not older than": notOlder,
		"exact":          exact(first.GetResourceVersion()),
	} {
		options.Limit = 37
		paged, err := pages(c.ctx, resource, options)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		whole, err := resource.List(c.ctx, exact(paged.revision))
		check(t, err)
		if !maps.Equal(paged.state, revisions(whole)) {
			t.Errorf("%s: %d pages hold %d objects, the whole list of revision %s holds %d",
				name, paged.pages, len(paged.state), paged.revision, len(whole.Items))
		}
		t.Logf("%s: %d pages, %d objects", name, paged.pages, len(paged.state))
	}
	again, err := resource.List(c.ctx, exact(first.GetResourceVersion()))
	check(t, err)
	if !maps.Equal(revisions(first), revisions(again)) {
		t.Error("the list of an old revision changed")
	}
	c.requireSelectedPages(t, resource)
}

// requireSelectedPages lists with a selector that the store cannot apply: the API
// server reads on until a page is full, and each object comes once.
func (c *cluster) requireSelectedPages(t *testing.T, resource dynamic.ResourceInterface) {
	t.Helper()
	const marked = 25
	inParallel(t, marked, func(i int) error {
		name := fmt.Sprintf("sandbox-%03d", i*sandboxCount/marked)
		o, err := resource.Get(c.ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		o.SetLabels(map[string]string{"marked": "yes"})
		_, err = resource.Update(c.ctx, o, metav1.UpdateOptions{})
		return err
	})
	paged, err := pages(c.ctx, resource, metav1.ListOptions{LabelSelector: "marked=yes", Limit: 7})
	check(t, err)
	if len(paged.state) != marked {
		t.Errorf("%d objects have the label, not %d", len(paged.state), marked)
	}
}
