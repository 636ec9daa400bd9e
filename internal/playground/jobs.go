package playground

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/pkg/model"
)

// Job is one CI job, played by a runner pod.
type Job struct {
	Name string
	// Group is the node group that the pod asks for by its node selector.
	Group string
	// Key is the job's cache key, such as a repository's name.
	Key string
	// CPU is what the pod requests; "6" fills a node of 8 so that one job runs
	// on a node.
	CPU string
	// RunFor is how long the job runs, in whole seconds; zero means until it
	// is deleted.
	RunFor time.Duration
}

// Pod is the runner pod of the job.
func (j Job) Pod() *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: j.Name, Namespace: metav1.NamespaceDefault,
			Labels: map[string]string{"app": "ci-runner"},
			Annotations: map[string]string{
				model.Prefix + "/cache-key":                      j.Key,
				"cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
			},
		},
		Spec: corev1.PodSpec{
			NodeSelector: map[string]string{model.Prefix + "/node-group": j.Group},
			Containers: []corev1.Container{{
				Name: "job", Image: "ci",
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(j.CPU)}},
			}},
			RestartPolicy: corev1.RestartPolicyNever,
		},
	}
	if j.RunFor > 0 {
		pod.Annotations[localcluster.RunForAnnotation] = j.RunFor.String()
	}
	return pod
}

// Submit creates the runner pods of jobs.
func (p *Playground) Submit(ctx context.Context, jobs ...Job) error {
	for _, j := range jobs {
		if _, err := p.Kube.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, j.Pod(), metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("creating the runner pod %q: %w", j.Name, err)
		}
	}
	return nil
}

// Finish deletes the runner pods of jobs that run until then.
func (p *Playground) Finish(ctx context.Context, names ...string) error {
	for _, name := range names {
		if err := p.Kube.CoreV1().Pods(metav1.NamespaceDefault).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			return fmt.Errorf("ending the job %q: %w", name, err)
		}
	}
	return nil
}
