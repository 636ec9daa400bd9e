package nodegroups

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// How the engine of a node that leaves is stopped. From v0.21 a Dagger engine
// that does not end by itself wipes its whole cache when it starts again; so
// its instance is not ended before the engine's exit has been recorded, or has
// been given up. One that was not clean is never parked: it would come back
// with nothing.
//
// Only what is seen concludes. Time alone never does: the API server, a watch
// or the leader may have been away for any part of it.

const (
	// taintSettle is how long new pods must have been kept away from a node
	// before a look at it counts: the scheduler may have been about to bind one.
	taintSettle = 10 * time.Second
	// quietTimeout is how long sessions may stay on an engine after the last
	// runner pod has gone from its node, and how long one that has answered
	// before may say nothing. They are not CI jobs', and end with the engine.
	quietTimeout = 10 * time.Minute
	// drainWarning is when people are told of pods that do not go, drainTimeout
	// when the node goes all the same: more than a CI job takes.
	drainWarning = 15 * time.Minute
	drainTimeout = 24 * time.Hour
	// graceSlack is what the kubelet has beyond an engine's deadline to end it
	// and to say so.
	graceSlack = time.Minute
	// refusedTimeout is how long an API server may refuse to stop an engine,
	// one answer like the other, before its instance is ended without.
	refusedTimeout = 15 * time.Minute
	// releaseTimeout is how long the engine pod that has ended is waited for to
	// go before its instance is stopped. Only when it has gone its controller
	// makes another one, if it does.
	releaseTimeout = time.Minute
	// lateTimeout is how long a runner pod that was bound in spite of all keeps
	// an instance whose engine has ended.
	lateTimeout = 10 * time.Minute
	// stopTimeout is how long the cloud may take to stop an instance before it
	// is terminated instead.
	stopTimeout = 10 * time.Minute
)

// Exit is how the stop of an engine ended: the exit code in decimal, or one of
// the words below.
type Exit string

// Exits.
const (
	ExitClean    Exit = "0"
	ExitVanished Exit = "vanished" // the pod went without an exit code that we saw
	ExitTimeout  Exit = "timeout"  // it did not end in time
	ExitRefused  Exit = "refused"  // the API server does not let us stop it
	ExitLost     Exit = "lost"     // its node or instance ended before it
)

// Clean says whether the engine's cache is as it was.
func (e Exit) Clean() bool { return e == ExitClean }

// EngineExit says how an engine has ended for good, false while it has not. One
// whose pod has neither ended nor been told to is started again; one that ended
// before it was told to is too, unless the pod says that it is over.
func EngineExit(p model.Pod) (exit Exit, ended bool) {
	if p.Engine == nil {
		return "", false
	}
	over, end := !p.Finished.IsZero(), p.Engine.Exit
	switch {
	case end == nil && over: // evicted, or its node died
		return ExitVanished, true
	case end == nil || !over && !p.EngineState.Deleting:
		return "", false
	case !over && end.At.Add(p.Engine.Grace+graceSlack).Before(p.EngineState.Deadline):
		return "", false
	}
	return Exit(strconv.Itoa(int(end.Code))), true
}

func runs(p model.Pod) bool {
	_, ended := EngineExit(p)
	return !ended
}

// beginDrain forgets what was found out in an earlier drain.
func (m *member) beginDrain() {
	m.drain = drain{}
}

// drain is what was found out of a node that leaves, in this life.
type drain struct {
	taintedAt time.Time // when our taint was put on
	looked    bool      // for its Node, by a live read
	// confirmed: a live read since found no runner pods, at a time.
	confirmed   bool
	confirmedAt time.Time
	// engines are those that the read found, later that which is to stop, as it
	// was last seen. gone is the UID of an engine that does not exist any more,
	// as of a time. overdue: a live read after its deadline still found it.
	// refusedAt is since when the API server refuses to stop it.
	engines         []model.Pod
	gone            string
	goneAt          time.Time
	overdue         bool
	refusedAt       time.Time
	warned, saidOff bool // people were told of what it waits for
}

// occupied says whether runner pods or sessions of the engine are on it.
func (g *Group) occupied(id model.InstanceID) bool {
	return g.busy[id] || g.uses[id].Activity == model.ActivityBusy
}

// quiet says whether the engine has no sessions since a live read found no
// runner pods. Of an engine without metrics only the runner pods are known; one
// that has them and does not answer is not quiet.
func (g *Group) quiet(id model.InstanceID, now time.Time) bool {
	use, since := g.uses[id], g.members[id].confirmedAt
	switch {
	case use.Activity == model.ActivityUnknown && !g.speaks(id):
		return true
	case use.Activity == model.ActivityIdle && use.At.After(since):
		return true
	default:
		return now.Sub(since) >= quietTimeout
	}
}

// speaks says whether the engine on an instance has metrics: it has answered
// before, or its pod says so.
func (g *Group) speaks(id model.InstanceID) bool {
	return g.uses[id].Metrics || slices.ContainsFunc(g.members[id].engines, func(p model.Pod) bool {
		return p.Engine != nil && p.Engine.Metrics
	})
}

// keptAway says whether new pods have been kept away from a draining node for
// long enough: by our taint, which cluster-autoscaler's has gone before.
func (g *Group) keptAway(id model.InstanceID, now time.Time) bool {
	node, since := g.nodes[id], g.members[id].taintedAt
	if ca := node.CATaintSince; !ca.IsZero() && ca.Before(since) {
		since = ca
	}
	return node.Draining && !g.members[id].taintedAt.IsZero() && now.Sub(since) >= taintSettle
}

// tooLong says whether a drain has taken so long that it goes on whatever is
// still there.
func (i Intent) tooLong(now time.Time) bool {
	return i.Stage == StageDraining && now.Sub(i.Since) >= drainTimeout
}

// mustLook says whether an instance that runs has a Node that is missing, or long
// NotReady, by the watch alone: the watch may be silent, the node have become Ready
// since, and a job run on it.
func (g *Group) mustLook(id model.InstanceID, now time.Time) bool {
	m := g.members[id]
	if m == nil || m.looked || !g.settings.Runner() || m.cloud.State != model.InstanceRunning {
		return false
	}
	node, registered := g.nodes[id]
	return !registered || dead(node, now)
}

// advanceDrain goes on to the engine once nothing uses the node any more: our
// taint is on, and a live read has found no runner pods since.
func (g *Group) advanceDrain(id model.InstanceID, intent Intent, now time.Time, out *Outcome) {
	m := g.members[id]
	node, registered := g.nodes[id]
	if g.mustLook(id, now) {
		return
	}
	if !registered || dead(node, now) {
		// Nothing to drain, and nobody who would stop an engine.
		exit := ExitLost
		if len(g.engines[id]) == 0 && intent.Desired != model.DesiredParked {
			exit = "" // none was seen, and nothing is to be kept
		}
		g.conclude(id, intent, exit, now, out)
		return
	}
	if used := g.busy[id] || !g.quiet(id, now); !node.Draining || !m.confirmed || used && !intent.tooLong(now) {
		if !m.warned && now.Sub(intent.Since) >= drainWarning {
			m.warned = true
			out.note(CommitNone, "drain", "waits", 1, id)
			out.Notes[len(out.Notes)-1].Detail = g.waitsFor(id)
		}
		return
	}
	if len(m.engines) == 0 {
		g.conclude(id, intent, "", now, out)
		return
	}
	// Pods that have ended may lie about; what counts is the one that runs.
	engines := slices.Clone(m.engines)
	slices.SortFunc(engines, func(a, b model.Pod) int {
		if runs(a) != runs(b) {
			return map[bool]int{true: -1, false: 1}[runs(a)]
		}
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.UID, b.UID))
	})
	engine, several := engines[0], len(engines) > 1 && runs(engines[1])
	if several { // one after the other, in an order that a restart keeps
		engine = slices.MinFunc(slices.DeleteFunc(engines, func(p model.Pod) bool { return !runs(p) }), byUID)
	}
	intent.Stage, intent.Since, intent.Engine = StageEngine, now, engine.UID
	reason := "drained"
	if g.uses[id].Activity == model.ActivityBusy {
		reason = "sessions-stayed"
	}
	out.note(CommitFirst, "stop-engine", reason, 1, id)
	if engine.EngineState.ToleratesDrain {
		g.distrust(&intent, id, "engine-tolerates-taint", "", out)
	}
	if several {
		g.distrust(&intent, id, "several-engines", fmt.Sprintf("%d engine pods are on one node", len(m.engines)), out)
	}
	g.record.Intents[id] = intent
}

// waitsFor says what a drain waits for.
func (g *Group) waitsFor(id model.InstanceID) string {
	switch m := g.members[id]; {
	case m.taintedAt.IsZero() || !g.nodes[id].Draining:
		return "our taint is not on the Node"
	case g.busy[id] || !m.confirmed:
		return "runner pods are still on it, or it could not be looked at"
	case g.uses[id].Activity == model.ActivityUnknown:
		return "its engine's metrics do not answer"
	default:
		return "its engine has sessions"
	}
}

func byUID(a, b model.Pod) int { return cmp.Compare(a.UID, b.UID) }

// distrust says what is wrong with an engine. Its instance is terminated if it
// was to be parked.
func (g *Group) distrust(intent *Intent, id model.InstanceID, reason, detail string, out *Outcome) {
	action := "stop"
	if intent.Desired == model.DesiredParked {
		action, intent.Desired = "terminate", model.DesiredGone
	}
	out.note(CommitFirst, action, reason, 1, id)
	out.Notes[len(out.Notes)-1].Detail = detail
}

// advanceEngine waits for the exit of an engine that was told to stop.
func (g *Group) advanceEngine(id model.InstanceID, intent Intent, now time.Time, out *Outcome) {
	m := g.members[id]
	pod, exists := g.enginePod(id, intent.Engine)
	_, watched := find(g.engines[id], intent.Engine)
	exit, ended := EngineExit(pod)
	switch {
	case ended:
	case !exists:
		exit = ExitVanished // while nobody looked
	case m.gone == intent.Engine && (!watched || now.Sub(m.goneAt) >= graceSlack):
		// A watch that is behind may still bring the exit code.
		exit = ExitVanished
	case m.cloud.State != "" && !active(m.cloud.State):
		exit = ExitLost
	case m.overdue:
		exit = ExitTimeout
	case !m.refusedAt.IsZero() && now.Sub(m.refusedAt) >= refusedTimeout:
		exit = ExitRefused
	default:
		return
	}
	if next, ok := g.nextEngine(id, intent); ok && exit != ExitLost {
		// The others are not to be killed either.
		intent.Engine, intent.Since = next.UID, now
		m.gone, m.overdue, m.refusedAt = "", false, time.Time{}
		out.note(CommitFirst, "stop-engine", "several-engines", 1, id)
		g.record.Intents[id] = intent
		return
	}
	g.conclude(id, intent, exit, now, out)
}

// nextEngine is another engine to stop before the instance ends. One that
// tolerates our taint would be started again as often as it is stopped.
func (g *Group) nextEngine(id model.InstanceID, intent Intent) (next model.Pod, ok bool) {
	if intent.Desired != model.DesiredGone {
		return model.Pod{}, false // it was alone; one that has come since is distrusted later
	}
	for _, p := range g.engines[id] { // sorted by UID
		if p.UID > intent.Engine && runs(p) && !p.EngineState.ToleratesDrain {
			return p, true
		}
	}
	return model.Pod{}, false
}

// observeEngine takes in the engine pods of an instance, sorted by UID. Of one
// that is to stop the last state is kept: it may be gone before anybody looks at
// it.
func (g *Group) observeEngine(id model.InstanceID, pods []model.Pod) {
	for _, p := range g.engines[id] {
		if _, still := find(pods, p.UID); !still {
			for _, verb := range []Verb{StopEngine, ReleaseEngine} {
				key := Effect{Verb: verb, Engine: p}.key()
				delete(g.attempts, key)
				delete(g.retryAt, key)
			}
		}
	}
	g.engines[id] = pods
	if len(pods) == 0 {
		delete(g.engines, id)
	}
	if pod, ok := find(pods, g.record.Intents[id].Engine); ok && g.members[id] != nil {
		g.members[id].see(pod)
	}
}

// see takes in the state of the engine that is to stop. What is older than a
// live read that saw it end changes nothing.
func (m *member) see(pod model.Pod) {
	if last, ok := find(m.engines, pod.UID); ok && !runs(last) && runs(pod) {
		return
	}
	m.engines = []model.Pod{pod}
}

// confirm takes in a live read of the pods on the instance's Node.
func (g *Group) confirm(e Confirmed, now time.Time) {
	m, intent := g.members[e.Instance], g.record.Intents[e.Instance]
	if m == nil {
		return
	}
	if intent.Stage != StageEngine {
		m.confirmed, m.confirmedAt, m.engines = e.Idle || intent.tooLong(now), now, e.Engines
		return
	}
	pod, found := find(e.Engines, intent.Engine)
	if !found {
		m.gone, m.goneAt = intent.Engine, now
		return
	}
	m.overdue = runs(pod) && late(pod, now)
	m.see(pod)
}

// late says whether an engine that was told to stop should have ended.
func late(p model.Pod, now time.Time) bool {
	d := p.EngineState.Deadline
	return !d.IsZero() && now.Sub(d) >= graceSlack
}

// enginePod returns an engine pod of the instance as it was seen last: by the
// watch, or in this life by a call. One that is in neither does not exist: the
// watch had told of everything before the first event.
func (g *Group) enginePod(id model.InstanceID, uid string) (model.Pod, bool) {
	watched, is := find(g.engines[id], uid)
	if p, seen := find(g.members[id].engines, uid); seen && (!is || !runs(p)) {
		return p, true
	}
	return watched, is
}

// conclude records how the engine ended, and goes on to the instance. Without
// an engine nothing could be lost.
func (g *Group) conclude(id model.InstanceID, intent Intent, exit Exit, now time.Time, out *Outcome) {
	intent.Stage, intent.Since, intent.Exit = StageStopping, now, exit
	switch {
	case exit == "":
		out.note(CommitFirst, "stop", "no-engine", 1, id)
	case exit.Clean():
		out.note(CommitFirst, "stop", "engine-exited", 1, id)
	default:
		g.distrust(&intent, id, "unclean-stop", exit.words(), out)
	}
	g.record.Intents[id] = intent
}

// words say an exit to people.
func (e Exit) words() string {
	switch e {
	case ExitVanished:
		return "the engine's pod went without an exit code"
	case ExitTimeout:
		return "the engine did not end in time"
	case ExitRefused:
		return "the API server refuses to delete the engine's pod"
	case ExitLost:
		return "the node ended before its engine"
	default:
		return "the engine ended with exit code " + string(e)
	}
}

// advanceStop terminates an instance that was to be parked and cannot be: an
// engine has come up on it again, or the cloud does not stop it.
func (g *Group) advanceStop(id model.InstanceID, intent Intent, now time.Time, out *Outcome) {
	m := g.members[id]
	if g.heldByJob(id, intent, now) && !m.saidOff {
		m.saidOff = true
		out.note(CommitNone, "drain", "job-came-late", 1, id)
	}
	if intent.Desired != model.DesiredParked || m.missing > 0 || !active(m.cloud.State) && m.cloud.State != model.InstanceStopping {
		return
	}
	returned := active(m.cloud.State) && slices.ContainsFunc(g.engines[id], func(p model.Pod) bool {
		return p.UID != intent.Engine && runs(p)
	})
	switch {
	case returned:
		g.distrust(&intent, id, "engine-tolerates-taint", "an engine has started on the drained node", out)
	case g.snapshot.TakenAt.Sub(intent.Since) >= stopTimeout:
		g.distrust(&intent, id, "stop-failed", "", out)
	default:
		return
	}
	intent.Since = now
	g.record.Intents[id] = intent
}

// held says whether an instance is not to be stopped yet: its engine has ended,
// but the pod is still there.
func (g *Group) held(id model.InstanceID, intent Intent, now time.Time) bool {
	_, watched := find(g.engines[id], intent.Engine)
	return watched && now.Sub(intent.Since) < releaseTimeout
}

// heldByJob says whether an instance is not to be ended yet: a runner pod was
// bound to it when its engine had been told to stop already.
func (g *Group) heldByJob(id model.InstanceID, intent Intent, now time.Time) bool {
	return g.settings.Runner() && g.busy[id] && g.nodes[id].Ready && active(g.members[id].cloud.State) && now.Sub(intent.Since) < lateTimeout
}

func find(pods []model.Pod, uid string) (model.Pod, bool) {
	at := slices.IndexFunc(pods, func(p model.Pod) bool { return p.UID == uid })
	if at < 0 {
		return model.Pod{}, false
	}
	return pods[at], true
}

// engineEffects returns what must be done to engine pods: stop those that have
// to, and let go of those whose exit needs no watching any more.
func (g *Group) engineEffects(now time.Time) []Effect {
	var effects []Effect
	add := func(verb Verb, id model.InstanceID, pod model.Pod) {
		e := Effect{Verb: verb, Group: g.spec.ID, Node: model.Node{ID: id, Name: pod.Node}, Engine: pod}
		if g.due(e, now) {
			effects = append(effects, e)
		}
	}
	for id, intent := range g.record.Intents {
		if intent.Stage != StageEngine || g.members[id] == nil {
			continue
		}
		pod, exists := g.enginePod(id, intent.Engine)
		_, watched := find(g.engines[id], intent.Engine)
		switch {
		case !exists || !runs(pod):
		case late(pod, now):
			// The watch may be behind: it is looked at before it is given up.
			if m := g.members[id]; !m.overdue && m.gone == "" {
				add(Confirm, id, pod)
			}
		case !watched || !pod.EngineState.Deleting:
			// One that is not watched any more may be gone: the call finds out.
			add(StopEngine, id, pod)
		}
	}
	for id, pods := range g.engines {
		intent := g.record.Intents[id]
		for _, p := range pods {
			if awaited := intent.Stage == StageEngine && p.UID == intent.Engine; p.EngineState.Guarded && !awaited {
				add(ReleaseEngine, id, p)
			}
		}
	}
	slices.SortFunc(effects, byKey)
	return effects
}
