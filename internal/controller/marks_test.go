package controller

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// A person's own scale-down-disabled stays, whatever the plan decides, and
// does not keep the others.
func TestPersonsProtectionIsLeftAlone(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "2m")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(3)
		own := nodes[0].Name
		l.cluster.edit(own, func(n *model.Node) { n.Marks.Protected, n.Marks.ProtectedByUs = true, false })
		untouched := func() bool {
			n, _ := l.cluster.node(own)
			return n.Marks.Protected && !n.Marks.ProtectedByUs
		}
		for _, other := range nodes[1:] {
			l.within(10*time.Minute, "release of another", func() bool { return untouched() && slices.Contains(l.unprotected(), other.Name) })
			l.must(l.remove(runners, other))
			l.within(time.Minute, "its end", func() bool { _, ok := l.cluster.node(other.Name); return !ok })
		}
		marks := l.cluster.count("mark")
		l.always(10*time.Minute, "a person's annotation", untouched)
		if more := l.cluster.count("mark") - marks; more > 0 {
			t.Errorf("%d calls to mark a node that is as it should be", more)
		}
		// The person takes it off again: it is the plan's.
		l.cluster.edit(own, func(n *model.Node) { n.Marks.Protected = false })
		l.released(30*time.Second, own)
	})
}

func TestMarksChangeOnlyWithDecisions(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "time-value", "10000")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(3)
		for range 3 { // jobs come and go; scores change all the time
			for _, n := range nodes {
				l.cluster.job("repo", 20*time.Second, n.Name)
			}
			time.Sleep(10 * time.Minute)
		}
		if got := l.cluster.count("mark"); got != 6 { // once for the decision, once for the one key
			t.Errorf("%d calls to mark three nodes that are kept all the time", got)
		}
		// One of three is released first, and nothing else changes.
		l.cluster.annotate(runners, annotation("max-idle", "1s"))
		l.within(2*time.Hour, "release", func() bool { return len(l.unprotected()) == 1 })
		time.Sleep(4 * time.Minute) // after 5 it would hold up the others no longer
		if got := l.cluster.count("mark"); got != 7 {
			t.Errorf("%d calls to mark, want one more for the released node", got)
		}
		if got := l.events.with("Normal DecisionRelease"); len(got) != 1 {
			t.Errorf("events of the decision: %q", got)
		}
	})
}

// A mark whose writing fails is tried again, and one that somebody spoils is
// put right.
func TestMarksAreRestored(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.cluster.only(failBefore, "mark")
		l.cluster.edit(node.Name, func(n *model.Node) { n.Marks = model.Marks{} })
		time.Sleep(time.Minute)
		if calls := l.cluster.count("mark"); calls < 5 || calls > 20 {
			t.Errorf("%d calls to mark in a minute in which each fails", calls)
		}
		l.cluster.heal()
		l.within(15*time.Second, "protection", func() bool { n, _ := l.cluster.node(node.Name); return n.Marks.Protected && n.Marks.ProtectedByUs })
	})
}

// Our protection must not keep cluster-autoscaler from removing a dead node.
func TestDeadNodeLosesProtection(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.cluster.job("repo", 100*time.Hour, node.Name)
		l.cloud.edit(runners, func(g *fakeGroup) { g.machines[node.ID].deadBoot = true })
		l.within(2*time.Minute, "NotReady node", func() bool { n, _ := l.cluster.node(node.Name); return !n.Ready })
		l.always(4*time.Minute, "protection for a while", func() bool { n, _ := l.cluster.node(node.Name); return n.Marks.Protected })
		l.within(2*time.Minute, "end of protection", func() bool { n, _ := l.cluster.node(node.Name); return !n.Marks.Protected })
		l.must(l.remove(runners, node))
		l.within(time.Minute, "end of the machine", func() bool { return len(l.cloud.machines(runners)) == 0 })
	})
}

func TestPlainGroupIsLeftAlone(t *testing.T) {
	plain := group(runners, "min-warm", "2")
	plain.Annotations[model.Prefix+"/role"] = "plain"
	experiment(t, []model.NodeGroup{plain}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(time.Minute, "node", func() bool { return len(l.ready()) == 1 })
		time.Sleep(10 * time.Minute)
		node := l.ready()[0]
		if l.cluster.count("mark") != 0 || l.cloud.launches() != 1 {
			t.Errorf("a plain group's node is %+v, %d launches", node.Marks, l.cloud.launches())
		}
		l.must(l.remove(runners, node)) // no veto
		l.within(time.Minute, "end", func() bool { return len(l.cloud.machines(runners)) == 0 && len(l.cluster.all()) == 0 })
	})
}

// A group that becomes plain loses our marks, and keeps a person's.
func TestRunnerGroupBecomesPlain(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		l.cluster.edit(nodes[0].Name, func(n *model.Node) { n.Marks.Protected, n.Marks.ProtectedByUs = true, false })
		l.cluster.annotate(runners, annotation("role", "plain"))
		l.within(20*time.Second, "end of our marks", func() bool {
			first, _ := l.cluster.node(nodes[0].Name)
			second, _ := l.cluster.node(nodes[1].Name)
			return first.Marks == model.Marks{Protected: true} && second.Marks == model.Marks{}
		})
		calls := l.cluster.count("mark")
		l.always(time.Minute, "no more calls", func() bool { return l.cluster.count("mark") == calls })
		l.cluster.annotate(runners, nil)
		l.within(20*time.Second, "our marks again", func() bool { n, _ := l.cluster.node(nodes[1].Name); return n.Marks.Protected })
	})
}

func TestAnnotationsTakeEffectAtOnce(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m", "min-warm", "0")}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		l.released(2*time.Minute, node.Name)
		// kubectl annotate rng runners hearth.dev/min-warm=1
		l.cluster.annotate(runners, annotation("min-warm", "1"))
		time.Sleep(1500 * time.Millisecond)
		l.wantKind(l.remove(runners, node), nodegroups.KindVetoed)
		l.within(10*time.Second, "protection", func() bool { return len(l.unprotected()) == 0 })
		l.cluster.annotate(runners, annotation("min-warm", "2"))
		l.within(10*time.Second, "launch for min-warm", func() bool { return l.cloud.launches() == 2 })
		// The object's annotation goes: the config's is in force again.
		l.cluster.annotate(runners, nil)
		l.within(5*time.Minute, "release", func() bool { return len(l.unprotected()) > 0 })
	})
}

func TestBadAnnotationsAreReportedOnce(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-warm", "many")}, func(t *testing.T, l *lab) {
		l.start()
		count := func(n int) {
			t.Helper()
			if got := l.events.with("runners Warning InvalidAnnotation", "max-warm"); len(got) != n {
				t.Errorf("events %q, want %d", got, n)
			}
			if got := l.log.count("annotation cannot be used"); got != n {
				t.Errorf("logged %d times, want %d", got, n)
			}
		}
		l.fleet(1) // it goes on working
		time.Sleep(10 * time.Minute)
		count(1)
		// Other annotations change; the bad one is not news.
		for i := range 3 {
			l.cluster.annotate(runners, annotation("min-warm", fmt.Sprint(i)))
			l.settle()
		}
		count(1)
		if got := l.metric(l.metrics.AnnotationErrors.WithLabelValues(string(runners))); got != 1 {
			t.Errorf("metric %v", got)
		}
		l.within(10*time.Second, "condition", func() bool {
			return slices.ContainsFunc(l.store.summary(runners).Conditions, func(c model.Condition) bool {
				return c.Type == "AnnotationsValid" && !c.True && contains(c.Message, "max-warm")
			})
		})
		l.cluster.annotate(runners, annotation("max-warm", "3"))
		l.settle()
		if got := l.metric(l.metrics.AnnotationErrors.WithLabelValues(string(runners))); got != 0 {
			t.Errorf("metric %v after it was put right", got)
		}
		l.cluster.annotate(runners, annotation("max-warm", "lots"))
		l.settle()
		count(2) // another bad value is news
	})
}

// What people wrote while no provider ran is in force in the first view.
func TestStoredAnnotationsAreInForceFromTheStart(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "9m")}, func(t *testing.T, l *lab) {
		l.store.edit(func(s *fakeStore) { s.annotations[runners] = annotation("min-warm", "1", "max-idle", "3m") })
		l.start()
		if s := l.view(runners).Settings; s.MinWarm != 1 || *s.MaxIdle != 3*time.Minute {
			t.Errorf("settings %+v", s)
		}
	})
}

func TestSetGroups(t *testing.T) {
	first, second := group(runners), group("second")
	experiment(t, []model.NodeGroup{first}, func(t *testing.T, l *lab) {
		l.cloud.add("second")
		l.cloud.edit("second", func(g *fakeGroup) { g.desired = 2 }) // has nodes already, of whoever manages it
		l.start()
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(2*time.Minute, "all nodes", func() bool { return len(l.ready()) == 3 })
		l.settle()
		l.refresh()
		var nodes []model.Node
		for _, n := range l.ready() {
			if l.view(runners).Owns(n.ID) {
				nodes = append(nodes, n)
			}
		}

		l.ctl.SetGroups([]model.NodeGroup{first, second})
		l.always(20*time.Second, "list of groups before the next Refresh", func() bool { return len(l.ctl.View().Groups()) == 1 })
		l.refresh()
		v := l.view("second")
		if v == nil || v.Target != 2 || len(v.Instances) != 2 {
			t.Fatalf("the new group's view is %+v, want its two Ready nodes", v)
		}
		l.within(20*time.Second, "marks", func() bool {
			return !slices.ContainsFunc(l.ready(), func(n model.Node) bool { return !n.Marks.Protected })
		})
		l.must(l.increase("second", 1))
		l.within(time.Minute, "third node", func() bool { return len(l.ready()) == 4 })

		before := l.answer()
		l.ctl.SetGroups([]model.NodeGroup{second})
		l.settle()
		if diff := cmp.Diff(before.Groups[0], l.answer().Groups[0]); diff != "" {
			t.Errorf("a removed group changed before the next Refresh:\n%s", diff)
		}
		l.wantKind(l.increase(runners, 1), nodegroups.KindNotFound)
		l.refresh()
		if len(l.ctl.View().Groups()) != 1 || l.ctl.View().ForInstance(nodes[0].ID) != nil {
			t.Errorf("the removed group is still listed")
		}
		machines := len(l.cloud.machines(runners))
		l.always(5*time.Minute, "its nodes are left as they are", func() bool {
			n, ok := l.cluster.node(nodes[0].Name)
			return ok && n.Ready && len(l.cloud.machines(runners)) == machines
		})

		// And back again.
		l.ctl.SetGroups([]model.NodeGroup{first, second})
		time.Sleep(5 * time.Second)
		l.refresh()
		if v := l.view(runners); v == nil || v.Target != 1 || !v.Owns(nodes[0].ID) {
			t.Errorf("the group that came back is %+v", v)
		}
	})
}

// The newest declaration counts, however many come before Run takes one.
func TestSetGroupsBeforeRun(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.cloud.add("second")
		l.cloud.add("third")
		l.change = func(c *Config) { c.Watched = func() bool { return time.Now().Second() >= 5 } }
		l.begin()
		l.ctl.SetGroups([]model.NodeGroup{group("second")})
		l.ctl.SetGroups([]model.NodeGroup{group("third")})
		l.within(10*time.Second, "view", func() bool { return l.ctl.View() != nil })
		l.within(10*time.Second, "the newest declaration", func() bool {
			l.refresh()
			groups := l.ctl.View().Groups()
			return len(groups) == 1 && groups[0].Group.ID == "third"
		})
	})
}
