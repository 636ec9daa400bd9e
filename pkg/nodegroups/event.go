package nodegroups

import (
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Event is something that happened to a group. Observations (their names say
// so) commute with each other; commands do not.
type Event interface{ isEvent() }

// Events.
type (
	// Configure replaces the declaration and the settings.
	Configure struct {
		Group    model.NodeGroup
		Settings Settings
	}
	// ObserveCloud is a whole reading of the group from the cloud.
	ObserveCloud struct{ Snapshot model.GroupSnapshot }
	// ObserveNode is the present state of a Node object of the group.
	ObserveNode struct{ Node model.Node }
	// ObserveNodeGone says that the instance has no Node object.
	ObserveNodeGone struct{ Instance model.InstanceID }
	// Known says that the instance was this group's in an earlier life of
	// Hearth: its Node may be deleted when the instance has gone meanwhile. A
	// Node's own label is no proof of that.
	Known struct{ Instance model.InstanceID }
	// ObserveBusy says whether runner pods are on it.
	ObserveBusy struct {
		Instance model.InstanceID
		Busy     bool
	}
	// ObserveEngine is the present state of the engine pods on it; there
	// should be one.
	ObserveEngine struct {
		Instance model.InstanceID
		Pods     []model.Pod
	}
	// ObserveUse says whether sessions are connected to its engine, as of the
	// sample at a time. Metrics: it has told so before, so that not to know is
	// no sign of quiet.
	ObserveUse struct {
		Instance model.InstanceID
		Activity model.Activity
		At       time.Time
		Metrics  bool
	}
	// Decide is the plan: it replaces all earlier verdicts of the group.
	Decide struct{ Verdicts []model.Verdict }
	// Refresh begins a loop of CA's: the view is made anew.
	Refresh struct{}
	// Forget says that CA may have lost its memory of what it asked for.
	Forget struct{}
	// IncreaseSize is CA's write. Prefer ranks parked instances: those that
	// fit the waiting jobs best come first.
	IncreaseSize struct {
		Delta  int
		Prefer []model.InstanceID
	}
	// DeleteNodes is CA's write; all or nothing.
	DeleteNodes struct{ Instances []model.InstanceID }
	// DecreaseTargetSize is CA's write; Delta is negative.
	DecreaseTargetSize struct{ Delta int }
	// Prescale asks for Want nodes to be on their way before CA asks. It is a
	// level, not a difference: asking twice launches once.
	Prescale struct {
		Want   int
		Prefer []model.InstanceID
		Reason string
	}
	// Confirmed answers a Confirm effect: whether no runner pods are on the
	// node, and which engine pods are.
	Confirmed struct {
		Instance model.InstanceID
		Idle     bool
		Engines  []model.Pod
	}
	// Looked answers a Look effect: what there is of a Node is known.
	Looked struct{ Instance model.InstanceID }
	// EngineGone answers a StopEngine effect: the pod does not exist.
	EngineGone struct {
		Instance model.InstanceID
		UID      string
	}
	// Done reports the end of an effect at a time.
	Done struct {
		Effect Effect
		Err    error
		At     time.Time
	}
)

func (Configure) isEvent()          {}
func (ObserveCloud) isEvent()       {}
func (ObserveNode) isEvent()        {}
func (ObserveNodeGone) isEvent()    {}
func (Known) isEvent()              {}
func (ObserveBusy) isEvent()        {}
func (ObserveEngine) isEvent()      {}
func (ObserveUse) isEvent()         {}
func (Decide) isEvent()             {}
func (Refresh) isEvent()            {}
func (Forget) isEvent()             {}
func (IncreaseSize) isEvent()       {}
func (DeleteNodes) isEvent()        {}
func (DecreaseTargetSize) isEvent() {}
func (Prescale) isEvent()           {}
func (Confirmed) isEvent()          {}
func (Looked) isEvent()             {}
func (EngineGone) isEvent()         {}
func (Done) isEvent()               {}
