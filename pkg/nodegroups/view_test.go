package nodegroups

import (
	"fmt"
	"slices"
	"testing"

	"github.com/hearth-ci/hearth/pkg/model"
)

func viewOf(id model.GroupID, instances ...InstanceView) *View {
	slices.SortFunc(instances, byInstance)
	return &View{Group: model.NodeGroup{ID: id}, Target: len(instances), Instances: instances}
}

func running(id model.InstanceID) InstanceView { return InstanceView{ID: id, Status: StatusRunning} }

// owner is the group that ForInstance answers, as text.
func owner(f *FleetView, id model.InstanceID) string {
	if v := f.ForInstance(id); v != nil {
		return string(v.Group.ID)
	}
	return "nobody"
}

func TestFleetView(t *testing.T) {
	failed := InstanceView{ID: "i-placeholder-a-act1-1", Status: StatusCreating, Failure: &model.LaunchFailure{Class: model.FailureCapacity}}
	a := viewOf("a", running("i-1"), InstanceView{ID: "i-2", Status: StatusCreating}, InstanceView{ID: "i-3", Status: StatusDeleting}, failed)
	b := viewOf("b", running("i-4"))
	f := NewFleetView([]*View{b, a})
	for id, want := range map[model.InstanceID]string{
		"i-1": "a", "i-2": "a", failed.ID: "a", "i-4": "b",
		"i-3": "nobody", // on its way out
		"i-5": "nobody", // hidden, parked or foreign: not listed
		"":    "nobody",
	} {
		if got := owner(f, id); got != want {
			t.Errorf("%q belongs to %s, want %s", id, got, want)
		}
	}
	if groups := f.Groups(); len(groups) != 2 || groups[0] != a || groups[1] != b {
		t.Errorf("groups are not sorted by id: %v", groups)
	}
	if f.Group("a") != a || f.Group("c") != nil {
		t.Error("Group does not find groups by id")
	}
}

func TestFleetViewWith(t *testing.T) {
	before := NewFleetView([]*View{viewOf("a", running("i-1"), running("i-2")), viewOf("b", running("i-3"))})
	tests := map[string]struct {
		with *View
		want map[model.InstanceID]string
	}{
		"one on its way out": {viewOf("a", running("i-1"), InstanceView{ID: "i-2", Status: StatusDeleting}), map[model.InstanceID]string{"i-1": "a", "i-2": "nobody", "i-3": "b"}},
		"one less":           {viewOf("a", running("i-1")), map[model.InstanceID]string{"i-1": "a", "i-2": "nobody", "i-3": "b"}},
		"one more":           {viewOf("a", running("i-1"), running("i-2"), running("i-4")), map[model.InstanceID]string{"i-1": "a", "i-2": "a", "i-3": "b", "i-4": "a"}},
		"none":               {viewOf("a"), map[model.InstanceID]string{"i-1": "nobody", "i-2": "nobody", "i-3": "b"}},
		"an unknown group":   {viewOf("c"), map[model.InstanceID]string{"i-1": "a", "i-2": "a", "i-3": "b"}},
	}
	for name, tt := range tests {
		after := before.With(tt.with)
		for id, want := range tt.want {
			if got := owner(after, id); got != want {
				t.Errorf("%s: %s belongs to %s, want %s", name, id, got, want)
			}
		}
		if id := tt.with.Group.ID; id != "c" && after.Group(id) != tt.with {
			t.Errorf("%s: the group's view was not replaced", name)
		}
		if len(after.Groups()) != 2 || after.Group("b") != before.Group("b") {
			t.Errorf("%s: another group changed", name)
		}
		for id, want := range map[model.InstanceID]string{"i-1": "a", "i-2": "a", "i-3": "b", "i-4": "nobody"} {
			if got := owner(before, id); got != want {
				t.Errorf("%s: before, %s belonged to %s; now %s", name, id, want, got)
			}
		}
	}
	// An instance that went and came back, and one that moved.
	again := before.With(viewOf("a", running("i-1"))).With(viewOf("a", running("i-1"), running("i-2")))
	if got := owner(again, "i-2"); got != "a" {
		t.Errorf("i-2 came back to %s", got)
	}
	moved := before.With(viewOf("a", running("i-1"))).With(viewOf("b", running("i-2"), running("i-3")))
	if got := owner(moved, "i-2"); got != "b" {
		t.Errorf("i-2 moved to %s", got)
	}
}

// TestIncreaseListsEveryInstanceOnce: nodes that are absorbed take their places
// among those that are listed.
func TestIncreaseListsEveryInstanceOnce(t *testing.T) {
	g, now := settledGroup(t, 40)
	for i, id := range g.memberIDs() {
		if i%2 == 0 { // not Ready after all, and hidden
			n := g.nodes[id]
			n.Ready = false
			g.nodes[id] = n
			g.members[id].wasReady = false
		}
	}
	for _, e := range []Event{Forget{}, IncreaseSize{Delta: 15}} {
		if _, err := g.Step(e, now); err != nil {
			t.Fatal(err)
		}
	}
	v := g.View()
	if v.Target != 35 || len(v.Instances) != 35 || !slices.IsSortedFunc(v.Instances, byInstance) {
		t.Errorf("the view lists %d of %d: %+v", len(v.Instances), v.Target, v.Instances)
	}
	if distinct := slices.CompactFunc(slices.Clone(v.Instances), func(a, b InstanceView) bool { return a.ID == b.ID }); len(distinct) != 35 {
		t.Errorf("the view lists only %d different instances", len(distinct))
	}
}

func TestForInstanceDoesNotAllocate(t *testing.T) {
	f := fleetOf(10, 50)
	ids := []model.InstanceID{"aws:///zone/i-3-7", "aws:///zone/i-9-49", "unknown", ""}
	if n := testing.AllocsPerRun(100, func() {
		for _, id := range ids {
			f.ForInstance(id)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func fleetOf(groups, nodes int) *FleetView { return NewFleetView(viewsOf(groups, nodes)) }

func viewsOf(groups, nodes int) []*View {
	views := make([]*View, groups)
	for g := range groups {
		instances := make([]InstanceView, nodes)
		for i := range nodes {
			instances[i] = running(model.InstanceID(fmt.Sprintf("aws:///zone/i-%d-%d", g, i)))
		}
		views[g] = viewOf(model.GroupID(fmt.Sprintf("group-%d", g)), instances...)
	}
	return views
}

func BenchmarkNewFleetView(b *testing.B) {
	views := viewsOf(300, 50)
	b.ReportAllocs()
	for b.Loop() {
		NewFleetView(views)
	}
}

func BenchmarkFleetViewWith(b *testing.B) {
	f := fleetOf(300, 50)
	v := *f.Groups()[7]
	b.ReportAllocs()
	for b.Loop() {
		f.With(&v)
	}
}

func BenchmarkForInstance(b *testing.B) {
	f := fleetOf(300, 50)
	b.ReportAllocs()
	for b.Loop() {
		f.ForInstance("aws:///zone/i-150-25")
	}
}
