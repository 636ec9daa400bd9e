package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

func TestScaleUpEndToEnd(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		if v := l.view(runners); v == nil || v.Target != 0 {
			t.Fatalf("the first view is %+v, want target 0", v)
		}
		l.must(l.increase(runners, 2))
		if v := l.view(runners); v.Target != 2 {
			t.Fatalf("target %d when IncreaseSize has returned, want 2", v.Target)
		}
		if r := l.store.record(runners); r.Target != 2 {
			t.Fatalf("target %d is recorded when IncreaseSize has returned, want 2", r.Target)
		}
		l.within(time.Minute, "two Ready nodes", func() bool { return len(l.ready()) == 2 })
		l.within(15*time.Second, "protection of both", func() bool {
			return !slices.ContainsFunc(l.ready(), func(n model.Node) bool {
				return !n.Marks.Protected || !n.Marks.ProtectedByUs || n.Marks.Decision != model.DecisionKeep
			})
		})
		l.refresh()
		v := l.view(runners)
		if v.Target != 2 || len(v.Instances) != 2 {
			t.Fatalf("view %+v, want two instances", v)
		}
		for _, n := range l.ready() {
			if owner := l.ctl.View().ForInstance(n.ID); owner == nil || owner.Group.ID != runners {
				t.Errorf("node %q belongs to %v", n.Name, owner)
			}
		}
		for _, i := range v.Instances {
			if i.Status != nodegroups.StatusRunning {
				t.Errorf("instance %+v of a Ready node", i)
			}
		}
		if got := l.cloud.launches(); got != 2 {
			t.Errorf("%d instances launched, want 2", got)
		}
		if l.synced != 1 {
			t.Errorf("OnSynced called %d times", l.synced)
		}
		if got := l.metric(l.metrics.TargetSize.WithLabelValues(string(runners))); got != 2 {
			t.Errorf("target size metric %v", got)
		}
		l.within(10*time.Second, "RunnerNodes", func() bool { return len(l.store.nodeRecords()) == 2 })
	})
}

// What has been asked of the cloud is looked at soon, although at rest it is
// read seldom.
func TestScaleUpIsSeenSoon(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		for range 5 {
			time.Sleep(64 * time.Second)
			launched := l.cloud.launches()
			l.must(l.increase(runners, 1))
			l.within(2*time.Second, "record of the new instance", func() bool { return len(l.store.nodeRecords()) == launched+1 })
		}
		// And at rest it is read seldom.
		time.Sleep(2 * time.Minute)
		before := l.cloud.count("snapshot")
		time.Sleep(10 * time.Minute)
		if got := l.cloud.count("snapshot") - before; got < 50 || got > 62 {
			t.Errorf("%d snapshots in ten minutes at rest", got)
		}
	})
}

// Nodes that are older than Hearth bear no label of its and are in no record.
func TestAdoptsFleetWithoutLabels(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.cluster.unlabelled = true
		l.cloud.edit(runners, func(g *fakeGroup) { g.desired = 2 })
		l.within(time.Minute, "two nodes of an old fleet", func() bool { return len(l.ready()) == 2 })
		busy := l.ready()[0]
		l.cluster.job("repo", time.Hour, busy.Name)
		l.settle()
		l.start()
		if v := l.view(runners); v.Target != 2 || len(v.Instances) != 2 {
			t.Errorf("the first view is %+v, want the two Ready nodes", v)
		}
		l.within(10*time.Second, "protection of both", func() bool { return len(l.unprotected()) == 0 })
		if err := l.remove(runners, busy); err == nil || !contains(err.Error(), "CI job") {
			t.Errorf("removal of the busy one: %v", err)
		}
		l.always(time.Minute, "nothing is launched", func() bool { return l.cloud.launches() == 2 })
	})
}

// answer is everything that cluster-autoscaler reads.
type answer struct {
	Groups []nodegroups.View
	Owners map[model.InstanceID]model.GroupID
}

func (l *lab) answer(asked ...model.InstanceID) answer {
	fleet := l.ctl.View()
	a := answer{Owners: map[model.InstanceID]model.GroupID{}}
	for _, v := range fleet.Groups() {
		c := *v
		c.Instances = slices.Clone(v.Instances)
		a.Groups = append(a.Groups, c)
		for _, i := range v.Instances {
			asked = append(asked, i.ID)
		}
	}
	for _, id := range asked {
		if v := fleet.ForInstance(id); v != nil {
			a.Owners[id] = v.Group.ID
		}
	}
	return a
}

func TestViewIsFrozenBetweenRefreshes(t *testing.T) {
	other := group("other")
	experiment(t, []model.NodeGroup{group(runners), other}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(3)
		l.must(l.increase(runners, 2)) // on their way
		l.refresh()
		before := l.answer()

		// Everything changes but by cluster-autoscaler's own hand.
		l.cloud.edit(runners, func(g *fakeGroup) { // a machine dies
			delete(g.machines, nodes[0].ID)
			g.desired--
		})
		l.cluster.removeNode(nodes[1].Name)
		l.cloud.edit("other", func(g *fakeGroup) { g.desired = 2 }) // somebody raises a size
		l.cluster.annotate(runners, annotation("min-warm", "6"))
		smaller := group(runners)
		smaller.Max = 7
		l.world.SetGroups([]model.NodeGroup{smaller, other, group("third")})
		l.ctl.SetGroups([]model.NodeGroup{smaller, other})
		l.always(2*time.Minute, "the same answers", func() bool { return cmp.Equal(before, l.answer()) })

		// A write changes its own group by what it is about, and nothing else.
		l.must(l.increase("other", 1))
		after := l.answer()
		if got, want := l.view("other").Target, before.Groups[0].Target+1; got != want {
			t.Errorf("target %d after IncreaseSize, want %d", got, want)
		}
		if diff := cmp.Diff(before.Groups[1], after.Groups[1]); diff != "" {
			t.Errorf("a write to one group changed another:\n%s", diff)
		}
		l.must(l.ctl.DecreaseTargetSize(t.Context(), "other", -1))

		l.refresh()
		if v := l.view(runners); v.Group.Max != 7 || v.Settings.MinWarm != 6 || cmp.Equal(before.Groups[1].Instances, v.Instances) {
			t.Errorf("Refresh did not bring what has changed: %+v", v)
		}
	})
}

func TestDrain(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.released(2*time.Minute, node.Name)
		l.must(l.remove(runners, node))
		if v := l.view(runners); v.Target != 0 || l.ctl.View().ForInstance(node.ID) != nil {
			t.Errorf("after DeleteNodes the view is %+v and owns the node: %v", v, l.ctl.View().ForInstance(node.ID))
		}
		if i := l.store.record(runners).Intents[node.ID]; i.Desired != model.DesiredGone {
			t.Errorf("recorded intent %+v when DeleteNodes has returned", i)
		}
		l.must(l.remove(runners, node)) // asked again: a success
		l.within(time.Minute, "end of machine and Node", func() bool {
			return len(l.cloud.machines(runners)) == 0 && len(l.cluster.all()) == 0
		})
		want := []string{"taint n-001", "delete n-001"}
		if diff := cmp.Diff(want, l.cluster.happened()); diff != "" {
			t.Errorf("what happened to the node (-want +got):\n%s", diff)
		}
		l.within(30*time.Second, "end of the RunnerNode", func() bool { return len(l.store.nodeRecords()) == 0 })
		l.refresh()
		l.must(l.remove(runners, node)) // gone: still a success
		if v := l.view(runners); len(v.Instances) != 0 || v.Target != 0 || l.cloud.desired(runners) != 0 {
			t.Errorf("in the end %+v", v)
		}
		if r := l.store.record(runners); r.Target != 0 || r.Hidden != 0 || len(r.Intents) != 0 {
			t.Errorf("in the end the record is %+v", r)
		}
	})
}

// The scheduler may bind a job to a node in the moment before our taint is on
// it: the drain waits for the job.
func TestDrainWaitsForJobThatSlippedIn(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.released(2*time.Minute, node.Name)
		l.must(l.remove(runners, node))
		l.cluster.job("slipped-in", 5*time.Minute, node.Name)
		l.always(5*time.Minute-10*time.Second, "the machine of a node with a job runs", func() bool {
			return l.cloud.machines(runners)[node.ID].State == model.InstanceRunning
		})
		l.within(2*time.Minute, "end of the machine", func() bool { return len(l.cloud.machines(runners)) == 0 })
		l.within(10*time.Second, "end of the Node", func() bool { return len(l.cluster.all()) == 0 })
	})
}

func TestDrainIsTakenBack(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.released(2*time.Minute, node.Name)
		l.cluster.edit(node.Name, func(n *model.Node) { n.CATaintSince, n.Unschedulable = time.Now(), true })
		l.cluster.job("slipped-in", time.Minute, node.Name)
		l.must(l.remove(runners, node))
		l.within(10*time.Second, "our taint", func() bool { n, _ := l.cluster.node(node.Name); return n.Draining })
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(10*time.Second, "a node that takes work again", func() bool {
			n, _ := l.cluster.node(node.Name)
			return !n.Draining && n.CATaintSince.IsZero() && !n.Unschedulable
		})
		l.refresh()
		if v := l.view(runners); v.Target != 1 || !v.Owns(node.ID) {
			t.Errorf("view %+v, want the node back in it", v)
		}
		l.within(15*time.Second, "protection", func() bool { n, _ := l.cluster.node(node.Name); return n.Marks.Protected })
		l.always(20*time.Second, "nothing is launched beside it", func() bool { return l.cloud.launches() == 1 })
	})
}

func TestVeto(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		first, second := nodes[0], nodes[1]
		l.wantKind(l.remove(runners, first), nodegroups.KindVetoed)
		if got := l.metric(l.metrics.Vetoes.WithLabelValues(string(runners), "not-released")); got != 1 {
			t.Errorf("%v vetoes of nodes that are not released counted", got)
		}
		l.released(3*time.Minute, first.Name)
		uid := l.cluster.job("repo", time.Hour, first.Name)
		l.settle()
		l.wantKind(l.remove(runners, first), nodegroups.KindVetoed)
		l.released(20*time.Second, second.Name) // the busy one is protected again
		// All or nothing.
		l.wantKind(l.remove(runners, second, first), nodegroups.KindVetoed)
		if v := l.view(runners); v.Target != 2 || len(l.store.record(runners).Intents) != 0 {
			t.Errorf("a vetoed request changed something: %+v", v)
		}
		if got := l.metric(l.metrics.Vetoes.WithLabelValues(string(runners), "busy")); got != 2 {
			t.Errorf("%v vetoes of busy nodes counted", got)
		}
		l.must(l.remove(runners, second))
		l.cluster.deletePod(uid)
		l.released(3*time.Minute, first.Name)
		l.must(l.remove(runners, first))
		l.within(time.Minute, "end of both", func() bool { return len(l.cloud.machines(runners)) == 0 && len(l.cluster.all()) == 0 })
	})
}

// A Node that a person deletes takes its jobs with it. The instance is no
// longer busy then, or cluster-autoscaler could never remove it.
func TestDeletedNodeIsNotBusy(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.cluster.job("repo", time.Hour, node.Name)
		l.settle()
		l.wantKind(l.remove(runners, node), nodegroups.KindVetoed)
		l.cloud.edit(runners, func(g *fakeGroup) { g.machines[node.ID].deadBoot = true }) // its kubelet is dead, too
		l.cluster.removeNode(node.Name)
		l.settle()
		l.must(l.remove(runners, node))
		l.within(time.Minute, "end of the machine", func() bool { return len(l.cloud.machines(runners)) == 0 })
	})
}

// parked removes nodes as the plan releases them and waits until their
// machines are stopped.
func (l *lab) parked(nodes ...model.Node) {
	l.t.Helper()
	for range nodes {
		l.within(5*time.Minute, "release", func() bool { return len(l.unprotected()) > 0 })
		n, _ := l.cluster.node(l.unprotected()[0])
		if n.Marks.Decision != model.DecisionPark {
			l.t.Errorf("node %q is marked %q", n.Name, n.Marks.Decision)
		}
		l.must(l.remove(runners, n))
		l.within(time.Minute, "end of the Node", func() bool { _, ok := l.cluster.node(n.Name); return !ok })
	}
}

func TestParkAndResume(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m", "park", "stop")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		l.cluster.job("warm-repo", 20*time.Second, nodes[1].Name)
		l.parked(nodes...)
		l.within(time.Minute, "two stopped machines", func() bool { return l.cloud.stopped(runners) == 2 })
		l.within(10*time.Second, "view without parked machines", func() bool {
			l.refresh()
			v := l.view(runners)
			return v.Target == 0 && len(v.Instances) == 0
		})
		l.restart() // what is parked and how warm it is survives
		l.refresh()
		l.cluster.job("warm-repo", 20*time.Second, "") // waits
		l.settle()
		l.must(l.increase(runners, 1))
		l.within(time.Minute, "a node", func() bool { return len(l.ready()) == 1 })
		if got := l.ready()[0]; got.ID != nodes[1].ID {
			t.Errorf("%q was resumed, want the one that is warm for the waiting job, %q", got.ID, nodes[1].ID)
		}
		if got := l.cloud.launches(); got != 2 {
			t.Errorf("%d launches, want none but the first two", got)
		}
	})
}

// What is beyond max-parked goes by its worth, not by its age.
func TestLeastValuableParkedGoesFirst(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m", "park", "stop", "max-parked", "2")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		l.cluster.job("warm-repo", 20*time.Second, nodes[0].Name)
		l.cluster.job("", 5*time.Minute, nodes[1].Name)
		l.parked(nodes...) // the warm one first, since the other is busy
		l.within(time.Minute, "two stopped machines", func() bool { return l.cloud.stopped(runners) == 2 })
		time.Sleep(10 * time.Minute)
		l.cluster.annotate(runners, annotation("max-parked", "1"))
		l.within(time.Minute, "one stopped machine", func() bool { return len(l.cloud.machines(runners)) == 1 })
		if _, ok := l.cloud.machines(runners)[nodes[0].ID]; !ok {
			t.Errorf("the warm machine is gone, the cold one is parked")
		}
	})
}

func TestMinWarmIsFilled(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "min-warm", "2")}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		l.within(time.Minute, "two Ready nodes that nobody asked for", func() bool { return len(l.ready()) == 2 })
		if v := l.view(runners); v.Target != 0 || len(v.Instances) != 0 {
			t.Fatalf("hidden nodes are told of: %+v", v)
		}
		for range 3 {
			time.Sleep(10 * time.Second)
			l.refresh()
		}
		if v := l.view(runners); v.Target != 2 || len(v.Instances) != 2 {
			t.Errorf("Ready nodes are still hidden after three Refreshes: %+v", v)
		}
		// A job takes one: another comes.
		l.cluster.job("repo", 30*time.Minute, "")
		l.within(time.Minute, "a third node", func() bool { return len(l.ready()) == 3 })
		l.always(10*time.Minute, "three nodes suffice", func() bool { return l.cloud.launches() == 3 })
		if got := l.unprotected(); len(got) != 0 {
			t.Errorf("%v released although min-warm keeps the idle ones", got)
		}
	})
}

func TestColdestIsReleasedFirst(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "3m", "min-warm", "1")}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		l.must(l.increase(runners, 2)) // and one that min-warm adds
		l.within(2*time.Minute, "three nodes", func() bool { return len(l.ready()) == 3 })
		// Make the first the warmest, the second a little warm.
		nodes := l.ready()
		for range 3 {
			l.cluster.job("often", 10*time.Second, nodes[0].Name)
			time.Sleep(15 * time.Second)
		}
		l.cluster.job("once", 10*time.Second, nodes[1].Name)
		var order []model.NodeName
		for range 2 {
			l.within(10*time.Minute, "a release", func() bool { return len(l.unprotected()) > 0 })
			victim := l.unprotected()
			if len(victim) != 1 {
				t.Fatalf("%v released at once, want the coldest alone", victim)
			}
			order = append(order, victim[0])
			l.refresh()
			n, _ := l.cluster.node(victim[0])
			l.within(40*time.Second, "accepted removal", func() bool { l.refresh(); return l.remove(runners, n) == nil })
			l.within(time.Minute, "end of the node", func() bool { _, ok := l.cluster.node(n.Name); return !ok })
		}
		if want := []model.NodeName{nodes[2].Name, nodes[1].Name}; !slices.Equal(order, want) {
			t.Errorf("went in the order %v, want %v", order, want)
		}
		l.always(30*time.Minute, "the warmest stays", func() bool { return len(l.ready()) == 1 && len(l.unprotected()) == 0 })
	})
}

func TestSnapshotFailuresKeepServing(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners), group("other")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		l.cloud.only(failBefore, "snapshot")
		for range 12 {
			time.Sleep(5 * time.Second)
			l.refresh()
			if v := l.view(runners); v.Target != 2 || len(v.Instances) != 2 {
				t.Fatalf("while the cloud cannot be read the view is %+v", v)
			}
		}
		if age := l.metric(l.metrics.SnapshotAge); age < 55 {
			t.Errorf("snapshot age %v after a minute without one", age)
		}
		l.cloud.heal()
		// One broken group does not hold up the other.
		l.cloud.tune(func(c *fakeCloud) { c.broken["other"] = errors.New("access denied") })
		l.within(30*time.Second, "condition of the broken group", func() bool {
			return slices.ContainsFunc(l.store.summary("other").Conditions, func(c model.Condition) bool {
				return c.Type == "BackendHealthy" && !c.True && c.Message == "access denied"
			})
		})
		l.must(l.increase(runners, 1))
		l.within(time.Minute, "a third node", func() bool { return len(l.ready()) == 3 })
		l.refresh()
		if l.view("other") == nil || len(l.view(runners).Instances) != 3 {
			t.Errorf("views %+v and %+v", l.view("other"), l.view(runners))
		}
		l.cloud.tune(func(c *fakeCloud) { delete(c.broken, "other") })
		l.within(30*time.Second, "healthy condition", func() bool {
			return !slices.ContainsFunc(l.store.summary("other").Conditions, func(c model.Condition) bool { return !c.True })
		})
		if got := l.log.count("reading a node group failed"); got != 1 {
			t.Errorf("a group that stays broken was logged %d times", got)
		}
		_ = nodes
	})
}

// A group that cannot be read at the start holds up nobody, and joins the
// others at the first Refresh after it could be.
func TestBrokenGroupAtStart(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners), group("other")}, func(t *testing.T, l *lab) {
		l.cloud.tune(func(c *fakeCloud) { c.broken["other"] = errors.New("access denied") })
		l.start()
		l.refresh()
		if l.view(runners) == nil || l.view("other") != nil {
			t.Fatalf("views %+v and %+v, want the one that can be read alone", l.view(runners), l.view("other"))
		}
		l.must(l.increase(runners, 1))
		l.within(time.Minute, "a node", func() bool { return len(l.ready()) == 1 })
		l.cloud.tune(func(c *fakeCloud) { delete(c.broken, "other") })
		l.within(time.Minute, "the other group", func() bool { l.refresh(); return l.view("other") != nil })
		l.must(l.increase("other", 1))
	})
}

// A cloud that leaves instances out of a list now and then loses none.
func TestForgetfulSnapshots(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.cloud.forgetful = 5
		l.start()
		l.fleet(3)
		l.always(5*time.Minute, "three nodes stay", func() bool { return len(l.ready()) == 3 && l.cloud.launches() == 3 })
		l.refresh()
		if v := l.view(runners); v.Target != 3 || len(v.Instances) != 3 {
			t.Errorf("view %+v", v)
		}
	})
}

// A cloud whose answers are old breaks its promise. That may cost a node, but
// none is lost.
func TestStaleSnapshots(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
		l.cloud.stale = 3 * time.Second
		l.start()
		l.refresh()
		l.must(l.increase(runners, 3))
		time.Sleep(time.Second)
		l.must(l.increase(runners, 1))
		ca := &autoscaler{lab: l, group: runners}
		l.within(20*time.Minute, "an empty cloud again", func() bool {
			ca.loop(0)
			time.Sleep(10 * time.Second)
			return len(l.cloud.machines(runners)) == 0 && len(l.cluster.all()) == 0 && l.cloud.desired(runners) == 0
		})
		l.refresh()
		if v := l.view(runners); v.Target != 0 || len(v.Instances) != 0 {
			t.Errorf("view %+v", v)
		}
	})
}

func TestCapacityFailure(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.cloud.edit(runners, func(g *fakeGroup) { g.capacity = 1 })
		l.start()
		l.refresh()
		l.must(l.increase(runners, 3))
		failed := func() (ids []model.Node) {
			for _, i := range l.view(runners).Instances {
				if i.Failure != nil && i.Failure.Class == model.FailureCapacity && i.Status == nodegroups.StatusCreating {
					ids = append(ids, model.Node{ID: i.ID})
				}
			}
			return ids
		}
		l.within(20*time.Second, "two placeholders", func() bool { l.refresh(); return len(failed()) == 2 })
		l.must(l.remove(runners, failed()...))
		if v := l.view(runners); v.Target != 1 {
			t.Errorf("target %d after deleting the placeholders, want 1", v.Target)
		}
		l.within(time.Minute, "the one that there is", func() bool { return len(l.ready()) == 1 })
		l.within(30*time.Second, "a cloud that has stopped trying", func() bool { return l.cloud.desired(runners) == 1 })
		l.cloud.edit(runners, func(g *fakeGroup) { g.capacity = -1 })
		l.always(2*time.Minute, "nothing is launched late", func() bool { return l.cloud.launches() == 1 })
	})
}

// Whatever fails is tried again; whatever may have happened is not done twice.
func TestFailingCalls(t *testing.T) {
	for _, kind := range []fault{failBefore, failAfter, hangBefore, hangAfter} {
		for _, op := range []string{"resize", "terminate", "taint", "pods-on", "delete", "mark", "snapshot"} {
			t.Run(fmt.Sprintf("%s %d", op, kind), func(t *testing.T) {
				experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
					l.start()
					// Two calls in three go wrong.
					calls := 0
					rule := func(called string) fault {
						if called == op {
							if calls++; calls%3 != 0 {
								return kind
							}
						}
						return healthy
					}
					l.cloud.set(rule)
					l.cluster.set(rule)
					l.refresh()
					l.must(l.increase(runners, 2))
					l.within(10*time.Minute, "two nodes", func() bool { return len(l.ready()) == 2 })
					ca := &autoscaler{lab: l, group: runners}
					l.within(30*time.Minute, "end of everything", func() bool {
						ca.loop(0)
						time.Sleep(10 * time.Second)
						return len(l.cloud.machines(runners)) == 0 && len(l.cluster.all()) == 0
					})
					if l.cloud.launches() != 2 || l.cloud.desired(runners) != 0 {
						t.Errorf("%d launches, %d desired", l.cloud.launches(), l.cloud.desired(runners))
					}
				})
			})
		}
	}
}

// One call that hangs holds up neither the owner nor other groups.
func TestHangingEffectBlocksNobody(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners), group("other")}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		l.cloud.only(hangBefore, "resize")
		l.must(l.increase(runners, 1))
		l.within(5*time.Second, "the call that hangs", func() bool { return l.cloud.count("resize") == 2 })
		l.cloud.heal()
		began := time.Now()
		l.refresh()
		l.must(l.increase("other", 1))
		if took := time.Since(began); took > time.Second {
			t.Errorf("a Refresh and an IncreaseSize took %s beside a hanging call", took)
		}
		l.within(time.Minute, "the other group's node", func() bool { return len(l.ready()) == 2 })
		l.within(5*time.Minute, "the first group's node", func() bool { return len(l.ready()) == 3 })
	})
}

// Calls to the API server that hang must not use up the room of the cloud's.
func TestHangingClusterDoesNotBlockCloud(t *testing.T) {
	big := group(runners, "max-idle", "1m")
	big.Max = 200
	experiment(t, []model.NodeGroup{big}, func(t *testing.T, l *lab) {
		l.start()
		for _, n := range l.fleet(120) { // every mark has to be written again
			l.cluster.edit(n.Name, func(n *model.Node) { n.Marks = model.Marks{} })
		}
		l.cluster.always(hangBefore)
		time.Sleep(5 * time.Minute)
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(10*time.Second, "launch beside a hanging API server", func() bool { return l.cloud.launches() == 121 })
		if calls := l.cluster.count("mark"); calls > 120+120*6 {
			t.Errorf("%d calls to mark 120 nodes in 5 min, while each hangs", calls)
		}
		l.cluster.heal()
		l.within(3*time.Minute, "marks", func() bool { return len(l.unprotected()) > 0 })
	})
}

// cluster-autoscaler may have forgotten what it asked for: what is not Ready
// yet is hidden, and asking again launches nothing.
func TestForget(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners), group("other")}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		l.must(l.increase(runners, 3))
		l.must(l.increase("other", 1))
		time.Sleep(5 * time.Second)
		ctx := t.Context()
		l.must(l.ctl.ForgetGroup(ctx, runners))
		if a, b := l.view(runners).Target, l.view("other").Target; a != 1 || b != 1 {
			t.Errorf("targets %d and %d after ForgetGroup, want 1 (the Ready one) and 1", a, b)
		}
		l.must(l.ctl.Forget(ctx))
		if a, b := l.view(runners).Target, l.view("other").Target; a != 1 || b != 0 {
			t.Errorf("targets %d and %d after Forget, want 1 and 0", a, b)
		}
		l.refresh()
		l.must(l.increase(runners, 3))
		l.must(l.increase("other", 1))
		l.within(time.Minute, "five nodes", func() bool { return len(l.ready()) == 5 })
		l.always(time.Minute, "five launches", func() bool { return l.cloud.launches() == 5 })
		l.refresh()
		if a, b := l.view(runners).Target, l.view("other").Target; a != 4 || b != 1 {
			t.Errorf("targets %d and %d in the end, want 4 and 1", a, b)
		}
	})
}

func TestPrescaleIsAbsorbed(t *testing.T) {
	for _, ahead := range []int{2, 6, 8} {
		t.Run(fmt.Sprint(ahead), func(t *testing.T) {
			experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
				l.start()
				l.refresh()
				l.must(l.ctl.Prescale(t.Context(), runners, ahead, "queued-jobs"))
				l.must(l.ctl.Prescale(t.Context(), runners, ahead, "queued-jobs")) // a level, not a difference
				time.Sleep(15 * time.Second)
				l.refresh()
				if v := l.view(runners); v.Target != 0 || len(v.Instances) != 0 {
					t.Fatalf("hidden nodes are told of: %+v", v)
				}
				l.must(l.increase(runners, 6))
				if v := l.view(runners); v.Target != 6 {
					t.Errorf("target %d, want 6", v.Target)
				}
				l.within(2*time.Minute, "the nodes", func() bool { return len(l.ready()) == max(6, ahead) })
				l.always(time.Minute, "nothing is launched twice", func() bool { return l.cloud.launches() == max(6, ahead) })
			})
		})
	}
}

func TestBadRequests(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners), group("other")}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(2)[0]
		before := l.answer()
		l.wantKind(l.increase("nobody", 1), nodegroups.KindNotFound)
		l.wantKind(l.increase(runners, 0), nodegroups.KindInvalid)
		l.wantKind(l.increase(runners, -1), nodegroups.KindInvalid)
		l.wantKind(l.increase(runners, 9), nodegroups.KindOutOfRange)
		l.wantKind(l.remove("nobody", node), nodegroups.KindNotFound)
		l.wantKind(l.remove("other", node), nodegroups.KindInvalid)
		l.wantKind(l.remove(runners, model.Node{ID: "fake:///runners/never"}), nodegroups.KindNotFound)
		l.wantKind(l.ctl.DecreaseTargetSize(t.Context(), runners, 1), nodegroups.KindInvalid)
		l.wantKind(l.ctl.Prescale(t.Context(), "nobody", 1, "test"), nodegroups.KindNotFound)
		l.must(l.ctl.DecreaseTargetSize(t.Context(), runners, -1)) // nothing unborn: a success
		if diff := cmp.Diff(before, l.answer()); diff != "" {
			t.Errorf("refused requests changed something:\n%s", diff)
		}
	})
}

func TestNotServingYetOrAnyMore(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.store.always(failBefore) // what an earlier life recorded cannot be read
		l.begin()
		time.Sleep(10 * time.Second)
		if l.ctl.View() != nil {
			t.Error("a view without the records")
		}
		l.wantKind(l.increase(runners, 1), nodegroups.KindUnavailable)
		l.wantKind(l.ctl.Refresh(t.Context()), nodegroups.KindUnavailable)
		l.store.heal()
		l.cloud.only(failBefore, "snapshot")
		time.Sleep(20 * time.Second)
		if l.ctl.View() != nil || l.synced != 0 {
			t.Error("a view without a snapshot")
		}
		l.cloud.heal()
		l.within(15*time.Second, "view", func() bool { return l.ctl.View() != nil })
		ctl := l.ctl
		if err := l.kill(); err != nil {
			t.Errorf("Run ended with %v when it was asked to end", err)
		}
		if ctl.View() != nil {
			t.Error("a view after the end")
		}
		err := ctl.IncreaseSize(context.Background(), runners, 1)
		l.wantKind(err, nodegroups.KindUnavailable)
	})
}

// The views are gone the moment that Run is asked to end, even if a call
// still keeps it from returning.
func TestNoAnswersWhileEnding(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		l.cloud.only(deaf, "resize")
		l.must(l.increase(runners, 1))
		l.within(5*time.Second, "the deaf call", func() bool { return l.cloud.count("resize") == 2 })
		time.Sleep(time.Second)
		l.stop()
		l.within(100*time.Millisecond, "end of the view", func() bool { return l.ctl.View() == nil })
		select {
		case err := <-l.done:
			t.Errorf("Run returned %v although a call of its own was under way", err)
		default:
		}
	})
}

func TestConfig(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("New accepted an empty config")
	}
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.prepare()
		for name, drop := range map[string]func(*Config){
			"Backend": func(c *Config) { c.Backend = nil }, "Store": func(c *Config) { c.Store = nil },
			"Nodes": func(c *Config) { c.Nodes = nil }, "Pods": func(c *Config) { c.Pods = nil },
			"Events": func(c *Config) { c.Events = nil }, "World": func(c *Config) { c.World = nil },
			"Watched": func(c *Config) { c.Watched = nil }, "Metrics": func(c *Config) { c.Metrics = nil },
			"Logger": func(c *Config) { c.Logger = nil },
		} {
			cfg := l.ctl.cfg
			drop(&cfg)
			if _, err := New(cfg); err == nil || !contains(err.Error(), name+" is required") {
				t.Errorf("without %s: error %v", name, err)
			}
		}
		if got := l.ctl.cfg.RecordWithin; got != 3*time.Second {
			t.Errorf("default RecordWithin %s", got)
		}
		l.ctl = nil // was never run
	})
}

// The expander is answered from what was true at the last Refresh.
func TestBestOption(t *testing.T) {
	cheap, dear, parking := group("cheap", "node-price", "1"), group("dear", "node-price", "3"), group(runners, "node-price", "2", "max-idle", "1m", "park", "stop")
	experiment(t, []model.NodeGroup{cheap, dear, parking}, func(t *testing.T, l *lab) {
		options := func(jobs map[model.CacheKey]int) []Option {
			return []Option{{Group: "dear", Nodes: 1, Jobs: jobs}, {Group: runners, Nodes: 1, Jobs: jobs}, {Group: "cheap", Nodes: 1, Jobs: jobs}}
		}
		best := func(want model.GroupID, jobs map[model.CacheKey]int) {
			t.Helper()
			if got := l.ctl.BestOption(options(jobs)); got != want {
				t.Errorf("best option for %v is %q, want %q", jobs, got, want)
			}
		}
		l.start()
		if got := l.ctl.BestOption(nil); got != "" {
			t.Errorf("best of no options is %q", got)
		}
		l.refresh()
		best("cheap", map[model.CacheKey]int{"repo": 1})
		node := l.fleet(1)[0]
		l.cluster.job("repo", 20*time.Second, node.Name)
		l.settle()
		l.parked(node)
		l.within(time.Minute, "stopped machine", func() bool { return l.cloud.stopped(runners) == 1 })
		l.settle()
		l.refresh()
		best(runners, map[model.CacheKey]int{"repo": 1})  // its cache is parked here
		best(runners, map[model.CacheKey]int{"other": 1}) // nothing has to be launched
		best(runners, map[model.CacheKey]int{"": 1})      // of no known key
		if got := l.ctl.BestOption([]Option{{Group: "unknown", Nodes: 1}}); got != "unknown" {
			t.Errorf("best of one option is %q", got)
		}
	})
}
