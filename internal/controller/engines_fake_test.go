package controller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// engineDaemons is a DaemonSet of engines. Its fields may be changed under the
// cluster's lock.
type engineDaemons struct {
	tolerant bool
	grace    time.Duration
	stops    time.Duration // how long an engine takes to end
	exit     int           // its exit code
	stuck    bool          // it does not end, and no kubelet kills it
	silent   bool          // the kubelet removes the pod without a word
	// real runs them as processes; the fields above do not count then.
	real *engineProcesses
	// killed are the engines that were running when their machine ended.
	killed map[model.InstanceID]string
}

type fakeEngine struct {
	model.Pod
	machine model.InstanceID
	ends    time.Time
}

// exited says whether the engine has ended for good; exit has it end.
func (e *fakeEngine) exited() bool {
	_, ended := nodegroups.EngineExit(e.Pod)
	return ended
}

func (e *fakeEngine) exit(code int) {
	e.Engine = &model.EngineContainer{Grace: e.Engine.Grace, Exit: &model.ContainerExit{Code: int32(code)}}
}

// runEngines is the work of the DaemonSet controller, of the kubelets and of
// the garbage collector.
func (c *fakeCluster) runEngines(now time.Time) {
	if c.daemons == nil {
		return
	}
	if c.daemons.real != nil {
		c.daemons.real.run(c, now)
		return
	}
	on := map[model.NodeName]int{}
	running := map[model.InstanceID]bool{}
	for _, group := range c.cloud.ids() {
		for id, m := range c.cloud.machines(group) {
			running[id] = m.State == model.InstanceRunning
		}
	}
	for _, uid := range slices.Sorted(maps.Keys(c.engines)) {
		e := c.engines[uid]
		on[e.Node]++
		if !e.exited() && !running[e.machine] && e.machine != "" {
			if c.daemons.killed == nil {
				c.daemons.killed = map[model.InstanceID]string{}
			}
			c.daemons.killed[e.machine], e.machine = uid, ""
		}
		_, registered := c.nodes[e.Node]
		switch {
		case !registered && !e.EngineState.Guarded:
			c.dropEngine(e)
		case e.EngineState.Deleting && !e.exited() && running[e.machine] && !c.daemons.stuck && !now.Before(e.ends):
			if !c.daemons.silent {
				e.exit(c.daemons.exit)
			}
			c.podChanged(e.Pod)
			if !e.EngineState.Guarded || c.daemons.silent {
				c.dropEngine(e)
			}
		case e.exited() && !e.EngineState.Guarded:
			c.dropEngine(e)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[name]
		if n.Ready && on[name] == 0 && (!n.Draining || c.daemons.tolerant) && running[n.ID] {
			c.startEngine(n)
		}
	}
}

func (c *fakeCluster) startEngine(n model.Node) (uid string) {
	c.uid++
	uid = fmt.Sprintf("engine-%03d", c.uid)
	grace := c.daemons.grace
	if grace == 0 {
		grace = 5 * time.Minute
	}
	e := &fakeEngine{machine: n.ID, Pod: model.Pod{
		Namespace: "dagger", Name: uid, UID: uid, Kind: model.PodEngine, Node: n.Name, Created: time.Now().Truncate(time.Second),
		EngineState: model.EngineState{ToleratesDrain: c.daemons.tolerant}, Engine: &model.EngineContainer{Grace: grace},
	}}
	c.engines[uid] = e
	c.podChanged(e.Pod)
	return uid
}

func (c *fakeCluster) dropEngine(e *fakeEngine) {
	pod := e.Pod
	delete(c.engines, e.UID)
	c.tell(func(w *World) { w.PodGone(pod) })
}

func (c *fakeCluster) StopEngine(ctx context.Context, pod model.Pod) (gone bool, err error) {
	err = c.call(ctx, "stop-engine", func() error {
		c.state.Lock()
		defer c.state.Unlock()
		e := c.engines[pod.UID]
		if gone = e == nil; gone || e.EngineState.Deleting {
			return nil
		}
		c.history = append(c.history, fmt.Sprintf("stop-engine %s", e.Node))
		e.EngineState.Guarded, e.EngineState.Deleting, e.ends = true, true, time.Now().Add(c.daemons.stops)
		c.podChanged(e.Pod)
		return nil
	})
	return gone, err
}

func (c *fakeCluster) ReleaseEngine(ctx context.Context, pod model.Pod) error {
	return c.call(ctx, "release-engine", func() error {
		c.state.Lock()
		defer c.state.Unlock()
		if e := c.engines[pod.UID]; e != nil && e.EngineState.Guarded {
			e.EngineState.Guarded = false
			c.podChanged(e.Pod)
		}
		return nil
	})
}

// enginesOn returns the engine pods on a node.
func (c *fakeCluster) enginesOn(name model.NodeName) (pods []model.Pod) {
	c.state.Lock()
	defer c.state.Unlock()
	for _, uid := range slices.Sorted(maps.Keys(c.engines)) {
		if e := c.engines[uid]; e.Node == name {
			pods = append(pods, e.Pod)
		}
	}
	return pods
}

// editEngines changes every engine pod on a node as somebody else would.
func (c *fakeCluster) editEngines(name model.NodeName, change func(*model.EngineState)) {
	c.state.Lock()
	defer c.state.Unlock()
	for _, e := range c.engines {
		if e.Node == name {
			change(&e.EngineState)
			c.podChanged(e.Pod)
		}
	}
}

// guarded counts the engine pods that our finalizer keeps, killed those engines
// that ran when their machine ended.
func (c *fakeCluster) guarded() (n int) {
	c.state.Lock()
	defer c.state.Unlock()
	for _, e := range c.engines {
		if e.EngineState.Guarded {
			n++
		}
	}
	return n
}

func (c *fakeCluster) killed() map[model.InstanceID]string {
	c.state.Lock()
	defer c.state.Unlock()
	return maps.Clone(c.daemons.killed)
}
