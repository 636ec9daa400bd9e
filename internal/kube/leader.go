package kube

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// LabelLeader puts the label hearth.dev/leader=true on the pod, which the
// Services that lead to the leader select, after it took it off every other
// pod in the namespace: nobody else does when a leader dies. The new leader
// calls it. That a pod is gone meanwhile is success.
func LabelLeader(ctx context.Context, c client.Client, namespace, pod string) error {
	var leaders corev1.PodList
	err := c.List(ctx, &leaders, client.InNamespace(namespace), client.MatchingLabels{labelLeader: "true"})
	if err != nil {
		return fmt.Errorf("listing pods labelled as leader: %w", err)
	}
	for _, p := range leaders.Items {
		if p.Name == pod {
			continue
		}
		if err := labelLeaderPod(ctx, c, namespace, p.Name, "null"); err != nil {
			return err
		}
	}
	return labelLeaderPod(ctx, c, namespace, pod, `"true"`)
}

func labelLeaderPod(ctx context.Context, c client.Client, namespace, pod, value string) error {
	o := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: pod}}
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, labelLeader, value)
	if err := c.Patch(ctx, o, client.RawPatch(types.MergePatchType, patch)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("labelling pod %q: %w", pod, err)
	}
	return nil
}
