package nodegroups

import (
	"fmt"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// settledGroup is a runner group of that many Ready nodes, every tenth busy,
// all of them revealed.
func settledGroup(tb testing.TB, nodes int) (*Group, time.Time) {
	w := newWorld()
	spec := model.NodeGroup{ID: "runners", Max: 2 * nodes}
	settings := Defaults(spec)
	settings.Role = model.RoleRunner
	g := NewGroup(spec, settings, Record{})
	step := func(e Event) {
		if _, err := g.Step(e, w.now); err != nil {
			tb.Fatal(err)
		}
	}
	w.desired = nodes
	w.launch()
	var decide Decide
	for i, id := range w.ids() {
		w.set(id, model.InstanceRunning)
		w.register(id)
		w.ready(id, true)
		step(ObserveNode{w.nodes[id]})
		step(ObserveBusy{id, i%10 == 0})
		decide.Verdicts = append(decide.Verdicts, model.Verdict{Instance: id, Decision: model.DecisionRelease, Score: float64(i)})
	}
	step(ObserveCloud{w.read()})
	step(decide)
	if g.record.Target != nodes || g.record.Hidden != 0 {
		tb.Fatalf("the group has %d nodes and %d hidden ones", g.record.Target, g.record.Hidden)
	}
	return g, w.now.Add(time.Second)
}

// BenchmarkStep is what the owner does for one event: Clone, Step, Ready.
func BenchmarkStep(b *testing.B) {
	for _, nodes := range []int{50, 2000} {
		g, now := settledGroup(b, nodes)
		for _, e := range []Event{Refresh{}, IncreaseSize{Delta: 1}, DeleteNodes{[]model.InstanceID{"i-2"}}, ObserveBusy{"i-2", true}} {
			b.Run(fmt.Sprintf("%T/%d", e, nodes)[len("nodegroups."):], func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					next := g.Clone()
					if _, err := next.Step(e, now); err != nil {
						b.Fatal(err)
					}
					next.Ready(now)
				}
			})
		}
	}
}
