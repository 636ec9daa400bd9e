package enginetest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Config says how an engine is run.
type Config struct {
	// Dir is the data folder, which outlives the engine. It is made when it is
	// not there.
	Dir string
	// MetricsAddr is where metrics are served; a free port of 127.0.0.1 when it
	// is empty. On Linux all of 127.0.0.0/8 can be used, to give every engine an
	// address of its own on the same port.
	MetricsAddr string
	// Refresh is how often the bytes of the cache are counted; every 50 ms when
	// it is zero. A real engine's default is 5 minutes.
	Refresh time.Duration
}

// Engine is a running engine, or one that has ended.
type Engine struct {
	// API is where clients connect, Metrics where GET /metrics is answered, URL
	// all of the latter.
	API     string
	Metrics netip.AddrPort
	URL     string

	cmd    *exec.Cmd
	stop   sync.Once
	ended  chan struct{}
	code   int          // to be read when it has ended
	stderr bytes.Buffer // likewise
}

// Start runs this test binary, which must call [Main], as an engine, and returns
// when the engine accepts clients. It is killed when ctx ends or this process
// does.
func Start(ctx context.Context, cfg Config) (*Engine, error) {
	cfg.MetricsAddr = cmp.Or(cfg.MetricsAddr, "127.0.0.1:0")
	cfg.Refresh = cmp.Or(cfg.Refresh, 50*time.Millisecond)
	env, err := json.Marshal(cfg)
	if err != nil {
		return nil, fmt.Errorf("starting an engine: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("starting an engine: %w", err)
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), envConfig+"="+string(env))
	// The engine ends itself when the other end of its standard input is closed,
	// which the system does for a parent that is gone.
	if _, err := cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("starting an engine: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("starting an engine: %w", err)
	}
	e, err := start(cmd)
	if err != nil {
		return nil, err
	}
	var at addresses
	ready := json.NewDecoder(stdout).Decode(&at)
	go e.reap()
	if ready != nil {
		e.Kill()
		return nil, fmt.Errorf("starting an engine: it exited with %d: %s", e.code, strings.TrimSpace(e.stderr.String()))
	}
	e.API, e.URL = at.API, "http://"+at.Metrics+"/metrics"
	if e.Metrics, err = netip.ParseAddrPort(at.Metrics); err != nil {
		e.Kill()
		return nil, fmt.Errorf("starting an engine: %w", err)
	}
	return e, nil
}

// start starts any engine's process; whoever calls it sees that it is reaped.
func start(cmd *exec.Cmd) (*Engine, error) {
	e := &Engine{cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &e.stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting an engine: %w", err)
	}
	return e, nil
}

func (e *Engine) reap() {
	defer close(e.ended)
	_ = e.cmd.Wait() // what it says is in the state
	e.code = e.cmd.ProcessState.ExitCode()
	if status, ok := e.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		e.code = 128 + int(status.Signal())
	}
}

// Signal sends a signal. One that has ended does not mind.
func (e *Engine) Signal(s os.Signal) { _ = e.cmd.Process.Signal(s) }

// Stop begins a clean stop, as a kubelet does, who tells an engine once however
// often it is called: [Engine.Wait] tells its outcome.
func (e *Engine) Stop() { e.stop.Do(func() { e.Signal(syscall.SIGTERM) }) }

// Kill ends the engine uncleanly, and returns when it has ended.
func (e *Engine) Kill() {
	e.Signal(syscall.SIGKILL)
	<-e.ended
}

// Ended is closed when the engine has ended.
func (e *Engine) Ended() <-chan struct{} { return e.ended }

// Wait waits until the engine has ended and returns its exit code as a kubelet
// reports it: 128 + the signal when one killed it.
func (e *Engine) Wait(ctx context.Context) (code int, err error) {
	select {
	case <-e.ended:
		return e.code, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("waiting for the end of an engine: %w", ctx.Err())
	}
}

// Session is a client that is connected to an engine.
type Session struct {
	// Warm: the cache had bytes of the key.
	Warm bool
	conn net.Conn
}

// Connect connects a client that runs a job of a key, after which the cache holds
// so many bytes of it. It returns when the job is done, and stays connected until
// the session is closed, as a runner does while its pipeline goes on. Without a
// key it is a mere probe.
func (e *Engine) Connect(ctx context.Context, key string, bytes int64) (*Session, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", e.API)
	if err != nil {
		return nil, fmt.Errorf("connecting to an engine: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	var a answer
	err = json.NewEncoder(conn).Encode(job{key, bytes})
	if err == nil {
		err = json.NewDecoder(conn).Decode(&a)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("running a job of %q: %w", key, err)
	}
	return &Session{Warm: a.Warm, conn: conn}, nil
}

// Close disconnects the client. It may be called more than once.
func (s *Session) Close() { _ = s.conn.Close() }
