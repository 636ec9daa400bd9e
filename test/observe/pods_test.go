package observe

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/internal/playground"
)

// running fails until a job's pod runs.
func running(t *testing.T, p *playground.Playground, name string) func() error {
	return func() error {
		pod, err := p.Kube.CoreV1().Pods(metav1.NamespaceDefault).Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && pod.Status.Phase != corev1.PodRunning {
			err = fmt.Errorf("it is %s on %q", pod.Status.Phase, pod.Spec.NodeName)
		}
		return err
	}
}

// jobOf is a job that fills a node of "runners".
func jobOf(name string) playground.Job {
	return playground.Job{Name: name, Group: "runners", Key: "acme/api", CPU: "6"}
}
