package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// fakeFleet is a Reader, Writer and Ranker with state: sizes move, nodes go,
// and every method can be made to fail, hang or panic.
type fakeFleet struct {
	mu       sync.Mutex
	groups   map[model.GroupID]*nodegroups.View // what the next Refresh shows
	shown    *nodegroups.FleetView
	busy     map[model.InstanceID]bool
	forgets  int
	forgot   []model.GroupID
	wasAlive []bool // whether the context of each ForgetGroup had not ended
	best     func([]ExpanderOption) []model.GroupID

	// before runs at the start of every write; its error is the answer.
	before func(ctx context.Context, operation string) error
}

// newFakeFleet has groups with so many running instances each, not shown yet.
func newFakeFleet(groups, nodes int) *fakeFleet {
	f := &fakeFleet{
		groups: map[model.GroupID]*nodegroups.View{},
		busy:   map[model.InstanceID]bool{},
		before: func(context.Context, string) error { return nil },
		best:   func(o []ExpanderOption) []model.GroupID { return []model.GroupID{o[0].Group} },
	}
	for g := range groups {
		id := model.GroupID(fmt.Sprintf("group-%d", g))
		group := model.NodeGroup{ID: id, Min: 0, Max: 2 * nodes, Template: model.Template{
			Capacity: map[string]string{"cpu": "8", "memory": "32Gi", "pods": "110"},
			Labels:   map[string]string{"example.com/team": "a"},
			Taints:   []model.Taint{{Key: "ci", Value: "true", Effect: "NoSchedule"}},
			Zone:     "a", InstanceType: "kwok.8x",
		}}
		view := &nodegroups.View{Group: group, Settings: nodegroups.Defaults(group), Target: nodes, Debug: fmt.Sprintf("%d ready", nodes)}
		for n := range nodes {
			view.Instances = append(view.Instances, nodegroups.InstanceView{ID: instance(g, n), Status: nodegroups.StatusRunning})
		}
		slices.SortFunc(view.Instances, byID)
		f.groups[id] = view
	}
	return f
}

func byID(a, b nodegroups.InstanceView) int {
	if a.ID < b.ID {
		return -1
	}
	return 1
}

func instance(group, node int) model.InstanceID {
	return model.InstanceID(fmt.Sprintf("kwok://group-%d/i-%017x", group, node))
}

// show does what a Refresh does.
func (f *fakeFleet) show() *fakeFleet {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.shown = nodegroups.NewFleetView(slices.Collect(maps.Values(f.groups)))
	return f
}

// hide is the loss of leadership.
func (f *fakeFleet) hide() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.shown = nil
}

// change replaces what is known of a group; it is shown at the next Refresh.
func (f *fakeFleet) change(id model.GroupID, how func(*nodegroups.View)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := *f.groups[id]
	next.Instances = slices.Clone(next.Instances)
	how(&next)
	f.groups[id] = &next
}

// write is change that is shown at once.
func (f *fakeFleet) write(id model.GroupID, how func(*nodegroups.View)) {
	f.change(id, how)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.shown = f.shown.With(f.groups[id])
}

func (f *fakeFleet) View() *nodegroups.FleetView {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.shown
}

func (f *fakeFleet) Refresh(ctx context.Context) error {
	if err := f.before(ctx, "Refresh"); err != nil {
		return err
	}
	f.show()
	return nil
}

func (f *fakeFleet) IncreaseSize(ctx context.Context, id model.GroupID, delta int) error {
	if err := f.before(ctx, "IncreaseSize"); err != nil {
		return err
	}
	if v := f.View().Group(id); v.Target+delta > v.Group.Max {
		return nodegroups.Refuse(nodegroups.KindOutOfRange, id, "max", "size %d + %d exceeds the maximum of %d", v.Target, delta, v.Group.Max)
	}
	f.write(id, func(v *nodegroups.View) { v.Target += delta })
	return nil
}

func (f *fakeFleet) DeleteNodes(ctx context.Context, id model.GroupID, ids []model.InstanceID) error {
	if err := f.before(ctx, "DeleteNodes"); err != nil {
		return err
	}
	for _, i := range ids {
		if !slices.ContainsFunc(f.View().Group(id).Instances, func(v nodegroups.InstanceView) bool { return v.ID == i }) {
			return nodegroups.Refuse(nodegroups.KindNotFound, id, "unknown-instance", "unknown instance %q", string(i))
		}
		if f.busy[i] {
			return nodegroups.Refuse(nodegroups.KindVetoed, id, "busy", "instance %q is busy", string(i))
		}
	}
	f.write(id, func(v *nodegroups.View) {
		for at, i := range v.Instances {
			if slices.Contains(ids, i.ID) && i.Status != nodegroups.StatusDeleting {
				v.Instances[at].Status = nodegroups.StatusDeleting
				v.Target--
			}
		}
	})
	return nil
}

func (f *fakeFleet) DecreaseTargetSize(ctx context.Context, id model.GroupID, delta int) error {
	if err := f.before(ctx, "DecreaseTargetSize"); err != nil {
		return err
	}
	f.write(id, func(v *nodegroups.View) { v.Target = max(len(v.Instances), v.Target+delta) })
	return nil
}

func (f *fakeFleet) Forget(ctx context.Context) error {
	if err := f.before(ctx, "Forget"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgets++
	return nil
}

func (f *fakeFleet) ForgetGroup(ctx context.Context, id model.GroupID) error {
	if err := f.before(ctx, "ForgetGroup"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgot = append(f.forgot, id)
	_, bounded := ctx.Deadline()
	f.wasAlive = append(f.wasAlive, ctx.Err() == nil && bounded)
	return nil
}

func (f *fakeFleet) forgotten() (all int, groups []model.GroupID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.forgets, slices.Clone(f.forgot)
}

func (f *fakeFleet) BestOptions(options []ExpanderOption) []model.GroupID { return f.best(options) }

// fails makes one operation fail.
func (f *fakeFleet) fails(operation string, err error) {
	f.before = func(_ context.Context, o string) error {
		if o == operation {
			return err
		}
		return nil
	}
}

// hangs makes one operation wait for the end of its context, or of the test.
func (f *fakeFleet) hangs(operation string, entered chan<- struct{}) {
	f.before = func(ctx context.Context, o string) error {
		if o != operation {
			return nil
		}
		entered <- struct{}{}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Minute):
			return fmt.Errorf("%s: nobody gave up within a minute", operation)
		}
	}
}
