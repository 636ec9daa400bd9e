package controller

import (
	"maps"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestRunnerNodeWrites(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "time-value", "10000")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(3)
		time.Sleep(10 * time.Second)
		var phases []model.Phase
		for _, r := range l.store.writesSince(0) {
			if r.ID == nodes[0].ID && (len(phases) == 0 || phases[len(phases)-1] != r.Phase) {
				phases = append(phases, r.Phase)
			}
		}
		if diff := cmp.Diff([]model.Phase{model.PhaseLaunching, model.PhaseReady}, phases); diff != "" {
			t.Errorf("phases written (-want +got):\n%s", diff)
		}

		// At rest, jobs or not: at most every five minutes.
		count := func() int { return len(l.store.writesSince(0)) }
		before := count()
		for range 60 {
			l.cluster.job("repo", 20*time.Second, nodes[0].Name)
			time.Sleep(time.Minute)
		}
		if wrote := count() - before; wrote < 3*11 || wrote > 3*12+3 {
			t.Errorf("%d writes for three nodes in an hour", wrote)
		}
		if warm := l.store.nodeRecords()[nodes[0].ID].Warmth; len(warm) != 1 || warm[0].Key != "repo" || warm[0].Uses < 54 {
			t.Errorf("recorded warmth %+v after sixty jobs", warm)
		}

		// A decision is written at once, of that node only.
		l.cluster.annotate(runners, annotation("max-idle", "1s"))
		before = count()
		l.within(time.Minute, "recorded decision", func() bool {
			return l.store.nodeRecords()[nodes[1].ID].Decision == model.DecisionRelease
		})
		wrote := map[model.InstanceID]int{}
		for _, r := range l.store.writesSince(before) {
			wrote[r.ID]++
		}
		if wrote[nodes[1].ID] != 1 || len(wrote) > 2 {
			t.Errorf("writes after a decision: %v", wrote)
		}
		// And a phase.
		l.must(l.remove(runners, nodes[1]))
		l.within(3*time.Second, "recorded phase", func() bool { return l.store.nodeRecords()[nodes[1].ID].Phase == model.PhaseDraining })
		if r := l.store.nodeRecords()[nodes[1].ID]; r.Desired != model.DesiredGone || r.Decision != model.DecisionRelease || r.Reason == "" {
			t.Errorf("record of a draining node %+v", r)
		}
		l.within(time.Minute, "end of the record", func() bool { _, ok := l.store.nodeRecords()[nodes[1].ID]; return !ok })
	})
}

// A write that fails is made later, with what is true then.
func TestRunnerNodeWritesAreMadeLater(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.store.only(failBefore, "save-node", "delete-node")
		l.fleet(2)
		l.store.heal()
		l.within(10*time.Second, "records", func() bool {
			records := l.store.nodeRecords()
			for _, r := range records {
				if r.Phase != model.PhaseReady {
					return false
				}
			}
			return len(records) == 2
		})
	})
}

func TestRestartRemembers(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "24h")}, func(t *testing.T, l *lab) {
		l.cluster.slots = 4
		l.start()
		nodes := l.fleet(2)
		node := nodes[0]
		// One job of "a" has ended and stays listed, one of "a" and one of "b" run.
		uid := l.cluster.job("a", 10*time.Second, node.Name)
		l.cluster.keep(uid)
		l.cluster.job("a", 2*time.Hour, node.Name)
		l.cluster.job("b", 2*time.Hour, node.Name)
		time.Sleep(6 * time.Minute) // the records are written
		uses := func() map[model.CacheKey]int {
			out := map[model.CacheKey]int{}
			for _, w := range l.store.nodeRecords()[node.ID].Warmth {
				out[w.Key] = w.Uses
			}
			return out
		}
		want := map[model.CacheKey]int{"a": 2, "b": 1}
		if got := uses(); !maps.Equal(got, want) {
			t.Fatalf("recorded uses %v, want %v", got, want)
		}
		since := l.store.nodeRecords()[node.ID].Since
		for range 3 {
			before := len(l.store.writesSince(0))
			l.restart()
			time.Sleep(10 * time.Second)
			if wrote := len(l.store.writesSince(before)); wrote > 2*2 {
				t.Errorf("%d writes for two nodes after a restart", wrote)
			}
			time.Sleep(6 * time.Minute)
			if got := uses(); !maps.Equal(got, want) {
				t.Errorf("uses %v after a restart, want %v", got, want)
			}
		}
		if got := l.store.nodeRecords()[node.ID].Since; !got.Equal(since) {
			t.Errorf("the node is in its phase since %s, %s before the restart", got, since)
		}
		// It is still busy, and the warmest.
		if err := l.remove(runners, node); err == nil || !contains(err.Error(), "CI job") {
			t.Errorf("removal of a node that is busy since before the restart: %v", err)
		}
		l.cluster.annotate(runners, annotation("max-idle", "1s"))
		l.within(time.Minute, "release of the cold node", func() bool { return len(l.unprotected()) == 1 })
		if got := l.unprotected()[0]; got != nodes[1].Name {
			t.Errorf("%q was released", got)
		}
		if jobs := l.metric(l.metrics.Jobs.WithLabelValues(string(runners), "cold")) + l.metric(l.metrics.Jobs.WithLabelValues(string(runners), "warm")); jobs != 0 {
			t.Errorf("%v jobs counted a second time", jobs)
		}
	})
}

// Records of instances that ended while nobody looked are deleted; those of
// groups that are not declared are left alone.
func TestOrphanedRecords(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		l.within(10*time.Second, "records", func() bool { return len(l.store.nodeRecords()) == 2 })
		l.restart(func() {
			l.cloud.edit(runners, func(g *fakeGroup) {
				delete(g.machines, nodes[0].ID)
				g.desired--
			})
			l.store.edit(func(s *fakeStore) {
				s.nodes["fake:///elsewhere/i-1"] = model.NodeRecord{ID: "fake:///elsewhere/i-1", Group: "elsewhere"}
			})
		})
		l.within(30*time.Second, "one record less", func() bool {
			_, ok := l.store.nodeRecords()[nodes[0].ID]
			return !ok
		})
		time.Sleep(time.Minute)
		records := l.store.nodeRecords()
		for _, id := range []model.InstanceID{nodes[1].ID, "fake:///elsewhere/i-1"} {
			if _, ok := records[id]; !ok {
				t.Errorf("no record of %q", id)
			}
		}
	})
}

func TestJobMetrics(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		for range 3 {
			l.cluster.job("repo", 10*time.Second, node.Name)
			time.Sleep(30 * time.Second)
		}
		cold, warm := l.metric(l.metrics.Jobs.WithLabelValues(string(runners), "cold")), l.metric(l.metrics.Jobs.WithLabelValues(string(runners), "warm"))
		if cold != 1 || warm != 2 {
			t.Errorf("%v cold and %v warm jobs, want 1 and 2", cold, warm)
		}
	})
}

// Clouds use names again: another machine of the same name inherits nothing,
// and its Node is not taken for that of the one before.
func TestNameIsUsedAgain(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.cloud.name = func(int) model.NodeName { return "ip-10-0-0-1" }
		l.start()
		before := l.fleet(1)[0]
		l.cluster.job("repo", 10*time.Second, before.Name)
		l.cluster.deletePod(l.cluster.job("long", time.Hour, before.Name))
		time.Sleep(time.Minute)
		l.cloud.edit(runners, func(g *fakeGroup) { delete(g.machines, before.ID) }) // the cloud replaces it
		l.within(time.Minute, "another Node of that name", func() bool {
			nodes := l.ready()
			return len(nodes) == 1 && nodes[0].ID != before.ID && nodes[0].Marks.Protected
		})
		after := l.ready()[0]
		l.always(6*time.Minute, "the new Node", func() bool { n, ok := l.cluster.node(after.Name); return ok && n.UID == after.UID && n.Ready })
		records := l.store.nodeRecords()
		if r := records[after.ID]; len(records) != 1 || r.Phase != model.PhaseReady || len(r.Warmth) != 0 || r.Node != after.Name {
			t.Errorf("records %+v", records)
		}
	})
}
