package compat

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestEtcdctl compares what etcdctl prints, as text and as JSON, and how it exits.
func TestEtcdctl(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "put, get and del", run: ctlKeys},
		{name: "get with options", run: ctlGetOptions},
		{name: "txn", run: ctlTxn},
		{name: "watch", run: ctlWatch},
		{name: "lease", run: ctlLease},
		{name: "compaction and defrag", run: ctlCompaction},
		{name: "endpoint", run: ctlEndpoint},
		{name: "member and alarm", run: ctlMembers},
		{name: "lock", run: ctlLocks},
		{name: "snapshot save", run: ctlSnapshot, open: "there are no snapshots yet"},
		{name: "downgrade", run: ctlDowngrade, open: "there are no downgrades"},
		{name: "other commands", run: ctlOther},
	})
}

// ctl runs etcdctl against the session's server and notes its exit, output and errors.
// An argument @n stands for the revision n changes after the start of the case.
func (s *session) ctl(input string, arguments ...string) {
	command := s.etcdctl(arguments)
	command.Stdin = strings.NewReader(input)
	var output, complaint bytes.Buffer
	command.Stdout, command.Stderr = &output, &complaint
	err := command.Run()
	s.note("etcdctl %s -> %v", strings.Join(arguments, " "), err)
	s.printed("out", output.String())
	s.printed("err", complaint.String())
}

func (s *session) etcdctl(arguments []string) *exec.Cmd {
	filled := []string{"--endpoints", s.server.endpoint, "--command-timeout", "10s"}
	for _, argument := range arguments {
		if n, err := strconv.ParseInt(strings.TrimPrefix(argument, "@"), 10, 64); err == nil &&
			strings.HasPrefix(argument, "@") {
			argument = fmt.Sprint(s.rev(n))
		}
		filled = append(filled, argument)
	}
	return exec.CommandContext(s.ctx, "bin/etcdctl", filled...)
}

// printed notes what was printed, without the client library's own log.
func (s *session) printed(where, text string) {
	for printed := range strings.Lines(text) {
		if !strings.HasPrefix(printed, `{"level":`) {
			s.note("  %s %s", where, s.plain(strings.TrimRight(printed, "\n")))
		}
	}
}

var (
	tookTime        = regexp.MustCompile(`took( =)? [0-9.]+[mµn]?s`)
	writtenRevision = regexp.MustCompile(`revision (\d+)`)
)

// plain makes a line of output comparable: JSON by its fields, text without times and addresses.
func (s *session) plain(text string) string {
	var decoded any
	if strings.HasPrefix(text, "{") || strings.HasPrefix(text, "[") {
		decoder := json.NewDecoder(strings.NewReader(text))
		decoder.UseNumber()
		if decoder.Decode(&decoded) == nil {
			if encoded, err := json.Marshal(s.plainJSON("", decoded)); err == nil {
				text = string(encoded)
			}
		}
	}
	text = strings.ReplaceAll(text, s.server.endpoint, "ENDPOINT")
	text = tookTime.ReplaceAllString(text, "took TIME")
	return writtenRevision.ReplaceAllStringFunc(text, func(found string) string {
		number, err := strconv.ParseInt(strings.TrimPrefix(found, "revision "), 10, 64)
		if err != nil {
			return found
		}
		return "revision " + s.revision(number)
	})
}

// plainJSON renders revisions from the start of the case and drops what a server chooses.
func (s *session) plainJSON(field string, value any) any {
	if chosenJSON[field] {
		return "set"
	}
	switch v := value.(type) {
	case map[string]any:
		for name, inner := range v {
			v[name] = s.plainJSON(name, inner)
		}
		delete(v, "dbSizeQuota") // these two have cases of their own
		delete(v, "peerURLs")
	case []any:
		for i, inner := range v {
			v[i] = s.plainJSON(field, inner)
		}
	case json.Number:
		number, err := v.Int64()
		if err == nil && strings.HasSuffix(strings.ToLower(field), "revision") {
			return s.revision(number)
		}
	case string:
		return s.plainString(field, v)
	}
	return value
}

// plainString does the same for a string, which is what the gateway makes of 64-bit numbers.
func (s *session) plainString(field, text string) string {
	switch {
	case field == "version" && strings.Contains(text, "."):
		return regexp.MustCompile(`^\d+\.\d+`).FindString(text)
	case strings.HasSuffix(field, "revision"):
		if number, err := strconv.ParseInt(text, 10, 64); err == nil {
			return s.revision(number)
		}
	}
	return text
}

// chosenJSON are the fields of etcdctl's JSON of which only presence is promised.
var chosenJSON = map[string]bool{
	"cluster_id": true, "member_id": true, "raft_term": true, "dbSize": true, "leader": true,
	"raftIndex": true, "raftTerm": true, "raftAppliedIndex": true, "dbSizeInUse": true,
	"ID": true, "name": true, "took": true, "hash": true, "ttl": true,
}

func ctlKeys(s *session) {
	s.ctl("", "put", "a", "1")
	s.ctl("", "put", "a", "2", "--prev-kv")
	s.ctl("from stdin", "put", "b")
	s.ctl("", "put", "c", "3", "-w", "json")
	s.ctl("", "get", "a")
	s.ctl("", "get", "a", "-w", "json")
	s.ctl("", "get", "missing")
	s.ctl("", "get", "a", "-w", "fields", "--print-value-only")
	s.ctl("", "put", "a", "--ignore-value")
	s.ctl("", "put", "missing", "--ignore-value")
	s.ctl("", "del", "a", "--prev-kv")
	s.ctl("", "del", "a")
	s.ctl("", "del", "", "--prefix", "-w", "json")
	s.ctl("", "put", "", "1")
}

func ctlGetOptions(s *session) {
	for i := range 5 {
		s.quietly(put(fmt.Sprintf("k%d", i), fmt.Sprint(9-i)))
	}
	s.ctl("", "get", "k", "--prefix")
	s.ctl("", "get", "k1", "k3")
	s.ctl("", "get", "k3", "--from-key", "--keys-only")
	s.ctl("", "get", "k", "--prefix", "--limit", "2", "-w", "json")
	s.ctl("", "get", "k", "--prefix", "--count-only", "-w", "json")
	s.ctl("", "get", "k", "--prefix", "--order", "DESCEND", "--sort-by", "MODIFY")
	s.ctl("", "get", "k", "--prefix", "--sort-by", "VALUE", "--print-value-only")
	s.ctl("", "get", "k", "--prefix", "--consistency", "s", "--hex")
}

func ctlTxn(s *session) {
	s.quietly(put("a", "1"))
	s.ctl("value(\"a\") = \"1\"\n\nput a 2\nget a\n\nget a\n\n", "txn")
	s.ctl("mod(\"a\") = \"0\"\n\nput a 3\n\nget a\ndel a\n\n", "txn", "-w", "json")
	s.ctl("ver(\"b\") = \"0\"\n\nput b 1\nput b 2\n\n\n", "txn")
}

// ctlWatch replays a history, so that etcdctl can be ended once it has printed it. JSON shows how
// events were grouped into responses, so there it is one event.
func ctlWatch(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), remove("a"), put("b", "1"), put("end", "last"))
	s.until("last", "watch", "--rev", "@1", "--prev-kv", "a", "f")
	s.until("bGFzdA==", "watch", "--rev", "@5", "-w", "json", "end")
	s.quietly(compact(s.rev(3)))
	s.ctl("", "watch", "a", "--rev", "@1")
}

// until runs etcdctl, which would go on, until it has printed the text and its line.
func (s *session) until(text string, arguments ...string) {
	command := s.etcdctl(arguments)
	pipe, err := command.StdoutPipe()
	if !s.check("output", err) || !s.check("etcdctl", command.Start()) {
		return
	}
	deadline := time.AfterFunc(responseTimeout, func() { _ = command.Process.Kill() })
	defer deadline.Stop()
	lines := bufio.NewScanner(pipe)
	for lines.Scan() {
		s.printed("out", lines.Text())
		if strings.Contains(lines.Text(), text) {
			break
		}
	}
	_ = command.Process.Kill()
	_ = command.Wait()
}

func ctlLease(s *session) {
	s.ctl("", "lease", "list")
	s.quietly(grant(0x51, 1000), putLeased("a", "1", 0x51))
	s.ctl("", "lease", "list")
	s.ctl("", "lease", "timetolive", "51", "--keys", "-w", "json")
	s.ctl("", "lease", "keep-alive", "51", "--once")
	s.ctl("", "lease", "revoke", "51")
	s.ctl("", "lease", "revoke", "51")
	s.ctl("", "lease", "timetolive", "51")
	s.ctl("", "lease", "keep-alive", "51", "--once")
	s.ctl("", "put", "b", "1", "--lease", "77")
}

func ctlCompaction(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), put("a", "3"))
	s.ctl("", "compaction", "@2")
	s.ctl("", "compaction", "@2")
	s.ctl("", "compaction", "@3", "--physical")
	s.ctl("", "get", "a", "--rev", "@2")
	s.ctl("", "defrag")
	s.ctl("", "get", "a")
}

func ctlEndpoint(s *session) {
	s.quietly(put("a", "1"))
	s.ctl("", "endpoint", "health")
	s.ctl("", "endpoint", "health", "-w", "json")
	s.ctl("", "endpoint", "status", "-w", "json")
	s.ctl("", "endpoint", "hashkv", "-w", "json")
}

func ctlMembers(s *session) {
	s.ctl("", "member", "list", "-w", "json")
	s.ctl("", "member", "remove", "1234")
	s.ctl("", "alarm", "list")
	s.ctl("", "alarm", "disarm")
}

func ctlLocks(s *session) {
	s.ctl("", "lock", "mutex", "echo", "held")
	s.ctl("", "lock", "mutex", "false")
	s.ctl("", "get", "mutex", "--prefix", "--count-only", "-w", "json")
}

func ctlSnapshot(s *session) {
	s.quietly(put("a", "1"))
	file := s.t.TempDir() + "/snapshot"
	command := s.etcdctl([]string{"snapshot", "save", file})
	s.note("snapshot save -> %v", command.Run())
	saved, err := os.Stat(file)
	s.note("saved something %v", err == nil && saved.Size() > 0)
}

func ctlDowngrade(s *session) { s.ctl("", "downgrade", "validate", "1.0") }

func ctlOther(s *session) {
	s.ctl("", "move-leader", "1234")
	s.ctl("", "version")
}
