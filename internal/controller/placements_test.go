package controller

import (
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/pkg/model"
)

// asked returns what is told of a pod; it must be known.
func (l *lab) asked(uid string) explain.Pod {
	l.t.Helper()
	d, err := l.ctl.Pod(l.t.Context(), "ci", uid)
	if err != nil || d == nil {
		l.t.Fatalf("asked about %s: %+v, %v", uid, d, err)
	}
	return *d
}

func whys(p *explain.Placement) map[string]string {
	out := map[string]string{}
	for _, o := range p.Others {
		out[o.Instance] = o.Why.Code
	}
	return out
}

// TestPodPlacement follows jobs of one key onto warm and cold nodes, and asks
// each time why it went where it did.
func TestPodPlacement(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "min-warm", "4", "prescale-max", "0")}, func(t *testing.T, l *lab) {
		if l.prepare(); l.ctl.View() == nil {
			if _, err := l.ctl.Pod(t.Context(), "ci", "pod-001"); err == nil {
				t.Error("an answer before there is a fleet")
			}
		}
		l.start()
		nodes := l.fleet(3)
		ended := func(uid string) {
			l.within(time.Minute, "the end of "+uid, func() bool { d, _ := l.ctl.Pod(t.Context(), "ci", uid); return d != nil && d.State == explain.PodEnded })
		}
		told := func(uid string) {
			l.within(10*time.Second, uid, func() bool {
				d, _ := l.ctl.Pod(t.Context(), "ci", uid)
				return d != nil && d.State == explain.PodRunning
			})
		}

		first := l.cluster.job("repo", 5*time.Second, nodes[0].Name)
		told(first)
		d := l.asked(first)
		if d.Node != string(nodes[0].Name) || d.Group != string(runners) || d.Key != "repo" || d.Placement == nil || d.Placement.Warmth != 0 || d.Placement.Warm != 0 {
			t.Errorf("the first job went %+v, chosen from %+v", d, d.Placement)
		}
		ended(first)
		second := l.cluster.job("repo", time.Hour, nodes[1].Name)
		told(second)
		if d := l.asked(second); d.Placement.Warmth != 0 || whys(d.Placement)[string(nodes[0].ID)] != "room" {
			t.Errorf("next to a warm node with room: %+v", d.Placement)
		}
		third := l.cluster.job("repo", time.Hour, nodes[0].Name)
		told(third)
		if d := l.asked(third); d.Placement.Warmth < 0.9 || whys(d.Placement)[string(nodes[1].ID)] != "full" {
			t.Errorf("onto a warm node, the other busy: %+v", d.Placement)
		}
		l.cluster.edit(nodes[2].Name, func(n *model.Node) { n.Unschedulable = true })
		waits := l.cluster.job("repo", 3*time.Hour, "")
		l.within(10*time.Second, "a waiting pod", func() bool { d, _ := l.ctl.Pod(t.Context(), "ci", waits); return d != nil })
		if d := l.asked(waits); d.State != explain.PodWaiting || d.Placement.Warm != 2 || d.Node != "" ||
			!slices.Equal([]string{"full", "full"}, []string{whys(d.Placement)[string(nodes[0].ID)], whys(d.Placement)[string(nodes[1].ID)]}) {
			t.Errorf("a waiting pod: %+v %+v", d, d.Placement)
		}
		l.cluster.deletePod(third)
		l.within(10*time.Second, "the deletion", func() bool { return l.asked(third).State == explain.PodEnded })
		if d := l.asked(third); d.Placement == nil || d.Placement.Warmth < 0.9 {
			t.Errorf("of a deleted pod: %+v", d)
		}
		time.Sleep(endedFor + time.Minute)
		l.cluster.deletePod(second) // what comes after lets go of the old
		l.within(10*time.Second, "the deletion", func() bool { return l.asked(second).State == explain.PodEnded })
		if d, err := l.ctl.Pod(t.Context(), "ci", third); d != nil || err != nil {
			t.Errorf("an hour after its deletion: %+v, %v", d, err)
		}

		l.restart()
		l.within(20*time.Second, "the next life", func() bool { return l.ctl.View() != nil })
		if d := l.asked(waits); d.Placement != nil || d.Node == "" {
			t.Errorf("a pod bound before this life: %+v", d)
		}
	})
}

// TestHoldersAreThoseWithUses holds the index by key against what it is made
// from.
func TestHoldersAreThoseWithUses(t *testing.T) {
	h := newHistory()
	check := func() {
		t.Helper()
		pairs := 0
		for id, uses := range h.uses {
			for _, u := range uses {
				if pairs++; !h.holders[u.Key][id] {
					t.Fatalf("%s has uses of %v and is no holder", id, u.Key)
				}
			}
		}
		for _, ids := range h.holders {
			if pairs -= len(ids); len(ids) == 0 {
				t.Fatal("a key with no holders is kept")
			}
		}
		if pairs != 0 {
			t.Fatalf("%d holders too few", pairs)
		}
	}
	for i := range 5 * model.MaxWarmKeys {
		for _, on := range []model.InstanceID{"i1", "i2"} {
			s := sighting{now: i + 2, pod: string(on) + time.Duration(i).String(), key: model.CacheKey(time.Duration(i % (2 * model.MaxWarmKeys)).String()), node: model.NodeName(on), on: on, from: i + 1}
			s.tell(h)
			check()
		}
	}
	h.forget("i1")
	check()
	h.forget("i2")
	if check(); len(h.holders) > 0 {
		t.Errorf("%d keys are held by nobody", len(h.holders))
	}
}
