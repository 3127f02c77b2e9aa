package compat

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"testing"
)

// TestHTTP compares what is served beside gRPC on the same port: the JSON gateway and the pages
// for health and version.
func TestHTTP(t *testing.T) {
	compare(t, reference36, []conversation{
		{name: "keys", run: gatewayKeys, open: noGateway},
		{name: "transactions", run: gatewayTxn, open: noGateway},
		{name: "leases", run: gatewayLeases, open: noGateway},
		{name: "watch", run: gatewayWatch, open: noGateway},
		{name: "maintenance and cluster", run: gatewayMaintenance, open: noGateway},
		{name: "locks and elections", run: gatewayLocks, open: noGateway},
		{name: "errors", run: gatewayErrors, open: noGateway},
		{name: "spellings of requests", run: gatewaySpellings, open: noGateway},
		{name: "methods, paths and headers", run: gatewayMethods, open: noGateway},
		{name: "pages", run: pages},
	})
}

const noGateway = "there is no JSON gateway yet"

// shownHeaders are the headers of an answer that clients look at.
var shownHeaders = []string{"Content-Type", "Access-Control-Allow-Origin",
	"Access-Control-Allow-Methods", "Access-Control-Allow-Headers", "Allow"}

// relative is a revision as cases write it into a body: "@+1" is the first of the case.
var relative = regexp.MustCompile(`"@\+(\d+)"`)

// send sends a request in which letters and revisions of the case are put in place of their marks.
func (s *session) send(method, path, body string) (*http.Response, error) {
	body = relative.ReplaceAllStringFunc(body, func(mark string) string {
		n, _ := strconv.ParseInt(relative.FindStringSubmatch(mark)[1], 10, 64)
		return fmt.Sprintf(`"%d"`, s.rev(n))
	})
	for _, letter := range []string{"a", "b", "c", "1", "2"} {
		encoded := base64.StdEncoding.EncodeToString([]byte(letter))
		body = strings.ReplaceAll(body, `"@`+letter+`"`, `"`+encoded+`"`)
	}
	request, err := http.NewRequestWithContext(s.ctx, method, "http://"+s.server.endpoint+path,
		strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	return http.DefaultClient.Do(request)
}

// web sends a request and notes status, headers if asked for, and body.
func (s *session) web(method, path, body string, headers bool) {
	answer, err := s.send(method, path, body)
	if err != nil {
		s.note("%s %s %s -> %v", method, path, body, err)
		return
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	s.note("%s %s %s -> %d %v", method, path, body, answer.StatusCode, err)
	if headers {
		for _, name := range shownHeaders {
			s.note("  %s: %q", name, answer.Header.Values(name))
		}
	}
	for printed := range strings.Lines(string(text)) {
		s.note("  %s", s.plain(strings.TrimSpace(printed)))
	}
}

// post calls the gateway.
func (s *session) post(path, body string) { s.web(http.MethodPost, "/v3/"+path, body, false) }

func gatewayKeys(s *session) {
	s.post("kv/put", `{"key": "@a", "value": "@1"}`)
	s.post("kv/put", `{"key": "@a", "value": "@2", "prev_kv": true}`)
	s.post("kv/range", `{"key": "@a"}`)
	s.post("kv/range", `{"key": "AA==", "range_end": "AA==", "limit": 1}`)
	s.post("kv/range", `{"key": "@a", "count_only": true}`)
	s.post("kv/range", `{"key": "@b"}`)
	s.post("kv/range",
		`{"key": "AA==", "range_end": "AA==", "sort_order": "DESCEND", "sort_target": "MOD"}`)
	s.post("kv/deleterange", `{"key": "@a", "prev_kv": true}`)
	s.post("kv/deleterange", `{"key": "@a"}`)
	s.post("kv/compaction", `{"revision": "@+2"}`)
}

func gatewayTxn(s *session) {
	s.quietly(put("a", "1"))
	s.post("kv/txn", `{
		"compare": [{"key": "@a", "target": "VERSION", "result": "EQUAL", "version": "1"}],
		"success": [{"request_put": {"key": "@b", "value": "@2"}},
			{"request_range": {"key": "@a"}}, {"request_delete_range": {"key": "@a"}}]}`)
	s.post("kv/txn", `{
		"compare": [{"key": "@a", "target": "MOD", "result": "GREATER", "mod_revision": 1}],
		"failure": [{"requestRange": {"key": "@b"}}]}`)
	s.post("kv/txn", `{}`)
}

func gatewayLeases(s *session) {
	s.post("lease/grant", `{"ID": "301", "TTL": "1000"}`)
	s.post("lease/grant", `{"ID": 302, "TTL": 1000}`)
	s.post("kv/put", `{"key": "@a", "value": "@1", "lease": "301"}`)
	s.post("lease/timetolive", `{"ID": "999", "keys": true}`)
	s.post("lease/keepalive", `{"ID": "301"}`)
	s.post("lease/leases", `{}`)
	s.post("kv/lease/timetolive", `{"ID": "998"}`)
	s.post("kv/lease/leases", `{}`)
	s.post("lease/revoke", `{"ID": "301"}`)
	s.post("kv/lease/revoke", `{"ID": "302"}`)
	s.post("lease/revoke", `{"ID": "301"}`)
}

// gatewayWatch reads as many results of the stream as the history gives.
func gatewayWatch(s *session) {
	s.quietly(put("a", "1"))
	answer, err := s.send(http.MethodPost, "/v3/watch",
		`{"create_request": {"key": "@a", "start_revision": "@+1"}}`)
	if !s.check("watch", err) {
		return
	}
	defer answer.Body.Close()
	s.note("%d %s", answer.StatusCode, answer.Header.Get("Content-Type"))
	lines := bufio.NewScanner(answer.Body)
	for range 2 {
		if !lines.Scan() {
			s.note("the stream ended: %v", lines.Err())
			return
		}
		s.note("  %s", s.plain(lines.Text()))
	}
}

func gatewayMaintenance(s *session) {
	s.quietly(put("a", "1"))
	s.post("maintenance/status", `{}`)
	s.post("maintenance/alarm", `{"action": "GET"}`)
	s.post("maintenance/defragment", `{}`)
	s.post("maintenance/hash", `{}`)
	s.post("maintenance/hashkv", `{}`)
	s.post("maintenance/transfer-leadership", `{"targetID": "1234"}`)
	s.post("cluster/member/list", `{}`)
	s.post("cluster/member/remove", `{"ID": "1234"}`)
}

func gatewayLocks(s *session) {
	s.quietly(grant(303, 1000))
	s.post("lock/lock", `{"name": "@a", "lease": "303"}`)
	s.do(prefix("a"))
	s.post("election/campaign", `{"name": "@b", "lease": "303", "value": "@1"}`)
	s.post("election/leader", `{"name": "@b"}`)
	s.post("election/leader", `{"name": "@c"}`)
}

func gatewayErrors(s *session) {
	s.quietly(put("a", "1"), put("a", "2"), compact(s.rev(2)))
	s.post("kv/put", `{"value": "@1"}`)
	s.post("kv/put", `{"key": "@a", "lease": "999"}`)
	s.post("kv/range", `{"key": "@a", "revision": "@+1"}`)
	s.post("kv/range", `{"key": "@a", "revision": "@+9"}`)
	s.post("kv/txn", `{"success": [{"request_put": {"key": "@b"}}, {"request_put": {"key": "@b"}}]}`)
	s.post("lease/grant", `{"TTL": "9000000001"}`)
}

func gatewaySpellings(s *session) {
	s.post("kv/put", `{"key": "YQ", "value": "MQ"}`)
	s.post("kv/put", `{"key": "_-8=", "value": "-_8="}`)
	s.post("kv/put", `{"key": "@b", "unknown": [1, {"x": null}]}`)
	s.post("kv/put", `{"key": "@c", "value": null}`)
	s.post("kv/range", `{"key": "AA==", "rangeEnd": "AA==", "keysOnly": true}`)
	s.post("kv/range", `{"key": "@a", "sort_order": 1}`)
	for _, bad := range []string{``, `{`, `[]`, `"x"`, `{"key": 1}`, `{"key": "*"}`,
		`{"key": "@a", "limit": "x"}`, `{"key": "@a", "sort_order": "UP"}`} {
		s.failing(bad)
	}
}

// failing posts a request of which only the status is compared: the text tells of the decoder.
func (s *session) failing(body string) {
	answer, err := s.send(http.MethodPost, "/v3/kv/range", body)
	if !s.check("post "+body, err) {
		return
	}
	answer.Body.Close()
	s.note("  %d", answer.StatusCode)
}

func gatewayMethods(s *session) {
	s.web(http.MethodPost, "/v3/kv/range", `{"key": "YQ=="}`, true)
	s.web(http.MethodGet, "/v3/kv/range", "", true)
	s.web(http.MethodOptions, "/v3/kv/range", "", true)
	s.web(http.MethodPost, "/v3/kv/nothing", `{}`, true)
	s.web(http.MethodPost, "/v3beta/kv/range", `{"key": "YQ=="}`, false)
	s.web(http.MethodPost, "/v3alpha/kv/range", `{"key": "YQ=="}`, false)
	s.web(http.MethodGet, "/nothing", "", true)
}

func pages(s *session) {
	for _, path := range []string{"/health", "/health?serializable=true", "/health?exclude=NOSPACE",
		"/livez", "/livez?verbose", "/livez/serializable_read", "/livez/nothing", "/readyz",
		"/readyz/linearizable_read", "/version", "/readyz?exclude=serializable_read"} {
		s.web(http.MethodGet, path, "", true)
	}
	s.verbose("/readyz?verbose")
	s.web(http.MethodPost, "/health", "", true)
	s.web(http.MethodPost, "/version", "", true)
}

// verbose notes the lines of a page in order: checks run in any.
func (s *session) verbose(path string) {
	answer, err := s.send(http.MethodGet, path, "")
	if !s.check("GET "+path, err) {
		return
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	sort.Strings(lines)
	s.note("  %d %q %v", answer.StatusCode, lines, err)
}
