package localcluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// process is one running binary of the control plane.
type process struct {
	name    string
	logFile string
	cmd     *exec.Cmd
	done    chan struct{} // closed when the process has ended and is reaped
	err     error         // how it ended; to be read after done
}

// kill ends the process and waits until it is reaped. The control plane keeps nothing that
// would be worth a graceful end: etcd's data are dropped, or outlive a kill.
func (p *process) kill() {
	p.signalKill()
	<-p.done
}

// signalKill is kill without the wait.
func (p *process) signalKill() {
	_ = p.cmd.Process.Kill() // fails only if it has ended
}

// logTail returns the last lines that the process wrote, for error messages.
func (p *process) logTail() string {
	const limit = 2000
	text, err := os.ReadFile(p.logFile)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-limit):])
}

// spawner starts processes from one OS thread that lives as long as they do: Linux sends the
// parent-death signal when the thread that started a process ends, not when the program ends.
type spawner struct {
	jobs chan func()
	done chan struct{}
}

func newSpawner() *spawner {
	s := &spawner{jobs: make(chan func()), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		runtime.LockOSThread()
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

// start runs binary with args, env added to ours, and its output appended to logDir/NAME.log.
func (s *spawner) start(name, binary, logDir string, env, args []string) (*process, error) {
	p := &process{name: name, logFile: filepath.Join(logDir, name+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", name, err)
	}
	defer out.Close()

	p.cmd = exec.Command(binary, args...) //nolint:noctx // Stop ends it, not a context
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = childAttr()
	started := make(chan error)
	s.jobs <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// close ends the spawner's thread. All its processes must have ended.
func (s *spawner) close() {
	close(s.jobs)
	<-s.done
}
