package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// partners are the flags that the README gives cluster-autoscaler.
func partners() []string {
	return []string{
		"--cloud-provider=externalgrpc", "--expander=grpc,least-waste", "--grpc-expander-url=hearth:8088",
		"--scale-down-delay-after-add=30s", "--scale-down-unneeded-time=10s",
		"--daemonset-eviction-for-occupied-nodes=false", "--skip-nodes-with-local-storage=false", "--skip-nodes-with-system-pods=false",
	}
}

func autoscalerPod(flags ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "ca"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "ca", Image: "example/cluster-autoscaler:v1.36.1", Command: append([]string{"./cluster-autoscaler"}, flags...)}}},
	}
}

// replica is one of an autoscaler that runs several times.
func replica(name string) *corev1.Pod {
	p := autoscalerPod(partners()...)
	p.Name, p.OwnerReferences = name, []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "ca", UID: "u"}}
	return p
}

func enginePod(name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "dagger", Name: name, Labels: map[string]string{"app.kubernetes.io/name": "dagger-helm"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64(300)),
			Containers:                    []corev1.Container{{Name: "dagger-engine", Env: []corev1.EnvVar{{Name: envMetrics, Value: ":9090"}}}},
		},
	}
	if change != nil {
		change(p)
	}
	return p
}

func TestExamine(t *testing.T) {
	runner := func(evictable bool) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Name: "runner", Labels: map[string]string{"hearth.dev/cache-key": "k"}, Annotations: map[string]string{}}}
		if !evictable {
			p.Annotations[annotationSafeToEvict] = "false"
		}
		return p
	}
	without := func(flag string) (out []string) {
		for _, f := range partners() {
			if !strings.HasPrefix(f, "--"+flag) {
				out = append(out, f)
			}
		}
		return out
	}
	for _, tt := range []struct {
		name    string
		watches bool
		pods    []client.Object
		says    []string // parts of the lines, in order
	}{
		{"all well", false, []client.Object{autoscalerPod(partners()...), enginePod("e", nil), runner(false)}, nil},
		{"no engines", false, nil, []string{"no pod is an engine's"}},
		{"an engine without metrics", false, []client.Object{enginePod("a", nil), enginePod("e", func(p *corev1.Pod) { p.Spec.Containers[0].Env = nil })}, []string{"1 of 2 engines, such as dagger/e, say nothing"}},
		{"a short grace period", false, []client.Object{enginePod("e", func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = nil })}, []string{"have less than 300 s"}},
		{"an engine that tolerates everything", false, []client.Object{enginePod("e", func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
		})}, []string{"tolerate every taint"}},
		{"a runner that may be evicted", false, []client.Object{enginePod("e", nil), runner(true)}, []string{"1 runner pods, such as ci/runner, may be evicted"}},
		{"another provider", false, []client.Object{enginePod("e", nil), autoscalerPod("--cloud-provider", "aws")}, []string{`(pod kube-system/ca): --cloud-provider is "aws", want externalgrpc`}},
		{"another provider, and Hearth watches", true, []client.Object{enginePod("e", nil), autoscalerPod("--cloud-provider=aws")}, nil},
		{"Hearth, which watches", true, []client.Object{enginePod("e", nil), autoscalerPod(partners()...)}, []string{"which only watches"}},
		{"no expander", false, []client.Object{enginePod("e", nil), autoscalerPod(without("expander")...)}, []string{"want --expander=grpc,least-waste"}},
		{"daemons are evicted", false, []client.Object{enginePod("e", nil), autoscalerPod(without("daemonset")...)}, []string{"want --daemonset-eviction-for-occupied-nodes=false"}},
		{"nodes are skipped", false, []client.Object{enginePod("e", nil), autoscalerPod(without("skip-nodes")...)}, []string{"--skip-nodes-with-local-storage=false", "--skip-nodes-with-system-pods=false"}},
		{"scale-down waits", false, []client.Object{enginePod("e", nil), autoscalerPod(append(without("scale-down"), "--scale-down-unneeded-time=10m")...)}, []string{"--scale-down-delay-after-add", "--scale-down-unneeded-time"}},
		{"two autoscalers", false, []client.Object{enginePod("e", nil), autoscalerPod(partners()...), func() client.Object {
			p := autoscalerPod(partners()...)
			p.Name = "another"
			return p
		}()}, []string{"2 cluster-autoscalers use it, kube-system/another and kube-system/ca"}},
		{"two replicas of one", false, []client.Object{enginePod("e", nil), replica("ca-1"), replica("ca-2")}, nil},
		{"two engines on a node", false, []client.Object{
			enginePod("e", func(p *corev1.Pod) { p.Spec.NodeName = "n" }), enginePod("f", func(p *corev1.Pod) { p.Spec.NodeName = "n" }), enginePod("g", func(p *corev1.Pod) { p.Spec.NodeName = "m" }),
		}, []string{"1 of 3 engines, such as dagger/f, are not the only one"}},
		{"pods that are over", false, []client.Object{enginePod("e", nil), func() client.Object { p := runner(true); p.Status.Phase = corev1.PodSucceeded; return p }()}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			advice, err := Examine(t.Context(), newClient(t, interceptor.Funcs{}, tt.pods...), engineSelector(t), tt.watches)
			must(t, err)
			if len(advice) != len(tt.says) {
				t.Fatalf("said %q, want %q", advice, tt.says)
			}
			for i, want := range tt.says {
				if !strings.Contains(advice[i], want) {
					t.Errorf("said %q, want %q", advice[i], want)
				}
			}
		})
	}
	c := newClient(t, interceptor.Funcs{List: func(_ context.Context, _ client.WithWatch, _ client.ObjectList, _ ...client.ListOption) error {
		return fmt.Errorf("forbidden")
	}})
	if _, err := Examine(t.Context(), c, engineSelector(t), false); err == nil {
		t.Error("a list that fails was taken")
	}
}

func TestAutoscalerFlags(t *testing.T) {
	got := autoscalerFlags(corev1.Container{Image: "x/cluster-autoscaler:v1", Args: []string{"--v=4", "-expander", "grpc", "--one", "--two=a=b"}})
	if diff := cmp.Diff(map[string]string{"v": "4", "expander": "grpc", "one": "", "two": "a=b"}, got); diff != "" {
		t.Error(diff)
	}
	if got := autoscalerFlags(corev1.Container{Image: "nginx", Args: []string{"--cloud-provider=aws"}}); got != nil {
		t.Errorf("another program has flags %v", got)
	}
}
