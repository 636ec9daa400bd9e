package controller

import (
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// parkedCleanly waits until an instance is parked with nothing killed.
func (l *lab) parkedCleanly(id model.InstanceID) {
	l.t.Helper()
	l.phase(id, model.PhaseParked)
	if k := l.cluster.killed(); len(k) > 0 {
		l.t.Errorf("killed before they had ended: %v", k)
	}
	if i := l.store.record(runners).Intents[id]; i.Exit != nodegroups.ExitClean {
		l.t.Errorf("recorded is %+v", i)
	}
}

// Nothing that is away for longer than an engine's grace, be it the API server
// or the leader, has the engine killed.
func TestOutagesKillNoEngine(t *testing.T) {
	const long = 40 * time.Minute
	stage := func(l *lab, node model.Node) {
		l.within(25*time.Second, "the stage", func() bool {
			return l.store.record(runners).Intents[node.ID].Stage == nodegroups.StageEngine
		})
	}
	for _, tt := range []struct {
		name   string
		outage func(l *lab, node model.Node)
	}{
		{"the API server, before the engine is told", func(l *lab, node model.Node) {
			l.cluster.only(failBefore, "stop-engine")
			l.drain(node)
			stage(l, node)
			time.Sleep(long)
			l.cluster.heal()
		}},
		{"the leader, before the engine is told", func(l *lab, node model.Node) {
			l.cluster.only(failBefore, "stop-engine")
			l.drain(node)
			stage(l, node)
			l.restart(func() { l.cluster.heal(); time.Sleep(long) })
		}},
		{"the watch and the API server, after the engine was told", func(l *lab, node model.Node) {
			l.drain(node)
			l.within(25*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
			l.cluster.setCut(true)
			l.cluster.always(failBefore)
			l.store.always(failBefore)
			time.Sleep(long)
			l.store.heal()
			l.cluster.heal()
			time.Sleep(5 * time.Second)
			l.cluster.setCut(false)
		}},
		{"the watch alone, after the engine was told", func(l *lab, node model.Node) {
			l.drain(node)
			l.within(25*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
			l.cluster.setCut(true)
			time.Sleep(long)
			l.cluster.setCut(false)
		}},
		{"the leader, after the engine was told", func(l *lab, node model.Node) {
			l.drain(node)
			l.within(25*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
			l.restart(func() { time.Sleep(long) })
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			experiment(t, parking(), func(t *testing.T, l *lab) {
				withEngines(l)
				node := l.warmNode("repo")
				tt.outage(l, node)
				l.parkedCleanly(node.ID)
			})
		})
	}
}

// A new leader does not take an engine of which it knows nothing yet for one
// without sessions.
func TestNewLeaderWaitsForASample(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		sample := func(a model.Activity) {
			pod := l.cluster.enginesOn(node.Name)[0]
			l.world.EngineSampled(model.EngineUse{Node: node.Name, Pod: pod.Namespace + "/" + pod.Name, At: time.Now(), Activity: a, Clients: 1, CacheBytes: 1 << 30})
			l.settle()
		}
		sample(model.ActivityIdle)
		l.drain(node)
		sample(model.ActivityBusy)
		l.always(time.Minute, "a session keeps it", func() bool { return l.cluster.guarded() == 0 })
		l.restart()
		l.always(3*time.Minute, "it does so with the next leader", func() bool { return l.cluster.guarded() == 0 })
		sample(model.ActivityIdle)
		l.within(5*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
		l.parkedCleanly(node.ID)
	})
}

// A pod that is relabelled is another thing from then on, and leaves nothing
// behind in what it was.
func TestRelabelledPods(t *testing.T) {
	pod := model.Pod{Namespace: "ci", Name: "p", UID: "a-p", Kind: model.PodRunner}
	as := func(kind model.PodKind, node model.NodeName) model.Pod {
		p := pod
		p.Kind, p.Node, p.Created = kind, node, time.Now()
		if kind == model.PodEngine {
			p.Engine, p.EngineState = &model.EngineContainer{Grace: time.Minute}, model.EngineState{Guarded: true}
		}
		return p
	}
	t.Run("from a runner to an engine", func(t *testing.T) {
		experiment(t, parking(), func(t *testing.T, l *lab) {
			withEngines(l)
			node := l.warmNode("repo")
			l.world.PodChanged(as(model.PodRunner, node.Name))
			l.settle()
			l.world.PodGone(as(model.PodRunner, node.Name))
			l.world.PodChanged(as(model.PodEngine, node.Name))
			l.settle()
			l.world.PodGone(as(model.PodEngine, node.Name))
			l.released(5*time.Minute, node.Name) // nothing runs on it any more
		})
	})
	t.Run("from an engine to a runner", func(t *testing.T) {
		experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
			withEngines(l)
			l.start()
			node := l.fleet(1)[0]
			l.settle()
			l.world.PodChanged(as(model.PodEngine, node.Name))
			l.settle()
			l.world.PodGone(as(model.PodEngine, node.Name))
			l.world.PodChanged(as(model.PodRunner, node.Name))
			l.settle()
			l.world.PodGone(as(model.PodRunner, node.Name))
			l.settle()
			calls := l.cluster.count("release-engine")
			l.always(10*time.Minute, "nobody is let go of", func() bool { return l.cluster.count("release-engine") == calls })
		})
	})
}

// Engine pods that no node has yet are nobody's, and not remembered.
func TestUnboundEnginesAreForgotten(t *testing.T) {
	o := (&Controller{log: slog.New(slog.DiscardHandler)}).newOwner(t.Context(), nil, nil)
	o.names["n"] = "i-1"
	for i := range 100 {
		p := model.Pod{UID: fmt.Sprint(i), Kind: model.PodEngine, Engine: &model.EngineContainer{Grace: usualGrace}}
		o.seeEngine(podChange{pod: p}, time.Now())
		p.Node = "n"
		o.seeEngine(podChange{pod: p}, time.Now())
		o.seeEngine(podChange{pod: p, gone: true}, time.Now())
	}
	if e := o.engines; len(e.homeless)+len(e.pods)+len(e.homes) > 0 {
		t.Errorf("remembered are %v, %v, %v", e.homeless, e.pods, e.homes)
	}
}

// An instance that registers under another name is the same; that its old Node
// goes says nothing about it.
func TestRenamedNode(t *testing.T) {
	experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		renamed := node
		renamed.Name, renamed.UID, renamed.Created = "renamed", "uid-new", time.Now()
		l.world.NodeChanged(renamed)
		l.settle()
		l.world.NodeChanged(node) // the old one is told of once more
		l.settle()
		l.world.NodeGone(node)
		l.settle()
		l.refresh()
		l.within(6*time.Minute, "its new name", func() bool { return l.store.nodeRecords()[node.ID].Node == "renamed" })
		l.wantKind(l.remove(runners, renamed), nodegroups.KindVetoed) // the plan keeps it
		l.always(10*time.Minute, "it lives", func() bool { return l.cloud.machines(runners)[node.ID].State == model.InstanceRunning })
	})
}

// Of two engines on a node that goes none is killed, whoever made the second.
func TestSecondEngineIsNotKilled(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		l.released(5*time.Minute, node.Name)
		l.cluster.locked(func() { l.cluster.startEngine(l.cluster.nodes[node.Name]) })
		l.settle()
		l.must(l.remove(runners, node))
		l.within(3*time.Minute, "the end of the machine", func() bool { return len(l.cloud.machines(runners)) == 0 })
		if k := l.cluster.killed(); len(k) > 0 {
			t.Errorf("killed: %v", k)
		}
		if n := len(slices.DeleteFunc(l.cluster.happened(), func(h string) bool { return h != fmt.Sprintf("stop-engine %s", node.Name) })); n != 2 {
			t.Errorf("%d engines were told to stop, want both", n)
		}
	})
}

// An instance that somebody else has stopped comes back cold, whether Hearth saw
// it happen or not.
func TestStoppedElsewhereIsCold(t *testing.T) {
	for _, away := range []bool{false, true} {
		experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
			withEngines(l)
			l.start()
			node := l.fleet(1)[0]
			l.settle()
			l.cluster.job("repo", 20*time.Second, node.Name)
			l.within(7*time.Minute, "warmth", func() bool { return l.warmFor(node.ID, "repo") })
			stop := func() {
				_ = l.cloud.Stop(t.Context(), runners, []model.InstanceID{node.ID})
				time.Sleep(30 * time.Second)
			}
			if away {
				l.restart(stop)
			} else {
				stop()
			}
			l.within(time.Minute, "cold", func() bool { return !l.warmFor(node.ID, "repo") })
			if len(l.events.with(string(node.Name), "CacheLost")) == 0 && !away {
				t.Error("nobody was told")
			}
		})
	}
}

// A pod that is bound when the engine has ended already keeps the machine for a
// while.
func TestLateJobKeepsItsMachine(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		l.drain(node)
		l.within(25*time.Second, "the engine to be told", func() bool { return l.cluster.guarded() == 1 })
		l.cluster.job("other", 3*time.Minute, node.Name)
		l.always(2*time.Minute, "its machine runs", func() bool { return l.cloud.machines(runners)[node.ID].State == model.InstanceRunning })
		l.within(3*time.Minute, "the end", func() bool { return l.store.nodeRecords()[node.ID].Phase == model.PhaseParked })
	})
}

// An engine that comes back and says for longer than it takes to count that it
// holds nothing has lost its cache.
func TestEmptyCacheAfterAResume(t *testing.T) {
	experiment(t, parking(), func(t *testing.T, l *lab) {
		withEngines(l)
		node := l.warmNode("repo")
		sample := func(bytes int64) {
			for _, pod := range l.cluster.enginesOn(node.Name) {
				l.world.EngineSampled(model.EngineUse{
					Node: node.Name, Pod: pod.Namespace + "/" + pod.Name, At: time.Now(), Activity: model.ActivityIdle, CacheBytes: bytes, Empty: bytes == 0,
				})
			}
			l.settle()
		}
		sample(400e9)
		l.drain(node)
		l.within(2*time.Minute, "quiet", func() bool {
			sample(400e9)
			return l.store.record(runners).Intents[node.ID].Stage == nodegroups.StageStopping
		})
		l.phase(node.ID, model.PhaseParked)
		l.refresh()
		l.must(l.increase(runners, 1))
		l.phase(node.ID, model.PhaseReady)
		l.settle()
		began := time.Now()
		for time.Since(began) < 5*time.Minute+30*time.Second {
			sample(0)
			time.Sleep(20 * time.Second)
		}
		if !l.warmFor(node.ID, "repo") {
			t.Error("cold before it can have counted")
		}
		for time.Since(began) < 8*time.Minute {
			sample(0)
			time.Sleep(20 * time.Second)
		}
		if l.warmFor(node.ID, "repo") {
			t.Error("warm, though it holds nothing")
		}
	})
}

// Why an engine is not known is told: in the RunnerNode and once in the log.
func TestSilentEngineIsExplained(t *testing.T) {
	experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
		withEngines(l)
		l.start()
		node := l.fleet(1)[0]
		l.settle()
		say := func(a model.Activity, reason string) {
			l.world.EngineSampled(model.EngineUse{Node: node.Name, Pod: "dagger/e", At: time.Now(), Activity: a, Reason: reason})
			l.settle()
		}
		known := func() string {
			for _, c := range l.store.nodeRecords()[node.ID].Conditions {
				if c.Type == "EngineKnown" && !c.True {
					return c.Message
				}
			}
			return ""
		}
		say(model.ActivityUnknown, "no answer in time")
		l.within(10*time.Second, "the reason", func() bool { return known() == "no answer in time" })
		writes := l.store.count("save-node")
		for i := range 6 {
			say(model.ActivityUnknown, fmt.Sprintf("connection reset, port %d", i))
			time.Sleep(20 * time.Second)
		}
		if n := l.store.count("save-node") - writes; n > 1 {
			t.Errorf("%d writes for reasons that differ in a port", n)
		}
		say(model.ActivityIdle, "")
		l.within(10*time.Second, "known again", func() bool { return known() == "" })
	})
}
