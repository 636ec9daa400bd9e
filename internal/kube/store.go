package kube

import (
	"context"
	"fmt"
	"sync"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// Store keeps the records of groups and instances as RunnerNodeGroup and
// RunnerNode objects. It relies on being the only writer of spec and status;
// people write annotations, which it neither changes nor loses.
//
// Its methods may be called concurrently for different groups and instances;
// calls for the same one must follow each other.
type Store struct {
	client client.Client

	mu     sync.Mutex
	groups map[model.GroupID]*stored
	nodes  map[model.InstanceID]*v1alpha1.RunnerNode // as last read or written
}

// stored is what is known of a group's object.
type stored struct {
	object *v1alpha1.RunnerNodeGroup // as last read or written; nil: read it again
	uid    types.UID
	// sequence is the one last read or written, tried that of a write whose
	// fate is not known.
	sequence, tried int64
}

// NewStore returns a store that has read nothing yet.
func NewStore(c client.Client) *Store {
	return &Store{client: c, groups: map[model.GroupID]*stored{}, nodes: map[model.InstanceID]*v1alpha1.RunnerNode{}}
}

// Load reads everything that is kept: the records of all groups, the
// annotations of their objects, and the instances. Who becomes leader calls it
// before anything else; what other processes wrote before it is not an error
// to SaveGroup afterwards.
func (s *Store) Load(ctx context.Context) (
	records map[model.GroupID]nodegroups.Record,
	annotations map[model.GroupID]map[string]string,
	nodes []model.NodeRecord,
	err error,
) {
	var groupList v1alpha1.RunnerNodeGroupList
	if err := s.client.List(ctx, &groupList); err != nil {
		return nil, nil, nil, fmt.Errorf("listing RunnerNodeGroups: %w", err)
	}
	var nodeList v1alpha1.RunnerNodeList
	if err := s.client.List(ctx, &nodeList); err != nil {
		return nil, nil, nil, fmt.Errorf("listing RunnerNodes: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.groups = map[model.GroupID]*stored{}
	records = map[model.GroupID]nodegroups.Record{}
	annotations = map[model.GroupID]map[string]string{}
	for _, o := range groupList.Items {
		id := groupID(&o)
		s.groups[id] = &stored{object: &o, uid: o.UID, sequence: o.Status.Sequence}
		records[id] = recordFrom(o.Status)
		annotations[id] = o.Annotations
	}
	s.nodes = make(map[model.InstanceID]*v1alpha1.RunnerNode, len(nodeList.Items))
	for _, o := range nodeList.Items {
		n := nodeRecordFrom(o)
		nodes = append(nodes, n)
		o.ManagedFields = nil
		s.nodes[n.ID] = &o
	}
	return records, annotations, nodes, nil
}

// SaveGroup commits a group's record with one write of its object's status;
// the object is made when there is none. When people changed its annotations
// meanwhile it reads it again and retries until ctx ends. After an error the
// record may or may not have been written; a later call settles that.
//
// It returns [model.ErrSuperseded] when another process has written a record
// since this one read or wrote it.
func (s *Store) SaveGroup(ctx context.Context, group model.GroupID, record nodegroups.Record, summary model.GroupSummary) error {
	known := s.group(group)
	status := groupStatus(record, summary)
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("saving node group %q: %w", group, err)
		}
		if known.object == nil {
			if err := s.readGroup(ctx, group, known); err != nil {
				return fmt.Errorf("saving node group %q: %w", group, err)
			}
		}
		object := known.object.DeepCopy()
		object.Status = status
		known.tried = record.Sequence
		known.object = nil // until the answer says what is there
		err := s.client.Status().Update(ctx, object)
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("saving node group %q: %w", group, err)
		}
		s.remember(known, object)
		return nil
	}
}

// readGroup reads the group's object, or makes it, and checks that the record
// in it is one that this process knows.
func (s *Store) readGroup(ctx context.Context, group model.GroupID, known *stored) error {
	object := &v1alpha1.RunnerNodeGroup{}
	err := s.client.Get(ctx, client.ObjectKey{Name: v1alpha1.GroupName(group)}, object)
	if apierrors.IsNotFound(err) {
		object = &v1alpha1.RunnerNodeGroup{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.GroupName(group)}}
		if object.Name != string(group) {
			object.Spec.ID = string(group)
		}
		err = s.client.Create(ctx, object)
	}
	if err != nil {
		return err
	}
	// Zero is an object without a record, perhaps made anew by a person.
	if at := object.Status.Sequence; at != 0 && at != known.sequence && at != known.tried {
		return fmt.Errorf("record %d, where %d was expected: %w", at, known.sequence, model.ErrSuperseded)
	}
	s.remember(known, object)
	return nil
}

// group returns the entry of a group. All but its uid belongs to the group's
// caller.
func (s *Store) group(id model.GroupID) *stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.groups[id]
	if known == nil {
		known = &stored{}
		s.groups[id] = known
	}
	return known
}

func (s *Store) remember(known *stored, object *v1alpha1.RunnerNodeGroup) {
	known.object, known.sequence = object, object.Status.Sequence
	s.mu.Lock()
	defer s.mu.Unlock()
	known.uid = object.UID
}

// uid returns the UID of the group's object, empty when it was never seen.
func (s *Store) uid(id model.GroupID) types.UID {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.groups[id]; known != nil {
		return known.uid
	}
	return ""
}

// SaveNode creates the instance's RunnerNode or brings it up to date. It
// writes only what differs from what it last read or wrote: no call when
// nothing does. What somebody else wrote or deleted is put right by the next
// write.
func (s *Store) SaveNode(ctx context.Context, r model.NodeRecord) error {
	object := s.node(r.ID)
	var err error
	if object != nil {
		err = s.updateNode(ctx, object, r)
	}
	if object == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		if object, err = s.openNode(ctx, r); err == nil {
			err = s.updateNode(ctx, object, r)
		}
	}
	if err != nil {
		s.setNode(r.ID, nil) // it may or may not have been written
		return fmt.Errorf("saving instance %q: %w", r.ID, err)
	}
	return nil
}

// openNode makes the instance's object, or reads the one that is there.
func (s *Store) openNode(ctx context.Context, r model.NodeRecord) (*v1alpha1.RunnerNode, error) {
	object := &v1alpha1.RunnerNode{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.NodeName(r.ID)}, Spec: nodeSpec(r)}
	err := s.client.Create(ctx, object)
	if apierrors.IsAlreadyExists(err) {
		object = &v1alpha1.RunnerNode{}
		err = s.client.Get(ctx, client.ObjectKey{Name: v1alpha1.NodeName(r.ID)}, object)
	}
	return object, err
}

// updateNode writes what differs from object, and remembers the result.
func (s *Store) updateNode(ctx context.Context, object *v1alpha1.RunnerNode, r model.NodeRecord) error {
	onlyThis := func() client.Patch {
		return client.MergeFromWithOptions(object.DeepCopy(), client.MergeFromWithOptimisticLock{})
	}
	object = object.DeepCopy()
	if spec := nodeSpec(r); object.Spec != spec {
		patch := onlyThis()
		object.Spec = spec
		if err := s.client.Patch(ctx, object, patch); err != nil {
			return err
		}
	}
	if status := nodeStatus(r); !equality.Semantic.DeepEqual(object.Status, status) {
		patch := onlyThis()
		object.Status = status
		if err := s.client.Status().Patch(ctx, object, patch); err != nil {
			return err
		}
	}
	s.setNode(r.ID, object)
	return nil
}

func (s *Store) node(id model.InstanceID) *v1alpha1.RunnerNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes[id]
}

// setNode remembers an object that nobody changes any more, or nil for none.
func (s *Store) setNode(id model.InstanceID, object *v1alpha1.RunnerNode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if object == nil {
		delete(s.nodes, id)
		return
	}
	object.ManagedFields = nil // of no use here, and the largest part
	s.nodes[id] = object
}

// DeleteNode removes the instance's RunnerNode. That there is none is success.
func (s *Store) DeleteNode(ctx context.Context, id model.InstanceID) error {
	object := &v1alpha1.RunnerNode{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.NodeName(id)}}
	s.setNode(id, nil)
	if err := s.client.Delete(ctx, object); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("forgetting instance %q: %w", id, err)
	}
	return nil
}
