package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// engineFolder, when it is set, makes this binary an engine that keeps its data
// in that folder.
const engineFolder = "HEARTH_TEST_ENGINE_FOLDER"

// beEngine behaves as a Dagger engine of v0.21 does with its data. It keeps what
// its sessions write. Told to stop, it waits until they have left, marks its
// data as clean, and ends with 0. Started on data that is not clean, it wipes
// it.
func beEngine(dir string) error {
	file := func(name string) string { return filepath.Join(dir, name) }
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	if _, err := os.Stat(file("dirty")); err == nil {
		data, _ := os.ReadFile(file("data"))
		if err := errors.Join(os.WriteFile(file("wiped"), []byte(strconv.Itoa(len(data))), 0o600), os.WriteFile(file("data"), nil, 0o600)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(file("dirty"), nil, 0o600); err != nil {
		return err
	}
	data, err := os.OpenFile(file("data"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_ = os.Remove(file("socket")) // left by one that was killed
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", file("socket"))
	if err != nil {
		return err
	}
	var sessions sync.WaitGroup
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			session, err := listener.Accept()
			if err != nil {
				return
			}
			sessions.Go(func() {
				defer session.Close()
				_, _ = io.Copy(data, session)
			})
		}
	})
	<-term
	_ = listener.Close()
	accepting.Wait()
	sessions.Wait()
	if err := data.Close(); err != nil {
		return err
	}
	return os.Remove(file("dirty"))
}

// engineProcesses runs the engines of a fakeCluster as processes of their own,
// each in the folder that its machine keeps through all stops. Everything but
// reading losses happens under the cluster's lock.
type engineProcesses struct {
	t    *testing.T
	root string
	// byPod are the processes by the UID of their pod, sessions the connections
	// of jobs by the UID of theirs.
	byPod    map[string]*engineProcess
	sessions map[string]net.Conn
	// crashed are the machines whose engine was killed by the test itself since
	// it last started.
	crashed map[model.InstanceID]bool
	losses  []string
	written int // bytes by jobs
	wiped   int // bytes that were lost by crashes
	stops   int // that were clean
}

type engineProcess struct {
	cmd     *exec.Cmd
	done    chan struct{}
	machine model.InstanceID
	told    bool
}

func (p *engineProcess) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (e *engineProcesses) folder(id model.InstanceID) string {
	return filepath.Join(e.root, strings.NewReplacer("/", "_", ":", "_").Replace(strings.TrimPrefix(string(id), "fake:///")))
}

// start runs the engine of a pod.
func (e *engineProcesses) start(uid string, id model.InstanceID) {
	dir := e.folder(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		e.t.Error(err)
		return
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), engineFolder+"="+dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		e.t.Error(err)
		return
	}
	p := &engineProcess{cmd: cmd, done: make(chan struct{}), machine: id}
	go func() { _ = cmd.Wait(); close(p.done) }()
	e.byPod[uid] = p
}

// account looks whether an engine has wiped its data, and whose doing that was.
func (e *engineProcesses) account(id model.InstanceID) {
	wiped := filepath.Join(e.folder(id), "wiped")
	lost, err := os.ReadFile(wiped)
	if err != nil {
		return
	}
	n, _ := strconv.Atoi(string(bytes.TrimSpace(lost)))
	if e.crashed[id] {
		e.wiped += n
	} else {
		e.losses = append(e.losses, fmt.Sprintf("%d bytes on %s", n, id))
	}
	delete(e.crashed, id)
	_ = os.Remove(wiped)
}

// run is the work of the kubelets, for engines and for the sessions of jobs.
func (e *engineProcesses) run(c *fakeCluster, now time.Time) {
	running := map[model.InstanceID]bool{}
	for _, group := range c.cloud.ids() {
		for id, m := range c.cloud.machines(group) {
			running[id] = m.State == model.InstanceRunning
		}
	}
	for uid, p := range e.byPod {
		if !running[p.machine] && !p.ended() {
			_ = p.cmd.Process.Kill() // as the machine's end does
			<-p.done
			if data, _ := os.ReadFile(filepath.Join(e.folder(p.machine), "data")); len(data) > 0 {
				e.losses = append(e.losses, fmt.Sprintf("%d bytes on %s, which ended before its engine", len(data), p.machine))
			}
		}
		if p.ended() && !running[p.machine] {
			delete(e.byPod, uid)
		}
	}
	on := map[model.NodeName]int{}
	for _, uid := range slices.Sorted(maps.Keys(c.engines)) {
		pod, p := c.engines[uid], e.byPod[uid]
		on[pod.Node]++
		_, registered := c.nodes[pod.Node]
		switch {
		case !pod.EngineState.Guarded && (!registered || pod.exited()):
			c.dropEngine(pod)
		case p == nil || pod.exited():
		case p.ended() && !pod.EngineState.Deleting: // the kubelet starts it again
			pod.EngineState.Restarts, pod.EngineState.LastExit = pod.EngineState.Restarts+1, 137
			c.podChanged(pod.Pod)
			e.start(uid, p.machine)
		case pod.EngineState.Deleting && !p.told:
			p.told = true
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
		case p.ended():
			code := p.cmd.ProcessState.ExitCode()
			if code < 0 {
				code = 137
			} else if code == 0 {
				e.stops++
			}
			pod.exit(code)
			c.podChanged(pod.Pod)
			delete(e.byPod, uid)
		}
		if p != nil {
			e.account(p.machine)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		if n := c.nodes[name]; n.Ready && on[name] == 0 && !n.Draining && running[n.ID] {
			e.start(c.startEngine(n), n.ID)
		}
	}
	e.connect(c)
}

// connect has every job that runs write to the engine beside it.
func (e *engineProcesses) connect(c *fakeCluster) {
	for uid, pod := range c.pods {
		session := e.sessions[uid]
		runs := !pod.Started.IsZero() && pod.Finished.IsZero()
		if runs && session == nil {
			id := c.nodes[pod.Node].ID
			conn, err := net.Dial("unix", filepath.Join(e.folder(id), "socket"))
			if err != nil {
				continue // it is starting
			}
			n, err := conn.Write(bytes.Repeat([]byte("x"), 1000))
			if err == nil {
				e.written += n
				e.sessions[uid] = conn
			}
		}
		if !runs && session != nil {
			_ = session.Close()
			delete(e.sessions, uid)
		}
	}
	for uid, session := range e.sessions {
		if c.pods[uid] == nil {
			_ = session.Close()
			delete(e.sessions, uid)
		}
	}
}

// close ends every process.
func (e *engineProcesses) close() {
	for _, session := range e.sessions {
		_ = session.Close()
	}
	for _, p := range e.byPod {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// TestNoByteIsLost lets many groups of one node each live through a schedule of
// their own, of jobs, scale-downs, scale-ups and crashes of engines, with
// engines that are real processes, while Hearth is killed again and again. What
// a crash does not account for must not be lost.
func TestNoByteIsLost(t *testing.T) {
	schedules, span, least := 200, 80*time.Second, 100
	if testing.Short() {
		schedules, span, least = 20, 15*time.Second, 1
	}
	var groups []model.NodeGroup
	for i := range schedules {
		groups = append(groups, group(model.GroupID(fmt.Sprintf("g-%03d", i)), "max-idle", "1s", "park", "stop"))
	}
	root, err := os.MkdirTemp("", "hearth-engines-") //nolint:usetesting // short: it is part of a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	l := newLab(t, groups)
	l.cloud.boot, l.cloud.resume, l.cloud.stopping, l.cloud.terminating = 200*time.Millisecond, 200*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	l.cloud.setLatency(5 * time.Millisecond)
	l.store.setLatency(time.Millisecond)
	l.cluster.setLatency(5 * time.Millisecond)
	engines := &engineProcesses{
		t: t, root: root, byPod: map[string]*engineProcess{}, sessions: map[string]net.Conn{}, crashed: map[model.InstanceID]bool{},
	}
	l.cluster.locked(func() { l.cluster.daemons = &engineDaemons{real: engines} })
	t.Cleanup(func() {
		l.cluster.locked(func() {
			engines.close()
			l.cluster.daemons = nil
		})
	})
	l.change = func(cfg *Config) {
		cfg.Tick, cfg.PlanEvery, cfg.SnapshotFast = 100*time.Millisecond, 250*time.Millisecond, 200*time.Millisecond
	}
	defer l.close()
	l.start()

	dice := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	want := map[model.GroupID]int{}
	next := map[model.GroupID]time.Time{} // when the next thing happens to a group
	hunt := time.Now().Add(5 * time.Second)
	crashes, kills := 0, 0
	for end := time.Now().Add(span); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
		if time.Now().After(hunt) {
			_ = l.kill()
			time.Sleep(time.Duration(dice.IntN(500)) * time.Millisecond)
			l.start()
			kills++
			hunt = time.Now().Add(time.Duration(500+dice.IntN(7000)) * time.Millisecond)
		}
		l.refresh()
		byGroup := map[model.GroupID]model.Node{}
		for _, n := range l.ready() {
			byGroup[model.GroupID(n.Labels[model.Prefix+"/node-group"])] = n
		}
		for _, g := range groups {
			node, up := byGroup[g.ID]
			v := l.view(g.ID)
			switch {
			case v == nil:
				continue
			case want[g.ID] > v.Target:
				_ = l.increase(g.ID, 1)
			case want[g.ID] < v.Target && up && !node.Marks.Protected && v.Owns(node.ID):
				_ = l.remove(g.ID, node) // or vetoed, since a job has come
			}
			if time.Now().Before(next[g.ID]) {
				continue
			}
			next[g.ID] = time.Now().Add(time.Duration(500+dice.IntN(6000)) * time.Millisecond)
			switch dice.IntN(8) {
			case 0, 1:
				want[g.ID] = 0
			case 2, 3:
				want[g.ID] = 1
			case 4:
				if up && dice.IntN(4) == 0 && l.cluster.crash(engines, node.Name) {
					crashes++
				}
			default:
				if up {
					l.cluster.bind("repo", time.Duration(dice.IntN(2000))*time.Millisecond, node.Name)
				}
			}
		}
	}
	l.cluster.locked(func() {
		t.Logf("%d schedules, %d lives of Hearth, %d engines crashed: %d bytes written, %d lost by crashes, %d clean stops, machines launched %d",
			schedules, kills+1, crashes, engines.written, engines.wiped, engines.stops, l.cloud.launches())
		if len(engines.losses) > 0 {
			t.Errorf("lost by Hearth's own doing: %v", engines.losses)
		}
		if engines.stops < least || engines.written == 0 {
			t.Errorf("only %d clean stops of %d schedules, %d bytes written: this shows nothing", engines.stops, schedules, engines.written)
		}
	})
}

// locked calls f while the cluster stands still.
func (c *fakeCluster) locked(f func()) {
	c.state.Lock()
	defer c.state.Unlock()
	f()
}

// bind makes a runner pod on a node that takes pods now.
func (c *fakeCluster) bind(key model.CacheKey, lasts time.Duration, node model.NodeName) {
	c.state.Lock()
	n, ok := c.nodes[node]
	open := ok && n.Ready && !n.Draining && n.CATaintSince.IsZero() && c.load(node) == 0
	if open {
		c.uid++
		uid := fmt.Sprintf("pod-%03d", c.uid)
		p := &fakePod{Pod: model.Pod{
			Namespace: "ci", Name: uid, UID: uid, Key: key, Kind: model.PodRunner, Node: node, Created: time.Now().Truncate(time.Second),
		}, lasts: lasts}
		c.pods[uid] = p
		c.podChanged(p.Pod)
	}
	c.state.Unlock()
}

// crash kills the engine on a node, as a bug of its own would.
func (c *fakeCluster) crash(e *engineProcesses, node model.NodeName) bool {
	c.state.Lock()
	defer c.state.Unlock()
	for uid, engine := range c.engines {
		if p := e.byPod[uid]; engine.Node == node && p != nil && !p.ended() {
			e.crashed[p.machine] = true
			_ = p.cmd.Process.Kill()
			<-p.done
			return true
		}
	}
	return false
}
