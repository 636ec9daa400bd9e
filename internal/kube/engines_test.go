package kube

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestEngineFrom(t *testing.T) {
	terminated := func(code int32) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code}}
	}
	containers := []corev1.Container{{Name: "dagger-engine"}, {Name: "a-sidecar"}}
	now := metav1.NewTime(morning)
	for _, tt := range []struct {
		name string
		pod  corev1.Pod
		want model.EngineState
	}{
		{"bare", corev1.Pod{}, model.EngineState{Grace: 30 * time.Second}},
		{"told to stop", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now, Finalizers: []string{"theirs", "hearth.dev/exit-code"}},
			Spec:       corev1.PodSpec{Containers: containers, TerminationGracePeriodSeconds: new(int64(300))},
			Status:     corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "dagger-engine"}}},
		}, model.EngineState{Deleting: true, Guarded: true, Grace: 5 * time.Minute}},
		{"killed, its sidecar ended well", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now},
			Spec:       corev1.PodSpec{Containers: containers},
			Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{
				{Name: "a-sidecar", State: terminated(0)}, {Name: "dagger-engine", State: terminated(137)},
			}},
		}, model.EngineState{Deleting: true, Grace: 30 * time.Second, Exited: true, ExitCode: 137}},
		{"ended well, its sidecar did not", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now, Annotations: map[string]string{"kubectl.kubernetes.io/default-container": "engine"}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "a-sidecar"}, {Name: "engine"}}},
			Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{
				{Name: "a-sidecar", State: terminated(143)}, {Name: "engine", State: terminated(0)},
			}},
		}, model.EngineState{Deleting: true, Grace: 30 * time.Second, Exited: true}},
		{"evicted", corev1.Pod{
			Spec: corev1.PodSpec{Containers: containers},
			Status: corev1.PodStatus{Phase: corev1.PodFailed, ContainerStatuses: []corev1.ContainerStatus{
				{Name: "dagger-engine", State: terminated(2)},
			}},
		}, model.EngineState{Grace: 30 * time.Second, Exited: true, ExitCode: 2}},
		{"crashed, to be started again", corev1.Pod{
			Spec: corev1.PodSpec{Containers: containers},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
				{Name: "dagger-engine", State: terminated(1), LastTerminationState: terminated(2), RestartCount: 3},
			}},
		}, model.EngineState{Grace: 30 * time.Second, Restarts: 3, LastExit: 2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stripPod(&tt.pod) // what is read must have been kept
			if diff := cmp.Diff(tt.want, engineFrom(&tt.pod)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestToleratesDrain(t *testing.T) {
	for _, tt := range []struct {
		toleration corev1.Toleration
		want       bool
	}{
		{corev1.Toleration{Operator: "Exists"}, true},
		{corev1.Toleration{Operator: "Exists", Effect: "NoSchedule"}, true},
		{corev1.Toleration{Operator: "Exists", Effect: "NoExecute"}, false},
		{corev1.Toleration{Key: "ci", Operator: "Exists"}, false},
		{corev1.Toleration{Key: "ci", Value: "true"}, false},
		{corev1.Toleration{}, false},
		{corev1.Toleration{Key: taintDraining}, true},
		{corev1.Toleration{Key: taintDraining, Operator: "Exists", Effect: "NoSchedule"}, true},
		{corev1.Toleration{Key: taintDraining, Value: "x"}, false},
	} {
		if got := toleratesDrain([]corev1.Toleration{{Key: "other"}, tt.toleration}); got != tt.want {
			t.Errorf("%+v: %t", tt.toleration, got)
		}
	}
}
