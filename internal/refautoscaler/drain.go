package refautoscaler

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Annotations by which users steer CA.
const (
	safeToEvict             = "cluster-autoscaler.kubernetes.io/safe-to-evict"
	safeToEvictLocalVolumes = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
	scaleDownDisabled       = "cluster-autoscaler.kubernetes.io/scale-down-disabled"
)

// departure is what has to happen to a node's pods before the node can go.
type departure struct {
	move    []*corev1.Pod // need another place
	waiting bool          // a pod must run to completion first
	blocked error         // the pod because of which the node stays
}

// departureOf applies the rules in CA's order: the first that has an opinion counts.
// An empty node is one with nothing to move.
func (f *Flags) departureOf(n *simulated, now time.Time) departure {
	var d departure
	for _, p := range n.pods {
		switch {
		case isMirrorPod(p), isLongTerminating(p, now), isDaemonSetPod(p):
			continue
		case p.Annotations[safeToEvict] == "true":
			d.move = append(d.move, p)
			continue
		case p.Annotations[safeToEvict] == "on-completion":
			d.waiting = true
			continue
		}
		if reason := f.blocksDrain(p); reason != "" {
			d.blocked = fmt.Errorf("pod %s/%s %s", p.Namespace, p.Name, reason)
			return d
		}
		d.move = append(d.move, p)
	}
	return d
}

func (f *Flags) blocksDrain(p *corev1.Pod) string {
	owner := metav1.GetControllerOf(p)
	switch {
	case owner == nil:
		return "has no controller"
	case f.SkipNodesWithCustomControllerPods && !slices.Contains(
		[]string{"ReplicationController", "Job", "ReplicaSet", "StatefulSet"}, owner.Kind):
		return "has a controller that CA does not know: " + owner.Kind
	case f.SkipNodesWithSystemPods && p.Namespace == metav1.NamespaceSystem:
		return "is a system pod"
	case p.Annotations[safeToEvict] == "false":
		return "is not safe to evict"
	case f.SkipNodesWithLocalStorage && hasBlockingLocalStorage(p):
		return "has local storage"
	}
	return ""
}

func hasBlockingLocalStorage(p *corev1.Pod) bool {
	harmless := strings.Split(p.Annotations[safeToEvictLocalVolumes], ",")
	return slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool {
		local := v.HostPath != nil || v.EmptyDir != nil && v.EmptyDir.Medium != corev1.StorageMediumMemory
		return local && !slices.Contains(harmless, v.Name)
	})
}
