package nodegroups

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// watchLag is how late a change in the cluster is observed at most,
	// callLag how long a call takes at most.
	watchLag = 20 * time.Second
	callLag  = time.Minute
)

// sim drives one Group against a world, as its owner must, with everything in
// between late, lost or cut off. Every step checks what must hold at any
// moment; converge checks what must hold once the faults have ended.
type sim struct {
	t *rapid.T
	w *world
	g *Group

	stored  Record // as last written: what a restart finds
	unsaved bool   // a CommitSoon that has not been written

	calls     []*call
	reads     []*reading
	delivered []model.GroupSnapshot
	watch     []sighting
	queued    map[model.InstanceID]sighting // the last one put into watch

	// What excuses the group.
	omitted   map[model.InstanceID]bool      // left out of a reading once already
	nodeless  map[model.InstanceID]bool      // deleted while it had no Node, or robbed of it
	recovered map[model.InstanceID]time.Time // a Node was NotReady until then
	meddled   map[model.InstanceID]bool      // somebody else has ended its engine
	metrics   bool                           // engines have metrics
	tolerant  bool                           // engines tolerate our taint
	exitCode  int                            // of engines that are told to stop
	maxEver   int
	foreign   int // instances that nobody here asked for
	lost      int // instances that the cloud lost
	cancelled int // unborn ones that were given up
	restarts  int

	ordered      int                       // instances that the group said it launches
	placeholders map[model.InstanceID]bool // ever shown
	shown        []model.InstanceID        // in the last view
}

// call is an effect under way.
type call struct {
	effect Effect
	at     time.Time
	landed bool
	answer bool        // of Confirm: idle; of StopEngine: gone
	pods   []model.Pod // of Confirm
	node   model.Node  // of Look
}

// reading is a read of the cloud under way: begun, then answered, then
// delivered.
type reading struct {
	begun    time.Time
	answered bool
	content  model.GroupSnapshot
}

// sighting is the state of a Node and its jobs that is about to be observed.
type sighting struct {
	at      time.Time
	id      model.InstanceID
	node    model.Node // zero: none
	busy    bool
	engines []model.Pod
}

// sight is what there is to be seen of an instance.
func (s *sim) sight(id model.InstanceID) sighting {
	return sighting{id: id, node: s.w.nodes[id], busy: s.w.jobs[id], engines: s.w.engines[id]}
}

func newSim(t *rapid.T) *sim {
	s := &sim{
		t: t, w: newWorld(),
		queued:       map[model.InstanceID]sighting{},
		omitted:      map[model.InstanceID]bool{},
		nodeless:     map[model.InstanceID]bool{},
		recovered:    map[model.InstanceID]time.Time{},
		placeholders: map[model.InstanceID]bool{},
		meddled:      map[model.InstanceID]bool{},
		metrics:      rapid.Bool().Draw(t, "metrics"),
		tolerant:     rapid.IntRange(0, 7).Draw(t, "tolerant") == 7,
		exitCode:     rapid.SampledFrom([]int{0, 0, 137}).Draw(t, "exit code"),
	}
	// A fleet that is older than its provider.
	s.foreign = rapid.IntRange(0, 3).Draw(t, "old instances")
	s.w.desired = s.foreign
	s.w.launch()
	for _, id := range s.w.ids() { // some of it stopped
		if rapid.IntRange(0, 4).Draw(t, "stopped") == 0 {
			s.w.set(id, model.InstanceStopped)
			s.w.desired--
		}
	}
	group, settings := s.drawConfig()
	s.g = NewGroup(group, settings, Record{})
	s.begin()
	return s
}

func (s *sim) drawConfig() (model.NodeGroup, Settings) {
	group := model.NodeGroup{
		ID:  "g",
		Min: rapid.IntRange(0, 2).Draw(s.t, "min"),
		Max: rapid.IntRange(2, 6).Draw(s.t, "max"),
	}
	s.maxEver = max(s.maxEver, group.Max)
	settings := Defaults(group)
	settings.Role = model.RoleRunner
	settings.Park = rapid.SampledFrom([]Park{ParkStop, ParkOff}).Draw(s.t, "park")
	settings.MaxParked = 3 - rapid.IntRange(0, 3).Draw(s.t, "max-parked")
	settings.MaxParkedAge = rapid.SampledFrom([]time.Duration{10 * time.Minute, 24 * time.Hour}).Draw(s.t, "max-parked-age")
	return group, settings
}

// begin starts a life of the provider: it lists the cluster, then reads the
// cloud.
func (s *sim) begin() {
	s.calls, s.reads, s.delivered, s.watch = nil, nil, nil, nil
	for _, id := range slices.Sorted(maps.Keys(s.w.nodes)) {
		s.observe(ObserveNode{s.w.nodes[id]})
		s.observe(ObserveBusy{id, s.w.jobs[id]})
	}
	for _, id := range slices.Sorted(maps.Keys(s.w.engines)) {
		s.observe(ObserveEngine{id, s.w.engines[id]})
	}
	clear(s.queued)
	for id := range s.w.nodes {
		s.queued[id] = s.sight(id)
	}
	for id := range s.w.engines {
		s.queued[id] = s.sight(id)
	}
	s.beginRead()
}

// actions are everything that can happen next. Those that make no sense now
// do nothing. More frequent ones are named more often.
func (s *sim) actions() map[string]func() {
	return map[string]func(){
		"time passes":                s.timePasses,
		"time passes briefly":        func() { s.pass(time.Second) },
		"time passes briefly, again": func() { s.pass(5 * time.Second) },
		"call lands":                 s.callLands,
		"call ends":                  s.callEnds,
		"call ends, quickly":         s.callEnds,
		"call fails":                 s.callFails,
		"read begins":                s.beginRead,
		"read is answered":           s.answerRead,
		"read is delivered":          s.deliverRead,
		"read is repeated":           s.repeatRead,
		"cluster is observed":        s.observeNext,
		"cluster is observed, more than once": func() {
			for range 5 {
				s.observeNext()
			}
		},
		"all is quick":            s.quick,
		"all is quick again":      s.quick,
		"all boots":               s.boot,
		"all is well":             func() { s.boot(); s.quick(); s.refresh() },
		"all is well again":       func() { s.boot(); s.quick(); s.refresh() },
		"record is written":       s.save,
		"provider restarts":       s.restart,
		"owner calls":             s.ready,
		"cloud works":             s.w.launch,
		"instances move":          s.instancesMove,
		"instances move on":       s.instancesMove,
		"instance is lost":        s.loseInstance,
		"instance is reclaimed":   s.reclaimInstance,
		"capacity changes":        func() { s.w.capacity = rapid.SampledFrom([]int{0, 2, endless, endless}).Draw(s.t, "capacity") },
		"somebody raises":         s.raise,
		"kubelet acts":            s.kubeletActs,
		"kubelet acts again":      s.kubeletActs,
		"job starts":              s.jobStarts,
		"job ends":                s.jobEnds,
		"node is deleted by hand": s.deleteNodeByHand,
		"engines start":           s.enginesStart,
		"engine exits":            s.engineExits,
		"engine exits, another":   s.engineExits,
		"engine is meddled with":  s.meddle,
		"session starts":          s.sessionStarts,
		"sessions end":            func() { clear(s.w.sessions) },
		"engines are sampled":     s.sample,
		"plan":                    s.decide,
		"plan releases":           s.decide,
		"prescale":                s.prescale,
		"configure":               s.configure,
		"refresh":                 s.refresh,
		"refresh, another":        s.refresh,
		"increase":                s.increase,
		"increase more":           s.increase,
		"delete":                  s.deleteNodes,
		"delete more":             s.deleteNodes,
		"delete nonsense":         s.deleteNonsense,
		"delete placeholders":     s.deletePlaceholders,
		"decrease":                s.decrease,
		"scale down":              s.scaleDown,
		"scale down again":        s.scaleDown,
		"scale down, at leisure":  func() { s.scaleDown(); s.quick(); s.quick(); s.boot(); s.quick() },
		"autoscaler restarts":     func() { s.command(Forget{}) },
	}
}

// run takes steps among the named actions, all for none.
func (s *sim) run(steps int, names ...string) {
	actions := s.actions()
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(actions))
	}
	// Draws favour what comes first: every run has favourites of its own.
	seed := rapid.Uint64().Draw(s.t, "favourites")
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for range steps {
		name := rapid.SampledFrom(names).Draw(s.t, "action")
		if actions[name] == nil {
			s.t.Fatalf("there is no action %q", name)
		}
		actions[name]()
		s.notice()
		s.check()
	}
}

// The owner.

// command is one event that may be refused or be recorded first.
func (s *sim) command(e Event) bool {
	before := dump(s.g)
	agreed := s.g.view == nil || s.g.view.Target == s.g.record.Target
	next := s.g.Clone()
	out, err := next.Step(e, s.w.now)
	if after := dump(s.g); after != before {
		s.t.Fatalf("%T on a clone changed the original:\n%s\n%s", e, before, after)
	}
	if err != nil {
		if after := dump(next); after != before {
			s.t.Fatalf("%T was refused (%v) and changed the group:\n%s\n%s", e, err, before, after)
		}
		return false
	}
	again := s.g.Clone()
	if _, err := again.Step(e, s.w.now); err != nil || dump(again) != dump(next) {
		s.t.Fatalf("%T twice from the same state differs (%v):\n%s\n%s", e, err, dump(next), dump(again))
	}
	if out.Commit == CommitFirst {
		if rapid.IntRange(0, 9).Draw(s.t, "write") == 0 {
			return false // the write failed: nothing happened
		}
		s.stored, s.unsaved = next.Record(), false
	}
	s.keep(next, out)
	if v := s.g.view; agreed && v != nil && v.Target != s.g.record.Target {
		s.t.Fatalf("after %+v the view says target %d, the record %d", e, v.Target, s.g.record.Target)
	}
	s.ready()
	return true
}

// observe is one event that is never refused.
func (s *sim) observe(e Event) {
	out, err := s.g.Step(e, s.w.now)
	if err != nil {
		s.t.Fatalf("%T was refused: %v", e, err)
	}
	if out.Commit == CommitFirst {
		s.t.Fatalf("%T must be recorded first: %+v", e, out)
	}
	s.keep(s.g, out)
	s.ready()
}

func (s *sim) ready() {
	next, again := s.g.Clone(), s.g.Clone()
	out, effects := next.Ready(s.w.now)
	if _, effects2 := again.Ready(s.w.now); fmt.Sprint(effects) != fmt.Sprint(effects2) || dump(next) != dump(again) {
		s.t.Fatalf("Ready twice from the same state differs:\n%v\n%v", effects, effects2)
	}
	if out.Commit == CommitFirst {
		if rapid.IntRange(0, 9).Draw(s.t, "write") == 0 {
			return
		}
		s.stored, s.unsaved = next.Record(), false
	}
	s.keep(next, out)
	for _, e := range effects {
		s.t.Logf("> %s %v %d %v", e.Verb, e.Node.ID, e.Desired, e.Instances)
		s.calls = append(s.calls, &call{effect: e, at: s.w.now})
	}
}

func (s *sim) keep(g *Group, out Outcome) {
	s.g = g
	s.unsaved = s.unsaved || out.Commit == CommitSoon
	for _, n := range out.Notes {
		s.t.Logf("· %s %s %d %s", n.Action, n.Reason, n.Count, n.Instance)
		if _, registered := g.nodes[n.Instance]; n.Action == "stop" && !registered {
			s.nodeless[n.Instance] = true // nobody to ask about an engine
		}
		switch n.Action {
		case "launch":
			s.ordered += n.Count
		case "cancel":
			s.cancelled += n.Count
		}
	}
}

func (s *sim) save() { s.stored, s.unsaved = s.g.Record(), false }

// restart ends the provider. What it had asked for either was carried out or
// never will be; what it had not written is lost.
func (s *sim) restart() {
	for _, c := range s.calls {
		if !c.landed && rapid.Bool().Draw(s.t, "lands") {
			s.land(c)
		}
	}
	s.restarts++
	known := maps.Clone(s.g.known)
	for id := range s.g.members {
		known[id] = true // a RunnerNode was written of each
	}
	s.g = NewGroup(s.g.Spec(), s.g.Settings(), s.stored)
	s.g.known = known
	s.unsaved = false
	s.begin()
}

// Effects under way.

func (s *sim) pickCall(match func(*call) bool) *call {
	var calls []*call
	for _, c := range s.calls {
		if match(c) {
			calls = append(calls, c)
		}
	}
	if len(calls) == 0 {
		return nil
	}
	return rapid.SampledFrom(calls).Draw(s.t, "call")
}

func (s *sim) callLands() {
	if c := s.pickCall(func(c *call) bool { return !c.landed }); c != nil {
		s.land(c)
	}
}

func (s *sim) callEnds() {
	if c := s.pickCall(func(*call) bool { return true }); c != nil {
		s.end(c)
	}
}

func (s *sim) callFails() {
	if c := s.pickCall(func(*call) bool { return true }); c != nil {
		s.done(c, errors.New("timeout"))
	}
}

// land has an effect take place, and checks that it may.
func (s *sim) land(c *call) {
	c.landed = true
	e := c.effect
	switch e.Verb {
	case Terminate, Stop:
		for _, id := range e.Instances {
			if s.w.jobs[id] && s.g.settings.Runner() && !s.excused(id) {
				s.t.Fatalf("%s of %s, which runs a job", e.Verb, id)
			}
			s.checkEngine(e.Verb, id)
		}
	case Resize:
		if e.Desired > max(s.maxEver, s.w.desired) {
			s.t.Fatalf("the cloud is asked for %d of %d at most", e.Desired, s.maxEver)
		}
	case DeleteNode:
		if s.w.nodes[e.Node.ID].UID == e.Node.UID && active(s.w.instances[e.Node.ID].State) {
			s.t.Fatalf("the Node of %s is deleted, which is %s", e.Node.ID, s.w.instances[e.Node.ID].State)
		}
	}
	c.answer, c.pods, c.node = s.w.apply(e), s.w.engines[e.Node.ID], s.w.nodes[e.Node.ID]
	s.notice()
}

// excused says whether nobody can be blamed for ending a busy node: it had no
// Node when it was deleted, or it has been NotReady until a moment ago.
func (s *sim) excused(id model.InstanceID) bool {
	n := s.w.nodes[id]
	return s.nodeless[id] || !n.Ready && s.w.now.Sub(n.ReadyChanged) > readyGrace-watchLag ||
		s.w.now.Sub(s.recovered[id]) <= watchLag+callLag
}

// checkEngine: the cloud ends no engine whose exit was not recorded before, or
// that was not given up; and stops none at all.
func (s *sim) checkEngine(v Verb, id model.InstanceID) {
	exit := s.stored.Intents[id].Exit
	if v == Stop && active(s.w.instances[id].State) && s.w.spoiled[id] && !s.nodeless[id] && !s.meddled[id] {
		s.t.Fatalf("%s is stopped to be parked, and its cache is lost; recorded is %+v", id, s.stored.Intents[id])
	}
	switch {
	case !active(s.w.instances[id].State) || len(s.w.running(id)) == 0 || s.excused(id) || s.meddled[id]:
	case exit == "" && s.tolerant: // it came back after the live read
	case exit == "" || v == Stop && !s.tolerant:
		s.t.Fatalf("%s of %s, whose engine runs; recorded is %+v\nengines %+v", v, id, s.stored.Intents[id], s.w.engines[id])
	}
}

func (s *sim) end(c *call) {
	if !c.landed {
		s.land(c)
	}
	switch {
	case c.effect.Verb == Confirm:
		s.observe(Confirmed{c.effect.Node.ID, c.answer, c.pods})
	case c.effect.Verb == Look:
		if c.answer {
			s.observe(ObserveNode{c.node})
		}
		s.observe(Looked{c.effect.Node.ID})
	case c.effect.Verb == StopEngine && c.answer:
		s.observe(EngineGone{c.effect.Node.ID, c.effect.Engine.UID})
	}
	s.done(c, nil)
}

func (s *sim) done(c *call, err error) {
	s.calls = slices.DeleteFunc(s.calls, func(o *call) bool { return o == c })
	// No call ends in the instant in which a read begins.
	s.w.now = s.w.now.Add(time.Millisecond)
	s.observe(Done{c.effect, err, s.w.now})
	s.w.now = s.w.now.Add(time.Millisecond)
	if c.effect.Verb.Cloud() {
		s.beginRead()
	}
}

// Readings of the cloud.

func (s *sim) beginRead() { s.reads = append(s.reads, &reading{begun: s.w.now}) }

func (s *sim) answerRead() {
	for _, r := range s.reads {
		if !r.answered {
			s.answer(r)
			if n := len(r.content.Instances); n > 0 && rapid.IntRange(0, 7).Draw(s.t, "omit") == 0 {
				at := rapid.IntRange(0, n-1).Draw(s.t, "omitted")
				if id := r.content.Instances[at].ID; !s.omitted[id] {
					s.omitted[id] = true
					r.content.Instances = slices.Delete(r.content.Instances, at, at+1)
				}
			}
			for _, id := range slices.Sorted(maps.Keys(s.g.tombstones)) { // listed for longer than it lived
				if _, exists := s.w.instances[id]; !exists && strings.HasPrefix(string(id), "i-") {
					r.content.Instances = append(r.content.Instances, model.Instance{ID: id, State: model.InstanceTerminating})
				}
			}
			return
		}
	}
}

func (s *sim) answer(r *reading) {
	r.answered, r.content = true, s.w.read()
	r.content.TakenAt = r.begun
}

func (s *sim) deliverRead() {
	for i, r := range s.reads {
		if r.answered {
			s.reads = slices.Delete(s.reads, i, i+1)
			s.delivered = append(s.delivered, r.content)
			s.observe(ObserveCloud{r.content})
			for _, inst := range r.content.Instances {
				_, dead := s.g.tombstones[inst.ID]
				newer := r.content.TakenAt.Equal(s.g.snapshot.TakenAt)
				if newer && !dead && s.g.members[inst.ID] == nil {
					s.t.Fatalf("nobody accounts for %s", inst.ID)
				}
			}
			return
		}
	}
}

func (s *sim) repeatRead() {
	if n := len(s.delivered); n > 0 {
		s.observe(ObserveCloud{s.delivered[n-1-rapid.IntRange(0, n-1).Draw(s.t, "age")]})
	}
}

// The cluster as it is observed.

// notice queues what has changed in the cluster.
func (s *sim) notice() {
	all := maps.Clone(s.queued)
	for _, seen := range []map[model.InstanceID]bool{keys(s.w.nodes), keys(s.w.engines)} {
		for id := range seen {
			if _, queued := all[id]; !queued {
				all[id] = sighting{}
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		now := s.sight(id)
		last := s.queued[id]
		last.at = time.Time{}
		if fmt.Sprint(now) != fmt.Sprint(last) {
			now.id = id
			s.queued[id] = now
			now.at = s.w.now
			s.watch = append(s.watch, now)
		}
	}
}

func (s *sim) observeNext() {
	if len(s.watch) == 0 {
		return
	}
	next := s.watch[0]
	s.watch = s.watch[1:]
	if next.node.Name == "" {
		s.observe(ObserveNodeGone{next.id})
	} else {
		s.observe(ObserveNode{next.node})
	}
	s.observe(ObserveBusy{next.id, next.busy})
	s.observe(ObserveEngine{next.id, next.engines})
}

func (s *sim) timePasses() {
	by := rapid.SampledFrom([]time.Duration{
		100 * time.Millisecond, time.Second, 6 * time.Second, 30 * time.Second, 2 * time.Minute, 6 * time.Minute, 15 * time.Minute,
	}).Draw(s.t, "by")
	s.pass(by)
}

func (s *sim) pass(by time.Duration) {
	for by > 0 {
		slice := min(by, watchLag/2)
		by -= slice
		s.w.now = s.w.now.Add(slice)
		s.hurry()
		s.sample()
	}
	s.ready()
}

// hurry ends what has taken as long as it may.
func (s *sim) hurry() {
	for len(s.watch) > 0 && s.w.now.Sub(s.watch[0].at) > watchLag {
		s.observeNext()
	}
	for _, c := range slices.Clone(s.calls) {
		if s.w.now.Sub(c.at) > callLag {
			s.end(c)
		}
	}
	s.reads = slices.DeleteFunc(s.reads, func(r *reading) bool { return s.w.now.Sub(r.begun) > callLag })
	if len(s.reads) == 0 {
		s.beginRead()
	}
}

// quick ends every call, observes all of the cluster and reads the cloud.
func (s *sim) quick() {
	for _, c := range slices.Clone(s.calls) {
		s.end(c)
	}
	s.notice()
	for len(s.watch) > 0 {
		s.observeNext()
	}
	s.sample()
	s.w.now = s.w.now.Add(time.Second)
	s.reads = nil
	s.beginRead()
	s.answer(s.reads[0])
	s.deliverRead()
}

// boot moves every instance and kubelet as far as they go.
func (s *sim) boot() {
	s.w.launch()
	for _, id := range s.w.ids() {
		if s.w.instances[id].State == model.InstanceRunning {
			s.w.exitEngines(id, s.exitCode, s.notice)
		}
		s.moveOn(id)
		if s.w.instances[id].State == model.InstanceRunning {
			if _, ok := s.w.nodes[id]; !ok {
				s.w.register(id)
			}
			s.becomeReady(id)
		}
	}
	s.enginesStart()
}

// enginesStart is the work of the engines' DaemonSet.
func (s *sim) enginesStart() {
	for _, id := range s.w.ids() {
		n := s.w.nodes[id]
		if n.Ready && s.w.instances[id].State == model.InstanceRunning && len(s.w.engines[id]) == 0 && (!n.Draining || s.tolerant) {
			s.w.startEngine(id, model.EngineState{ToleratesDrain: s.tolerant}, 5*time.Minute)
		}
	}
}

// pickEngine returns an instance that runs, with an engine that matches.
func (s *sim) pickEngine(what string, match func(model.EngineState) bool) (model.InstanceID, bool) {
	return s.pick(what, func(i model.Instance) bool {
		return i.State == model.InstanceRunning && slices.ContainsFunc(s.w.running(i.ID), func(p model.Pod) bool { return match(p.EngineState) })
	})
}

func (s *sim) engineExits() {
	if id, ok := s.pickEngine("exits", func(e model.EngineState) bool { return e.Deleting }); ok {
		s.w.exitEngines(id, s.exitCode, s.notice)
	}
}

// meddle: somebody else deletes the engine's pod, or removes it by force.
func (s *sim) meddle() {
	id, ok := s.pickEngine("meddled with", func(model.EngineState) bool { return true })
	if !ok || rapid.IntRange(0, 2).Draw(s.t, "really") > 0 {
		return
	}
	s.meddled[id] = true
	if rapid.Bool().Draw(s.t, "by force") {
		s.w.vanishEngines(id)
		return
	}
	for _, p := range s.w.engines[id] {
		s.w.changeEngine(id, p.UID, s.w.tellToStop)
	}
}

func (s *sim) sessionStarts() {
	if id, ok := s.pickEngine("session", func(e model.EngineState) bool { return !e.Deleting }); ok {
		s.w.sessions[id] = true
	}
}

// sample has the metrics of all engines read.
func (s *sim) sample() {
	for _, id := range s.w.ids() {
		if !s.metrics || len(s.w.running(id)) == 0 || s.w.instances[id].State != model.InstanceRunning {
			continue
		}
		activity := model.ActivityIdle
		if s.w.sessions[id] || s.w.jobs[id] {
			activity = model.ActivityBusy
		}
		s.observe(ObserveUse{id, activity, s.w.now, true})
	}
}

func (s *sim) becomeReady(id model.InstanceID) {
	if !s.w.nodes[id].Ready {
		s.recovered[id] = s.w.now
		s.w.ready(id, true)
	}
}

// What happens in the world.

func (s *sim) pick(what string, match func(model.Instance) bool) (model.InstanceID, bool) {
	var ids []model.InstanceID
	for _, id := range s.w.ids() {
		if match(s.w.instances[id]) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return "", false
	}
	return rapid.SampledFrom(ids).Draw(s.t, what), true
}

func (s *sim) instancesMove() {
	id, ok := s.pick("moves", func(i model.Instance) bool {
		return i.State != model.InstanceRunning && i.State != model.InstanceStopped
	})
	if ok {
		s.moveOn(id)
	}
}

func (s *sim) moveOn(id model.InstanceID) {
	switch s.w.instances[id].State {
	case model.InstancePending:
		s.w.set(id, model.InstanceRunning)
	case model.InstanceStopping:
		s.w.set(id, model.InstanceStopped)
	case model.InstanceTerminating:
		s.w.remove(id)
	}
}

func (s *sim) loseInstance() {
	if id, ok := s.pick("lost", func(model.Instance) bool { return true }); ok && rapid.IntRange(0, 2).Draw(s.t, "really") == 0 {
		s.lost++
		s.w.ready(id, false)
		s.w.remove(id)
	}
}

func (s *sim) reclaimInstance() {
	if id, ok := s.pick("reclaimed", func(i model.Instance) bool { return active(i.State) }); ok && rapid.IntRange(0, 2).Draw(s.t, "really") == 0 {
		s.lost++
		s.w.set(id, model.InstanceTerminating)
		s.w.halt(id)
	}
}

func (s *sim) raise() {
	if rapid.IntRange(0, 2).Draw(s.t, "really") == 0 {
		n := rapid.IntRange(1, 2).Draw(s.t, "raise")
		s.foreign += n
		s.w.desired += n
	}
}

// kubeletActs: a Node registers, becomes Ready, or sometimes stops being so.
func (s *sim) kubeletActs() {
	id, ok := s.pick("kubelet", func(i model.Instance) bool { return i.State == model.InstanceRunning })
	switch n, registered := s.w.nodes[id]; {
	case !ok:
	case !registered:
		s.w.register(id)
	case !n.Ready:
		s.becomeReady(id)
	case rapid.IntRange(0, 3).Draw(s.t, "dies") == 0:
		s.w.ready(id, false)
	}
}

func (s *sim) jobStarts() {
	if id, ok := s.pick("busy", func(i model.Instance) bool { return s.w.schedulable(i.ID) }); ok {
		s.w.jobs[id] = true
	}
}

func (s *sim) jobEnds() {
	if id, ok := s.pick("idle", func(i model.Instance) bool { return s.w.jobs[i.ID] && s.w.nodes[i.ID].Ready }); ok {
		delete(s.w.jobs, id)
	}
}

func (s *sim) deleteNodeByHand() {
	id, ok := s.pick("node", func(i model.Instance) bool { _, ok := s.w.nodes[i.ID]; return ok && !s.w.jobs[i.ID] })
	if ok && rapid.IntRange(0, 2).Draw(s.t, "really") == 0 {
		delete(s.w.nodes, id)
		s.nodeless[id] = true
		s.w.vanishEngines(id) // with their Node, and the kubelet ends them
	}
}

// Planner and autoscaler.

func (s *sim) decide() {
	var e Decide
	for _, id := range s.g.memberIDs() {
		e.Verdicts = append(e.Verdicts, model.Verdict{
			Instance: id,
			Decision: rapid.SampledFrom([]model.Decision{model.DecisionRelease, model.DecisionPark, model.DecisionKeep}).Draw(s.t, "decision"),
			Score:    float64(rapid.IntRange(0, 3).Draw(s.t, "score")),
		})
	}
	s.observe(e)
}

func (s *sim) prescale() {
	s.command(Prescale{Want: rapid.IntRange(0, 4).Draw(s.t, "want"), Prefer: s.w.ids(), Reason: "queued-jobs"})
}

func (s *sim) configure() {
	group, settings := s.drawConfig()
	s.observe(Configure{group, settings})
}

func (s *sim) refresh() {
	s.command(Refresh{})
	v := s.g.view
	if v == nil {
		return
	}
	revealed, shown := 0, []model.InstanceID(nil)
	for _, i := range v.Instances {
		if i.Status != StatusDeleting {
			revealed++
		}
		if i.Failure == nil {
			continue
		}
		// What was not in the last view was in none.
		shown = append(shown, i.ID)
		if s.placeholders[i.ID] && !slices.Contains(s.shown, i.ID) {
			s.t.Fatalf("placeholder %s is used again", i.ID)
		}
		s.placeholders[i.ID] = true
	}
	s.shown = shown
	if v.Target != s.g.record.Target || revealed > v.Target {
		s.t.Fatalf("the view lists %d instances for target %d, recorded %d\n%s", revealed, v.Target, s.g.record.Target, dump(s.g))
	}
}

func (s *sim) increase() {
	if s.g.synced {
		s.command(IncreaseSize{Delta: rapid.IntRange(-1, 4).Draw(s.t, "delta"), Prefer: s.w.ids()})
	}
}

// deleteNodes is what cluster-autoscaler does: it deletes Nodes that are there,
// or instances that have had none for long. It sees the cluster at least as
// well as we do.
func (s *sim) deleteNodes() {
	if s.g.view == nil {
		return
	}
	var e DeleteNodes
	for _, i := range s.g.view.Instances {
		_, exists := s.w.nodes[i.ID]
		_, observed := s.g.nodes[i.ID]
		if i.Failure == nil && (exists == observed) && rapid.IntRange(0, 2).Draw(s.t, "victim") == 0 {
			e.Instances = append(e.Instances, i.ID)
		}
	}
	if len(e.Instances) == 0 {
		return
	}
	for _, id := range e.Instances {
		s.w.change(id, func(n *model.Node) { n.CATaintSince = s.w.now })
	}
	if accepted := s.command(e); !accepted && rapid.Bool().Draw(s.t, "rolled back") {
		for _, id := range e.Instances {
			s.w.change(id, func(n *model.Node) { n.CATaintSince = time.Time{} })
		}
	} else if accepted {
		for _, id := range e.Instances {
			if _, exists := s.w.nodes[id]; !exists {
				s.nodeless[id] = true
			}
		}
		again := s.g.Clone()
		if out, err := again.Step(e, s.w.now); err != nil || out.Commit != CommitNone || len(out.Notes) > 0 || dump(again) != dump(s.g) {
			s.t.Fatalf("deleting %v twice is not deleting once: %v, %+v", e.Instances, err, out)
		}
	}
}

// scaleDown: the plan lets go of everything and cluster-autoscaler obeys.
func (s *sim) scaleDown() {
	decision := rapid.SampledFrom([]model.Decision{model.DecisionPark, model.DecisionRelease}).Draw(s.t, "decision")
	var e Decide
	for _, id := range s.g.memberIDs() {
		e.Verdicts = append(e.Verdicts, model.Verdict{Instance: id, Decision: decision})
	}
	s.observe(e)
	s.deleteNodes()
}

func (s *sim) deleteNonsense() {
	ids := append(s.w.ids(), "i-unknown", "i-placeholder-g-act1-1", "")
	e := DeleteNodes{rapid.SliceOfN(rapid.SampledFrom(ids), 1, 4).Draw(s.t, "ids")}
	if slices.ContainsFunc(e.Instances, func(id model.InstanceID) bool { return s.w.instances[id].ID != "" }) {
		e.Instances = append(e.Instances, "i-unknown") // never accepted
	}
	s.command(e)
}

func (s *sim) deletePlaceholders() {
	if s.g.view == nil {
		return
	}
	var e DeleteNodes
	for _, i := range s.g.view.Instances {
		if i.Failure != nil {
			e.Instances = append(e.Instances, i.ID)
		}
	}
	if len(e.Instances) > 0 {
		s.command(e)
	}
}

func (s *sim) decrease() {
	before := s.g.record.Target
	delta := rapid.IntRange(-4, 1).Draw(s.t, "delta")
	unborn, _ := s.g.Unborn()
	if s.command(DecreaseTargetSize{delta}) && before-s.g.record.Target > unborn {
		s.t.Fatalf("decrease by %d took %d of %d unborn", delta, before-s.g.record.Target, unborn)
	}
}

// check is what holds at any moment.
func (s *sim) check() {
	r := s.g.record
	if r.Target < 0 || r.Hidden < 0 {
		s.t.Fatalf("target %d, hidden %d", r.Target, r.Hidden)
	}
	if most := s.maxEver + s.foreign + s.lost + s.cancelled; r.Target+r.Hidden > most {
		s.t.Fatalf("target %d + hidden %d exceed %d", r.Target, r.Hidden, most)
	}
	if most := s.ordered + s.foreign + s.lost*(1+s.restarts); s.w.launched > most {
		s.t.Fatalf("%d instances were launched, ordered or excused are only %d", s.w.launched, most)
	}
	revealed, hidden := 0, 0
	for id, m := range s.g.members {
		switch {
		case s.g.leaving(id):
		case m.hidden:
			hidden++
		default:
			revealed++
		}
	}
	if s.g.synced && (revealed > r.Target || hidden > r.Hidden) {
		s.t.Fatalf("%d revealed and %d hidden instances for target %d, hidden %d", revealed, hidden, r.Target, r.Hidden)
	}
	for id := range s.g.tombstones {
		if i, exists := s.w.instances[id]; exists && i.State != model.InstanceTerminating {
			s.t.Fatalf("%s counts as gone and is %s", id, i.State)
		}
	}
	if v := s.g.view; v != nil {
		for i := 1; i < len(v.Instances); i++ {
			if v.Instances[i-1].ID >= v.Instances[i].ID {
				s.t.Fatalf("the view lists %s before %s", v.Instances[i-1].ID, v.Instances[i].ID)
			}
		}
	}
}

// converge ends all faults, lets everything run its course and checks where it
// ends.
func (s *sim) converge() {
	s.w.capacity = endless
	for range 100 {
		s.boot()
		clear(s.w.jobs)
		clear(s.w.sessions)
		s.w.now = s.w.now.Add(10 * time.Second)
		s.quick()
		s.refresh()
		s.ready()
		s.check()
	}
	r := s.g.Record()
	fail := func(format string, args ...any) {
		s.t.Fatalf(format+"\n%s\nworld: %+v", append(args, dump(s.g), *s.w)...)
	}
	if s.w.desired != r.Target+r.Hidden || s.w.active() != s.w.desired {
		fail("the cloud has %d of %d, promised are %d + %d", s.w.active(), s.w.desired, r.Target, r.Hidden)
	}
	if r.Hidden != 0 || s.g.view.Target != r.Target {
		fail("%d nodes are still hidden, the view says %d", r.Hidden, s.g.view.Target)
	}
	if r.Target < s.g.spec.Min {
		fail("target %d is below the minimum %d", r.Target, s.g.spec.Min)
	}
	for id, intent := range r.Intents {
		if intent.Desired != model.DesiredParked || s.w.instances[id].State != model.InstanceStopped {
			fail("%s is %q and still %+v", id, s.w.instances[id].State, intent)
		}
	}
	for id := range r.Intents {
		if s.w.spoiled[id] && !s.nodeless[id] && !s.meddled[id] {
			fail("%s is parked, and its cache is lost", id)
		}
	}
	for id, pods := range s.w.engines {
		if slices.ContainsFunc(pods, func(p model.Pod) bool { return p.EngineState.Guarded }) {
			fail("an engine pod of %s still has our finalizer: %+v", id, pods)
		}
	}
	if len(r.Intents) > s.g.settings.MaxParked {
		fail("%d are parked", len(r.Intents))
	}
	listed := 0
	for _, id := range s.w.ids() {
		if s.g.members[id] == nil {
			fail("nobody accounts for %s", id)
		}
		if active(s.w.instances[id].State) {
			listed++
			if !s.g.view.Owns(id) {
				fail("%s is not listed", id)
			}
		}
	}
	if len(s.g.view.Instances) != listed {
		fail("the view lists %d", len(s.g.view.Instances))
	}
	for id, n := range s.w.nodes {
		switch {
		case !active(s.w.instances[id].State):
			// One that no life has known as its own is left to the cloud: a
			// Node's label proves nothing.
			if _, dead := s.g.tombstones[id]; dead || s.g.known[id] || s.g.members[id] != nil {
				fail("the Node of %s is left over", id)
			}
		case n.Draining || !n.CATaintSince.IsZero():
			fail("the Node of %s is still tainted: %+v", id, n)
		}
	}
}
