package localcluster

import (
	"fmt"
	"os"
)

// Process is a program that Spawn has started. Its methods may be called
// concurrently.
type Process struct{ *process }

// Spawn starts a program beside the control plane, env added to ours, its
// output appended to NAME.log in LogDir. It ends with the cluster, however that
// ends.
func (c *Cluster) Spawn(name, binary string, env []string, args ...string) (*Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return nil, fmt.Errorf("starting %s: %w", name, errStopped)
	}
	if before := c.running[name]; before != nil && !before.ended() {
		return nil, fmt.Errorf("starting %s: it is running", name)
	}
	p, err := c.spawner.start(name, binary, c.LogDir(), env, args)
	if err != nil {
		return nil, err
	}
	c.running[name] = p
	return &Process{p}, nil
}

// Kill ends the process at once and waits until it is reaped.
func (p *Process) Kill() { p.kill() }

// Signal sends the process a signal.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("signalling %s: %w", p.name, err)
	}
	return nil
}

// Done is closed when the process has ended; Err then says how.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the process ended: nil for exit code 0.
func (p *Process) Err() error { return p.err }

// LogTail returns the last lines that the process wrote.
func (p *Process) LogTail() string { return p.logTail() }

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}
