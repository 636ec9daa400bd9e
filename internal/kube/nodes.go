package kube

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// Nodes acts on Node objects. Every method reads the Node fresh, changes only
// what it is about, and retries when somebody else changed the Node in
// between. To change a Node that is gone is success: there is nothing left to
// change. Another Node of the same name counts as gone, since clouds use names
// again; an empty uid means any.
//
// Methods may be called concurrently.
type Nodes struct {
	client client.Client
	reader podReader

	reading    chan struct{} // has room for who reads all Nodes
	readAt     time.Time     // when that began
	byInstance map[model.InstanceID]model.Node
}

// NewNodes returns Nodes; engines selects the pods that are Dagger engines.
func NewNodes(c client.Client, engines EngineSelector) *Nodes {
	return &Nodes{client: c, reading: make(chan struct{}, 1), reader: podReader{
		engines:   engines,
		groupOf:   func(label string) model.GroupID { return model.GroupID(label) },
		nodeGroup: func(model.NodeName) model.GroupID { return "" },
		keysFor:   func(model.GroupID) []string { return nil },
	}}
}

// Taint puts our drain taint on the Node: no new pod is scheduled to it that
// does not tolerate everything. Pods that run there stay.
func (n *Nodes) Taint(ctx context.Context, name model.NodeName, uid string) error {
	return n.change(ctx, "tainting", name, uid, taint)
}

// Untaint takes a drain back: our taint, cluster-autoscaler's taints and its
// cordon come off.
func (n *Nodes) Untaint(ctx context.Context, name model.NodeName, uid string) error {
	return n.change(ctx, "taking the drain back from", name, uid, func(o *corev1.Node) {
		clearCATaint(o)
		removeTaints(o, taintDraining)
	})
}

// ClearCATaint takes cluster-autoscaler's taints and its cordon off a Node
// that it has forgotten. A cordon without its taint is a person's and stays.
func (n *Nodes) ClearCATaint(ctx context.Context, name model.NodeName, uid string) error {
	return n.change(ctx, "clearing cluster-autoscaler's taint from", name, uid, clearCATaint)
}

// Mark brings our annotations and labels on the Node in line with marks, in one
// write or none; a decision of "" means none. Only the wish counts in marks.Protected: a person's own
// scale-down-disabled stays as it is, whatever its value, and ProtectedByUs is
// not read.
func (n *Nodes) Mark(ctx context.Context, name model.NodeName, uid string, marks model.Marks) error {
	return n.change(ctx, "marking", name, uid, func(o *corev1.Node) { mark(o, marks) })
}

// Label puts the label of the group on the Node when it has none.
func (n *Nodes) Label(ctx context.Context, name model.NodeName, uid string, group model.GroupID) error {
	return n.change(ctx, "labelling", name, uid, func(o *corev1.Node) {
		if _, has := o.Labels[v1alpha1.NodeGroupLabel]; !has {
			set(&o.Labels, v1alpha1.NodeGroupLabel, v1alpha1.GroupLabel(group))
		}
	})
}

// Unmark takes everything of ours off the Node: annotations, labels and taint.
// It leaves a person's own scale-down-disabled, and all of
// cluster-autoscaler's.
func (n *Nodes) Unmark(ctx context.Context, name model.NodeName, uid string) error {
	return n.change(ctx, "unmarking", name, uid, unmark)
}

// Delete deletes the Node object. That it is gone already is success.
func (n *Nodes) Delete(ctx context.Context, name model.NodeName, uid string) error {
	o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: string(name)}}
	var options []client.DeleteOption
	if uid != "" {
		options = append(options, client.Preconditions{UID: new(types.UID(uid))})
	}
	err := n.client.Delete(ctx, o, options...)
	// A conflict is another Node of that name: ours is gone.
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("deleting node %q: %w", name, err)
	}
	return nil
}

// PodsOn lists the pods on the Node that run CI jobs and have not finished, and
// those that are engines. It asks the API server and not a cache: a pod that
// was bound before the call is in the answer. Cache keys and groups are not
// filled in as the group may want them.
func (n *Nodes) PodsOn(ctx context.Context, name model.NodeName) ([]model.Pod, error) {
	var list corev1.PodList
	if err := n.client.List(ctx, &list, client.MatchingFields{"spec.nodeName": string(name)}); err != nil {
		return nil, fmt.Errorf("listing the pods on node %q: %w", name, err)
	}
	var pods []model.Pod
	for _, p := range list.Items {
		pod := n.reader.pod(&p)
		if pod.Kind == model.PodEngine || pod.Kind == model.PodRunner && pod.Finished.IsZero() {
			pods = append(pods, pod)
		}
	}
	return pods, nil
}

// NodeOf returns the Node of an instance, zero when there is none. It asks the API
// server and not a cache. No field selector knows provider ids, so that it reads all
// Nodes; calls that come while one reads share the next reading.
func (n *Nodes) NodeOf(ctx context.Context, id model.InstanceID) (model.Node, error) {
	asked := time.Now()
	select {
	case n.reading <- struct{}{}:
		defer func() { <-n.reading }()
	case <-ctx.Done():
		return model.Node{}, fmt.Errorf("looking for the node of %q: %w", id, ctx.Err())
	}
	if !n.readAt.After(asked) {
		readAt := time.Now()
		var list corev1.NodeList
		if err := n.client.List(ctx, &list); err != nil {
			return model.Node{}, fmt.Errorf("looking for the node of %q: %w", id, err)
		}
		n.readAt, n.byInstance = readAt, make(map[model.InstanceID]model.Node, len(list.Items))
		for i := range list.Items {
			if node, matters := readNode(&list.Items[i]); matters {
				n.byInstance[node.ID] = node
			}
		}
	}
	return n.byInstance[id], nil
}

// Uninstall takes everything of ours off every Node. It does all that it can
// and returns the first error.
func (n *Nodes) Uninstall(ctx context.Context) error {
	var list corev1.NodeList
	if err := n.client.List(ctx, &list); err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	var first error
	for _, o := range list.Items {
		// Most Nodes need no fresh read to see that there is nothing to do.
		bare := o.DeepCopy()
		if unmark(bare); equality.Semantic.DeepEqual(&o, bare) {
			continue
		}
		if err := n.Unmark(ctx, model.NodeName(o.Name), string(o.UID)); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// attempts bounds how often a change is tried when others write meanwhile.
const attempts = 5

// change applies f to a fresh copy of the Node and sends what it changed, on
// condition that nothing else has changed since.
func (n *Nodes) change(ctx context.Context, doing string, name model.NodeName, uid string, f func(*corev1.Node)) error {
	var err error
	// Not client-go's RetryOnConflict: it takes a request that timed out for a
	// success.
	for attempt := range attempts {
		if err = n.changeOnce(ctx, name, uid, f); !apierrors.IsConflict(err) {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(attempt) * 10 * time.Millisecond):
		}
	}
	if err != nil {
		return fmt.Errorf("%s node %q: %w", doing, name, err)
	}
	return nil
}

func (n *Nodes) changeOnce(ctx context.Context, name model.NodeName, uid string, f func(*corev1.Node)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	o := &corev1.Node{}
	if err := n.client.Get(ctx, client.ObjectKey{Name: string(name)}, o); err != nil {
		return client.IgnoreNotFound(err)
	}
	if uid != "" && string(o.UID) != uid {
		return nil
	}
	before := o.DeepCopy()
	if f(o); equality.Semantic.DeepEqual(before, o) {
		return nil
	}
	// Taints are one list to a patch: without the lock it would put back what
	// somebody else has taken off meanwhile.
	lock := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	return client.IgnoreNotFound(n.client.Patch(ctx, o, lock))
}

func taint(o *corev1.Node) {
	drain := corev1.Taint{Key: taintDraining, Effect: corev1.TaintEffectNoSchedule}
	if !slices.ContainsFunc(o.Spec.Taints, func(t corev1.Taint) bool { return t.MatchTaint(&drain) }) {
		o.Spec.Taints = append(o.Spec.Taints, drain)
	}
}

func clearCATaint(o *corev1.Node) {
	if removeTaints(o, taintToBeDeleted) {
		o.Spec.Unschedulable = false // it cordons only what it taints
	}
	removeTaints(o, taintDeletionCandidate)
}

// removeTaints removes all taints with the key and says whether there were any.
func removeTaints(o *corev1.Node, key string) bool {
	before := len(o.Spec.Taints)
	o.Spec.Taints = slices.DeleteFunc(o.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
	return len(o.Spec.Taints) < before
}

func mark(o *corev1.Node, marks model.Marks) {
	for key, value := range map[string]string{
		annotationDecision: string(marks.Decision),
		annotationReason:   clip(marks.Reason, 1024),
	} {
		if value == "" {
			delete(o.Annotations, key)
		} else {
			set(&o.Annotations, key, value)
		}
	}
	markWarm(o, marks.Warm)
	_, has := o.Annotations[annotationScaleDownDisabled]
	ours := o.Annotations[annotationProtectedBy] == protectedByUs
	switch {
	case has && !ours: // a person's own
	case marks.Protected:
		set(&o.Annotations, annotationScaleDownDisabled, "true")
		set(&o.Annotations, annotationProtectedBy, protectedByUs)
	case ours:
		delete(o.Annotations, annotationScaleDownDisabled)
		delete(o.Annotations, annotationProtectedBy)
	}
}

func unmark(o *corev1.Node) {
	mark(o, model.Marks{})
	removeTaints(o, taintDraining)
	delete(o.Labels, v1alpha1.NodeGroupLabel)
}

func set(m *map[string]string, key, value string) {
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[key] = value
}
