package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestEngineState(t *testing.T) {
	ended := func(code int32) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code}}
	}
	containers := []corev1.Container{{Name: "a-sidecar"}, {Name: "dagger-engine"}}
	now := metav1.NewTime(morning)
	for _, tt := range []struct {
		name string
		pod  corev1.Pod
		want model.EngineState
	}{
		{"bare", corev1.Pod{}, model.EngineState{}},
		{"told to stop", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now, Finalizers: []string{"theirs", "hearth.dev/exit-code"}},
		}, model.EngineState{Deleting: true, Guarded: true}},
		{"tolerates everything", corev1.Pod{
			Spec: corev1.PodSpec{Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}}},
		}, model.EngineState{ToleratesDrain: true}},
		{"started again, and so was its sidecar", corev1.Pod{
			Spec: corev1.PodSpec{Containers: containers},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
				{Name: "a-sidecar", LastTerminationState: ended(1), RestartCount: 9},
				{Name: "dagger-engine", LastTerminationState: ended(2), RestartCount: 3},
			}},
		}, model.EngineState{Restarts: 3, LastExit: 2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stripPodOrEngine(&tt.pod) // what is read must have been kept
			if diff := cmp.Diff(tt.want, engineState(&tt.pod)); diff != "" {
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
