package controlplane

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Process is a child process whose output goes to a file.
// It leads its own process group, so a signal reaches what it started too.
type Process struct {
	name    string
	logPath string
	cmd     *exec.Cmd
	done    chan struct{}
}

// StartProcess starts argv with env added to the environment, appending output to logPath.
//
// The goroutine that starts the child stays on its thread until the child has
// ended: Linux sends the parent-death signal when the starting thread exits, not
// when the process does.
func StartProcess(logPath string, env []string, argv ...string) (*Process, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = ownGroup()
	p := &Process{
		name:    filepath.Base(argv[0]),
		logPath: logPath,
		cmd:     cmd,
		done:    make(chan struct{}),
	}
	started := make(chan error)
	go func() {
		defer log.Close()
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // the outcome is read from cmd.ProcessState
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running tells whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the process group with SIGKILL, as a crash would, and waits for the process.
func (p *Process) Kill() {
	if p.Running() {
		p.signal(syscall.SIGKILL)
	}
	<-p.done
}

// Stop asks the process to end, waits at most patience, and kills it then.
// It returns an error if killing was needed.
func (p *Process) Stop(patience time.Duration) error {
	if !p.Running() {
		return nil
	}
	p.signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		p.Kill()
		return fmt.Errorf("%s did not stop within %s and was killed", p.name, patience)
	}
}

func (p *Process) signal(signal syscall.Signal) {
	_ = syscall.Kill(-p.cmd.Process.Pid, signal) // the group may have ended by itself
}

// Failure describes how the process ended, with the last lines it wrote.
func (p *Process) Failure(lines int) error {
	state := "is still running"
	if !p.Running() {
		state = "ended with " + p.cmd.ProcessState.String()
	}
	return fmt.Errorf("%s %s; the end of %s:\n%s", p.name, state, p.logPath, p.Tail(lines))
}

// Tail returns the last lines of the process's output.
func (p *Process) Tail(lines int) string {
	content, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(content), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
