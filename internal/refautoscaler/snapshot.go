package refautoscaler

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/resource"
	schedulingv1 "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// simulated is a node with the pods on it, real or supposed.
type simulated struct {
	node     *corev1.Node
	pods     []*corev1.Pod
	upcoming bool // stands for a node that is not there yet
}

// snapshot is the cluster as one loop sees and changes it.
type snapshot []*simulated

func newSnapshot(nodes []*corev1.Node, pods []*corev1.Pod) snapshot {
	byName := map[string]*simulated{}
	s := make(snapshot, len(nodes))
	for i, n := range nodes {
		s[i] = &simulated{node: n}
		byName[n.Name] = s[i]
	}
	for _, p := range pods {
		if s := byName[p.Spec.NodeName]; s != nil {
			s.pods = append(s.pods, p)
		}
	}
	return s
}

func (s snapshot) get(name string) *simulated {
	for _, n := range s {
		if n.node.Name == name && !n.upcoming {
			return n
		}
	}
	return nil
}

// place puts the pod on the first acceptable node where it fits.
func (s snapshot) place(pod *corev1.Pod, acceptable func(*simulated) bool) *simulated {
	for _, n := range s {
		if acceptable(n) && n.fits(pod) {
			n.pods = append(n.pods, pod)
			return n
		}
	}
	return nil
}

func (n *simulated) clone() *simulated {
	return &simulated{node: n.node, pods: slices.Clone(n.pods), upcoming: n.upcoming}
}

// fits checks what of the scheduler's filters matters here: cordon, taints, node
// selector and required affinity, resources.
func (n *simulated) fits(pod *corev1.Pod) bool {
	return n.admits(pod) && n.hasRoomFor(pod)
}

func (n *simulated) admits(pod *corev1.Pod) bool {
	taints := n.node.Spec.Taints
	if n.node.Spec.Unschedulable {
		taints = append(slices.Clone(taints),
			corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule})
	}
	if _, untolerated := schedulingv1.FindMatchingUntoleratedTaint(logr.Discard(), taints, pod.Spec.Tolerations,
		func(t *corev1.Taint) bool { return t.Effect != corev1.TaintEffectPreferNoSchedule }, false); untolerated {
		return false
	}
	matches, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(n.node)
	return matches && err == nil
}

func (n *simulated) hasRoomFor(pod *corev1.Pod) bool {
	allocatable := n.node.Status.Allocatable
	if int64(len(n.pods)) >= allocatable.Pods().Value() {
		return false
	}
	for name, want := range requests(pod) {
		if want.IsZero() {
			continue
		}
		for _, p := range n.pods {
			want.Add(requests(p)[name])
		}
		if have := allocatable[name]; want.Cmp(have) > 0 {
			return false
		}
	}
	return true
}

func requests(pod *corev1.Pod) corev1.ResourceList {
	return resource.PodRequests(pod, resource.PodResourcesOptions{})
}

// utilization is the larger of the requested shares of CPU and memory.
func (n *simulated) utilization(ignoreDaemonSets bool, now time.Time) (float64, error) {
	var highest float64
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		allocatable := n.node.Status.Allocatable[name]
		if allocatable.IsZero() {
			return 0, errors.New("node without allocatable " + string(name))
		}
		total, used := allocatable.MilliValue(), int64(0)
		for _, p := range n.pods {
			request := requests(p)[name]
			switch {
			case ignoreDaemonSets && isDaemonSetPod(p):
				total -= request.MilliValue()
			case !isLongTerminating(p, now):
				used += request.MilliValue()
			}
		}
		highest = max(highest, float64(used)/float64(total))
	}
	return highest, nil
}

// estimate packs pods on new nodes, the largest first, each on the first where it
// fits. It returns how many nodes are needed, at most limit, and the pods they take.
func estimate(template *simulated, pods []*corev1.Pod, limit int) (int, []*corev1.Pod) {
	size := func(p *corev1.Pod) float64 {
		var sum float64
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			request, allocatable := requests(p)[name], template.node.Status.Allocatable[name]
			if !allocatable.IsZero() {
				sum += request.AsApproximateFloat64() / allocatable.AsApproximateFloat64()
			}
		}
		return sum
	}
	pods = slices.Clone(pods)
	slices.SortStableFunc(pods, func(a, b *corev1.Pod) int { return cmp.Compare(size(b), size(a)) })

	var bins snapshot
	var placed []*corev1.Pod
	for _, p := range pods {
		if bins.place(p, anyNode) == nil {
			if len(bins) == limit || !template.fits(p) {
				continue
			}
			bin := template.clone()
			bin.pods = append(bin.pods, p)
			bins = append(bins, bin)
		}
		placed = append(placed, p)
	}
	return len(bins), placed
}

func anyNode(*simulated) bool { return true }

// Taints that CA sets or knows.
const (
	toBeDeletedTaint       = "ToBeDeletedByClusterAutoscaler"
	deletionCandidateTaint = "DeletionCandidateOfClusterAutoscaler"
)

// toBeDeletedFor is how long a ToBeDeleted taint means that a node is being deleted.
const toBeDeletedFor = 5 * time.Minute

func hasTaint(node *corev1.Node, key string) bool {
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
}

// readiness returns whether the node counts as ready, and since when it is what it is.
func readinessOf(node *corev1.Node) (ready bool, since time.Time) {
	healthy, found := true, false
	for _, c := range node.Status.Conditions {
		switch c.Type {
		case corev1.NodeReady:
			found = true
			healthy = healthy && c.Status != corev1.ConditionFalse && c.Status != corev1.ConditionUnknown
		case corev1.NodeDiskPressure, corev1.NodeNetworkUnavailable:
			healthy = healthy && c.Status != corev1.ConditionTrue
		default:
			continue
		}
		if c.LastTransitionTime.After(since) {
			since = c.LastTransitionTime.Time
		}
	}
	for _, t := range node.Spec.Taints {
		switch {
		case t.Key == corev1.TaintNodeNotReady, t.Key == corev1.TaintNodeDiskPressure,
			t.Key == corev1.TaintNodeNetworkUnavailable, isStartupTaint(t.Key):
			healthy = false
		}
	}
	return found && healthy, since
}

func isStartupTaint(key string) bool {
	return strings.HasPrefix(key, "startup-taint.cluster-autoscaler.kubernetes.io/") ||
		strings.HasPrefix(key, "ignore-taint.cluster-autoscaler.kubernetes.io/")
}

func isDaemonSetPod(pod *corev1.Pod) bool {
	owner := metav1.GetControllerOf(pod)
	return owner != nil && owner.Kind == "DaemonSet" ||
		pod.Annotations["cluster-autoscaler.kubernetes.io/daemonset-pod"] == "true"
}

func isMirrorPod(pod *corev1.Pod) bool {
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return mirror
}

// isLongTerminating tells a pod that should have been gone 30 s ago.
func isLongTerminating(pod *corev1.Pod, now time.Time) bool {
	return pod.DeletionTimestamp != nil &&
		pod.DeletionTimestamp.Add(gracePeriod(pod)+30*time.Second).Before(now)
}

func gracePeriod(pod *corev1.Pod) time.Duration {
	if s := pod.Spec.TerminationGracePeriodSeconds; s != nil {
		return time.Duration(*s) * time.Second
	}
	return corev1.DefaultTerminationGracePeriodSeconds * time.Second
}

func podNames(pods []*corev1.Pod) []string {
	names := make([]string, len(pods))
	for i, p := range pods {
		names[i] = p.Namespace + "/" + p.Name
	}
	return names
}
