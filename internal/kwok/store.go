package kwok

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// Keys of the ConfigMaps. stateKey holds a cloud, faultsKey its Faults.
const (
	stateKey  = "state"
	faultsKey = "faults"
)

// labelBackend is on all ConfigMaps of this package.
const labelBackend = model.Prefix + "/backend"

func configMapName(group model.GroupID) string { return v1alpha1.GroupName("hearth-kwok-" + group) }

// list reads the ConfigMaps of all groups, by name.
func (b *Backend) list(ctx context.Context) (map[string]*corev1.ConfigMap, error) {
	var list corev1.ConfigMapList
	err := b.cfg.Client.List(ctx, &list, client.InNamespace(b.cfg.Namespace), client.MatchingLabels{labelBackend: "kwok"})
	if err != nil {
		return nil, fmt.Errorf("listing the instances of the embedded backend: %w", err)
	}
	byName := make(map[string]*corev1.ConfigMap, len(list.Items))
	for i := range list.Items {
		byName[list.Items[i].Name] = &list.Items[i]
	}
	return byName, nil
}

// decode reads a group's cloud. A group of which nothing is stored begins at
// its minimum, as an Auto Scaling group would.
func decode(g model.NodeGroup, stored *corev1.ConfigMap) (*cloud, error) {
	c := &cloud{group: g.ID, Desired: g.Min}
	if stored == nil {
		return c, nil
	}
	for key, into := range map[string]any{stateKey: c, faultsKey: &c.faults} {
		text, has := stored.Data[key]
		if !has {
			continue
		}
		decoder := json.NewDecoder(strings.NewReader(text))
		decoder.DisallowUnknownFields() // people write faults
		if err := decoder.Decode(into); err != nil {
			return nil, fmt.Errorf("reading %q of ConfigMap %q: %w", key, stored.Name, err)
		}
	}
	return c, nil
}

// save writes a cloud if it differs from what is stored, on condition that
// this is still what was read. Else it returns a conflict.
func (b *Backend) save(ctx context.Context, c *cloud, stored *corev1.ConfigMap) error {
	state, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("writing the instances of node group %q: %w", c.group, err)
	}
	faults, err := json.Marshal(c.faults)
	if err != nil {
		return fmt.Errorf("writing the faults of node group %q: %w", c.group, err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	data := map[string]string{stateKey: string(state), faultsKey: string(faults)}
	if stored == nil {
		err := b.cfg.Client.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: b.cfg.Namespace, Name: configMapName(c.group),
				Labels: map[string]string{labelBackend: "kwok"},
			},
			Data: data,
		})
		if apierrors.IsAlreadyExists(err) {
			return apierrors.NewConflict(schema.GroupResource{Resource: "configmaps"}, configMapName(c.group), err)
		}
		return err
	}
	if maps.Equal(stored.Data, data) {
		return nil
	}
	next := stored.DeepCopy()
	next.Data = data
	return b.cfg.Client.Update(ctx, next)
}
