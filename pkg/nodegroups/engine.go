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

const (
	// quietTimeout is how long sessions may stay on an engine after the last
	// runner pod has gone from its node. They are not CI jobs', and end with
	// the engine.
	quietTimeout = 10 * time.Minute
	// An engine that has been told to stop has its pod's grace period, but
	// graceMost at most, and graceSlack beyond it for the kubelet to end it and
	// to say so.
	graceMost  = 15 * time.Minute
	graceSlack = time.Minute
	// releaseTimeout is how long the engine pod that has ended is waited for to
	// go before its instance is stopped. Only when it has gone its controller
	// makes another one, if it does.
	releaseTimeout = time.Minute
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
	ExitLost     Exit = "lost"     // its node or instance ended before it
)

// Clean says whether the engine's cache is as it was.
func (e Exit) Clean() bool { return e == ExitClean }

// EngineExit returns the exit code of an engine that has ended for good. One
// whose pod has neither ended nor been told to is started again.
func EngineExit(p model.Pod) (code int, ended bool) {
	if p.Engine == nil || p.Engine.Exit == nil || !p.EngineState.Deleting && p.Finished.IsZero() {
		return 0, false
	}
	return int(p.Engine.Exit.Code), true
}

func runs(p model.Pod) bool {
	_, ended := EngineExit(p)
	return !ended
}

// beginDrain forgets what was found out in an earlier drain.
func (m *member) beginDrain() {
	m.tainted, m.confirmed, m.confirmedAt, m.engines, m.engineGone = false, false, time.Time{}, nil, ""
}

// occupied says whether runner pods or sessions of the engine are on it.
func (g *Group) occupied(id model.InstanceID) bool {
	return g.busy[id] || g.uses[id].Activity == model.ActivityBusy
}

// quiet says whether the engine has no sessions since a live read found no
// runner pods. Of an engine without metrics only the runner pods are known.
func (g *Group) quiet(id model.InstanceID, now time.Time) bool {
	use, since := g.uses[id], g.members[id].confirmedAt
	switch {
	case use.Activity == model.ActivityUnknown:
		return true
	case use.Activity == model.ActivityIdle && use.At.After(since):
		return true
	default:
		return now.Sub(since) >= quietTimeout
	}
}

// advanceDrain goes on to the engine once nothing uses the node any more: our
// taint is on, and a live read has found no runner pods since.
func (g *Group) advanceDrain(id model.InstanceID, intent Intent, now time.Time, out *Outcome) {
	m := g.members[id]
	node, registered := g.nodes[id]
	if !registered || dead(node, now) {
		// Nothing to drain, and nobody who would stop an engine.
		exit := ExitLost
		if len(g.engines[id]) == 0 && intent.Desired != model.DesiredParked {
			exit = "" // none was seen, and nothing is to be kept
		}
		g.conclude(id, intent, exit, now, out)
		return
	}
	if !node.Draining || g.busy[id] || !m.confirmed || !g.quiet(id, now) {
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
	engine := engines[0]
	intent.Stage, intent.Since, intent.Engine = StageEngine, now, engine.UID
	reason := "drained"
	if g.uses[id].Activity == model.ActivityBusy {
		reason = "sessions-stayed"
	}
	out.note(CommitFirst, "stop-engine", reason, 1, id)
	if engine.EngineState.ToleratesDrain {
		g.distrust(&intent, id, "engine-tolerates-taint", "", out)
	}
	if len(engines) > 1 && runs(engines[1]) {
		g.distrust(&intent, id, "several-engines", fmt.Sprintf("%d engine pods run on one node", len(engines)), out)
	}
	g.record.Intents[id] = intent
}

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
	grace := graceSlack
	if pod.Engine != nil {
		grace += min(pod.Engine.Grace, graceMost)
	}
	code, ended := EngineExit(pod)
	switch {
	case ended:
		g.conclude(id, intent, Exit(strconv.Itoa(code)), now, out)
	case !exists || m.engineGone == intent.Engine:
		g.conclude(id, intent, ExitVanished, now, out)
	case m.cloud.State != "" && !active(m.cloud.State):
		g.conclude(id, intent, ExitLost, now, out)
	case now.Sub(intent.Since) >= grace:
		g.conclude(id, intent, ExitTimeout, now, out)
	}
}

// observeEngine takes in the engine pods of an instance. Of one that is to stop
// the last state is kept: it may be gone before anybody looks at it.
func (g *Group) observeEngine(id model.InstanceID, pods []model.Pod) {
	g.engines[id] = pods
	if len(pods) == 0 {
		delete(g.engines, id)
	}
	if pod, ok := find(pods, g.record.Intents[id].Engine); ok && g.members[id] != nil {
		g.members[id].engines = []model.Pod{pod}
	}
}

// enginePod returns an engine pod of the instance: as it is watched, else as it
// was seen last in this life. One that is in neither does not exist: the watch
// had told of everything before the first event.
func (g *Group) enginePod(id model.InstanceID, uid string) (model.Pod, bool) {
	if p, ok := find(g.engines[id], uid); ok {
		return p, true
	}
	return find(g.members[id].engines, uid)
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
		// One that is not watched any more may be gone: the call finds out.
		watched, _ := find(g.engines[id], intent.Engine)
		if pod, exists := g.enginePod(id, intent.Engine); exists && !watched.EngineState.Deleting {
			add(StopEngine, id, pod)
		}
	}
	for id, pods := range g.engines {
		intent := g.record.Intents[id]
		awaited := func(p model.Pod) bool { return intent.Stage == StageEngine && p.UID == intent.Engine }
		at := slices.IndexFunc(pods, func(p model.Pod) bool { return p.EngineState.Guarded && !awaited(p) })
		if at >= 0 {
			add(ReleaseEngine, id, pods[at])
		}
	}
	slices.SortFunc(effects, byKey)
	return effects
}
