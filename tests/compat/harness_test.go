package compat

import (
	"testing"
)

// TestHarness proves that the comparison sees differences: it compares etcd with an etcd that
// allows fewer operations in a transaction, and with the next release, which answers some requests
// otherwise, and must find exactly the cases that show it.
func TestHarness(t *testing.T) {
	t.Parallel()
	plain, twin := newServer(t, reference36), newServer(t, reference36)
	limited := newServer(t, reference36, "-max-txn-ops=127")
	next := newServer(t, reference37)
	for _, c := range []struct {
		name    string
		subject *server
		run     func(s *session)
		differ  bool
	}{
		{"same release", twin, txnBudget, false},
		{"smaller limit, case that shows it", limited, txnBudget, true},
		{"smaller limit, case that does not", limited, txnOverlaps, false},
		{"next release, keys only", next, rangeParts, true},
		{"next release, new method", next, streamKeys, true},
		{"next release, comparisons", next, txnCompares, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			reference, subject := converse(t, pair{plain, c.subject}, conversation{run: c.run})
			if found := differ(reference, subject); (len(found) > 0) != c.differ {
				t.Errorf("differences: %q; expected some: %v", found, c.differ)
			}
		})
	}
	missing := []string{"one", "two"}
	if len(differ(missing, missing[:1])) == 0 || len(differ(missing[:1], missing)) == 0 {
		t.Error("a transcript that ends early counts as equal")
	}
}
