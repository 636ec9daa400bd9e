package controller

import (
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/pkg/model"
)

// explained returns what the report says of a group.
func (l *lab) explained(id model.GroupID) explain.Group {
	l.t.Helper()
	r := l.ctl.Report()
	if r == nil {
		l.t.Fatal("no report")
	}
	for _, g := range r.Groups {
		if g.ID == string(id) {
			return g
		}
	}
	l.t.Fatalf("nothing of %q in the report", id)
	return explain.Group{}
}

func codes(n explain.Node) (out []string) {
	for _, r := range n.Reasons {
		out = append(out, r.Code)
		if r.Text == "" {
			out = append(out, "without words")
		}
	}
	return out
}

func TestReport(t *testing.T) {
	plain := model.NodeGroup{ID: "plain", Max: 3, Annotations: annotation("min-warm", "many")}
	experiment(t, []model.NodeGroup{group(runners, "min-warm", "1", "prescale-max", "0", "max-idle", "5m", "node-price", "2"), plain}, func(t *testing.T, l *lab) {
		l.prepare()
		if l.ctl.Report() != nil {
			t.Error("a report before the first plan")
		}
		l.start()
		if g := l.explained(runners); g.Nodes == nil || len(g.Nodes)+g.Busy+g.Idle > 0 {
			t.Errorf("an empty group has %+v", g)
		}
		nodes := l.fleet(3)
		first, second := nodes[0], nodes[1]
		l.must(l.increase("plain", 1))
		for _, key := range []string{"a", "b", "c", "d", "e", "f"} {
			l.cluster.job(model.CacheKey(key), time.Second, first.Name)
			time.Sleep(5 * time.Second)
		}
		time.Sleep(time.Minute) // that batch is over
		began := time.Now()
		l.cluster.job("repo", time.Hour, second.Name)
		l.within(10*time.Second, "a busy node", func() bool { return l.explained(runners).Busy == 1 })

		g := l.explained(runners)
		if age := time.Since(g.At); age > 6*time.Second {
			t.Errorf("the report is %s old", age)
		}
		if g.Target != 3 || g.Idle != 2 || g.Settings.MinWarm != 1 || g.Settings.NodePrice != 2 ||
			g.Settings.MaxIdleSeconds == nil || *g.Settings.MaxIdleSeconds != 300 || g.Learnt.ColdPenaltySeconds != 180 {
			t.Errorf("group %+v", g)
		}
		if g.Learnt.BootSeconds >= usualBoot.Seconds() {
			t.Errorf("%v s to boot learnt from machines that take a few", g.Learnt.BootSeconds)
		}
		if f := g.Forecast; f.IdleNodes != 2 || f.BatchesPerHour <= 0 || f.IdleBatchesPerHour > f.BatchesPerHour {
			t.Errorf("forecast %+v", f)
		}
		if len(g.Nodes) != 3 {
			t.Fatalf("nodes %+v", g.Nodes)
		}
		// Idle ones first, the coldest of them first.
		cold, warm, busy := g.Nodes[0], g.Nodes[1], g.Nodes[2]
		if cold.State != explain.StateIdle || cold.WarmKeys != 0 || cold.LastUsed != nil || cold.Since == nil {
			t.Errorf("the cold node is %+v", cold)
		}
		if warm.Name != string(first.Name) || warm.WarmKeys != 6 || len(warm.Keys) != explain.MaxKeys || warm.Keys[0].Key != "f" ||
			warm.Keys[0].Jobs != 1 || warm.Keys[0].Warmth <= 0.9 || warm.Decision != "keep" {
			t.Errorf("the warm node is %+v", warm)
		}
		if warm.Since == nil || warm.Since.After(began) || began.Sub(*warm.Since) > 66*time.Second {
			t.Errorf("the warm node is idle since %v, its last job ended shortly before %v", warm.Since, began)
		}
		if !slices.Contains(codes(warm), "min-warm") {
			t.Errorf("the warm node stays because of %v", codes(warm))
		}
		if busy.Name != string(second.Name) || busy.State != explain.StateBusy || busy.Since != nil || !slices.Equal(codes(busy), []string{"busy"}) {
			t.Errorf("the busy node is %+v", busy)
		}

		// What it says is what is done.
		l.within(6*time.Minute, "release", func() bool { return l.explained(runners).Nodes[0].Decision == "release" })
		released := l.explained(runners).Nodes[0]
		if released.Name != cold.Name || !slices.Contains(codes(released), "max-idle") {
			t.Errorf("released is %+v", released)
		}
		l.within(2*time.Second, "node without protection", func() bool {
			node, _ := l.cluster.node(model.NodeName(cold.Name))
			return !node.Marks.Protected
		})
		node, _ := l.cluster.node(model.NodeName(cold.Name))
		l.cloud.tune(func(c *fakeCloud) { c.terminating = time.Minute })
		l.must(l.remove(runners, node))
		l.within(10*time.Second, "node that leaves", func() bool { return l.explained(runners).Leaving == 1 })
		leaving := l.explained(runners).Nodes[0]
		if leaving.State != explain.StateLeaving || leaving.Decision != "" || !slices.Contains(codes(leaving), "earlier") {
			t.Errorf("the node that leaves is %+v", leaving)
		}

		// A plain group is shown and has no plan.
		p := l.explained("plain")
		if len(p.Nodes) != 1 || !slices.Equal(codes(p.Nodes[0]), []string{"plain"}) || p.Nodes[0].Decision != "" || p.Target != 1 {
			t.Errorf("plain group %+v", p)
		}
		if len(p.Problems) != 1 || !strings.Contains(p.Problems[0], "min-warm") {
			t.Errorf("problems %v", p.Problems)
		}

		ctl := l.ctl
		l.must(l.kill())
		if ctl.Report() != nil {
			t.Error("a report of one that does not lead any more")
		}
	})
}

func TestReportOfParkedNodes(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m", "park", "stop")}, func(t *testing.T, l *lab) {
		l.start()
		nodes := l.fleet(2)
		l.cluster.job("repo", 10*time.Second, nodes[0].Name)
		time.Sleep(15 * time.Second)
		l.parked(nodes...)
		l.within(10*time.Second, "parked nodes", func() bool { return l.explained(runners).Parked == 2 })
		g := l.explained(runners)
		cold, warm := g.Nodes[0], g.Nodes[1]
		if cold.Instance != string(nodes[1].ID) || warm.Instance != string(nodes[0].ID) || warm.WarmKeys != 1 {
			t.Errorf("parked nodes in order %+v", g.Nodes)
		}
		for _, n := range g.Nodes {
			if n.State != explain.StateParked || n.Decision == "" || n.Since == nil || len(n.Reasons) == 0 {
				t.Errorf("parked node %+v", n)
			}
		}
		if s := g.Settings; !s.Parks() || s.ParkedPrice != parkedShare*unknownPrice || s.MaxParkedSeconds != (168*time.Hour).Seconds() {
			t.Errorf("settings %+v", s)
		}
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(10*time.Second, "node that resumes", func() bool { return l.explained(runners).Starting == 1 })
		if n := l.explained(runners).Nodes[0]; n.State != explain.StateStarting || !slices.Equal(codes(n), []string{"resuming"}) {
			t.Errorf("resuming node %+v", n)
		}
	})
}

// The last report may be read at any time, by many, and does not change.
func TestReportsAreFrozen(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "min-warm", "1", "max-idle", "10s", "park", "stop")}, func(t *testing.T, l *lab) {
		l.start()
		done := make(chan struct{})
		var readers sync.WaitGroup
		for range 3 {
			readers.Go(func() {
				var last *explain.Report
				var text []byte
				for {
					select {
					case <-done:
						return
					case <-time.After(130 * time.Millisecond):
					}
					if last != nil {
						if again, _ := json.Marshal(last); string(again) != string(text) {
							t.Error(cmp.Diff(string(text), string(again)))
						}
					}
					last = l.ctl.Report()
					text, _ = json.Marshal(last)
				}
			})
		}
		nodes := l.fleet(4)
		for range 10 {
			for _, n := range nodes {
				l.cluster.job("repo", 3*time.Second, n.Name)
			}
			time.Sleep(7 * time.Second)
		}
		l.cluster.annotate(runners, annotation("min-warm", "2"))
		time.Sleep(time.Minute)
		close(done)
		readers.Wait()
	})
}

func BenchmarkReport(b *testing.B) {
	o, r, end := largeFleet(b, 10, 500)
	defer end()
	o.read(r)
	for b.Loop() {
		o.explainPlan(time.Now())
	}
	text, err := json.Marshal(o.report.Load())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(len(text)), "bytes")
}
