package nodegroups

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Verb says what an effect does.
type Verb string

// Verbs. The first four act on the cloud, the others on the cluster. Each is
// idempotent: doing it twice is doing it once.
const (
	// Resize sets the number of pending and running instances that the cloud
	// works towards, an absolute number. Lowering it only cancels what is not
	// yet an instance.
	Resize Verb = "resize"
	// Terminate, Stop and Start act on Instances. Terminating and stopping
	// lower the desired number by each instance, starting raises it.
	Terminate Verb = "terminate"
	Stop      Verb = "stop"
	Start     Verb = "start"
	// Taint keeps new pods away from Node; Untaint takes a drain back, with
	// CA's own taint and cordon; ClearAutoscalerTaint removes a ToBeDeleted
	// taint that CA has forgotten.
	Taint                Verb = "taint"
	Untaint              Verb = "untaint"
	ClearAutoscalerTaint Verb = "clear-autoscaler-taint"
	// Confirm lists the runner pods and engines of Node by a live read and
	// answers with a Confirmed event.
	Confirm Verb = "confirm"
	// Look looks for the Node of an instance by a live read and answers with a
	// Looked event, after an ObserveNode when there is one. Node has no more than
	// the instance's id.
	Look Verb = "look"
	// StopEngine puts our finalizer on the pod Engine and deletes it, both with
	// its UID as precondition. When there is no such pod any more it answers
	// with an EngineGone event. ReleaseEngine takes the finalizer off.
	StopEngine    Verb = "stop-engine"
	ReleaseEngine Verb = "release-engine"
	// DeleteNode deletes the Node object, with its UID as precondition.
	DeleteNode Verb = "delete-node"
)

// Cloud says whether the verb acts on the cloud.
func (v Verb) Cloud() bool { return v == Resize || v == Terminate || v == Stop || v == Start }

// Effect is one thing to be done.
type Effect struct {
	Verb      Verb
	Group     model.GroupID
	Desired   int                // Resize
	Instances []model.InstanceID // Terminate, Stop, Start, sorted
	Node      model.Node         // the others
	Engine    model.Pod          // StopEngine, ReleaseEngine
}

// key identifies an effect among those of its group that are under way.
func (e Effect) key() string {
	if e.Verb == StopEngine || e.Verb == ReleaseEngine {
		return string(e.Verb) + " " + e.Engine.UID
	}
	return string(e.Verb) + " " + string(e.Node.ID)
}

// Ready advances what waits for time or for an observation and returns the
// effects that are due. Every effect returned counts as under way until its
// Done event.
func (g *Group) Ready(now time.Time) (Outcome, []Effect) {
	var out Outcome
	if !g.synced {
		return out, nil
	}
	g.fill(now, &out)
	for _, id := range g.memberIDs() {
		g.advance(id, now, &out)
	}
	g.boundParked(now, &out)
	if out.Commit > CommitNone {
		g.record.Sequence++
	}
	effects := slices.Concat(g.cloudEffects(now), g.nodeEffects(now), g.engineEffects(now))
	for _, e := range effects {
		g.inflight[e.key()] = true
		delete(g.retryAt, e.key())
	}
	return out, effects
}

// fill keeps the group at its minimum, hidden from CA until the nodes are
// Ready, and gives up hidden launches that are above the maximum or that the
// cloud refuses.
func (g *Group) fill(now time.Time, out *Outcome) {
	// More than the maximum was never promised: the record was edited, or is
	// from before the maximum was lowered. What it holds of resuming nodes may
	// turn out not to exist at any later snapshot.
	_, hidden := g.Unborn()
	if n := min(hidden, g.record.Target+g.record.Hidden-g.spec.Max); n > 0 {
		g.record.Hidden -= n
		out.note(CommitSoon, "cancel", "above-max", n, "")
	}
	size := g.record.Target + g.record.Hidden
	if n := g.spec.Min - size; n > 0 {
		n -= g.resume(n, nil, true, now, out)
		if n > 0 {
			g.record.Hidden += n
			g.askedAt = now
			out.note(CommitFirst, "launch", "min-size", n, "")
		}
	}
	_, hidden = g.Unborn()
	if n := min(hidden, size-g.spec.Min); n > 0 && g.failure() != nil {
		g.record.Hidden -= n
		g.prescaleFrom = now.Add(prescaleBackoff)
		out.note(CommitSoon, "cancel", "launch-failed", n, "")
	}
}

// advance moves one instance's intent on as far as the observations allow.
func (g *Group) advance(id model.InstanceID, now time.Time, out *Outcome) {
	intent, ok := g.record.Intents[id]
	if !ok {
		return
	}
	m := g.members[id]
	switch intent.Stage {
	case StageDraining:
		g.advanceDrain(id, intent, now, out)
	case StageEngine:
		g.advanceEngine(id, intent, now, out)
	case StageStopping:
		g.advanceStop(id, intent, now, out)
	case StageStarting:
		switch node := g.nodes[id]; {
		case node.Ready && m.cloud.State == model.InstanceRunning:
			m.wasReady = true
			delete(g.record.Intents, id)
			out.note(CommitSoon, "resumed", "ready", 1, id)
		case now.Sub(intent.Since) >= resumeTimeout && now.Sub(m.heldAt) >= resumeTimeout:
			// It stays wanted: the sizes do not change, so a launch takes its
			// place within the same scale-up. Its Node may be there, and Ready
			// by now.
			g.record.Intents[id] = Intent{Desired: model.DesiredGone, Stage: StageDraining, Since: now}
			m.beginDrain()
			g.askedAt = now
			out.note(CommitFirst, "launch", "resume-failed", 1, id)
		}
	}
}

// boundParked ends parked instances that are too old, then the outdated and the
// least valuable ones beyond the maximum.
func (g *Group) boundParked(now time.Time, out *Outcome) {
	parked := g.withIntent(func(_ model.InstanceID, i Intent) bool {
		return i.Desired == model.DesiredParked && i.Stage == StageStopping
	})
	end := func(id model.InstanceID, reason string) {
		g.record.Intents[id] = Intent{Desired: model.DesiredGone, Stage: StageStopping, Since: now}
		out.note(CommitFirst, "terminate", reason, 1, id)
	}
	parked = slices.DeleteFunc(parked, func(id model.InstanceID) bool {
		old := now.Sub(g.record.Intents[id].Since) > g.settings.MaxParkedAge
		if old {
			end(id, "parked-too-long")
		}
		return old
	})
	slices.SortStableFunc(parked, func(a, b model.InstanceID) int {
		if x, y := g.members[a].cloud.Outdated, g.members[b].cloud.Outdated; x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Or(
			cmp.Compare(g.verdicts[a].Score, g.verdicts[b].Score),
			g.record.Intents[a].Since.Compare(g.record.Intents[b].Since))
	})
	for _, id := range parked[:max(0, len(parked)-g.settings.MaxParked)] {
		end(id, "too-many-parked")
	}
}

// cloudEffects returns what the cloud must do. Nothing is asked while an
// earlier call is under way or not yet contained in the snapshot, and a Resize
// is never sent beside another call: its number would be wrong by what that
// one changes.
func (g *Group) cloudEffects(now time.Time) []Effect {
	for _, v := range []Verb{Resize, Terminate, Stop, Start} {
		if g.inflight[Effect{Verb: v}.key()] {
			return nil
		}
	}
	if g.snapshot.TakenAt.Before(g.settledAt) {
		return nil
	}
	// An instance that is missing may have been lost, and replaced by the cloud
	// itself: it is no reason to raise the number, nor yet to lower it.
	seen, missing := g.running()
	revealed, hidden := g.Unborn()
	resize := Effect{Verb: Resize, Group: g.spec.ID, Desired: seen + revealed + hidden}
	// What is on its way out still takes a place, and no cloud works towards
	// more than the maximum: a launch waits for it.
	if raised := min(resize.Desired, g.most()); raised > g.snapshot.Desired {
		if resize.Desired = raised; g.due(resize, now) {
			return []Effect{resize}
		}
	}
	var effects []Effect
	for verb, pick := range map[Verb]func(model.InstanceID, Intent) bool{
		Terminate: func(id model.InstanceID, i Intent) bool {
			return i.Desired == model.DesiredGone && i.Stage == StageStopping &&
				g.members[id].cloud.State != "" && g.members[id].cloud.State != model.InstanceTerminating && !g.heldByJob(id, i, now)
		},
		Stop: func(id model.InstanceID, i Intent) bool {
			return i.Desired == model.DesiredParked && i.Stage == StageStopping && active(g.members[id].cloud.State) &&
				!g.held(id, i, now) && !g.heldByJob(id, i, now)
		},
		Start: func(id model.InstanceID, i Intent) bool {
			return i.Desired == model.DesiredRunning && g.members[id].cloud.State == model.InstanceStopped
		},
	} {
		e := Effect{Verb: verb, Group: g.spec.ID, Instances: g.withIntent(pick)}
		if verb == Start {
			e.Instances = g.fitting(e.Instances, seen+missing, now)
		}
		if len(e.Instances) > 0 && g.due(e, now) {
			effects = append(effects, e)
		}
	}
	resize.Desired += missing
	if len(effects) == 0 && resize.Desired < g.snapshot.Desired && g.due(resize, now) {
		effects = append(effects, resize)
	}
	slices.SortFunc(effects, byKey)
	return effects
}

// most is how many instances may live: the maximum, or what was promised before
// it was lowered.
func (g *Group) most() int { return max(g.spec.Max, g.record.Target) }

// fitting are those of the parked instances that can be started under the
// maximum beside the living ones. The others wait, and it does not count against
// them.
func (g *Group) fitting(ids []model.InstanceID, living int, now time.Time) []model.InstanceID {
	room := min(max(g.most()-living, 0), len(ids))
	for _, id := range ids[room:] {
		g.members[id].heldAt = now
	}
	return ids[:room]
}

func byKey(a, b Effect) int { return cmp.Compare(a.key(), b.key()) }

// nodeEffects returns what must be done to Node objects.
func (g *Group) nodeEffects(now time.Time) []Effect {
	var effects []Effect
	add := func(verb Verb, node model.Node) {
		if e := (Effect{Verb: verb, Group: g.spec.ID, Node: node}); g.due(e, now) {
			effects = append(effects, e)
		}
	}
	for id, node := range g.nodes {
		intent, intended := g.record.Intents[id]
		m := g.members[id]
		switch {
		case m == nil:
			// The instance is gone for good; nobody else deletes its Node.
			if _, dead := g.tombstones[id]; dead || g.stray(node) {
				add(DeleteNode, node)
			}
		case intended && intent.Stage == StageDraining:
			// One at a time, since each builds on the one before.
			switch {
			case g.underWay(id, Taint, Untaint, Confirm):
			case !node.Draining || m.taintedAt.IsZero():
				add(Taint, node)
			case g.keptAway(id, now) && (!g.busy[id] || intent.tooLong(now)) && !m.confirmed:
				add(Confirm, node)
			}
		case intended && intent.Stage == StageEngine:
			if !node.Draining { // somebody took it off: the engine would come back
				add(Taint, node)
			}
		case intended && intent.Stage == StageStopping:
			if !node.Draining && active(m.cloud.State) && !m.taintedAt.IsZero() { // it was made anew, or somebody took it off
				add(Taint, node)
			}
			// A reading that is older than the Node says nothing about it;
			// creation times come in whole seconds.
			if m.cloud.State != "" && !active(m.cloud.State) && g.snapshot.TakenAt.Sub(node.Created) > time.Second {
				add(DeleteNode, node)
			}
		case node.Draining || m.takenBack:
			if !g.underWay(id, Taint, Confirm) {
				add(Untaint, node)
			}
		case !node.CATaintSince.IsZero() && now.Sub(node.CATaintSince) >= strayTaintAge:
			add(ClearAutoscalerTaint, node)
		}
	}
	for id, intent := range g.record.Intents {
		if intent.Stage == StageDraining && g.mustLook(id, now) {
			add(Look, model.Node{ID: id})
		}
	}
	slices.SortFunc(effects, byKey)
	return effects
}

// stray says whether a Node has no instance, although none was seen to go: it
// went while nobody looked. The Node has not been Ready for as long as the
// cloud has been read without the instance, and was the group's by a record,
// not just by its own label.
func (g *Group) stray(n model.Node) bool {
	read := g.snapshot.TakenAt
	return g.known[n.ID] && !n.Ready && read.Sub(n.ReadyChanged) >= readyGrace && read.Sub(g.firstRead) >= readyGrace
}

// underWay says whether one of these effects on the instance's Node is.
func (g *Group) underWay(id model.InstanceID, verbs ...Verb) bool {
	return slices.ContainsFunc(verbs, func(v Verb) bool {
		return g.inflight[Effect{Verb: v, Node: model.Node{ID: id}}.key()]
	})
}

// due says whether an effect may be emitted: it is neither under way nor
// waiting after a failure.
func (g *Group) due(e Effect, now time.Time) bool {
	return !g.inflight[e.key()] && !now.Before(g.retryAt[e.key()])
}

const (
	// echo is how long the effect of a successful call on the cluster may
	// take to show up in the watch before it is tried again.
	echo = 5 * time.Second
	// retryFirst and retryMost bound the wait after a failed effect, doubled
	// at each failure.
	retryFirst = time.Second
	retryMost  = 30 * time.Second
	// retryUnderWay is the wait where nothing has failed, but a cloud must get
	// on with a part before it can be asked for the rest.
	retryUnderWay = 5 * time.Second
)

func (g *Group) done(e Done, now time.Time) {
	key := e.Effect.key()
	delete(g.inflight, key)
	delete(g.retryAt, key)
	if e.Effect.Verb.Cloud() && e.At.After(g.settledAt) {
		// Failed calls too: a timeout says nothing about what was done.
		g.settledAt = e.At
	}
	if m := g.members[e.Effect.Node.ID]; m != nil && e.Effect.Verb == StopEngine {
		switch refused := errors.Is(e.Err, model.ErrRefused); {
		case !refused:
			m.refusedAt = time.Time{}
		case m.refusedAt.IsZero():
			m.refusedAt = now
		}
	}
	if e.Err == nil {
		delete(g.attempts, key)
		if m := g.members[e.Effect.Node.ID]; m != nil {
			switch e.Effect.Verb {
			case Taint:
				m.taintedAt = now
			case Untaint:
				m.takenBack = false
			}
		}
		if !e.Effect.Verb.Cloud() {
			g.retryAt[key] = now.Add(echo)
		}
		return
	}
	if errors.Is(e.Err, model.ErrUnderWay) || errors.Is(e.Err, model.ErrDryRun) {
		delete(g.attempts, key)
		g.retryAt[key] = now.Add(retryUnderWay)
		return
	}
	wait := min(retryFirst<<min(g.attempts[key], 10), retryMost)
	g.attempts[key]++
	g.retryAt[key] = now.Add(wait)
}
