package kube

import (
	"bytes"
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// labelLearnt is on every ConfigMap of Memories, annotationGroup says whose
	// it is, and learntKey is where the bytes are.
	labelLearnt     = model.Prefix + "/learnt"
	annotationGroup = model.Prefix + "/node-group"
	learntKey       = "learnt"
	// memoriesAtOnce bounds a page of the list: each may be half a megabyte.
	memoriesAtOnce = 20
)

// Memories keeps what the policy has learnt, in one ConfigMap per group. None
// is ever deleted: a group may be declared again. It is safe for concurrent
// use for different groups.
type Memories struct {
	client    client.Client
	namespace string
}

// NewMemories returns what keeps ConfigMaps in that namespace. The client must
// not cache them.
func NewMemories(c client.Client, namespace string) *Memories { return &Memories{c, namespace} }

// LoadLearnt returns what was saved, by group.
func (m *Memories) LoadLearnt(ctx context.Context) (map[model.GroupID][]byte, error) {
	learnt := map[model.GroupID][]byte{}
	for next := ""; ; {
		var list corev1.ConfigMapList
		err := m.client.List(ctx, &list, client.InNamespace(m.namespace), client.MatchingLabels{labelLearnt: "true"},
			client.Limit(memoriesAtOnce), client.Continue(next))
		if err != nil {
			return nil, fmt.Errorf("listing what was learnt: %w", err)
		}
		for _, o := range list.Items {
			group := model.GroupID(o.Annotations[annotationGroup])
			// A copy that a person made under another name is none of ours.
			if data, has := o.BinaryData[learntKey]; has && o.Name == memoryName(group) {
				learnt[group] = data
			}
		}
		if next = list.Continue; next == "" {
			return learnt, nil
		}
	}
}

// SaveLearnt makes the group's ConfigMap or brings it up to date. When somebody
// else changed it meanwhile, that is lost.
func (m *Memories) SaveLearnt(ctx context.Context, group model.GroupID, data []byte) error {
	for {
		err := m.save(ctx, group, data)
		if (apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err)) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return fmt.Errorf("saving what was learnt of node group %q: %w", group, err)
		}
		return nil
	}
}

func (m *Memories) save(ctx context.Context, group model.GroupID, data []byte) error {
	object := &corev1.ConfigMap{}
	err := m.client.Get(ctx, client.ObjectKey{Namespace: m.namespace, Name: memoryName(group)}, object)
	switch {
	case apierrors.IsNotFound(err):
		return m.client.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: m.namespace, Name: memoryName(group),
				Labels:      map[string]string{labelLearnt: "true"},
				Annotations: map[string]string{annotationGroup: string(group)},
			},
			BinaryData: map[string][]byte{learntKey: data},
		})
	case err != nil:
		return err
	case bytes.Equal(object.BinaryData[learntKey], data):
		return nil
	}
	set(&object.Labels, labelLearnt, "true")
	set(&object.Annotations, annotationGroup, string(group))
	object.BinaryData = map[string][]byte{learntKey: data}
	return m.client.Update(ctx, object)
}

func memoryName(group model.GroupID) string { return v1alpha1.GroupName("hearth-learnt-" + group) }
