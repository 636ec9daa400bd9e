package controller

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/dagger/enginetest"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// written is what a job leaves in the cache of the engine that it ran on.
	written = 1000
	// lingers is for how many rounds of the kubelets a client stays on average
	// when its pod has ended.
	lingers = 20
)

// engineProcesses runs the engines of a fakeCluster as processes of their own,
// each in the folder that its machine keeps through all stops. Everything but
// reading losses happens under the cluster's lock.
type engineProcesses struct {
	t    *testing.T
	root string
	// byPod are the processes by the UID of their pod, sessions those of jobs
	// by the UID of theirs.
	byPod    map[string]*engineProcess
	sessions map[string]*enginetest.Session
	// crashed are the machines whose engine was killed by the test itself since
	// it last started.
	crashed map[model.InstanceID]bool
	losses  []string
	written int64 // bytes by jobs
	wiped   int64 // bytes that were lost by crashes
	stops   int   // that were clean
}

type engineProcess struct {
	machine model.InstanceID
	crashed bool // the one before was, by the test
	// started is closed when engine is set, and lost, which are the bytes that
	// it wiped. It is nil if it could not be started.
	started chan struct{}
	engine  *enginetest.Engine
	lost    int64
}

func (p *engineProcess) ready() bool {
	select {
	case <-p.started:
		return p.engine != nil
	default:
		return false
	}
}

func (p *engineProcess) ended() bool {
	if !p.ready() {
		return false
	}
	select {
	case <-p.engine.Ended():
		return true
	default:
		return false
	}
}

// kill ends the process, however young it is.
func (p *engineProcess) kill() {
	if <-p.started; p.engine != nil {
		p.engine.Kill()
	}
}

func (e *engineProcesses) folder(id model.InstanceID) string {
	return filepath.Join(e.root, url.PathEscape(string(id)))
}

func (e *engineProcesses) bytes(id model.InstanceID) int64 {
	return enginetest.Bytes(e.folder(id), "repo")
}

// start runs the engine of a pod. The cluster does not wait for that.
func (e *engineProcesses) start(uid string, id model.InstanceID) {
	p := &engineProcess{machine: id, crashed: e.crashed[id], started: make(chan struct{})}
	delete(e.crashed, id)
	e.byPod[uid] = p
	before := e.bytes(id)
	go func() {
		defer close(p.started)
		var err error
		// Nobody asks for its metrics.
		if p.engine, err = enginetest.Start(context.Background(), enginetest.Config{Dir: e.folder(id), Refresh: time.Hour}); err != nil {
			e.t.Error(err)
			return
		}
		p.lost = before - e.bytes(id)
	}()
}

// account looks whether an engine has wiped its data, and whose doing that was.
func (e *engineProcesses) account(p *engineProcess) {
	if !p.ready() || p.lost == 0 {
		return
	}
	if p.crashed {
		e.wiped += p.lost
	} else {
		e.losses = append(e.losses, fmt.Sprintf("%d bytes on %s", p.lost, p.machine))
	}
	p.lost = 0
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
			p.kill() // as the machine's end does
			if n := e.bytes(p.machine); n > 0 {
				e.losses = append(e.losses, fmt.Sprintf("%d bytes on %s, which ended before its engine", n, p.machine))
			}
		}
		e.account(p)
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
		case p == nil || !p.ready() || pod.exited():
		case p.ended() && !pod.EngineState.Deleting: // the kubelet starts it again
			pod.EngineState.Restarts, pod.EngineState.LastExit = pod.EngineState.Restarts+1, 137
			c.podChanged(pod.Pod)
			e.start(uid, p.machine)
		case p.ended():
			code, _ := p.engine.Wait(context.Background())
			if code == 0 {
				e.stops++
			}
			pod.exit(code)
			c.podChanged(pod.Pod)
			delete(e.byPod, uid)
		case pod.EngineState.Deleting:
			p.engine.Stop()
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
	at := map[model.NodeName]*engineProcess{}
	for uid, pod := range c.engines {
		if p := e.byPod[uid]; p != nil && p.ready() {
			at[pod.Node] = p
		}
	}
	for uid, pod := range c.pods {
		p := at[pod.Node]
		if pod.Started.IsZero() || !pod.Finished.IsZero() || e.sessions[uid] != nil || p == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		session, err := p.engine.Connect(ctx, "repo", e.bytes(p.machine)+written)
		cancel()
		if err == nil { // else it has ended, or is about to
			e.written += written
			e.sessions[uid] = session
		}
	}
	// A client may leave later than its pod ends, as far as that is known.
	for uid, session := range e.sessions {
		if pod := c.pods[uid]; (pod == nil || !pod.Finished.IsZero()) && rand.IntN(lingers) == 0 {
			session.Close()
			delete(e.sessions, uid)
		}
	}
}

// close ends every process.
func (e *engineProcesses) close() {
	for _, session := range e.sessions {
		session.Close()
	}
	for _, p := range e.byPod {
		p.kill()
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
	l := newLab(t, groups)
	l.cloud.boot, l.cloud.resume, l.cloud.stopping, l.cloud.terminating = 200*time.Millisecond, 200*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	l.cloud.setLatency(5 * time.Millisecond)
	l.store.setLatency(time.Millisecond)
	l.cluster.setLatency(5 * time.Millisecond)
	engines := &engineProcesses{
		t: t, root: t.TempDir(), byPod: map[string]*engineProcess{}, sessions: map[string]*enginetest.Session{}, crashed: map[model.InstanceID]bool{},
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
		if p := e.byPod[uid]; engine.Node == node && p != nil && p.ready() && !p.ended() {
			e.crashed[p.machine] = true
			p.kill()
			return true
		}
	}
	return false
}
