package nodegroups

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// world is a cloud and a cluster, small enough to be read: what is true, as
// opposed to what a Group has been told. It moves only when told to.
type world struct {
	now time.Time

	// The cloud. It works towards desired; capacity bounds what it can have
	// pending or running.
	desired   int
	capacity  int
	instances map[model.InstanceID]model.Instance
	launched  int
	attempts  int
	failure   *model.LaunchFailure

	// The cluster: the Nodes by instance, and those that run a job.
	nodes map[model.InstanceID]model.Node
	jobs  map[model.InstanceID]bool
	uids  int
	// engines are the engine pods on each instance, sessions the instances
	// whose engine is used by more than runner pods. spoiled are those on whose
	// disk an engine that did not end by itself has left its cache.
	engines  map[model.InstanceID][]model.Pod
	sessions map[model.InstanceID]bool
	spoiled  map[model.InstanceID]bool
}

const endless = 1 << 30

func newWorld() *world {
	return &world{
		now:       time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC),
		capacity:  endless,
		instances: map[model.InstanceID]model.Instance{},
		nodes:     map[model.InstanceID]model.Node{},
		jobs:      map[model.InstanceID]bool{},
		engines:   map[model.InstanceID][]model.Pod{},
		sessions:  map[model.InstanceID]bool{},
		spoiled:   map[model.InstanceID]bool{},
	}
}

// startEngine is what the engines' DaemonSet does for a node.
func (w *world) startEngine(id model.InstanceID, state model.EngineState, grace time.Duration) {
	w.uids++
	delete(w.spoiled, id) // it wipes what it cannot trust
	uid := fmt.Sprintf("engine-%d", w.uids)
	w.engines[id] = append(slices.Clone(w.engines[id]), model.Pod{
		Namespace: "dagger", Name: uid, UID: uid, Node: w.nodes[id].Name, Kind: model.PodEngine, Created: w.now,
		EngineState: state, Engine: &model.EngineContainer{Grace: grace},
	})
}

// changeEngine edits an engine pod; false when there is none.
func (w *world) changeEngine(id model.InstanceID, uid string, edit func(*model.Pod)) bool {
	pods := slices.Clone(w.engines[id])
	at := slices.IndexFunc(pods, func(p model.Pod) bool { return p.UID == uid })
	if at < 0 {
		return false
	}
	edit(&pods[at])
	w.engines[id] = pods
	return true
}

// sweep removes the engine pods that have ended and that nothing holds.
func (w *world) sweep(id model.InstanceID) {
	w.engines[id] = slices.DeleteFunc(slices.Clone(w.engines[id]), func(p model.Pod) bool {
		return p.EngineState.Deleting && !runs(p) && !p.EngineState.Guarded
	})
	if len(w.engines[id]) == 0 {
		delete(w.engines, id)
	}
}

// tellToStop is the deletion of an engine's pod.
func (w *world) tellToStop(p *model.Pod) {
	if s := &p.EngineState; !s.Deleting {
		s.Deleting, s.Deadline = true, w.now.Add(p.Engine.Grace)
	}
}

// running returns the engines that have not ended.
func (w *world) running(id model.InstanceID) (pods []model.Pod) {
	for _, p := range w.engines[id] {
		if runs(p) {
			pods = append(pods, p)
		}
	}
	return pods
}

// exitEngines ends every engine of the instance that was told to stop. The
// kubelet tells the exit codes before it removes the pods.
func (w *world) exitEngines(id model.InstanceID, code int, told func()) {
	for _, p := range w.running(id) {
		if p.EngineState.Deleting {
			w.changeEngine(id, p.UID, func(p *model.Pod) {
				p.Engine = &model.EngineContainer{Grace: p.Engine.Grace, Exit: &model.ContainerExit{Code: int32(code), At: w.now}}
			})
			w.spoiled[id] = w.spoiled[id] || code != 0
		}
	}
	told()
	w.sweep(id)
}

// vanishEngines deletes the engine pods of the instance, whatever holds them.
func (w *world) vanishEngines(id model.InstanceID) {
	if len(w.running(id)) > 0 {
		w.spoiled[id] = true
	}
	delete(w.engines, id)
}

func (w *world) ids() []model.InstanceID { return slices.Sorted(maps.Keys(w.instances)) }

func (w *world) active() (n int) {
	for _, i := range w.instances {
		if active(i.State) {
			n++
		}
	}
	return n
}

// launch has the cloud work towards desired, as far as it has capacity. An
// attempt that falls short is a failure of its own.
func (w *world) launch() {
	for w.active() < min(w.desired, w.capacity) {
		w.launched++
		id := model.InstanceID(fmt.Sprintf("i-%d", w.launched))
		w.instances[id] = model.Instance{ID: id, State: model.InstancePending, LaunchedAt: w.now}
	}
	w.failure = nil
	if w.active() < w.desired {
		w.attempts++
		w.failure = &model.LaunchFailure{
			Activity: fmt.Sprintf("act%d", w.attempts), Class: model.FailureCapacity,
			Message: "no capacity", At: w.now,
		}
	}
}

// read is what the cloud reports now.
func (w *world) read() model.GroupSnapshot {
	s := model.GroupSnapshot{TakenAt: w.now, Desired: w.desired, Failure: w.failure}
	for _, id := range w.ids() {
		s.Instances = append(s.Instances, w.instances[id])
	}
	return s
}

// set changes the state of an instance, if there is one.
func (w *world) set(id model.InstanceID, s model.InstanceState) {
	if i, ok := w.instances[id]; ok {
		i.State = s
		w.instances[id] = i
	}
}

// remove ends an instance at once; its Node stays.
func (w *world) remove(id model.InstanceID) {
	delete(w.instances, id)
	delete(w.jobs, id)
}

// change edits the instance's Node, if there is one.
func (w *world) change(id model.InstanceID, edit func(*model.Node)) {
	if n, ok := w.nodes[id]; ok {
		edit(&n)
		w.nodes[id] = n
	}
}

// register is the kubelet's first word: a Node, not Ready yet.
func (w *world) register(id model.InstanceID) {
	w.uids++
	w.nodes[id] = model.Node{
		Name: model.NodeName("node-" + string(id)), UID: fmt.Sprintf("uid-%d", w.uids), ID: id,
		Created: w.now, ReadyChanged: w.now,
	}
}

func (w *world) ready(id model.InstanceID, ready bool) {
	w.change(id, func(n *model.Node) {
		if n.Ready != ready {
			n.Ready, n.ReadyChanged = ready, w.now
		}
	})
}

// schedulable says whether a job may be bound to the instance's Node.
func (w *world) schedulable(id model.InstanceID) bool {
	n, ok := w.nodes[id]
	return ok && n.Ready && !n.Draining && w.instances[id].State == model.InstanceRunning
}

// apply carries out an effect as cloud and API server would. For Confirm it
// returns whether the node was idle, for Look whether there is one, for StopEngine
// whether there was no pod.
func (w *world) apply(e Effect) (answer bool) {
	switch e.Verb {
	case Resize:
		w.desired = max(e.Desired, w.active())
	case Terminate:
		for _, id := range e.Instances {
			if active(w.instances[id].State) {
				w.desired--
			}
			w.set(id, model.InstanceTerminating)
			w.halt(id)
		}
	case Stop:
		for _, id := range e.Instances {
			if active(w.instances[id].State) {
				w.desired--
				w.set(id, model.InstanceStopping)
				w.halt(id)
			}
		}
	case Start:
		for _, id := range e.Instances {
			if w.instances[id].State == model.InstanceStopped {
				w.desired++
				w.set(id, model.InstancePending)
			}
		}
	case Taint:
		w.changeSame(e.Node, func(n *model.Node) { n.Draining = true })
	case Untaint:
		w.changeSame(e.Node, func(n *model.Node) {
			n.Draining, n.CATaintSince, n.Unschedulable = false, time.Time{}, false
		})
	case ClearAutoscalerTaint:
		w.changeSame(e.Node, func(n *model.Node) { n.CATaintSince = time.Time{} })
	case Confirm:
		return !w.jobs[e.Node.ID]
	case Look:
		_, answer = w.nodes[e.Node.ID]
		return answer
	case DeleteNode:
		if w.nodes[e.Node.ID].UID == e.Node.UID {
			delete(w.nodes, e.Node.ID)
			delete(w.jobs, e.Node.ID)
			w.collect(e.Node.ID)
		}
	case StopEngine:
		return !w.changeEngine(e.Node.ID, e.Engine.UID, func(p *model.Pod) {
			p.EngineState.Guarded = p.EngineState.Guarded || !p.EngineState.Deleting // nothing can be added to what is being deleted
			w.tellToStop(p)
		})
	case ReleaseEngine:
		w.changeEngine(e.Node.ID, e.Engine.UID, func(p *model.Pod) { p.EngineState.Guarded = false })
		w.sweep(e.Node.ID)
	}
	return false
}

// changeSame edits the very Node that is meant, by UID.
func (w *world) changeSame(n model.Node, edit func(*model.Node)) {
	if w.nodes[n.ID].UID == n.UID {
		w.change(n.ID, edit)
	}
}

// halt is the end of a kubelet: its Node is not Ready any more, its engine is
// killed, and nobody says so.
func (w *world) halt(id model.InstanceID) {
	if len(w.running(id)) > 0 {
		w.spoiled[id] = true
	}
	w.ready(id, false)
	delete(w.jobs, id)
	delete(w.sessions, id)
}

// collect is what becomes of the pods whose Node was deleted.
func (w *world) collect(id model.InstanceID) {
	w.engines[id] = slices.DeleteFunc(slices.Clone(w.engines[id]), func(p model.Pod) bool { return !p.EngineState.Guarded })
	for i := range w.engines[id] {
		w.tellToStop(&w.engines[id][i])
	}
	if len(w.engines[id]) == 0 {
		delete(w.engines, id)
	}
}

// dump is everything that a Group holds, as text that is equal for equal
// groups.
func dump(g *Group) string {
	flat := *g
	members := make(map[model.InstanceID]member, len(g.members))
	for id, m := range g.members {
		members[id] = *m
	}
	flat.members, flat.view = nil, nil
	text := fmt.Sprintf("%+v\nmembers: %+v\n", flat, members)
	if g.view != nil {
		text += fmt.Sprintf("view: %+v", *g.view)
	}
	return text
}
