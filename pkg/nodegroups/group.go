package nodegroups

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// revealAfter is at how many Refreshes, and revealAge for how long, a
	// hidden node must have been seen Ready before cluster-autoscaler is told
	// of it: two whole loops, and longer than a watch lags. One that is
	// revealed while CA still holds it for NotReady is skipped as upcoming and
	// ordered a second time (measured, CA 1.36.1). The age is needed because
	// since 1.35 CA's loops may follow each other without a pause.
	revealAfter = 3
	revealAge   = 5 * time.Second
	// readyAge is how long before a Refresh a node must have been seen Ready
	// at one, so that CA is sure to hold it for Ready too. startupTime is the
	// age up to which CA by default holds one that is not Ready for starting.
	readyAge    = 2 * time.Second
	startupTime = 15 * time.Minute
	// listedAge is how long before a Refresh a node must have been Ready for CA
	// to have listed it so: CA lists its nodes first, from a watch of its own.
	// In between it asks for a node that it does not see, and must get that one.
	listedAge = 500 * time.Millisecond
	// lostAfter is how many snapshots in a row must lack an instance before
	// it counts as gone: clouds list with eventual consistency.
	lostAfter = 2
	// readyGrace is the age after which a NotReady node may be removed
	// whatever the plan says.
	readyGrace = 5 * time.Minute
	// resumeTimeout is how long a resumed instance may take to become Ready
	// before a launch replaces it.
	resumeTimeout = 5 * time.Minute
	// strayTaintAge is the age at which CA's ToBeDeleted taint on a node that
	// we never agreed to delete is removed: CA has forgotten it in a restart.
	strayTaintAge = 10 * time.Minute
	// prescaleBackoff follows a failed hidden launch.
	prescaleBackoff = 5 * time.Minute
	// tombstoneAge is how long a deleted instance is remembered, so that CA's
	// second DeleteNodes for it is answered with success.
	tombstoneAge = time.Hour
	// wasReadyAfter tells a node that stopped being Ready from one that never
	// was: the kubelet registers a node as NotReady in its first seconds, so a
	// later change of the condition means it had been Ready in between.
	wasReadyAfter = 5 * time.Second
)

// Stage is how far an intent has come.
type Stage string

// Stages.
const (
	// StageDraining: new work is kept away; the node may be taken back.
	StageDraining Stage = "Draining"
	// StageEngine: the engine has been told to stop, or is about to be; no way
	// back from here on.
	StageEngine Stage = "StoppingEngine"
	// StageStopping: the instance is being ended, or has been.
	StageStopping Stage = "Stopping"
	// StageStarting: a parked instance is being resumed.
	StageStarting Stage = "Starting"
)

// Intent is what is meant to become of an instance that is not simply running.
type Intent struct {
	Desired model.Desired
	Stage   Stage
	Since   time.Time // when the stage began
	// Engine is the UID of the engine pod that is or was to stop, empty when
	// there was none. Exit is how that ended, empty until it has.
	Engine string
	Exit   Exit
}

// leaving says whether the instance is no longer the group's capacity.
func (i Intent) leaving() bool { return i.Desired != model.DesiredRunning }

// Record is what has been promised and must survive: it is written to the
// group's RunnerNodeGroup.
type Record struct {
	// Sequence grows by one with every change.
	Sequence int64
	// Target is the size that CA was told. Hidden are the nodes beyond it that
	// CA does not know: launched ahead, or not yet Ready when CA forgot.
	Target, Hidden int
	Intents        map[model.InstanceID]Intent
}

// member is an instance that exists or existed a moment ago.
type member struct {
	cloud   model.Instance
	hidden  bool
	missing int // snapshots in a row without it
	// adopted: nobody asked for it, and instances are missing: it may be the
	// cloud's own replacement of one that is not yet known to be lost.
	adopted bool
	// readyAt is when the node was first seen Ready. readySince is the first of
	// the Refreshes at which CA has listed it so, zero when it had not at the
	// last one; refreshes counts those at which it had and it was hidden.
	readyAt    time.Time
	refreshes  int
	readySince time.Time
	wasReady   bool
	drain      // the present one
	// heldAt is when it was last not resumed for want of room under the maximum.
	heldAt time.Time
	// takenBack: taints are to come off, whether they are seen or not.
	takenBack bool
}

// Group is the state machine of one node group. The zero value is not usable;
// see NewGroup. A Group belongs to one goroutine.
type Group struct {
	spec     model.NodeGroup
	settings Settings
	record   Record

	// Observed: raw inputs, independent of each other.
	snapshot  model.GroupSnapshot
	firstRead time.Time // of the cloud, in this life
	synced    bool
	nodes     map[model.InstanceID]model.Node
	busy      map[model.InstanceID]bool
	engines   map[model.InstanceID][]model.Pod
	uses      map[model.InstanceID]ObserveUse
	verdicts  map[model.InstanceID]model.Verdict

	// Derived bookkeeping.
	members      map[model.InstanceID]*member
	tombstones   map[model.InstanceID]time.Time
	known        map[model.InstanceID]bool // from the records of an earlier life
	placeholders []model.InstanceID
	placeholderN int
	activity     string
	askedAt      time.Time // when more instances were last wanted
	prescaleFrom time.Time // no hidden launch before this

	// Effects that were emitted and not yet reported as done.
	inflight  map[string]bool
	retryAt   map[string]time.Time
	attempts  map[string]int
	settledAt time.Time // end of the last cloud effect

	view *View
}

// NewGroup returns a group of which nothing is known yet but its declaration
// and, when there is one, the record of an earlier life.
func NewGroup(spec model.NodeGroup, settings Settings, record Record) *Group {
	intents := maps.Clone(record.Intents)
	if intents == nil {
		intents = map[model.InstanceID]Intent{}
	}
	record.Intents = intents
	// What has an intent exists until the cloud says otherwise. Which of the
	// resuming ones are hidden is not recorded; the first snapshot decides anew.
	members := make(map[model.InstanceID]*member, len(intents))
	hidden := record.Hidden
	for _, id := range slices.Sorted(maps.Keys(intents)) {
		members[id] = &member{}
		if !intents[id].leaving() && hidden > 0 {
			members[id].hidden = true
			hidden--
		}
	}
	return &Group{
		spec: spec, settings: settings, record: record,
		nodes:      map[model.InstanceID]model.Node{},
		busy:       map[model.InstanceID]bool{},
		engines:    map[model.InstanceID][]model.Pod{},
		uses:       map[model.InstanceID]ObserveUse{},
		verdicts:   map[model.InstanceID]model.Verdict{},
		members:    members,
		tombstones: map[model.InstanceID]time.Time{},
		known:      map[model.InstanceID]bool{},
		inflight:   map[string]bool{},
		retryAt:    map[string]time.Time{},
		attempts:   map[string]int{},
	}
}

// Clone returns an independent copy.
func (g *Group) Clone() *Group {
	c := *g
	c.record.Intents = maps.Clone(g.record.Intents)
	c.nodes = maps.Clone(g.nodes)
	c.busy = maps.Clone(g.busy)
	c.engines = maps.Clone(g.engines)
	c.uses = maps.Clone(g.uses)
	c.verdicts = maps.Clone(g.verdicts)
	c.members = make(map[model.InstanceID]*member, len(g.members))
	for id, m := range g.members {
		c.members[id] = new(*m)
	}
	c.tombstones = maps.Clone(g.tombstones)
	c.known = maps.Clone(g.known)
	c.placeholders = slices.Clone(g.placeholders)
	c.inflight = maps.Clone(g.inflight)
	c.retryAt = maps.Clone(g.retryAt)
	c.attempts = maps.Clone(g.attempts)
	return &c
}

// Spec returns the group's declaration, Settings its interpreted annotations.
func (g *Group) Spec() model.NodeGroup { return g.spec }

// Settings returns the group's interpreted annotations.
func (g *Group) Settings() Settings { return g.settings }

// Record returns a copy of what has to be persisted.
func (g *Group) Record() Record {
	r := g.record
	r.Intents = maps.Clone(r.Intents)
	return r
}

// Node returns the Node object of an instance, zero when none is registered.
func (g *Group) Node(id model.InstanceID) model.Node { return g.nodes[id] }

// Has says whether the instance exists as far as is known.
func (g *Group) Has(id model.InstanceID) bool { return g.members[id] != nil }

// HasParked says whether any instance is parked or parking.
func (g *Group) HasParked() bool {
	for _, i := range g.record.Intents {
		if i.Desired == model.DesiredParked {
			return true
		}
	}
	return false
}

// Settled says whether nothing is under way: every instance is Ready or
// parked and was in the last snapshot, and none is wanted that does not exist.
func (g *Group) Settled() bool {
	if revealed, hidden := g.Unborn(); revealed+hidden > 0 {
		return false
	}
	for id, m := range g.members {
		if p := g.phase(id, m); p != model.PhaseReady && p != model.PhaseParked || m.missing > 0 {
			return false
		}
	}
	return true
}

// Synced says whether a snapshot of the cloud has been observed.
func (g *Group) Synced() bool { return g.synced }

// View returns what CA is told. It is nil before the first snapshot, and
// changes only in Step, by a Refresh, a Forget or a write of CA's.
func (g *Group) View() *View { return g.view }

// NodeStatus is the state of one instance for RunnerNodes, metrics and people.
type NodeStatus struct {
	ID      model.InstanceID
	Node    model.Node // zero when no Node is registered
	Phase   model.Phase
	Desired model.Desired
	Hidden  bool
	Busy    bool
	Since   time.Time // of the intent, else of the launch
	Exit    Exit      // of the engine, once it was told to stop and has
	Verdict model.Verdict
}

// Nodes returns every instance of the group, sorted by id.
func (g *Group) Nodes() []NodeStatus {
	out := make([]NodeStatus, 0, len(g.members))
	for _, id := range g.memberIDs() {
		out = append(out, g.Status(id))
	}
	return out
}

// Status returns the state of one instance, zero when it is not the group's.
func (g *Group) Status(id model.InstanceID) NodeStatus {
	m := g.members[id]
	if m == nil {
		return NodeStatus{}
	}
	s := NodeStatus{
		ID: id, Node: g.nodes[id], Phase: g.phase(id, m), Desired: model.DesiredRunning,
		Hidden: m.hidden, Busy: g.occupied(id), Since: m.cloud.LaunchedAt, Verdict: g.verdicts[id],
	}
	if intent, ok := g.record.Intents[id]; ok {
		s.Desired, s.Since, s.Exit = intent.Desired, intent.Since, intent.Exit
	}
	return s
}

// Unborn returns how many instances are wanted and do not exist yet: those
// that CA counts on, and hidden ones.
func (g *Group) Unborn() (revealed, hidden int) {
	revealed, hidden = g.record.Target, g.record.Hidden
	for id, m := range g.members {
		switch {
		case g.leaving(id):
		case m.hidden:
			hidden--
		default:
			revealed--
		}
	}
	return max(revealed, 0), max(hidden, 0)
}

// Coming returns how many hidden instances are on their way: wanted, and not
// Ready yet.
func (g *Group) Coming() int {
	_, coming := g.Unborn()
	for id, m := range g.members {
		if m.hidden && !g.leaving(id) && g.neverReady(id) {
			coming++
		}
	}
	return coming
}

func (g *Group) hasIntent(id model.InstanceID) bool {
	_, ok := g.record.Intents[id]
	return ok
}

// leaving says whether the instance is on its way out, parked or parking.
func (g *Group) leaving(id model.InstanceID) bool {
	intent, ok := g.record.Intents[id]
	return ok && intent.leaving()
}

func (g *Group) memberIDs() []model.InstanceID { return slices.Sorted(maps.Keys(g.members)) }

// neverReady says whether the instance has not been a Ready node yet.
func (g *Group) neverReady(id model.InstanceID) bool {
	m := g.members[id]
	return m == nil || !m.wasReady
}

func (g *Group) phase(id model.InstanceID, m *member) model.Phase {
	intent, ok := g.record.Intents[id]
	switch {
	case ok && intent.Stage == StageDraining:
		return model.PhaseDraining
	case ok && intent.Desired == model.DesiredGone:
		return model.PhaseTerminating
	case ok && intent.Desired == model.DesiredParked:
		if m.cloud.State == model.InstanceStopped {
			return model.PhaseParked
		}
		return model.PhaseParking
	case ok:
		return model.PhaseResuming
	case m.wasReady:
		return model.PhaseReady
	default:
		return model.PhaseLaunching
	}
}

// Commit says whether the record changed and when it has to be written.
type Commit int

// Commit levels, ordered.
const (
	CommitNone  Commit = iota
	CommitSoon         // the change can be derived again from what is observed
	CommitFirst        // write before answering and before any effect
)

// Note is something that happened, for logs, events and metrics.
type Note struct {
	Action, Reason string // stable words: labels of hearth_scale_events_total
	Count          int
	Instance       model.InstanceID // empty when it is about the group
	Detail         string           // more for people, often empty
}

// Outcome is what a Step or Ready came to.
type Outcome struct {
	Commit Commit
	Notes  []Note
}

func (o *Outcome) note(c Commit, action, reason string, n int, id model.InstanceID) {
	o.Commit = max(o.Commit, c)
	o.Notes = append(o.Notes, Note{Action: action, Reason: reason, Count: n, Instance: id})
}

// Step applies one event at a time now. An error means that it was refused and
// that nothing changed.
func (g *Group) Step(event Event, now time.Time) (Outcome, error) {
	var out Outcome
	var err error
	switch e := event.(type) {
	case Configure:
		g.spec, g.settings = e.Group, e.Settings
	case ObserveCloud:
		g.observeCloud(e.Snapshot, now, &out)
	case ObserveNode:
		g.observeNode(e.Node, now)
	case ObserveNodeGone:
		g.observeNodeGone(e.Instance, &out)
	case Known:
		g.known[e.Instance] = true
	case ObserveBusy:
		g.busy[e.Instance] = e.Busy
		if !e.Busy {
			delete(g.busy, e.Instance)
		} else if m := g.members[e.Instance]; m != nil {
			m.confirmed = false // what was read before is not true any more
		}
	case ObserveEngine:
		g.observeEngine(e.Instance, e.Pods)
	case ObserveUse:
		g.uses[e.Instance] = e
		if e.Activity == model.ActivityUnknown && !e.Metrics {
			delete(g.uses, e.Instance)
		}
	case Decide:
		g.verdicts = make(map[model.InstanceID]model.Verdict, len(e.Verdicts))
		for _, v := range e.Verdicts {
			g.verdicts[v.Instance] = v
		}
	case Refresh:
		g.refresh(now, &out)
	case Forget:
		if g.synced { // else the first snapshot does the same
			g.forget(&out)
			g.view = g.buildView(now)
		}
	case IncreaseSize:
		err = g.increaseSize(e, now, &out)
	case DeleteNodes:
		err = g.deleteNodes(e, now, &out)
	case DecreaseTargetSize:
		err = g.decreaseTargetSize(e, &out)
	case Prescale:
		g.prescale(e, now, &out)
	case Confirmed:
		g.confirm(e, now)
	case Looked:
		if m := g.members[e.Instance]; m != nil {
			m.looked = true
		}
	case EngineGone:
		if m := g.members[e.Instance]; m != nil {
			m.gone, m.goneAt = e.UID, now
		}
	case Done:
		g.done(e, now)
	default:
		err = Refuse(KindInvalid, g.spec.ID, "event", "unknown event %T", event)
	}
	if err != nil {
		return Outcome{}, err
	}
	if out.Commit > CommitNone {
		g.record.Sequence++
	}
	return out, nil
}

func (g *Group) observeNode(n model.Node, now time.Time) {
	before := g.nodes[n.ID]
	g.nodes[n.ID] = n
	if m := g.members[n.ID]; m != nil {
		if n.Ready && !before.Ready {
			m.readyAt = now
		}
		m.wasReady = m.wasReady || wasReady(n)
	}
}

func (g *Group) observeNodeGone(id model.InstanceID, out *Outcome) {
	delete(g.nodes, id)
	if g.members[id] == nil && g.hasIntent(id) { // see vanish
		delete(g.record.Intents, id)
		out.Commit = max(out.Commit, CommitSoon)
	}
}

func wasReady(n model.Node) bool {
	return n.Ready || n.ReadyChanged.Sub(n.Created) > wasReadyAfter
}

// observeCloud binds new instances to what was wanted, adopts those that
// nobody asked for, and lets go of those that are gone.
func (g *Group) observeCloud(s model.GroupSnapshot, now time.Time, out *Outcome) {
	if s.TakenAt.Before(g.snapshot.TakenAt) {
		return // overtaken by a newer read
	}
	first, repeated := !g.synced, g.synced && s.TakenAt.Equal(g.snapshot.TakenAt)
	g.snapshot, g.synced = s, true
	seen := make(map[model.InstanceID]bool, len(s.Instances))
	for _, i := range s.Instances {
		if _, dead := g.tombstones[i.ID]; dead {
			continue
		}
		seen[i.ID] = true
		if m := g.members[i.ID]; m != nil {
			if g.settings.Runner() && active(m.cloud.State) && stopped(i.State) && !g.leaving(i.ID) {
				out.note(CommitNone, "lost", "stopped-elsewhere", 1, i.ID)
			}
			m.cloud, m.missing = i, 0
		} else {
			g.bind(i, now, out)
		}
		if i.State == model.InstanceTerminating && !g.leaving(i.ID) {
			g.lose(i.ID, "terminated-elsewhere", out)
			g.record.Intents[i.ID] = Intent{Desired: model.DesiredGone, Stage: StageStopping, Since: now}
		}
	}
	missing := false
	for _, id := range g.memberIDs() {
		m := g.members[id]
		if seen[id] {
			continue
		}
		if m.missing == 0 || !repeated {
			m.missing++
		}
		if m.missing < lostAfter && m.cloud.State != model.InstanceTerminating {
			missing = true
			continue
		}
		g.vanish(id, now, out)
	}
	if !missing { // nothing that could have been replaced
		for _, m := range g.members {
			m.adopted = false
		}
	}
	if first {
		g.firstRead = s.TakenAt
		// What the cloud is already working on belongs to the fleet, and CA's
		// memory of it is not to be relied on.
		_, hidden := g.Unborn()
		seen, _ := g.running()
		if extra := s.Desired - seen - hidden; extra > 0 && g.record.Sequence == 0 {
			g.record.Hidden += extra
			out.note(CommitSoon, "adopt", "unknown-to-us", extra, "")
		}
		g.forget(out)
		g.view = g.buildView(now)
	}
}

// bind makes an instance that was not seen before a member.
func (g *Group) bind(i model.Instance, now time.Time, out *Outcome) {
	revealed, hidden := g.Unborn()
	m := &member{cloud: i, readyAt: now}
	if n, ok := g.nodes[i.ID]; ok {
		m.wasReady = wasReady(n)
	}
	g.members[i.ID] = m
	switch {
	case stopped(i.State):
		// Nobody saw its engine end.
		g.record.Intents[i.ID] = Intent{Desired: model.DesiredParked, Stage: StageStopping, Since: now, Exit: ExitLost}
		out.note(CommitSoon, "adopt", "stopped", 1, i.ID)
	case revealed > 0:
	default:
		m.hidden = true
		if hidden == 0 {
			m.adopted = true
			g.record.Hidden++
			out.note(CommitSoon, "adopt", "unknown-to-us", 1, i.ID)
		}
	}
}

// drop takes a living member out of the sizes.
func (g *Group) drop(id model.InstanceID) {
	if g.members[id].hidden {
		g.record.Hidden = max(g.record.Hidden-1, 0)
	} else {
		g.record.Target = max(g.record.Target-1, 0)
	}
}

// lose corrects the sizes for an instance that the cloud ended by itself. One
// that was still starting stays wanted, since CA waits for it; one that had
// been Ready does not: a replacement would be a size raised behind CA's back.
func (g *Group) lose(id model.InstanceID, reason string, out *Outcome) {
	m := g.members[id]
	if m.wasReady || m.adopted {
		g.drop(id)
	} else if r := g.replacement(); r != nil {
		g.drop(id)
		if r.adopted = false; !m.hidden && r.hidden {
			g.reveal(r)
		}
	}
	out.note(CommitSoon, "lost", reason, 1, id)
}

// replacement returns a member that the cloud may have launched in place of
// one that it lost, nil when there is none.
func (g *Group) replacement() *member {
	for _, id := range g.memberIDs() {
		if m := g.members[id]; m.adopted && !g.leaving(id) {
			return m
		}
	}
	return nil
}

// vanish forgets an instance that the cloud no longer has.
func (g *Group) vanish(id model.InstanceID, now time.Time, out *Outcome) {
	if g.leaving(id) {
		out.note(CommitSoon, "gone", "as-intended", 1, id)
	} else {
		g.lose(id, "vanished", out)
	}
	delete(g.members, id)
	delete(g.record.Intents, id)
	if _, registered := g.nodes[id]; registered {
		// Recorded until its Node is gone too: nobody else deletes that.
		g.record.Intents[id] = Intent{Desired: model.DesiredGone, Stage: StageStopping, Since: now}
	}
	delete(g.busy, id)
	delete(g.uses, id)
	delete(g.verdicts, id)
	g.tombstones[id] = now
}

// forget hides again what CA may no longer expect and reveals what it will
// see as capacity anyway. CA keeps its scale-up requests in memory only: after
// a restart a healthy launch looks like a size raised behind its back.
func (g *Group) forget(out *Outcome) {
	wanted, target := g.record.Target+g.record.Hidden, 0
	for id, m := range g.members {
		if g.leaving(id) {
			continue
		}
		m.hidden = g.neverReady(id)
		m.refreshes = 0
		if !m.hidden {
			target++
		}
	}
	target = min(target, wanted)
	if target != g.record.Target {
		out.note(CommitSoon, "hide", "autoscaler-forgot", abs(g.record.Target-target), "")
	}
	g.record.Target, g.record.Hidden = target, wanted-target
}

func abs(n int) int { return max(n, -n) }

func (g *Group) refresh(now time.Time, out *Outcome) {
	if !g.synced {
		return
	}
	for _, id := range g.memberIDs() {
		m := g.members[id]
		if !g.nodes[id].Ready || now.Sub(m.readyAt) < listedAge {
			m.refreshes, m.readySince = 0, time.Time{}
			continue
		}
		if m.readySince.IsZero() {
			m.readySince = now
		}
		if !m.hidden || g.leaving(id) {
			continue
		}
		if m.refreshes++; m.refreshes >= revealAfter && now.Sub(m.readySince) >= revealAge {
			g.reveal(m)
			out.note(CommitSoon, "reveal", "ready", 1, id)
		}
	}
	for id, at := range g.tombstones {
		if _, registered := g.nodes[id]; !registered && now.Sub(at) > tombstoneAge {
			delete(g.tombstones, id)
		}
	}
	g.view = g.buildView(now)
}

// reveal moves a hidden member, or a hidden unborn instance for nil, into the
// target size.
func (g *Group) reveal(m *member) {
	if m != nil {
		m.hidden, m.refreshes = false, 0
	}
	g.record.Hidden--
	g.record.Target++
}

func (g *Group) increaseSize(e IncreaseSize, now time.Time, out *Outcome) error {
	if e.Delta <= 0 {
		return Refuse(KindInvalid, g.spec.ID, "delta", "delta must be positive, got %d", e.Delta)
	}
	if e.Delta > g.spec.Max-g.record.Target {
		return Refuse(KindOutOfRange, g.spec.ID, "max", "size %d + %d exceeds the maximum of %d", g.record.Target, e.Delta, g.spec.Max)
	}
	left := e.Delta
	// Hidden nodes on their way: registered ones first, then instances, then
	// the unborn. Never those that were Ready when its loop began: CA sees them
	// as capacity already. One that has become so since it does not.
	left -= g.revealMembers(left, out, func(id model.InstanceID) bool {
		return g.nodes[id].Name != "" && (!g.nodes[id].Ready || g.members[id].readySince.IsZero())
	})
	left -= g.revealMembers(left, out, func(id model.InstanceID) bool { return g.nodes[id].Name == "" })
	_, hidden := g.Unborn()
	for range min(left, hidden) {
		g.reveal(nil)
		g.askedAt = now // CA wants it from now on; earlier failures are not its
		out.note(CommitFirst, "absorb", "unborn", 1, "")
		left--
	}
	// What does not fit under the maximum any more are hidden nodes that are
	// Ready: reveal those.
	if over := g.record.Target + g.record.Hidden + left - g.spec.Max; over > 0 {
		left -= g.revealMembers(min(over, left), out, func(model.InstanceID) bool { return true })
	}
	left -= g.takeBack(left, out)
	left -= g.resume(left, e.Prefer, false, now, out)
	if left > 0 {
		g.record.Target += left
		g.askedAt = now
		out.note(CommitFirst, "launch", "scale-up", left, "")
	}
	out.Commit = CommitFirst
	g.amendView(func(v *View) {
		v.Target += e.Delta
		v.Starting = true
		var added []InstanceView
		for id, m := range g.members {
			if _, listed := v.find(id); !listed && !m.hidden && !g.leaving(id) {
				added = append(added, InstanceView{ID: id, Status: status(m)})
			}
		}
		// A drain that was taken back is the group's again.
		for i, inst := range v.Instances {
			if m := g.members[inst.ID]; m != nil && inst.Status == StatusDeleting && !g.leaving(inst.ID) {
				v.Instances[i].Status = status(m)
			}
		}
		v.Instances = append(v.Instances, added...)
		slices.SortFunc(v.Instances, byInstance)
	})
	return nil
}

// revealMembers reveals up to n hidden members that match, in order of id.
func (g *Group) revealMembers(n int, out *Outcome, match func(model.InstanceID) bool) (revealed int) {
	for _, id := range g.memberIDs() {
		m := g.members[id]
		if revealed < n && m.hidden && !g.leaving(id) && match(id) {
			g.reveal(m)
			m.adopted = false // CA has asked for it
			out.note(CommitFirst, "absorb", "hidden", 1, id)
			revealed++
		}
	}
	return revealed
}

// takeBack undoes up to n drains whose engine has not been told to stop, the
// most valuable nodes first.
func (g *Group) takeBack(n int, out *Outcome) (taken int) {
	candidates := g.withIntent(func(id model.InstanceID, i Intent) bool {
		return i.Stage == StageDraining && i.leaving() && g.nodes[id].Ready
	})
	slices.SortStableFunc(candidates, func(a, b model.InstanceID) int {
		return cmp.Compare(g.verdicts[b].Score, g.verdicts[a].Score)
	})
	for _, id := range candidates[:min(n, len(candidates))] {
		delete(g.record.Intents, id)
		delete(g.verdicts, id) // it must be released anew
		m := g.members[id]
		m.hidden, m.takenBack = false, true
		g.record.Target++
		out.note(CommitFirst, "take-back", "scale-up", 1, id)
		taken++
	}
	return taken
}

// resume starts up to n parked instances: the preferred ones first, then by
// id. Hidden ones are not told to CA. An outdated one is left where it is as
// long as the cloud launches others. An instance whose old Node is not gone
// has to wait: that Node would pass for the new one, and be deleted as the old.
func (g *Group) resume(n int, prefer []model.InstanceID, hidden bool, now time.Time, out *Outcome) (resumed int) {
	parked := g.withIntent(func(id model.InstanceID, i Intent) bool {
		_, registered := g.nodes[id]
		return i.Desired == model.DesiredParked && i.Stage == StageStopping &&
			g.members[id].cloud.State == model.InstanceStopped && !registered &&
			(!g.members[id].cloud.Outdated || g.failure() != nil)
	})
	rank := func(id model.InstanceID) int {
		if at := slices.Index(prefer, id); at >= 0 {
			return at
		}
		return len(prefer)
	}
	slices.SortStableFunc(parked, func(a, b model.InstanceID) int { return cmp.Compare(rank(a), rank(b)) })
	for _, id := range parked[:min(n, len(parked))] {
		g.record.Intents[id] = Intent{Desired: model.DesiredRunning, Stage: StageStarting, Since: now}
		delete(g.verdicts, id) // it must be released anew
		m := g.members[id]
		m.hidden, m.wasReady, m.adopted = hidden, false, false
		if hidden {
			g.record.Hidden++
		} else {
			g.record.Target++
		}
		out.note(CommitFirst, "resume", "parked", 1, id)
		resumed++
	}
	return resumed
}

// withIntent returns the members whose intent matches, sorted by id.
func (g *Group) withIntent(match func(model.InstanceID, Intent) bool) []model.InstanceID {
	var ids []model.InstanceID
	for _, id := range slices.Sorted(maps.Keys(g.record.Intents)) {
		if g.members[id] != nil && match(id, g.record.Intents[id]) {
			ids = append(ids, id)
		}
	}
	return ids
}

func (g *Group) deleteNodes(e DeleteNodes, now time.Time, out *Outcome) error {
	var members, placeholders []model.InstanceID
	living, removed := 0, 0
	for _, id := range slices.Compact(slices.Sorted(slices.Values(e.Instances))) {
		_, dead := g.tombstones[id]
		switch {
		case dead || g.leaving(id):
			continue // done already: idempotent
		case strings.HasPrefix(string(id), g.placeholderPrefix()):
			// Those of an earlier activity have nothing to cancel any more.
			if slices.Contains(g.placeholders, id) {
				placeholders = append(placeholders, id)
			}
			continue
		case g.members[id] == nil:
			return Refuse(KindNotFound, g.spec.ID, "unknown-instance", "no instance %q", string(id))
		}
		if err := g.veto(id, now); err != nil {
			return err
		}
		members = append(members, id)
		if !g.members[id].hidden {
			removed++
			if !g.neverReady(id) {
				living++
			}
		}
	}
	if living > 0 && g.record.Target-removed < g.spec.Min {
		return Refuse(KindOutOfRange, g.spec.ID, "min", "size %d - %d is below the minimum of %d", g.record.Target, removed, g.spec.Min)
	}
	if len(members)+len(placeholders) == 0 {
		return nil
	}
	for _, id := range members {
		g.drop(id)
		intent := Intent{Desired: model.DesiredGone, Stage: StageDraining, Since: now}
		// One that never came up holds nothing that is worth keeping.
		if g.settings.Runner() && g.settings.Park == ParkStop && g.verdicts[id].Decision == model.DecisionPark && !g.neverReady(id) {
			intent.Desired = model.DesiredParked
		}
		g.members[id].beginDrain()
		if !g.settings.Runner() || g.nodes[id].Name == "" && g.neverReady(id) && !g.mustLook(id, now) {
			intent.Stage = StageStopping
		}
		g.record.Intents[id] = intent
		out.note(CommitFirst, "drain", "scale-down", 1, id)
	}
	for _, id := range placeholders {
		if revealed, _ := g.Unborn(); revealed > 0 {
			g.record.Target--
			removed++
			out.note(CommitFirst, "cancel", "launch-failed", 1, "")
		}
		g.placeholders = slices.DeleteFunc(g.placeholders, func(p model.InstanceID) bool { return p == id })
		g.tombstones[id] = now
	}
	g.amendView(func(v *View) {
		for _, id := range members {
			if at, ok := v.find(id); ok {
				v.Instances[at].Status = StatusDeleting
			}
		}
		v.Instances = slices.DeleteFunc(v.Instances, func(i InstanceView) bool {
			return slices.Contains(placeholders, i.ID)
		})
		v.Target -= removed
	})
	return nil
}

// veto says why a node may not be removed now. Only runner groups veto, and
// never a node that has not been Ready or has not been for readyGrace.
func (g *Group) veto(id model.InstanceID, now time.Time) error {
	node, registered := g.nodes[id]
	switch {
	case !g.settings.Runner() || registered && dead(node, now):
		return nil
	case g.busy[id]:
		return Refuse(KindVetoed, g.spec.ID, "busy", "node %q runs a CI job", string(node.Name))
	case g.occupied(id):
		return Refuse(KindVetoed, g.spec.ID, "busy", "the engine on node %q has sessions", string(node.Name))
	case !registered || g.neverReady(id):
		return nil
	}
	switch g.verdicts[id].Decision {
	case model.DecisionRelease, model.DecisionPark:
		return nil
	default:
		return Refuse(KindVetoed, g.spec.ID, "not-released", "the plan keeps node %q", string(node.Name))
	}
}

// dead says whether the node has not been Ready for so long that whatever its
// pods claim to do is not being done.
func dead(n model.Node, now time.Time) bool {
	return !n.Ready && wasReady(n) && now.Sub(n.ReadyChanged) >= readyGrace
}

// decreaseTargetSize cancels what is not yet born and succeeds even when that
// is nothing: an error would abort CA's loop for every group.
func (g *Group) decreaseTargetSize(e DecreaseTargetSize, out *Outcome) error {
	if e.Delta >= 0 {
		return Refuse(KindInvalid, g.spec.ID, "delta", "delta must be negative, got %d", e.Delta)
	}
	revealed, _ := g.Unborn()
	n := revealed
	if e.Delta > -revealed {
		n = -e.Delta
	}
	if n == 0 {
		return nil
	}
	g.record.Target -= n
	out.note(CommitFirst, "cancel", "autoscaler", n, "")
	g.amendView(func(v *View) { v.Target -= n })
	return nil
}

// prescale makes sure that at least Want hidden nodes are on their way.
func (g *Group) prescale(e Prescale, now time.Time, out *Outcome) {
	if !g.synced || !g.settings.Runner() || now.Before(g.prescaleFrom) {
		return
	}
	n := min(e.Want-g.Coming(), g.settings.PrescaleMax-g.record.Hidden, g.spec.Max-g.record.Target-g.record.Hidden)
	if n <= 0 {
		return
	}
	n -= g.resume(n, e.Prefer, true, now, out)
	if n > 0 {
		g.record.Hidden += n
		g.askedAt = now
		out.note(CommitFirst, "launch", e.Reason, n, "")
	}
}

// amendView changes a copy of the published view.
func (g *Group) amendView(change func(*View)) {
	if g.view == nil {
		return
	}
	v := *g.view
	v.Instances = slices.Clone(v.Instances)
	change(&v)
	v.Debug = g.debug()
	g.view = &v
}

func byInstance(a, b InstanceView) int { return cmp.Compare(a.ID, b.ID) }

func status(m *member) InstanceStatus {
	if m.cloud.State == model.InstanceRunning {
		return StatusRunning
	}
	return StatusCreating
}

func (g *Group) buildView(now time.Time) *View {
	v := &View{Group: g.spec, Settings: g.settings, Target: g.record.Target, Debug: g.debug()}
	for id, m := range g.members {
		intent, has := g.record.Intents[id]
		switch {
		case has && intent.leaving():
			// Listed until it is gone, so that CA neither cleans its taint nor
			// counts the Node as unregistered; a parked one is not listed.
			if m.cloud.State != model.InstanceStopped || g.nodes[id].Name != "" {
				v.Instances = append(v.Instances, InstanceView{ID: id, Status: StatusDeleting})
			}
		case !m.hidden:
			v.Instances = append(v.Instances, InstanceView{ID: id, Status: status(m)})
		}
	}
	v.Starting = g.starting(now)
	g.renewPlaceholders()
	for _, id := range g.placeholders {
		v.Instances = append(v.Instances, InstanceView{ID: id, Status: StatusCreating, Failure: g.snapshot.Failure})
	}
	slices.SortFunc(v.Instances, byInstance)
	return v
}

// starting says whether CA may take a node that is on its way for one that is
// broken. So it does with one that it holds for registered and not Ready: it
// may have listed its nodes some time before the Refresh. What has not
// registered within the group's own max-node-provision-time does not count:
// CA needs that time to give it up.
func (g *Group) starting(now time.Time) bool {
	awaited := func(since time.Time) bool {
		most := g.settings.Options.MaxNodeProvisionTime
		return most == nil || now.Sub(since) < *most
	}
	if revealed, hidden := g.Unborn(); revealed+hidden > 0 && awaited(g.askedAt) {
		return true
	}
	for id, m := range g.members {
		node, registered := g.nodes[id]
		switch {
		case g.leaving(id):
		case !registered:
			if awaited(m.cloud.LaunchedAt) {
				return true
			}
		case m.readySince.IsZero() || now.Sub(m.readySince) < readyAge:
			if now.Sub(node.Created) < startupTime {
				return true
			}
		}
	}
	return false
}

// failure returns the cloud's failure to start what is wanted now, nil when
// there is none or it is older than the wish.
func (g *Group) failure() *model.LaunchFailure {
	if f := g.snapshot.Failure; f != nil && !f.At.Before(g.askedAt) {
		return f
	}
	return nil
}

// renewPlaceholders gives every unborn instance that CA waits for an id under
// which its failure is reported. Ids carry the activity and a number, and are
// never used twice: CA counts an error only under an id that it has not seen.
func (g *Group) renewPlaceholders() {
	revealed, _ := g.Unborn()
	f := g.failure()
	if f == nil {
		g.placeholders = nil
		return
	}
	if f.Activity != g.activity {
		g.activity, g.placeholders, g.placeholderN = f.Activity, nil, 0
	}
	g.placeholders = g.placeholders[:min(len(g.placeholders), revealed)]
	for len(g.placeholders) < revealed {
		g.placeholderN++
		g.placeholders = append(g.placeholders, model.InstanceID(
			fmt.Sprintf("%s%s-%d", g.placeholderPrefix(), f.Activity, g.placeholderN)))
	}
}

func (g *Group) placeholderPrefix() string {
	return fmt.Sprintf("i-placeholder-%s-", string(g.spec.ID))
}

func (g *Group) debug() string {
	counts := map[model.Phase]int{}
	for id, m := range g.members {
		counts[g.phase(id, m)]++
	}
	text := fmt.Sprintf("target %d, hidden %d", g.record.Target, g.record.Hidden)
	for _, p := range model.Phases() {
		if counts[p] > 0 {
			text += fmt.Sprintf(", %s %d", p, counts[p])
		}
	}
	return text
}

// running counts what the cloud reports as pending or running, and apart from
// that what it did when it was last seen, but is missing now.
func (g *Group) running() (seen, missing int) {
	for _, m := range g.members {
		switch {
		case !active(m.cloud.State):
		case m.missing > 0:
			missing++
		default:
			seen++
		}
	}
	return seen, missing
}

func active(s model.InstanceState) bool {
	return s == model.InstancePending || s == model.InstanceRunning
}

func stopped(s model.InstanceState) bool {
	return s == model.InstanceStopping || s == model.InstanceStopped
}
