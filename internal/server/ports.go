package server

import (
	"context"
	"fmt"
	"iter"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// Reader has what reads are answered from.
type Reader interface {
	// View returns the present answer for all groups; nil before the first
	// snapshot and while this process does not lead. It must not block.
	View() *nodegroups.FleetView
}

// Writer takes what CA asks for. Every method returns once the change is
// recorded and in View, or an error: of type *nodegroups.Error when nothing
// changed.
type Writer interface {
	// Refresh begins a loop of CA's: View is made anew. Its group list then
	// stays as it is until the next Refresh.
	Refresh(ctx context.Context) error
	// IncreaseSize raises the target size. It is not idempotent. delta > 0.
	IncreaseSize(ctx context.Context, id model.GroupID, delta int) error
	// DeleteNodes accepts the removal of all the instances, each named once,
	// or of none. It is idempotent.
	DeleteNodes(ctx context.Context, id model.GroupID, ids []model.InstanceID) error
	// DecreaseTargetSize cancels what is not born yet, at most -delta
	// instances, and succeeds even when that is none. delta < 0.
	DecreaseTargetSize(ctx context.Context, id model.GroupID, delta int) error
	Forgetter
}

// Forgetter is told when CA may no longer know what it asked for. Nodes that
// are not Ready yet are then hidden until it asks again. Both methods are
// idempotent.
type Forgetter interface {
	// Forget is for all groups: CA is at a new connection or said good-bye.
	Forget(ctx context.Context) error
	// ForgetGroup is for one group: an IncreaseSize was answered too late.
	ForgetGroup(ctx context.Context, id model.GroupID) error
}

// Ranker says which expander options are best.
type Ranker interface {
	// BestOptions returns the groups of the best options, one or more. What is
	// not among the options does not count; when nothing is left all options
	// stay. It must not change the options or keep them.
	BestOptions(options []ExpanderOption) []model.GroupID
}

// ExpanderOption is one way in which CA could serve pending pods: NodeCount
// more nodes in Group.
type ExpanderOption struct {
	Group     model.GroupID
	NodeCount int
	Debug     string // CA's own description

	pods [][]byte
}

// PodCount is how many pods the option serves.
func (o ExpanderOption) PodCount() int { return len(o.pods) }

// Pods decodes the metadata of the pods that the option serves, one at a time.
// A pod that cannot be decoded is yielded as nil with an error.
func (o ExpanderOption) Pods() iter.Seq2[*metav1.ObjectMeta, error] {
	return func(yield func(*metav1.ObjectMeta, error) bool) {
		for i, encoded := range o.pods {
			// Metadata has the same number in every object, and what has
			// another one is skipped.
			var pod metav1.PartialObjectMetadata
			if err := pod.Unmarshal(encoded); err != nil {
				if !yield(nil, fmt.Errorf("decoding pod %d of option %q: %w", i, string(o.Group), err)) {
					return
				}
				continue
			}
			if !yield(&pod.ObjectMeta, nil) {
				return
			}
		}
	}
}
