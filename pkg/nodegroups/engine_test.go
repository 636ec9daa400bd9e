package nodegroups

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// stopping is a group of one Ready node with one engine, and a clock.
type stopping struct {
	t     *testing.T
	g     *Group
	now   time.Time
	notes []string
	// refuse and lose have StopEngine fail: the API server refuses, or does not
	// answer. held effects are not carried out.
	refuse, lose bool
	deleted      map[string]bool // UIDs whose StopEngine was answered
	live         []model.Pod     // what a live read finds
}

func newStopping(t *testing.T, annotations ...string) *stopping {
	t.Helper()
	notes := map[string]string{model.Prefix + "/role": "runner", model.Prefix + "/park": "stop"}
	spec := model.NodeGroup{ID: "g", Max: 5, Annotations: notes}
	for i := 0; i < len(annotations); i += 2 {
		notes[model.Prefix+"/"+annotations[i]] = annotations[i+1]
	}
	settings, problems := Interpret(spec, nil)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	s := &stopping{t: t, g: NewGroup(spec, settings, Record{}), now: time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC), deleted: map[string]bool{}}
	s.cloud(model.InstanceRunning)
	s.node(false)
	s.step(Refresh{})
	return s
}

func (s *stopping) step(e Event) {
	s.t.Helper()
	out, err := s.g.Step(e, s.now)
	if err != nil {
		s.t.Fatalf("%T: %v", e, err)
	}
	s.say(out)
}

func (s *stopping) say(out Outcome) {
	for _, n := range out.Notes {
		s.notes = append(s.notes, n.Action+" "+n.Reason)
	}
}

func (s *stopping) said(note string) bool { return slices.Contains(s.notes, note) }

func (s *stopping) cloud(state model.InstanceState) {
	s.t.Helper()
	s.step(ObserveCloud{Snapshot: model.GroupSnapshot{TakenAt: s.now, Desired: 1, Instances: []model.Instance{{ID: "i", State: state, LaunchedAt: s.now}}}})
}

func (s *stopping) node(draining bool) {
	s.t.Helper()
	born := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	s.step(ObserveNode{Node: model.Node{ID: "i", Name: "n", UID: "u", Ready: true, Draining: draining, Created: born, ReadyChanged: born}})
}

// engine is an engine pod; told says since when it is to stop, zero for not.
func engine(uid string, told time.Time) model.Pod {
	p := model.Pod{UID: uid, Kind: model.PodEngine, Node: "n", Engine: &model.EngineContainer{Grace: 5 * time.Minute}}
	if !told.IsZero() {
		p.EngineState = model.EngineState{Deleting: true, Guarded: true, Deadline: told.Add(5 * time.Minute)}
	}
	return p
}

func exited(p model.Pod, code int32, at time.Time) model.Pod {
	p.Engine = &model.EngineContainer{Grace: p.Engine.Grace, Exit: &model.ContainerExit{Code: code, At: at}}
	return p
}

// watch has the watch show these engines; a live read finds them too.
func (s *stopping) watch(pods ...model.Pod) {
	s.t.Helper()
	s.live = pods
	s.step(ObserveEngine{Instance: "i", Pods: pods})
}

// run lets time pass in steps of a second; effects succeed at once, but what a
// watch would show of them is the test's to say. It returns what was done.
func (s *stopping) run(d time.Duration) (done []string) {
	s.t.Helper()
	for end := s.now.Add(d); ; s.now = s.now.Add(time.Second) {
		out, effects := s.g.Ready(s.now)
		s.say(out)
		for _, e := range effects {
			var err error
			switch {
			case e.Verb == StopEngine && s.refuse:
				err = fmt.Errorf("forbidden: %w", model.ErrRefused)
			case e.Verb == StopEngine && s.lose:
				err = fmt.Errorf("connection refused")
			}
			text := string(e.Verb)
			if e.Engine.UID != "" {
				text += " " + e.Engine.UID
			}
			if err == nil {
				done = append(done, text)
			}
			s.step(Done{Effect: e, Err: err, At: s.now})
			if e.Verb == Confirm && err == nil {
				s.step(Confirmed{Instance: "i", Idle: true, Engines: s.live})
			}
			if e.Verb == Look && err == nil {
				s.step(Looked{Instance: "i"})
			}
			if e.Verb == Taint {
				s.node(true)
			}
		}
		if !s.now.Before(end) {
			return done
		}
	}
}

func (s *stopping) intent() Intent { return s.g.Record().Intents["i"] }

func (s *stopping) remove(d model.Decision) {
	s.t.Helper()
	s.step(Decide{Verdicts: []model.Verdict{{Instance: "i", Decision: d}}})
	s.step(DeleteNodes{Instances: []model.InstanceID{"i"}})
}

// told drains the node until its engine is being told to stop.
func (s *stopping) told() {
	s.t.Helper()
	s.remove(model.DecisionPark)
	s.run(taintSettle + time.Second)
	if s.intent().Stage != StageEngine {
		s.t.Fatalf("the intent is %+v", s.intent())
	}
}

// An engine that could not be told to stop is not given up, however long the API
// server or the leader were away.
func TestEngineIsToldHoweverLate(t *testing.T) {
	s := newStopping(t)
	s.watch(engine("e", time.Time{}))
	s.lose = true
	s.told()
	if done := s.run(5 * time.Hour); slices.Contains(done, "stop") || slices.Contains(done, "terminate") || s.intent().Stage != StageEngine {
		t.Fatalf("in an outage: %v, intent %+v", done, s.intent())
	}
	s.lose = false
	if done := s.run(retryMost); !slices.Contains(done, "stop-engine e") {
		t.Fatalf("after the outage: %v", done)
	}
	s.watch(engine("e", s.now))
	if done := s.run(5 * time.Minute); len(done) > 0 {
		t.Errorf("within its grace: %v", done)
	}
	s.watch(exited(engine("e", s.now), 0, s.now))
	s.watch()
	if done := s.run(0); !slices.Contains(done, "stop") || s.intent().Exit != ExitClean || s.intent().Desired != model.DesiredParked {
		t.Errorf("after it has ended: %v, intent %+v", done, s.intent())
	}
}

// A watch that is behind does not conclude; a live read does.
func TestLateEngineIsLookedAt(t *testing.T) {
	for _, tt := range []struct {
		name string
		live func(s *stopping) []model.Pod
		exit Exit
	}{
		{"it has ended by itself", func(s *stopping) []model.Pod {
			return []model.Pod{exited(engine("e", s.now.Add(-6*time.Minute)), 0, s.now.Add(-5*time.Minute))}
		}, ExitClean},
		{"it was killed", func(s *stopping) []model.Pod {
			return []model.Pod{exited(engine("e", s.now.Add(-6*time.Minute)), 137, s.now.Add(-time.Minute))}
		}, "137"},
		{"it hangs", func(s *stopping) []model.Pod { return []model.Pod{engine("e", s.now.Add(-6*time.Minute))} }, ExitTimeout},
		{"it is gone", func(*stopping) []model.Pod { return nil }, ExitVanished},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStopping(t)
			s.watch(engine("e", time.Time{}))
			s.told()
			s.watch(engine("e", s.now))
			s.run(5*time.Minute + graceSlack - time.Second)
			if s.intent().Exit != "" {
				t.Fatalf("concluded early: %+v", s.intent())
			}
			s.now = s.now.Add(time.Second)
			s.live = tt.live(s)
			done := s.run(2 * graceSlack)
			if done[0] != "confirm e" || s.intent().Exit != tt.exit {
				t.Errorf("done %v, exit %q, want a look and %q", done, s.intent().Exit, tt.exit)
			}
		})
	}
}

// An API server that answers and refuses is believed in the end.
func TestRefusedStop(t *testing.T) {
	s := newStopping(t)
	s.watch(engine("e", time.Time{}))
	s.told()
	s.refuse = true
	if s.run(refusedTimeout); s.intent().Stage != StageEngine {
		t.Fatalf("%+v", s.intent())
	}
	if done := s.run(time.Minute); s.intent().Exit != ExitRefused || !slices.Contains(done, "terminate") || !s.said("terminate unclean-stop") {
		t.Errorf("done %v, intent %+v", done, s.intent())
	}
}

// What a 404 says is settled by the watch, which may still bring the exit code.
func TestGoneEngineMayHaveEndedCleanly(t *testing.T) {
	s := newStopping(t)
	s.watch(engine("e", time.Time{}))
	s.told()
	s.step(EngineGone{Instance: "i", UID: "e"})
	s.run(10 * time.Second)
	s.watch(exited(engine("e", s.now.Add(-time.Minute)), 0, s.now.Add(-30*time.Second)))
	if s.run(0); s.intent().Exit != ExitClean {
		t.Errorf("exit %q", s.intent().Exit)
	}
}

// An engine that has metrics and does not answer is not quiet; one without is.
func TestSilentEngineIsNotQuiet(t *testing.T) {
	for _, tt := range []struct {
		name    string
		declare bool
		use     ObserveUse
		after   time.Duration
	}{
		{"without metrics", false, ObserveUse{Instance: "i"}, 0},
		{"its pod says that it has them", true, ObserveUse{Instance: "i"}, quietTimeout},
		{"it has answered before", false, ObserveUse{Instance: "i", Metrics: true}, quietTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStopping(t)
			e := engine("e", time.Time{})
			e.Engine.Metrics = tt.declare
			s.watch(e)
			s.step(tt.use)
			s.remove(model.DecisionPark)
			begun := s.now
			for s.intent().Stage == StageDraining {
				s.run(time.Second)
			}
			if took := s.now.Sub(begun) - taintSettle; took < tt.after || took > tt.after+5*time.Second {
				t.Errorf("told to stop %s after the look, want %s", took, tt.after)
			}
		})
	}
}

// Every engine that runs on a node that goes is stopped before the instance.
func TestAllEnginesAreStopped(t *testing.T) {
	s := newStopping(t)
	tolerant := engine("x", time.Time{})
	tolerant.EngineState.ToleratesDrain = true
	a, b := engine("a", time.Time{}), engine("b", time.Time{})
	b.Created = s.now // the newest
	s.watch(a, b, tolerant)
	s.told()
	a = engine("a", s.now)
	s.watch(a, b, tolerant)
	if done := s.run(time.Minute); len(done) > 0 {
		t.Errorf("while the first stops: %v", done)
	}
	s.watch(exited(a, 0, s.now), b, tolerant)
	if done := s.run(0); !slices.Contains(done, "stop-engine b") || slices.Contains(done, "terminate") {
		t.Fatalf("after the first has ended: %v", done)
	}
	b = engine("b", s.now)
	s.watch(b, tolerant)
	s.run(time.Minute)
	s.watch(exited(b, 0, s.now), tolerant)
	done := s.run(0)
	s.watch(tolerant)
	if done = append(done, s.run(0)...); !slices.Contains(done, "terminate") || slices.Contains(done, "stop-engine x") {
		t.Errorf("after both have ended: %v", done)
	}
}

// A drain that does not end is told of, and is ended.
func TestDrainIsBounded(t *testing.T) {
	s := newStopping(t)
	s.watch(engine("e", time.Time{}))
	s.remove(model.DecisionPark)
	s.run(time.Second)
	s.step(ObserveBusy{Instance: "i", Busy: true}) // it tolerates everything
	s.run(drainWarning - 2*time.Second)
	if s.said("drain waits") {
		t.Error("told too early")
	}
	s.run(2 * time.Second)
	if !s.said("drain waits") {
		t.Error("nobody was told")
	}
	s.now = s.now.Add(drainTimeout - time.Hour)
	if s.run(time.Second); s.intent().Stage != StageDraining {
		t.Fatalf("%+v", s.intent())
	}
	s.now = s.now.Add(time.Hour)
	if done := s.run(time.Minute); !slices.Contains(done, "stop-engine e") {
		t.Errorf("after a day: %v", done)
	}
}

// New pods have been kept away for a while before a look counts; time under
// cluster-autoscaler's own taint counts too.
func TestLookWaitsForTheTaint(t *testing.T) {
	for _, before := range []time.Duration{0, 4 * time.Second, time.Minute} {
		s := newStopping(t)
		s.remove(model.DecisionPark)
		begun := s.now
		var done []string
		for !slices.Contains(done, "confirm") {
			out, effects := s.g.Ready(s.now)
			s.say(out)
			for _, e := range effects {
				done = append(done, string(e.Verb))
				s.step(Done{Effect: e, At: s.now})
				n := e.Node
				if n.Draining = true; before > 0 {
					n.CATaintSince = begun.Add(-before)
				}
				s.step(ObserveNode{Node: n})
			}
			s.now = s.now.Add(time.Second)
		}
		if took, want := s.now.Sub(begun)-time.Second, max(taintSettle-before, 0); took < want || took > want+time.Second {
			t.Errorf("a look %s after our taint, the autoscaler's %s before; want %s", took, before, want)
		}
	}
}

// A runner pod that was bound after the look keeps the instance for a while.
func TestLateJobIsNotKilledAtOnce(t *testing.T) {
	s := newStopping(t)
	s.watch(engine("e", time.Time{}))
	s.told()
	s.step(ObserveBusy{Instance: "i", Busy: true})
	s.watch(exited(engine("e", s.now), 0, s.now))
	s.watch()
	if done := s.run(lateTimeout - time.Second); slices.Contains(done, "stop") || !s.said("drain job-came-late") {
		t.Errorf("with a job on it: %v, said %v", done, s.notes)
	}
	s.step(ObserveBusy{Instance: "i"})
	if done := s.run(0); !slices.Contains(done, "stop") {
		t.Errorf("after the job: %v", done)
	}
}

// An instance whose Node is missing for a moment may run an engine: it is not
// parked as if it had been stopped.
func TestUnregisteredNodeIsNotParked(t *testing.T) {
	for _, seen := range []bool{true, false} {
		s := newStopping(t)
		if seen {
			s.watch(engine("e", time.Time{}))
		}
		s.step(ObserveNodeGone{Instance: "i"})
		s.remove(model.DecisionPark)
		s.run(time.Minute)
		if i := s.intent(); i.Desired != model.DesiredGone || i.Exit != ExitLost {
			t.Errorf("engine seen %v: %+v", seen, i)
		}
	}
}

// Every pod that our finalizer keeps is let go of, whatever others do.
func TestEachGuardedPodIsReleased(t *testing.T) {
	s := newStopping(t)
	spoof, genuine := engine("a-spoof", time.Time{}), engine("z-real", time.Time{})
	spoof.EngineState.Guarded, genuine.EngineState.Guarded = true, true
	s.watch(spoof, genuine)
	if done := s.run(0); !slices.Contains(done, "release-engine a-spoof") || !slices.Contains(done, "release-engine z-real") {
		t.Errorf("done %v", done)
	}
	s.watch()
	if len(s.g.retryAt)+len(s.g.attempts) > 0 {
		t.Errorf("of pods that are gone it remembers %v, %v", s.g.retryAt, s.g.attempts)
	}
}

// An instance that somebody else has stopped was not seen to end cleanly.
func TestStoppedElsewhere(t *testing.T) {
	s := newStopping(t)
	s.now = s.now.Add(time.Minute)
	s.cloud(model.InstanceStopping)
	s.cloud(model.InstanceStopped)
	if n := len(slices.DeleteFunc(slices.Clone(s.notes), func(n string) bool { return n != "lost stopped-elsewhere" })); n != 1 {
		t.Errorf("told %d times: %v", n, s.notes)
	}
	g := NewGroup(s.g.Spec(), s.g.Settings(), Record{})
	if _, err := g.Step(ObserveCloud{Snapshot: s.g.snapshot}, s.now); err != nil {
		t.Fatal(err)
	}
	if i := g.Record().Intents["i"]; i.Desired != model.DesiredParked || i.Exit != ExitLost {
		t.Errorf("the next life takes it for %+v", i)
	}
}

func TestEngineExit(t *testing.T) {
	now := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	over := func(p model.Pod) model.Pod { p.Finished = now; return p }
	for _, tt := range []struct {
		name  string
		pod   model.Pod
		exit  Exit
		ended bool
	}{
		{"runs", engine("e", time.Time{}), "", false},
		{"told to stop", engine("e", now), "", false},
		{"no engine", model.Pod{Finished: now}, "", false},
		{"crashed, and is started again", exited(engine("e", time.Time{}), 1, now), "", false},
		{"ended after it was told to", exited(engine("e", now), 0, now.Add(time.Second)), "0", true},
		{"killed", exited(engine("e", now), 137, now.Add(5*time.Minute)), "137", true},
		{"ended just before, by another clock", exited(engine("e", now), 0, now.Add(-30*time.Second)), "0", true},
		{"ended long before it was told to", exited(engine("e", now), 0, now.Add(-time.Hour)), "", false},
		{"ended long before, and the pod is over", over(exited(engine("e", now), 0, now.Add(-time.Hour))), "0", true},
		{"evicted without a word", over(engine("e", time.Time{})), ExitVanished, true},
		{"over", over(exited(engine("e", time.Time{}), 2, now)), "2", true},
	} {
		if exit, ended := EngineExit(tt.pod); exit != tt.exit || ended != tt.ended {
			t.Errorf("%s: %q, %v; want %q, %v", tt.name, exit, ended, tt.exit, tt.ended)
		}
	}
}
