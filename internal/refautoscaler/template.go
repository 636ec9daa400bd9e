package refautoscaler

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// templateStable is how long a node must have been ready to be a model for others.
const templateStable = time.Minute

// updateTemplates finds out what a new node of each group would be: like a live one
// of the group, else like the last live one seen, else as the provider says.
func (a *Autoscaler) updateTemplates(ctx context.Context, world snapshot, daemons []appsv1.DaemonSet, now time.Time) {
	templates := map[string]*simulated{}
	for _, n := range world {
		ready, since := readinessOf(n.node)
		if !ready || !since.Add(templateStable).Before(now) || n.node.Spec.Unschedulable || hasTaint(n.node, toBeDeletedTaint) {
			continue
		}
		if g := a.provider.ownGroupOf(ctx, n.node); g != nil && templates[g.id] == nil {
			t := sanitized(n.node, g.id)
			for _, p := range n.pods {
				if p.DeletionTimestamp == nil && (isDaemonSetPod(p) || isMirrorPod(p)) {
					t.pods = append(t.pods, p)
				}
			}
			templates[g.id], a.liveTemplates[g.id] = t, t
		}
	}
	groups := map[string]bool{}
	for _, g := range a.provider.nodeGroups(ctx) {
		groups[g.id] = true
		if templates[g.id] != nil {
			continue
		}
		if cached := a.liveTemplates[g.id]; cached != nil {
			templates[g.id] = cached
			continue
		}
		node, err := a.provider.templateOf(ctx, g)
		if err != nil {
			a.log.Error("group without template", "group", g.id, "err", err)
			continue
		}
		t := sanitized(node, g.id)
		for i := range daemons {
			if p := podOf(&daemons[i]); t.admits(p) {
				t.pods = append(t.pods, p)
			}
		}
		templates[g.id] = t
	}
	maps.DeleteFunc(a.liveTemplates, func(id string, _ *simulated) bool { return !groups[id] })
	a.templates = templates
}

// podOf is the pod that a DaemonSet would put on a node.
func podOf(d *appsv1.DaemonSet) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: d.Namespace, Name: d.Name, Labels: d.Spec.Template.Labels,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("DaemonSet"))},
		},
		Spec: d.Spec.Template.Spec,
	}
}

// sanitized is a new node made after an example: another name, and without the
// taints that say something about the example alone.
func sanitized(example *corev1.Node, group string) *simulated {
	node := example.DeepCopy()
	node.Name = "template-node-for-" + group
	if node.Labels == nil {
		node.Labels = map[string]string{}
	}
	node.Labels[corev1.LabelHostname] = node.Name
	node.Labels["cluster-autoscaler.kubernetes.io/template-node"] = "true"
	node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return isTransient(t.Key) })
	return &simulated{node: node}
}

func isTransient(taint string) bool {
	switch taint {
	case toBeDeletedTaint, deletionCandidateTaint,
		corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable, corev1.TaintNodeUnschedulable,
		corev1.TaintNodeMemoryPressure, corev1.TaintNodeDiskPressure, corev1.TaintNodeNetworkUnavailable,
		corev1.TaintNodePIDPressure, "node.cloudprovider.kubernetes.io/uninitialized",
		"node.cloudprovider.kubernetes.io/shutdown", "cloud.google.com/impending-node-termination",
		"NodeWithImpairedVolumes":
		return true
	}
	return isStartupTaint(taint) || strings.HasPrefix(taint, "status-taint.cluster-autoscaler.kubernetes.io/")
}
