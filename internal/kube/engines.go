package kube

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Engines acts on the pods of Dagger engines. Each change is one request with
// the pod's UID as precondition: another pod of the same name counts as gone.
// Methods may be called concurrently.
type Engines struct {
	client client.Client
}

// NewEngines returns Engines.
func NewEngines(c client.Client) *Engines { return &Engines{client: c} }

// StopEngine tells an engine to stop: its pod gets our finalizer and is then
// deleted, with its own grace period. It returns true when there is no such pod.
// One that somebody else has deleted already gets no finalizer.
func (e *Engines) StopEngine(ctx context.Context, pod model.Pod) (gone bool, err error) {
	o := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	patch := fmt.Appendf(nil, `{"metadata":{"uid":%q,"finalizers":[%q]}}`, pod.UID, finalizerExitCode)
	err = e.client.Patch(ctx, o, client.RawPatch(types.StrategicMergePatchType, patch))
	deletion := []client.DeleteOption{client.Preconditions{UID: new(types.UID(pod.UID))}}
	switch {
	case apierrors.IsNotFound(err):
		return true, nil
	case apierrors.IsInvalid(err):
		// Another pod, or one that is being deleted: nothing can be added to
		// that. A deletion that does nothing tells which.
		deletion = append(deletion, client.DryRunAll)
	case err != nil:
		return false, fmt.Errorf("guarding the engine's pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	err = e.client.Delete(ctx, o, deletion...)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("deleting the engine's pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return false, nil
}

// ReleaseEngine takes our finalizer off an engine's pod.
func (e *Engines) ReleaseEngine(ctx context.Context, pod model.Pod) error {
	o := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	patch := fmt.Appendf(nil, `{"metadata":{"uid":%q,"$deleteFromPrimitiveList/finalizers":[%q]}}`, pod.UID, finalizerExitCode)
	err := e.client.Patch(ctx, o, client.RawPatch(types.StrategicMergePatchType, patch))
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsInvalid(err) { // invalid: another pod
		return fmt.Errorf("releasing the engine's pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

// Uninstall takes our finalizer off every pod, whatever it runs. It does all
// that it can and returns the first error.
func (e *Engines) Uninstall(ctx context.Context) error {
	var first error
	list := &corev1.PodList{}
	for {
		if err := e.client.List(ctx, list, client.Limit(500), client.Continue(list.Continue)); err != nil {
			return fmt.Errorf("listing pods: %w", err)
		}
		for _, p := range list.Items {
			if !slices.Contains(p.Finalizers, finalizerExitCode) {
				continue
			}
			err := e.ReleaseEngine(ctx, model.Pod{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)})
			if err != nil && first == nil {
				first = err
			}
		}
		if list.Continue == "" {
			return first
		}
	}
}

// stripPodOrEngine drops most of a pod, but not what engineState reads.
func stripPodOrEngine(obj any) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	tolerations := p.Spec.Tolerations
	stripPod(p)
	p.Spec.Tolerations = tolerations
}

// engineState says what matters of an engine's pod, beside its container.
func engineState(p *corev1.Pod) model.EngineState {
	out := model.EngineState{
		Deleting:       p.DeletionTimestamp != nil,
		Guarded:        slices.Contains(p.Finalizers, finalizerExitCode),
		ToleratesDrain: toleratesDrain(p.Spec.Tolerations),
	}
	containers := p.Spec.Containers
	if len(containers) == 0 {
		return out
	}
	at := max(0, slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == engineContainerName }))
	for _, c := range p.Status.ContainerStatuses {
		if c.Name != containers[at].Name {
			continue
		}
		out.Restarts = int(c.RestartCount)
		if end := c.LastTerminationState.Terminated; end != nil {
			out.LastExit = int(end.ExitCode)
		}
	}
	return out
}

// toleratesDrain says whether our drain taint does not keep a pod away.
func toleratesDrain(tolerations []corev1.Toleration) bool {
	return slices.ContainsFunc(tolerations, func(t corev1.Toleration) bool {
		return (t.Effect == "" || t.Effect == corev1.TaintEffectNoSchedule) &&
			(t.Key == "" && t.Operator == corev1.TolerationOpExists ||
				t.Key == taintDraining && (t.Operator == corev1.TolerationOpExists || t.Value == ""))
	})
}
