// Package model is Hearth's vocabulary: the named types that every other
// package speaks in. It owns no logic and no state; it imports nothing but the
// standard library, so that pure packages and adapters can share it.
//
// Unless a comment says otherwise a zero time.Time means "never" or "not
// known", and every value may be copied freely; maps and slices are shared and
// must not be changed by whoever receives them.
package model

import "time"

// Prefix starts every annotation, label and API group of Hearth.
const Prefix = "hearth.dev"

// Named ids. They are opaque: nothing but equality and order is meaningful.
type (
	// GroupID names a node group: on AWS the Auto Scaling group's name.
	GroupID string
	// InstanceID is the providerID of an instance, as in Node.spec.providerID.
	InstanceID string
	// NodeName is the name of a Node object. Names are reused by clouds; an
	// InstanceID is not.
	NodeName string
	// CacheKey names a pipeline whose layers an engine may hold.
	CacheKey string
)

// Role says what a node group is for.
type Role string

// Roles. A plain group is scaled exactly as cluster-autoscaler's own providers
// do: it is never annotated, parked or prescaled.
const (
	RolePlain  Role = "plain"
	RoleRunner Role = "runner"
)

// Phase is where an instance is in its life (RunnerNode status.phase).
type Phase string

// Phases, in the order of a life.
const (
	PhaseLaunching   Phase = "Launching"
	PhaseReady       Phase = "Ready"
	PhaseDraining    Phase = "Draining"
	PhaseParking     Phase = "Parking"
	PhaseParked      Phase = "Parked"
	PhaseResuming    Phase = "Resuming"
	PhaseTerminating Phase = "Terminating"
)

// Phases lists every phase once.
func Phases() []Phase {
	return []Phase{
		PhaseLaunching, PhaseReady, PhaseDraining, PhaseParking, PhaseParked,
		PhaseResuming, PhaseTerminating,
	}
}

// Desired is what Hearth means to become of an instance (RunnerNode
// spec.desired).
type Desired string

// Desired states.
const (
	DesiredRunning Desired = "Running"
	DesiredParked  Desired = "Parked"
	DesiredGone    Desired = "Gone"
)

// Decision is the plan's verdict on a node.
type Decision string

// Decisions. The zero value is no decision: nothing may be removed on it.
const (
	DecisionKeep    Decision = "keep"
	DecisionRelease Decision = "release"
	DecisionPark    Decision = "park"
)

// Verdict is a decision on one instance with everything that led to it.
type Verdict struct {
	Instance InstanceID
	Decision Decision
	// Score orders the group's nodes: the lowest goes first. Its unit is the
	// policy's own; only the order has a meaning outside pkg/scoring.
	Score float64
	// Reasons are the facts the decision rests on, the weightiest first.
	Reasons []Reason
}

// Reason is one fact behind a decision, as data: Code is a stable word for
// metrics and tests, Text the sentence people read.
type Reason struct {
	Code string
	Text string
}

// NodeGroup is the declaration of a group: what the cloud or the config file
// says it is, before annotations are interpreted.
type NodeGroup struct {
	ID       GroupID
	Min, Max int
	Template Template
	// Annotations as declared by the backend or the config file. Those of
	// the RunnerNodeGroup object win over them (pkg/nodegroups, Merge).
	Annotations map[string]string
}

// Template is what a node of the group will look like once it registers.
type Template struct {
	// Capacity and Allocatable map resource names to Kubernetes quantities in
	// their canonical text form. An empty Allocatable means Capacity.
	Capacity    map[string]string
	Allocatable map[string]string
	Labels      map[string]string
	Taints      []Taint
	// Zone and InstanceType become the well-known topology and instance type
	// labels.
	Zone         string
	InstanceType string
}

// Taint is a Kubernetes node taint.
type Taint struct {
	Key    string `json:"key"`
	Value  string `json:"value,omitempty"`
	Effect string `json:"effect"`
}

// InstanceState is the state in which a cloud reports an instance.
type InstanceState string

// Instance states. Gone instances are not reported at all.
const (
	InstancePending     InstanceState = "Pending"     // being started for the first time or again
	InstanceRunning     InstanceState = "Running"     // started; says nothing about its Node
	InstanceStopping    InstanceState = "Stopping"    // on its way to Stopped
	InstanceStopped     InstanceState = "Stopped"     // disk intact, no compute
	InstanceTerminating InstanceState = "Terminating" // on its way to gone; cannot come back
)

// Instance is one instance as the cloud reports it.
type Instance struct {
	ID         InstanceID
	State      InstanceState
	LaunchedAt time.Time
	// Outdated: the group's next instance would be made in another way, of
	// another image perhaps.
	Outdated bool
}

// FailureClass says why a cloud did not start an instance.
type FailureClass string

// Failure classes.
const (
	FailureCapacity    FailureClass = "capacity"
	FailureQuota       FailureClass = "quota"
	FailureTemplate    FailureClass = "launch-template"
	FailurePermissions FailureClass = "permissions"
	FailureNetwork     FailureClass = "network"
	FailureThrottled   FailureClass = "throttled"
	FailureUnknown     FailureClass = "unknown"
)

// LaunchFailure is the cloud's last word on instances that it should have
// started and could not.
type LaunchFailure struct {
	// Activity identifies the failed attempt; a later attempt has another id.
	Activity string
	Class    FailureClass
	Message  string
	At       time.Time
}

// GroupSnapshot is everything that a cloud reports of one group at one moment.
type GroupSnapshot struct {
	// TakenAt is when the read began: whatever was completed before it is
	// contained.
	TakenAt time.Time
	// Desired is the number of pending and running instances that the cloud
	// works towards; stopped and terminating ones are not in it.
	Desired   int
	Instances []Instance
	// Failure is the newest failed attempt to reach Desired, nil when the
	// last attempt succeeded or none is outstanding.
	Failure *LaunchFailure
}

// Snapshot is one read of all groups. A group that could not be read is in
// Errors and not in Groups; one broken group never fails the others.
type Snapshot struct {
	Groups map[GroupID]GroupSnapshot
	Errors map[GroupID]error
}

// Node is what matters of a Node object.
type Node struct {
	Name NodeName
	UID  string
	ID   InstanceID
	// Ready is the Ready condition; ReadyChanged when it last changed.
	Ready        bool
	ReadyChanged time.Time
	Created      time.Time
	// Draining: our taint is on it. CATaintSince: when cluster-autoscaler's
	// ToBeDeleted taint was put on it, zero when it is not.
	Draining      bool
	CATaintSince  time.Time
	Unschedulable bool
	// Marks are our own annotations as they are now.
	Marks Marks
	// Labels of the node; shared with the cache, read only.
	Labels map[string]string
}

// Marks are the annotations and labels that Hearth keeps on the nodes of runner
// groups.
type Marks struct {
	Decision Decision
	Reason   string
	// Protected: cluster-autoscaler's scale-down-disabled is "true".
	// ProtectedByUs: we set it and may take it off; a person's own stays.
	Protected     bool
	ProtectedByUs bool
	// Warm are the keys that the node's labels call it warm for.
	Warm WarmKeys
}

// MaxWarmLabels bounds the keys that a node's labels call it warm for.
const MaxWarmLabels = 20

// WarmKeys are cache keys in ascending order; the places left are empty.
type WarmKeys [MaxWarmLabels]CacheKey

// Pod is what matters of a pod that is bound to a node of ours or waits for
// one.
type Pod struct {
	Namespace, Name, UID string
	// EngineState is zero unless the pod is an engine's.
	EngineState EngineState
	// Node is empty until the pod is bound.
	Node NodeName
	Key  CacheKey
	// Job is the key of the job that the pod's runner has picked up, where that
	// is known only then and says more than Key; else empty.
	Job CacheKey
	// Waiting: it is a runner that is known to have no job yet: a free slot, and
	// not work.
	Waiting bool
	// Placement is what the placement webhook decided for the pod, in words;
	// empty when it did not see the pod.
	Placement string
	// Kind tells a job from an engine and from what may be ignored.
	Kind PodKind
	// Created, Started and Finished as in the pod's status.
	Created, Started, Finished time.Time
	// Failed: it has finished, and not with success.
	Failed bool
	// Group is the node group that the pod asks for by its node selector,
	// empty when it does not say.
	Group GroupID
	// IP is the address of the pod, empty until it has one.
	IP string
	// Engine tells of the container in which the engine runs; nil unless the
	// pod is an engine's.
	Engine *EngineContainer
}

// PodKind tells what a pod is to Hearth.
type PodKind int

// Pod kinds.
const (
	PodIgnored PodKind = iota // DaemonSet and mirror pods: they never keep a node
	PodRunner                 // runs CI jobs: keeps its node busy until it finishes
	PodEngine                 // a Dagger engine
)
