package placement

import (
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	annotationPlacement = model.Prefix + "/placement" // on pods: what was decided, for people
	safeToEvict         = "cluster-autoscaler.kubernetes.io/safe-to-evict"
)

// Weights of the preferences. The scheduler scales their sum so that the best
// node that a pod fits on has 100, and counts that twice; only their ratio
// matters. A node that is warm and not among the best has at least 80 of 100,
// so 160 points: more than the 150 by which an idle node can be ahead of a used
// one for its free resources (NodeResourcesFit 100, BalancedAllocation 50).
const (
	weightWarm = 80
	weightBest = 20 // of the least missed node, on top; less for those after it
)

// facts are what matters of a pod that is being created.
type facts struct {
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		NodeName     string            `json:"nodeName"`
		NodeSelector map[string]string `json:"nodeSelector"`
		Affinity     *struct {
			NodeAffinity *corev1.NodeAffinity `json:"nodeAffinity"`
		} `json:"affinity"`
	} `json:"spec"`
}

func (f *facts) pod(namespace string) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: f.ObjectMeta}
	pod.Namespace = namespace
	pod.Spec.NodeName, pod.Spec.NodeSelector = f.Spec.NodeName, f.Spec.NodeSelector
	return pod
}

// says where to run itself.
func (f *facts) says() bool {
	if f.Spec.NodeName != "" {
		return true
	}
	for _, key := range []string{corev1.LabelHostname, "metadata.name"} {
		if f.Spec.NodeSelector[key] != "" {
			return true
		}
	}
	a := f.Spec.Affinity
	return a != nil && a.NodeAffinity != nil &&
		(a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil || len(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution) > 0)
}

// operation is one step of a JSON patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// annotate adds those annotations that the pod does not have.
func (f *facts) annotate(patch []operation, annotations map[string]string) []operation {
	missing := maps.Clone(annotations)
	maps.DeleteFunc(missing, func(key, _ string) bool { _, has := f.Annotations[key]; return has })
	if len(missing) == 0 {
		return patch
	}
	// The whole map: no key needs the escapes of a JSON pointer then.
	all := maps.Clone(f.Annotations)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, missing)
	return append(patch, operation{"add", "/metadata/annotations", all})
}

// prefer makes the pod prefer nodes.
func (f *facts) prefer(patch []operation, terms []corev1.PreferredSchedulingTerm) []operation {
	affinity := corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: terms}
	if f.Spec.Affinity == nil {
		return append(patch, operation{"add", "/spec/affinity", corev1.Affinity{NodeAffinity: &affinity}})
	}
	return append(patch, operation{"add", "/spec/affinity/nodeAffinity", affinity})
}

// terms are the preferences that lead to the chosen nodes: any that bears the
// label, also one that comes later, and the best by name.
func (c choice) terms(label string) []corev1.PreferredSchedulingTerm {
	terms := []corev1.PreferredSchedulingTerm{{
		Weight: weightWarm,
		Preference: corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{
			Key: label, Operator: corev1.NodeSelectorOpExists,
		}}},
	}}
	for i, n := range c.best {
		weight := weightBest - i*weightBest/most
		if !n.labelled {
			weight += weightWarm
		}
		terms = append(terms, corev1.PreferredSchedulingTerm{
			Weight: int32(weight), //nolint:gosec // at most 100
			Preference: corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{{
				Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{string(n.name)},
			}}},
		})
	}
	return terms
}

// words say what was decided.
func (c choice) words() string {
	switch {
	case c.late:
		return fmt.Sprintf("no preference: all %d warm nodes have been full for long", c.warm)
	case c.free > 0:
		return fmt.Sprintf("prefers %d warm nodes with room of %d, %s first", c.free, c.warm, c.best[0].name)
	}
	return fmt.Sprintf("prefers warm nodes; of %d none has room yet", c.warm)
}
