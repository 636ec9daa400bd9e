package controller

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// parking is a group whose idle nodes are parked.
func parking(annotations ...string) []model.NodeGroup {
	return []model.NodeGroup{group(runners, append([]string{"max-idle", "1m", "park", "stop"}, annotations...)...)}
}

// withEngines has an engine run on every node.
func withEngines(l *lab) *engineDaemons {
	l.cluster.daemons = &engineDaemons{stops: 2 * time.Second}
	return l.cluster.daemons
}

// warmNode brings up one node that has run a job of the key.
func (l *lab) warmNode(key model.CacheKey) model.Node {
	l.t.Helper()
	l.start()
	node := l.fleet(1)[0]
	l.within(10*time.Second, "an engine", func() bool { return len(l.cluster.enginesOn(node.Name)) == 1 })
	l.cluster.job(key, 20*time.Second, node.Name)
	l.within(2*time.Minute, "the end of the job", func() bool { return l.cluster.jobs(node.Name) == 0 && len(l.unprotected()) > 0 })
	return node
}

// drain has the node removed once the plan lets it go.
func (l *lab) drain(n model.Node) {
	l.t.Helper()
	l.released(5*time.Minute, n.Name)
	l.must(l.remove(runners, n))
}

// phase waits until the RunnerNode says so.
func (l *lab) phase(id model.InstanceID, want model.Phase) model.NodeRecord {
	l.t.Helper()
	l.within(2*time.Minute, "phase "+string(want), func() bool { return l.store.nodeRecords()[id].Phase == want })
	return l.store.nodeRecords()[id]
}

func (l *lab) warmFor(id model.InstanceID, key model.CacheKey) bool {
	return slices.ContainsFunc(l.store.nodeRecords()[id].Warmth, func(w model.KeyWarmth) bool { return w.Key == key })
}

func TestEngineEndsBeforeItsMachine(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		l.drain(node)
		l.within(10*time.Second, "the engine to be told", func() bool {
			return l.store.record(runners).Intents[node.ID].Stage == nodegroups.StageEngine && l.cluster.guarded() == 1
		})
		if m := l.cloud.machines(runners)[node.ID]; m.State != model.InstanceRunning {
			t.Errorf("the machine is %s while its engine ends", m.State)
		}
		l.phase(node.ID, model.PhaseParked)
		if i := l.store.record(runners).Intents[node.ID]; i.Exit != nodegroups.ExitClean || i.Engine == "" {
			t.Errorf("recorded is %+v", i)
		}
		want := []string{"taint", "stop-engine", "delete"}
		for i, h := range l.cluster.happened() {
			if op, _, _ := strings.Cut(h, " "); i >= len(want) || op != want[i] {
				t.Errorf("step %d was %q, want %v", i, h, want)
			}
		}
		if killed := l.cluster.killed(); len(killed) > 0 || l.cluster.guarded() > 0 {
			t.Errorf("killed were %v, %d are guarded", killed, l.cluster.guarded())
		}
		l.restart()
		l.settle()
		if !l.warmFor(node.ID, "repo") {
			t.Error("the parked node is not warm any more")
		}
	})
}

func TestEngineThatDoesNotEndCleanlyIsNotParked(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*engineDaemons)
		reason string
		says   string
		exit   nodegroups.Exit
		atMost time.Duration
	}{
		{"killed", func(d *engineDaemons) { d.exit = 137 }, "unclean-stop", "terminationGracePeriodSeconds", "137", time.Minute},
		{"silent", func(d *engineDaemons) { d.silent = true }, "unclean-stop", "without an exit code", nodegroups.ExitVanished, time.Minute},
		{"stuck", func(d *engineDaemons) { d.stuck, d.grace = true, time.Minute }, "unclean-stop", "in time", nodegroups.ExitTimeout, 3 * time.Minute},
		{"tolerant", func(d *engineDaemons) { d.tolerant = true }, "engine-tolerates-taint", "by key", nodegroups.ExitClean, time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			experiment(t, parking(), func(t *testing.T, l *lab) {
				tt.change(withEngines(l))
				node := l.warmNode("repo")
				l.drain(node)
				l.within(tt.atMost, "an exit", func() bool { return l.store.record(runners).Intents[node.ID].Exit == tt.exit })
				l.within(time.Minute, "a RunnerNode that says why", func() bool {
					r := l.store.nodeRecords()[node.ID]
					return r.Phase == model.PhaseTerminating && r.Decision == model.DecisionRelease && strings.Contains(r.Reason, tt.reason)
				})
				l.within(time.Minute, "the end of the machine", func() bool { return len(l.cloud.machines(runners)) == 0 })
				if lives := l.cloud.lives[node.ID]; strings.Contains(lives, "stopped") {
					t.Errorf("the machine's life: %s", lives)
				}
				if got := l.metric(l.metrics.ScaleEvents.WithLabelValues(string(runners), "terminate", tt.reason)); got != 1 {
					t.Errorf("%s was counted %v times", tt.reason, got)
				}
				if len(l.events.with(string(node.Name), "Warning", tt.reason, tt.says)) == 0 {
					t.Errorf("nobody was told; said was %q", l.events.said)
				}
				l.within(time.Minute, "no finalizer", func() bool { return l.cluster.guarded() == 0 })
			})
		})
	}
}

// An engine whose sessions stay keeps its node; so do samples that are older
// than the last runner pod.
func TestSessionsKeepTheNode(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		sample := func(a model.Activity) {
			pod := l.cluster.enginesOn(node.Name)[0]
			l.world.EngineSampled(model.EngineUse{Node: node.Name, Pod: pod.Namespace + "/" + pod.Name, At: time.Now(), Activity: a, Clients: 1})
			l.settle()
		}
		l.released(5*time.Minute, node.Name)
		sample(model.ActivityBusy)
		l.wantKind(l.remove(runners, node), nodegroups.KindVetoed)
		sample(model.ActivityIdle)
		l.released(5*time.Minute, node.Name)
		l.must(l.remove(runners, node))
		l.always(20*time.Second, "no new sample, no stop", func() bool { return l.cluster.guarded() == 0 })
		sample(model.ActivityIdle)
		l.within(5*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
		l.phase(node.ID, model.PhaseParked)
	})
}

// A cache that is lost makes its node cold, at once and for the next lives too;
// jobs that ran before do not bring the warmth back.
func TestLostCacheIsCold(t *testing.T) {
	experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
		withEngines(l)
		l.start()
		node := l.fleet(1)[0]
		l.settle()
		uid := l.cluster.job("repo", 20*time.Second, node.Name)
		l.cluster.keep(uid)
		lost := func(what string, cause func()) {
			t.Helper()
			l.cluster.keep(l.cluster.job("repo", 20*time.Second, node.Name))
			l.within(7*time.Minute, "warmth", func() bool { return l.warmFor(node.ID, "repo") })
			cause()
			l.within(10*time.Second, "cold after "+what, func() bool { return !l.warmFor(node.ID, "repo") })
			l.restart()
			l.always(6*time.Minute, "cold after a restart, "+what, func() bool { return !l.warmFor(node.ID, "repo") })
			if len(l.events.with(string(node.Name), "Warning CacheLost")) == 0 {
				t.Errorf("%s: nobody was told", what)
			}
			if c := l.store.nodeRecords()[node.ID].Conditions; len(c) != 1 || c[0].Type != "CacheLost" {
				t.Errorf("%s: the RunnerNode's conditions are %+v", what, c)
			}
		}
		lost("a crash", func() {
			l.cluster.editEngines(node.Name, func(e *model.EngineState) { e.Restarts, e.LastExit = e.Restarts+1, 1 })
		})
		lost("an end nobody saw", func() {
			l.cluster.state.Lock()
			defer l.cluster.state.Unlock()
			for _, e := range l.cluster.engines {
				l.cluster.dropEngine(e)
			}
		})
		lost("a wipe", func() {
			l.world.EngineSampled(model.EngineUse{Node: node.Name, Pod: "dagger/e", At: time.Now(), CacheBytes: 1, Wiped: true})
		})
	})
}

// An engine that ends cleanly and is replaced, as by an update of its
// DaemonSet, has lost nothing.
func TestReplacedEngineKeepsItsCache(t *testing.T) {
	experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
		withEngines(l)
		l.start()
		node := l.fleet(1)[0]
		l.settle()
		l.cluster.job("repo", 20*time.Second, node.Name)
		l.within(7*time.Minute, "warmth", func() bool { return l.warmFor(node.ID, "repo") })
		before := l.cluster.enginesOn(node.Name)
		l.cluster.editEngines(node.Name, func(e *model.EngineState) { e.Deleting = true })
		l.within(20*time.Second, "another engine", func() bool {
			now := l.cluster.enginesOn(node.Name)
			return len(now) == 1 && now[0].UID != before[0].UID
		})
		l.always(6*time.Minute, "warm", func() bool { return l.warmFor(node.ID, "repo") })
	})
}

// After a resume the engine has to show that it found its cache.
func TestCacheIsVerifiedAfterAResume(t *testing.T) {
	const left = 8 << 30
	for _, tt := range []struct {
		name  string
		found int64
		warm  bool
	}{{"all of it", left, true}, {"most of it", left*2/3 + 1, true}, {"little of it", left / 3, false}, {"not measured", 0, true}} {
		t.Run(tt.name, func(t *testing.T) {
			experiment(t, parking(), func(t *testing.T, l *lab) {
				withEngines(l)
				node := l.warmNode("repo")
				sample := func(bytes int64) {
					pod := l.cluster.enginesOn(node.Name)[0]
					l.world.EngineSampled(model.EngineUse{
						Node: node.Name, Pod: pod.Namespace + "/" + pod.Name, At: time.Now(), Activity: model.ActivityIdle, CacheBytes: bytes, Clients: 0,
					})
					l.settle()
				}
				sample(left)
				l.drain(node)
				l.settle()
				sample(left)
				if got := l.metric(l.metrics.EngineCacheBytes.WithLabelValues(string(runners))); got != left {
					t.Errorf("the group's caches are %g bytes", got)
				}
				if r := l.phase(node.ID, model.PhaseParked); r.CacheBytes != left || r.Node != "" {
					t.Errorf("the parked RunnerNode is %+v", r)
				}
				l.restart()
				l.refresh()
				l.must(l.increase(runners, 1))
				l.within(time.Minute, "the node again", func() bool {
					return len(l.ready()) == 1 && len(l.cluster.enginesOn(l.ready()[0].Name)) == 1
				})
				l.phase(node.ID, model.PhaseReady)
				unverified := func() bool {
					c := l.store.nodeRecords()[node.ID].Conditions
					return len(c) == 1 && c[0].Type == "CacheVerified" && !c[0].True
				}
				l.within(10*time.Second, "not verified", unverified)
				sample(tt.found)
				if got := unverified(); got != (tt.found == 0) {
					t.Errorf("after the sample, still unverified: %t", got)
				}
				if tt.warm {
					l.always(time.Minute, "warm", func() bool { return l.warmFor(node.ID, "repo") })
				} else {
					l.within(10*time.Second, "cold", func() bool { return !l.warmFor(node.ID, "repo") })
				}
			})
		})
	}
}

// A RunnerNode that somebody deleted is made anew from what the cloud has; what
// it alone knew is not known any more.
func TestLostRunnerNodeIsRebuilt(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		l.drain(node)
		l.phase(node.ID, model.PhaseParked)
		l.restart(func() { l.store.edit(func(s *fakeStore) { delete(s.nodes, node.ID) }) })
		if r := l.phase(node.ID, model.PhaseParked); len(r.Warmth) > 0 || r.Desired != model.DesiredParked || r.Group != runners {
			t.Errorf("rebuilt as %+v", r)
		}
	})
}

// An engine's pod is let go of by whoever leads next, if its node went while
// nobody looked, and by a group that is declared no more.
func TestOrphansAreLetGo(t *testing.T) {
	for _, gone := range []bool{true, false} {
		experiment(t, parking(), func(t *testing.T, l *lab) {
			d := withEngines(l)
			d.stuck = true
			node := l.warmNode("repo")
			l.drain(node)
			l.within(10*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
			if gone {
				l.restart(func() {
					l.cluster.removeNode(node.Name)
					l.store.edit(func(s *fakeStore) { clear(s.records); clear(s.nodes) })
					l.cloud.edit(runners, func(g *fakeGroup) { clear(g.machines); g.desired = 0 })
				})
			} else {
				l.ctl.SetGroups(nil)
			}
			l.within(10*time.Second, "no finalizer", func() bool { return l.cluster.guarded() == 0 })
		})
	}
}

// A parked node that does not come back is replaced within the same scale-up:
// cluster-autoscaler is told the same size all the time.
func TestResumeThatFailsIsReplaced(t *testing.T) {
	for name, fail := range map[string]func(l *lab, id model.InstanceID){
		"never registers": func(l *lab, id model.InstanceID) {
			l.cloud.edit(runners, func(g *fakeGroup) { g.machines[id].deadBoot = true })
		},
		"cannot be started": func(l *lab, _ model.InstanceID) { l.cloud.only(failBefore, "start") },
	} {
		t.Run(name, func(t *testing.T) {
			experiment(t, parking(), func(t *testing.T, l *lab) {
				withEngines(l)
				node := l.warmNode("repo")
				l.drain(node)
				l.phase(node.ID, model.PhaseParked)
				fail(l, node.ID)
				l.refresh()
				l.must(l.increase(runners, 1))
				for end := time.Now().Add(8 * time.Minute); time.Now().Before(end); time.Sleep(10 * time.Second) {
					l.refresh()
					if v := l.view(runners); v.Target != 1 {
						t.Fatalf("the target size became %d\n%s", v.Target, l.state())
					}
				}
				ready := l.ready()
				if len(ready) != 1 || ready[0].ID == node.ID || l.cloud.launches() != 2 {
					t.Errorf("ready are %v after %d launches, want the second machine", ready, l.cloud.launches())
				}
				l.within(time.Minute, "the end of the first machine", func() bool { return len(l.cloud.machines(runners)) == 1 })
			})
		})
	}
}

// A cloud that does not stop an instance is told to terminate it in the end.
func TestStopThatFailsEndsInTermination(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		l.cloud.only(failBefore, "stop")
		l.drain(node)
		l.within(12*time.Minute, "the end of the machine", func() bool { return len(l.cloud.machines(runners)) == 0 })
		if got := l.metric(l.metrics.ScaleEvents.WithLabelValues(string(runners), "terminate", "stop-failed")); got != 1 {
			t.Errorf("stop-failed was counted %v times", got)
		}
	})
}
