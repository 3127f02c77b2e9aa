package compat

import (
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

var transcripts = flag.Bool("transcripts", false, "log what the reference said in each case")

// A conversation is one case: what is said to a server, with everything that it answers noted.
type conversation struct {
	name string
	// fresh asks for servers that have never been used, so that absolute revisions count.
	fresh bool
	// open says why the server of this checkout is known to answer otherwise. Such a case is run
	// and counts as skipped while the answers differ, as failed when they do no longer.
	open string
	run  func(s *session)
}

// compare runs each case against the reference and the server under test; both must say the same.
func compare(t *testing.T, referenceCommand string, cases []conversation) {
	t.Helper()
	t.Parallel()
	shared := newPair(t, referenceCommand)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			servers := shared
			if c.fresh {
				servers = newPair(t, referenceCommand)
			}
			reference, subject := converse(t, servers, c)
			judge(t, c, differ(reference, subject))
		})
	}
}

// judge lets a case pass without differences, or with them if they are known.
func judge(t *testing.T, c conversation, differences []string) {
	t.Helper()
	told := "the answers differ:\n" + strings.Join(differences, "\n")
	known := c.open != "" && ownServer()
	switch {
	case known && len(differences) > 0:
		opened.Lock()
		opened.cases = append(opened.cases, t.Name()+": "+c.open)
		opened.Unlock()
		t.Skip(told)
	case known:
		t.Errorf("the answers differ no longer: the case is not open (%s)", c.open)
	case len(differences) > 0:
		t.Error(told)
	}
}

// opened collects the open cases that were run, to be told at the end.
var opened struct {
	sync.Mutex
	cases []string
}

func TestMain(m *testing.M) {
	flag.Parse()
	status := m.Run()
	slices.Sort(opened.cases)
	for _, open := range opened.cases {
		fmt.Println("open:", open)
	}
	os.Exit(status)
}

// converse holds one conversation with both servers at the same time and returns the transcripts.
func converse(t *testing.T, servers pair, c conversation) (reference, subject []string) {
	ctx, cancel := context.WithTimeout(context.Background(), caseTimeout)
	defer cancel()
	said := [2][]string{}
	var both sync.WaitGroup
	for i, server := range []*server{servers.reference, servers.subject} {
		s := newSession(t, ctx, server)
		both.Go(func() {
			err := s.connect()
			if err == nil && !c.fresh {
				err = s.empty()
			}
			if err != nil {
				t.Errorf("cannot begin with %s: %v", server.command[0], err)
				return
			}
			said[i] = s.held(c)
		})
	}
	both.Wait()
	reference, subject = said[0], said[1]
	if *transcripts {
		t.Log("the reference said:\n  " + strings.Join(reference, "\n  "))
	}
	if len(reference) == 0 {
		t.Error("the case noted nothing, so it compares nothing")
	}
	for _, heard := range reference {
		if outOfReach.MatchString(heard) {
			t.Errorf("the reference was out of reach, so nothing is known: %s", heard)
		}
	}
	return reference, subject
}

// outOfReach are lines that tell of the transport or the case itself instead of the reference.
var outOfReach = regexp.MustCompile(`-> (Unavailable|DeadlineExceeded|Canceled) "|^the case broke`)

// held runs the case and returns its transcript, which says so if the case could not go on.
func (s *session) held(c conversation) (transcript []string) {
	defer func() {
		if broken := recover(); broken != nil {
			s.note("the case broke: %v", broken)
		}
		transcript = s.transcript
	}()
	c.run(s)
	return nil
}

// differ lists the lines in which two transcripts differ, with the last line they share before.
func differ(reference, subject []string) []string {
	const shownMax = 12
	var differences []string
	for i := range max(len(reference), len(subject)) {
		r, s := line(reference, i), line(subject, i)
		if r == s {
			continue
		}
		if len(differences) == shownMax {
			return append(differences, "  and more")
		}
		differences = append(differences,
			fmt.Sprintf("  line %d\n    reference: %s\n    subject:   %s", i+1, r, s))
	}
	return differences
}

func line(transcript []string, i int) string {
	if i < len(transcript) {
		return transcript[i]
	}
	return "(nothing)"
}
