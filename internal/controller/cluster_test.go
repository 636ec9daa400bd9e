package controller

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// fakeCluster is an API server with its nodes and pods, the kubelets of the
// cloud's machines, a scheduler, and a watch that tells a World what changes.
type fakeCluster struct {
	faults // of Nodes and Pods
	cloud  machinery
	// slots is how many runner pods a node takes; lag how late the watch is.
	slots int
	lag   time.Duration
	// watched is the World of the present life.
	state   sync.Mutex
	watched *World
	events  []watchEvent
	cut     bool // the watch tells nothing while it is cut
	// choose is which of the nodes with room a pod goes to, nil: the first;
	// bound is told where it went. beat is how often everything happens.
	choose func(p *fakePod, room []model.Node) model.NodeName
	bound  func(p *fakePod, n model.Node)
	beat   time.Duration
	// unlabelled: new nodes do not bear their group's label.
	unlabelled bool
	nodes      map[model.NodeName]model.Node
	pods       map[string]*fakePod
	uid        int
	history    []string // what happened to nodes, in order
	// daemons says how engines behave; nil: nodes have none.
	daemons *engineDaemons
	engines map[string]*fakeEngine // by UID
}

type fakePod struct {
	model.Pod
	lasts time.Duration
	stays bool // is not deleted when it has finished
}

type watchEvent struct {
	due  time.Time
	tell func(*World)
}

// machinery is a cloud whose machines become Nodes.
type machinery interface {
	step(now time.Time)
	ids() []model.GroupID
	machines(group model.GroupID) map[model.InstanceID]machine
}

func newFakeCluster(cloud machinery) *fakeCluster {
	c := &fakeCluster{
		cloud: cloud, slots: 1, lag: 100 * time.Millisecond, beat: 100 * time.Millisecond,
		choose: func(_ *fakePod, room []model.Node) model.NodeName { return room[0].Name }, bound: func(*fakePod, model.Node) {},
		nodes: map[model.NodeName]model.Node{}, pods: map[string]*fakePod{}, engines: map[string]*fakeEngine{},
	}
	c.latency = 20 * time.Millisecond
	return c
}

// run plays cloud and cluster until ctx ends.
func (c *fakeCluster) run(ctx context.Context) {
	beat := func() (d time.Duration) {
		c.locked(func() { d = c.beat })
		return d
	}
	for pause(ctx, beat()) {
		now := time.Now()
		c.cloud.step(now)
		c.state.Lock()
		c.kubelets(now)
		c.schedule(now)
		c.runEngines(now)
		c.deliver(now)
		c.state.Unlock()
	}
}

const (
	registerAfter = 2 * time.Second // a machine runs before its Node registers
	readyAfter    = 3 * time.Second // a Node registers before it is Ready
	lostAfter     = 40 * time.Second
)

// kubelets registers the Nodes of machines that run, and makes those NotReady
// whose machine does not run any more.
func (c *fakeCluster) kubelets(now time.Time) {
	running := map[model.InstanceID]bool{}
	for _, group := range c.cloud.ids() {
		for id, m := range c.cloud.machines(group) {
			if m.State != model.InstanceRunning || m.deadBoot || now.Before(m.due.Add(registerAfter)) {
				continue
			}
			running[id] = true
			n, registered := c.nodes[m.node]
			switch {
			case registered && n.ID != id:
				c.remove(m.node) // left by the machine that had the name before
			case !registered:
				c.uid++
				n = model.Node{Name: m.node, UID: fmt.Sprintf("uid-%d", c.uid), ID: id, Created: now, ReadyChanged: now}
				if !c.unlabelled {
					n.Labels = map[string]string{model.Prefix + "/node-group": string(group)}
				}
				c.put(n)
			case !n.Ready && (now.Sub(n.Created) >= readyAfter):
				n.Ready, n.ReadyChanged = true, now
				c.put(n)
			}
		}
	}
	for _, n := range c.nodes {
		if !running[n.ID] && n.Ready && now.Sub(n.ReadyChanged) >= lostAfter {
			n.Ready, n.ReadyChanged = false, now
			c.put(n)
		}
	}
}

// schedule binds pods, starts, ends and deletes them. Times of the API are
// whole seconds.
func (c *fakeCluster) schedule(now time.Time) {
	second := now.Truncate(time.Second)
	inTurn := func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) }
	for _, uid := range slices.SortedFunc(maps.Keys(c.pods), inTurn) {
		p := c.pods[uid]
		switch {
		case p.Node == "":
			if room := c.room(); len(room) > 0 {
				p.Node = c.choose(p, room)
				c.bound(p, c.nodes[p.Node])
				c.podChanged(p.Pod)
			}
		case p.Started.IsZero():
			p.Started = second
			c.podChanged(p.Pod)
		case p.Finished.IsZero() && now.Sub(p.Started) >= p.lasts:
			p.Finished = second
			c.podChanged(p.Pod)
		case !p.Finished.IsZero() && now.Sub(p.Finished) >= 10*time.Second && !p.stays:
			delete(c.pods, uid)
			c.tell(func(w *World) { w.PodGone(p.Pod) })
		}
	}
}

// room returns the nodes that take another pod, by name.
func (c *fakeCluster) room() (nodes []model.Node) {
	load := map[model.NodeName]int{}
	for _, p := range c.pods {
		if p.Finished.IsZero() {
			load[p.Node]++
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[name]
		if n.Ready && !n.Draining && n.CATaintSince.IsZero() && !n.Unschedulable && load[name] < c.slots {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// load counts the runner pods of a node that have not finished.
func (c *fakeCluster) load(name model.NodeName) (n int) {
	for _, p := range c.pods {
		if p.Node == name && p.Finished.IsZero() {
			n++
		}
	}
	return n
}

func (c *fakeCluster) tell(what func(*World)) {
	c.events = append(c.events, watchEvent{time.Now().Add(c.lag), what})
}

func (c *fakeCluster) podChanged(p model.Pod) { c.tell(func(w *World) { w.PodChanged(p) }) }

func (c *fakeCluster) put(n model.Node) {
	c.nodes[n.Name] = n
	c.tell(func(w *World) { w.NodeChanged(n) })
}

func (c *fakeCluster) deliver(now time.Time) {
	for len(c.events) > 0 && !c.cut && !now.Before(c.events[0].due) {
		if c.watched != nil {
			c.events[0].tell(c.watched)
		}
		c.events = c.events[1:]
	}
}

// watch tells a World everything that there is, and from then on what changes.
func (c *fakeCluster) watch(w *World) {
	c.state.Lock()
	defer c.state.Unlock()
	c.events, c.watched = nil, w
	for _, n := range c.nodes {
		w.NodeChanged(n)
	}
	for _, p := range c.pods {
		w.PodChanged(p.Pod)
	}
	for _, e := range c.engines {
		w.PodChanged(e.Pod)
	}
}

// setCut cuts the watch, or lets it tell what has happened meanwhile.
func (c *fakeCluster) setCut(cut bool) {
	c.state.Lock()
	defer c.state.Unlock()
	c.cut = cut
}

// annotate does what `kubectl annotate rng` does.
func (c *fakeCluster) annotate(group model.GroupID, annotations map[string]string) {
	c.state.Lock()
	defer c.state.Unlock()
	c.tell(func(w *World) { w.AnnotationsChanged(group, annotations) })
}

// job makes a runner pod; on which node is the scheduler's to say when node is
// empty.
func (c *fakeCluster) job(key model.CacheKey, lasts time.Duration, node model.NodeName) (uid string) {
	c.state.Lock()
	defer c.state.Unlock()
	c.uid++
	uid = fmt.Sprintf("pod-%03d", c.uid)
	p := &fakePod{Pod: model.Pod{
		Namespace: "ci", Name: uid, UID: uid, Key: key, Kind: model.PodRunner, Node: node, Created: time.Now().Truncate(time.Second),
	}, lasts: lasts}
	c.pods[uid] = p
	c.podChanged(p.Pod)
	return uid
}

// keep lets a pod stay when it has finished.
func (c *fakeCluster) keep(uid string) {
	c.state.Lock()
	defer c.state.Unlock()
	c.pods[uid].stays = true
}

// deletePod removes a pod whatever its state.
func (c *fakeCluster) deletePod(uid string) {
	c.state.Lock()
	defer c.state.Unlock()
	p := c.pods[uid]
	delete(c.pods, uid)
	c.tell(func(w *World) { w.PodGone(p.Pod) })
}

// edit changes a Node as somebody else would. There must be one.
func (c *fakeCluster) edit(name model.NodeName, change func(*model.Node)) {
	c.state.Lock()
	defer c.state.Unlock()
	n := c.nodes[name]
	change(&n)
	c.put(n)
}

func (c *fakeCluster) removeNode(name model.NodeName) {
	c.state.Lock()
	defer c.state.Unlock()
	c.remove(name)
}

func (c *fakeCluster) remove(name model.NodeName) {
	n := c.nodes[name]
	delete(c.nodes, name)
	c.tell(func(w *World) { w.NodeGone(n) })
}

func (c *fakeCluster) node(name model.NodeName) (model.Node, bool) {
	c.state.Lock()
	defer c.state.Unlock()
	n, ok := c.nodes[name]
	return n, ok
}

// all returns every Node, sorted by name.
func (c *fakeCluster) all() (nodes []model.Node) {
	c.state.Lock()
	defer c.state.Unlock()
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		nodes = append(nodes, c.nodes[name])
	}
	return nodes
}

func (c *fakeCluster) jobs(name model.NodeName) int {
	c.state.Lock()
	defer c.state.Unlock()
	return c.load(name)
}

// change applies f to the Node if it is the one meant.
func (c *fakeCluster) change(ctx context.Context, op string, name model.NodeName, uid string, f func(*model.Node)) error {
	return c.call(ctx, op, func() error {
		c.state.Lock()
		defer c.state.Unlock()
		n, ok := c.nodes[name]
		if !ok || n.UID != uid {
			return nil
		}
		before := n
		f(&n)
		if before.Draining != n.Draining || before.Marks != n.Marks || before.CATaintSince != n.CATaintSince || before.Unschedulable != n.Unschedulable {
			c.history = append(c.history, fmt.Sprintf("%s %s", op, name))
			c.put(n)
		}
		return nil
	})
}

func (c *fakeCluster) Taint(ctx context.Context, name model.NodeName, uid string) error {
	return c.change(ctx, "taint", name, uid, func(n *model.Node) { n.Draining = true })
}

func (c *fakeCluster) Untaint(ctx context.Context, name model.NodeName, uid string) error {
	return c.change(ctx, "untaint", name, uid, func(n *model.Node) {
		n.Draining, n.CATaintSince, n.Unschedulable = false, time.Time{}, false
	})
}

func (c *fakeCluster) ClearCATaint(ctx context.Context, name model.NodeName, uid string) error {
	return c.change(ctx, "clear-autoscaler-taint", name, uid, func(n *model.Node) { n.CATaintSince, n.Unschedulable = time.Time{}, false })
}

func (c *fakeCluster) Label(ctx context.Context, name model.NodeName, uid string, group model.GroupID) error {
	return c.change(ctx, "label", name, uid, func(n *model.Node) {
		n.Labels = maps.Clone(n.Labels)
		if n.Labels == nil {
			n.Labels = map[string]string{}
		}
		n.Labels[model.Prefix+"/node-group"] = model.GroupLabel(group)
	})
}

func (c *fakeCluster) Mark(ctx context.Context, name model.NodeName, uid string, marks model.Marks) error {
	return c.change(ctx, "mark", name, uid, func(n *model.Node) {
		n.Marks.Decision, n.Marks.Reason, n.Marks.Warm = marks.Decision, marks.Reason, marks.Warm
		switch {
		case n.Marks.Protected && !n.Marks.ProtectedByUs: // a person's own
		case marks.Protected:
			n.Marks.Protected, n.Marks.ProtectedByUs = true, true
		default:
			n.Marks.Protected, n.Marks.ProtectedByUs = false, false
		}
	})
}

func (c *fakeCluster) Delete(ctx context.Context, name model.NodeName, uid string) error {
	return c.call(ctx, "delete", func() error {
		c.state.Lock()
		defer c.state.Unlock()
		if n, ok := c.nodes[name]; ok && n.UID == uid {
			c.history = append(c.history, fmt.Sprintf("delete %s", name))
			c.remove(name)
		}
		return nil
	})
}

func (c *fakeCluster) NodeOf(ctx context.Context, id model.InstanceID) (found model.Node, err error) {
	err = c.call(ctx, "node-of", func() error {
		c.state.Lock()
		defer c.state.Unlock()
		for _, n := range c.nodes {
			if n.ID == id {
				found = n
			}
		}
		return nil
	})
	return found, err
}

func (c *fakeCluster) PodsOn(ctx context.Context, node model.NodeName) (pods []model.Pod, err error) {
	err = c.call(ctx, "pods-on", func() error {
		c.state.Lock()
		defer c.state.Unlock()
		for _, e := range c.engines {
			if e.Node == node {
				pods = append(pods, e.Pod)
			}
		}
		for _, p := range c.pods {
			if p.Node == node && p.Finished.IsZero() {
				pods = append(pods, p.Pod)
			}
		}
		return nil
	})
	return pods, err
}

// happened returns what was done to nodes, in order, without marks.
func (c *fakeCluster) happened() (out []string) {
	c.state.Lock()
	defer c.state.Unlock()
	for _, h := range c.history {
		if len(h) < 4 || h[:4] != "mark" {
			out = append(out, h)
		}
	}
	return out
}
