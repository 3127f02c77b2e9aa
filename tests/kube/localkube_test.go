package kube

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kvstore.test/kube/controlplane"
)

const localKube = "../../deploy/local-kube.sh"

// TestLocalKube follows a newcomer: start the script on a running store, use the
// kubectl line that it prints, create objects, and end it with an interrupt.
func TestLocalKube(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir, usualCommand())
	defer s.Kill()
	port, err := controlplane.FreePort()
	check(t, err)
	log := filepath.Join(dir, "local-kube.log")
	script, err := controlplane.StartProcess(log, nil, localKube,
		"--store", s.url, "--dir", filepath.Join(dir, "kube"), "--port", fmt.Sprint(port))
	check(t, err)
	defer script.Kill()

	var line []string
	eventually(t, "the script prints a kubectl line", 2*conditionWithin, func() error {
		if !script.Running() {
			t.Fatal(script.Failure(logLines))
		}
		for _, printed := range strings.Split(script.Tail(logLines), "\n") {
			line = strings.Fields(printed)
			if len(line) > 3 && strings.HasSuffix(line[0], "/kubectl") {
				return nil
			}
		}
		return fmt.Errorf("it printed:\n%s", script.Tail(logLines))
	})
	if out := kubectl(t, line...); !strings.Contains(out, "default") {
		t.Errorf("the printed line answered:\n%s", out)
	}
	client := func(words ...string) string { // kubectl --kubeconfig FILE words
		return kubectl(t, slices.Concat(line[:3], words)...)
	}
	client("create", "configmap", "greeting", "--from-literal=word=hello")
	out := client("get", "configmap", "greeting", "-o", "jsonpath={.data.word}")
	if out != "hello" {
		t.Errorf("the created object holds %q", out)
	}
	check(t, script.Stop(stopWithin))
	if _, err := net.DialTimeout("tcp", fmt.Sprint("127.0.0.1:", port), time.Second); err == nil {
		t.Error("the API server still listens after the script has ended")
	}
}

func kubectl(t *testing.T, words ...string) string {
	t.Helper()
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(words, " "), err, out)
	}
	return string(out)
}

// TestLocalKubeRefuses gives the script what it cannot work with: it ends at once
// with one line that names the cause and the way out.
func TestLocalKubeRefuses(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	check(t, err)
	defer taken.Close()
	free, err := controlplane.FreePort()
	check(t, err)
	listening := "http://" + taken.Addr().String()
	_, port, err := net.SplitHostPort(taken.Addr().String())
	check(t, err)
	for _, c := range []struct {
		flags []string
		says  string
	}{
		{[]string{"--store", fmt.Sprint("http://127.0.0.1:", free)}, "make run"},
		{[]string{"--store", "nowhere"}, "is not a URL"},
		{[]string{"--store", listening, "--port", port}, "choose another with --port"},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), conditionWithin)
		defer cancel()
		command := exec.CommandContext(ctx, localKube, append(c.flags, "--dir", os.DevNull)...)
		out, err := command.CombinedOutput()
		if err == nil {
			t.Errorf("%v was accepted", c.flags)
		}
		if text := string(out); strings.Count(text, "\n") != 1 || !strings.Contains(text, c.says) {
			t.Errorf("%v was answered with:\n%s", c.flags, text)
		}
	}
}
