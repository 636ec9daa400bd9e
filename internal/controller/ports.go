package controller

import (
	"context"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// Backend is a cloud. All methods are safe for concurrent use and idempotent:
// a call that may have taken effect is simply made again.
type Backend interface {
	// Snapshot reads all groups. An error means that nothing could be read; a
	// group that could not be read alone is in Snapshot.Errors. A group in which
	// nothing can have changed since the last snapshot may be left out of both:
	// what that one said holds.
	Snapshot(ctx context.Context) (model.Snapshot, error)
	// Resize sets how many pending and running instances the cloud works
	// towards. Lowering it only cancels what is not yet an instance.
	Resize(ctx context.Context, group model.GroupID, desired int) error
	// Terminate and Stop lower the desired number by every instance that was
	// pending or running; Start raises it. Unknown instances are skipped. An
	// error that is [model.ErrUnderWay] has the call made again after a while.
	Terminate(ctx context.Context, group model.GroupID, ids []model.InstanceID) error
	Stop(ctx context.Context, group model.GroupID, ids []model.InstanceID) error
	Start(ctx context.Context, group model.GroupID, ids []model.InstanceID) error
}

// Store keeps what must survive. Writes of one group are never made at the
// same time. ErrSuperseded from SaveGroup means that another process leads.
type Store interface {
	// Load returns the records of all groups, the annotations that people put
	// on them, and what is known of their instances.
	Load(ctx context.Context) (
		records map[model.GroupID]nodegroups.Record,
		annotations map[model.GroupID]map[string]string,
		nodes []model.NodeRecord,
		err error,
	)
	SaveGroup(ctx context.Context, group model.GroupID, record nodegroups.Record, summary model.GroupSummary) error
	SaveNode(ctx context.Context, record model.NodeRecord) error
	DeleteNode(ctx context.Context, id model.InstanceID) error
}

// Memories keeps what the policy has learnt, group by group. That it is lost
// is harmless: it is learnt again. Methods are safe for concurrent use for
// different groups.
type Memories interface {
	LoadLearnt(ctx context.Context) (map[model.GroupID][]byte, error)
	SaveLearnt(ctx context.Context, group model.GroupID, data []byte) error
}

// Nodes acts on Node objects. Every method is idempotent, and a Node that does
// not exist (or has another UID) is a success.
type Nodes interface {
	// Taint puts our draining taint on; Untaint takes it off again, with
	// cluster-autoscaler's taint and the cordon that came with it.
	Taint(ctx context.Context, name model.NodeName, uid string) error
	Untaint(ctx context.Context, name model.NodeName, uid string) error
	// ClearCATaint removes cluster-autoscaler's ToBeDeleted taint.
	ClearCATaint(ctx context.Context, name model.NodeName, uid string) error
	Delete(ctx context.Context, name model.NodeName, uid string) error
	// Label puts the label of its group on a node that has none.
	Label(ctx context.Context, name model.NodeName, uid string, group model.GroupID) error
	// Mark makes the node's annotations those of marks; a person's own
	// scale-down-disabled is never touched.
	Mark(ctx context.Context, name model.NodeName, uid string, marks model.Marks) error
}

// Pods reads pods, and the Nodes under them, past every cache.
type Pods interface {
	// NodeOf returns the Node of an instance, zero when there is none.
	NodeOf(ctx context.Context, id model.InstanceID) (model.Node, error)
	// PodsOn lists the pods that are bound to the node: those of CI jobs that
	// have not finished, and engines.
	PodsOn(ctx context.Context, node model.NodeName) ([]model.Pod, error)
}

// Engines acts on the pods of engines. Both methods are idempotent and touch
// only the very pod, by its UID.
type Engines interface {
	// StopEngine has our finalizer put on the pod and then the pod deleted, so
	// that its engine ends and its exit code can be seen. It returns true when
	// there is no such pod.
	StopEngine(ctx context.Context, pod model.Pod) (gone bool, err error)
	// ReleaseEngine takes the finalizer off; that there is no such pod is a
	// success.
	ReleaseEngine(ctx context.Context, pod model.Pod) error
}

// Events tells people what happened, beside the object that it happened to.
// Implementations drop events rather than block.
type Events interface {
	Node(node model.Node, severity model.Severity, reason, message string)
	Group(group model.GroupID, severity model.Severity, reason, message string)
}
