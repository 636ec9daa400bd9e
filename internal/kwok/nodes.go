package kwok

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	scheme = "kwok://"
	// annotationFake makes kwok play a Node's kubelet, annotationUnready one
	// that is not well.
	annotationFake    = "kwok.x-k8s.io/node"
	annotationUnready = "kwok.hearth.dev/unready"
	// orphanAge is how long a Node without an instance is left alone. It is
	// what the cloud controller of a real cloud does for us.
	orphanAge = 2 * time.Minute
)

// newInstanceID makes a random id and the name that its Node registers under.
func newInstanceID(group model.GroupID) (model.InstanceID, string) {
	unique := strings.ToLower(rand.Text()[:10])
	name := v1alpha1.GroupName(group)
	name = strings.TrimRight(name[:min(len(name), 50)], ".-") + "-" + unique
	return model.InstanceID(scheme + string(group) + "/" + unique), name
}

// groupOf returns the group that an instance was launched for.
func groupOf(id model.InstanceID) (model.GroupID, bool) {
	rest, ours := strings.CutPrefix(string(id), scheme)
	at := strings.LastIndexByte(rest, '/')
	if !ours || at < 0 {
		return "", false
	}
	return model.GroupID(rest[:at]), true
}

// newNode returns the Node that an instance registers. It is not Ready yet:
// that is for kwok.
func newNode(g model.NodeGroup, i instance) (*corev1.Node, error) {
	t := g.Template
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name:        i.Node,
			Annotations: map[string]string{annotationFake: "fake"},
			Labels:      map[string]string{corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64"},
		},
		Spec: corev1.NodeSpec{ProviderID: string(i.ID)},
	}
	maps.Copy(node.Labels, t.Labels)
	for key, value := range map[string]string{
		v1alpha1.NodeGroupLabel:        v1alpha1.GroupLabel(g.ID),
		corev1.LabelHostname:           i.Node,
		corev1.LabelInstanceTypeStable: t.InstanceType,
		corev1.LabelTopologyZone:       t.Zone,
	} {
		if value != "" {
			node.Labels[key] = value
		}
	}
	node.Status.NodeInfo = corev1.NodeSystemInfo{
		KubeletVersion:  "kwok",
		OperatingSystem: node.Labels[corev1.LabelOSStable], Architecture: node.Labels[corev1.LabelArchStable],
	}
	for _, taint := range t.Taints {
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{
			Key: taint.Key, Value: taint.Value, Effect: corev1.TaintEffect(taint.Effect),
		})
	}
	var err error
	if node.Status.Capacity, err = resources(t.Capacity); err != nil {
		return nil, fmt.Errorf("capacity of node group %q: %w", g.ID, err)
	}
	if node.Status.Allocatable, err = resources(t.Allocatable); err != nil {
		return nil, fmt.Errorf("allocatable of node group %q: %w", g.ID, err)
	}
	if len(node.Status.Allocatable) == 0 {
		node.Status.Allocatable = node.Status.Capacity
	}
	return node, nil
}

func resources(quantities map[string]string) (corev1.ResourceList, error) {
	list := corev1.ResourceList{}
	for name, text := range quantities {
		q, err := resource.ParseQuantity(text)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", name, text, err)
		}
		list[corev1.ResourceName(name)] = q
	}
	return list, nil
}

// register does what a kubelet does when it starts: it creates its Node, or
// takes over the one that it left behind.
func (b *Backend) register(ctx context.Context, g model.NodeGroup, i instance) error {
	node, err := newNode(g, i)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err = b.cfg.Client.Create(ctx, node)
	if apierrors.IsAlreadyExists(err) {
		err = b.setUnready(ctx, i.Node, false)
	}
	if err != nil {
		return fmt.Errorf("registering node %q: %w", i.Node, err)
	}
	return nil
}

func (b *Backend) setUnready(ctx context.Context, node string, unready bool) error {
	value := "null"
	if unready {
		value = `"true"`
	}
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%s}}}`, annotationUnready, value)
	o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}
	return client.IgnoreNotFound(b.cfg.Client.Patch(ctx, o, client.RawPatch(types.MergePatchType, patch)))
}

// tend looks after the Nodes of instances that do not run: they stop being
// Ready, and those whose instance does not exist are deleted in the end. Nodes
// of groups that are not among the clouds are left alone.
func (b *Backend) tend(ctx context.Context, clouds map[model.GroupID]*cloud) error {
	var nodes corev1.NodeList
	if err := b.cfg.Client.List(ctx, &nodes, client.HasLabels{v1alpha1.NodeGroupLabel}); err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	now, orphans := b.cfg.Now(), map[string]time.Time{}
	var failed []error
	for _, node := range nodes.Items {
		if err := ctx.Err(); err != nil {
			return err
		}
		group, _ := groupOf(model.InstanceID(node.Spec.ProviderID))
		c := clouds[group]
		if c == nil {
			continue
		}
		at, exists := c.find(model.InstanceID(node.Spec.ProviderID))
		if exists && c.Instances[at].State != model.InstanceStopped {
			continue
		}
		if node.Annotations[annotationUnready] != "true" {
			failed = append(failed, b.setUnready(ctx, node.Name, true))
		}
		if exists {
			continue
		}
		since, known := b.orphans[string(node.UID)]
		if !known {
			since = now
		}
		orphans[string(node.UID)] = since
		if now.Sub(since) >= orphanAge {
			err := b.cfg.Client.Delete(ctx, &node, client.Preconditions{UID: &node.UID})
			failed = append(failed, client.IgnoreNotFound(err))
		}
	}
	b.orphans = orphans
	if err := errors.Join(failed...); err != nil {
		return err
	}
	b.tended = now
	return nil
}
