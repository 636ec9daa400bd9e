package nodegroups

import (
	"cmp"
	"slices"

	"github.com/hearth-ci/hearth/pkg/model"
)

// InstanceStatus is the state of an instance as cluster-autoscaler is told.
type InstanceStatus int

// Instance statuses; the numbers are those of the wire (InstanceState).
const (
	StatusRunning  InstanceStatus = 1
	StatusCreating InstanceStatus = 2
	StatusDeleting InstanceStatus = 3
)

// InstanceView is one line of NodeGroupNodes. A Failure makes it a placeholder
// for an instance that the cloud could not start.
type InstanceView struct {
	ID      model.InstanceID
	Status  InstanceStatus
	Failure *model.LaunchFailure
}

// View is what cluster-autoscaler is told of one group between two Refreshes:
// frozen but for its own writes. A published View never changes; a write
// publishes a changed copy.
type View struct {
	Group    model.NodeGroup
	Settings Settings
	Target   int
	// Starting: some instance is wanted or there that CA may not hold for Ready
	// yet.
	Starting bool
	// Debug is one line for people: sizes by phase.
	Debug string
	// Instances are sorted by id.
	Instances []InstanceView
}

// find returns the position of id among the instances, or false.
func (v *View) find(id model.InstanceID) (int, bool) {
	return slices.BinarySearchFunc(v.Instances, id, func(i InstanceView, id model.InstanceID) int {
		return cmp.Compare(i.ID, id)
	})
}

// Owns says whether NodeGroupForNode answers this group for the instance: it
// is listed and not on its way out.
func (v *View) Owns(id model.InstanceID) bool {
	at, ok := v.find(id)
	return ok && v.Instances[at].Status != StatusDeleting
}

// FleetView is one consistent answer for all groups. It never changes once
// made, so readers need no lock.
type FleetView struct {
	groups     []*View
	byID       map[model.GroupID]*View
	byInstance map[model.InstanceID]model.GroupID
}

// NewFleetView builds the answer for the given groups.
func NewFleetView(groups []*View) *FleetView {
	f := &FleetView{
		groups:     slices.Clone(groups),
		byID:       make(map[model.GroupID]*View, len(groups)),
		byInstance: map[model.InstanceID]model.GroupID{},
	}
	slices.SortFunc(f.groups, func(a, b *View) int { return cmp.Compare(a.Group.ID, b.Group.ID) })
	for _, v := range f.groups {
		f.byID[v.Group.ID] = v
		for _, i := range v.Instances {
			f.byInstance[i.ID] = v.Group.ID
		}
	}
	return f
}

// With returns the answer in which v replaces the view of its group. The cost
// is the number of groups, plus the number of instances when v lists one that
// was not listed before.
func (f *FleetView) With(v *View) *FleetView {
	groups := slices.Clone(f.groups)
	for i := range groups {
		if groups[i].Group.ID == v.Group.ID {
			groups[i] = v
		}
	}
	for _, i := range v.Instances {
		if f.byInstance[i.ID] != v.Group.ID {
			return NewFleetView(groups)
		}
	}
	byID := make(map[model.GroupID]*View, len(groups))
	for _, g := range groups {
		byID[g.Group.ID] = g
	}
	return &FleetView{groups: groups, byID: byID, byInstance: f.byInstance}
}

// Groups returns every group's view, sorted by id. The slice must not be
// changed.
func (f *FleetView) Groups() []*View { return f.groups }

// Group returns the view of one group, nil when there is none.
func (f *FleetView) Group(id model.GroupID) *View { return f.byID[id] }

// ForInstance returns the view of the group that owns the instance, nil when
// it is no one's: unknown, hidden or on its way out. It does not allocate.
func (f *FleetView) ForInstance(id model.InstanceID) *View {
	group, ok := f.byInstance[id]
	if !ok {
		return nil
	}
	if v := f.byID[group]; v != nil && v.Owns(id) {
		return v
	}
	return nil
}
