package localcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

func TestCluster(t *testing.T) {
	if _, err := FindBinaries(); err != nil {
		t.Skipf("SKIPPED, nothing of the control plane is tested: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	c, err := Start(ctx, Config{Progress: func(what string) { t.Logf("%5.1f s: %s", time.Since(began).Seconds(), what) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && exists(c.dir) {
			for _, p := range c.running {
				t.Logf("%s:\n%s", p.name, p.logTail())
			}
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	t.Logf("started in %.1f s", time.Since(began).Seconds())
	client, err := kubernetes.NewForConfig(c.AdminConfig())
	if err != nil {
		t.Fatal(err)
	}
	nodes, pods := client.CoreV1().Nodes(), client.CoreV1().Pods("default")

	ready := func(name string) func() error {
		return func() error { return nodeIs(ctx, client, name, corev1.ConditionTrue) }
	}
	create := func(t *testing.T, node *corev1.Node) {
		t.Helper()
		if _, err := nodes.Create(ctx, node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("version", func(t *testing.T) {
		v, err := client.Discovery().ServerVersion()
		if err != nil {
			t.Fatal(err)
		}
		if v.GitVersion == "" || strings.HasPrefix(v.GitVersion, "v0.") {
			t.Errorf("the API server calls itself %q", v.GitVersion)
		}
	})

	t.Run("node becomes ready and its pod runs and succeeds", func(t *testing.T) {
		create(t, fakeNode("runner"))
		eventually(t, 5*time.Second, ready("runner"))
		node, err := nodes.Get(ctx, "runner", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got := node.Status.Allocatable.Cpu().String(); got != "8" {
			t.Errorf("allocatable CPU is %s, want the 8 that the node was created with", got)
		}

		pod := fakePod("job")
		pod.Annotations = map[string]string{RunForAnnotation: "3s"}
		if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, phaseIs(ctx, client, "job", corev1.PodRunning))
		running := time.Now()
		// An update must not make it run longer.
		patch := []byte(`{"metadata":{"labels":{"touched":"yes"}}}`)
		if _, err := pods.Patch(ctx, "job", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, phaseIs(ctx, client, "job", corev1.PodSucceeded))
		if ran := time.Since(running); ran < time.Second || ran > 5*time.Second {
			t.Errorf("the pod ran for %s, want about 3s", ran)
		}
	})

	t.Run("pod without an end runs until deleted", func(t *testing.T) {
		if _, err := pods.Create(ctx, fakePod("service"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, phaseIs(ctx, client, "service", corev1.PodRunning))
		pod, err := pods.Get(ctx, "service", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(pod.Status.PodIP, "127.1.") {
			t.Errorf("the pod's address is %q, want one in 127.1.0.0/16", pod.Status.PodIP)
		}
		if err := pods.Delete(ctx, "service", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			_, err := pods.Get(ctx, "service", metav1.GetOptions{})
			return wantNotFound(err)
		})
	})

	t.Run("pod that a finalizer keeps shows its exit code", func(t *testing.T) {
		pod := fakePod("kept")
		pod.Finalizers = []string{"example.com/kept"}
		pod.Annotations = map[string]string{StopAfterAnnotation: "1h", ExitCodeAnnotation: "137"}
		if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, phaseIs(ctx, client, "kept", corev1.PodRunning))
		if err := pods.Delete(ctx, "kept", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		patch := []byte(`{"metadata":{"annotations":{"demo.hearth.dev/stop-after":"1s"}}}`)
		if _, err := pods.Patch(ctx, "kept", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, phaseIs(ctx, client, "kept", corev1.PodFailed))
		got, err := pods.Get(ctx, "kept", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if ended := got.Status.ContainerStatuses[0].State.Terminated; ended == nil || ended.ExitCode != 137 {
			t.Errorf("its container is %+v, want one that ended with 137", got.Status.ContainerStatuses[0].State)
		}
		if _, err := pods.Patch(ctx, "kept", "application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			_, err := pods.Get(ctx, "kept", metav1.GetOptions{})
			return wantNotFound(err)
		})
	})

	t.Run("daemon set runs on every node", func(t *testing.T) {
		create(t, fakeNode("second"))
		if _, err := client.AppsV1().DaemonSets("default").Create(ctx, engines(), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 15*time.Second, func() error {
			ds, err := client.AppsV1().DaemonSets("default").Get(ctx, "engine", metav1.GetOptions{})
			if err == nil && ds.Status.NumberReady != 2 {
				err = fmt.Errorf("%d engines are ready, want 2", ds.Status.NumberReady)
			}
			return err
		})
	})

	t.Run("unready annotation", func(t *testing.T) {
		node := fakeNode("stuck")
		node.Annotations[UnreadyAnnotation] = "true"
		create(t, node)
		eventually(t, 5*time.Second, func() error { return nodeIs(ctx, client, "stuck", corev1.ConditionFalse) })
		set := func(value string) {
			t.Helper()
			patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%s}}}`, UnreadyAnnotation, value)
			if _, err := nodes.Patch(ctx, "stuck", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		set(`null`)
		eventually(t, 5*time.Second, ready("stuck"))
		set(`"true"`)
		eventually(t, 5*time.Second, func() error { return nodeIs(ctx, client, "stuck", corev1.ConditionFalse) })
	})

	t.Run("deleted node stays away and its name can be used again", func(t *testing.T) {
		if err := nodes.Delete(ctx, "second", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		// That the owner's Lease is collected shows that controllers have seen the deletion.
		eventually(t, 15*time.Second, func() error {
			_, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, "second", metav1.GetOptions{})
			return wantNotFound(err)
		})
		if _, err := nodes.Get(ctx, "second", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Fatalf("the deleted node is there again (%v)", err)
		}
		create(t, fakeNode("second"))
		eventually(t, 5*time.Second, ready("second"))
	})

	t.Run("service account has no rights but those it is given", func(t *testing.T) {
		cfg, err := c.ServiceAccountConfig(ctx, "hearth", "hearth")
		if err != nil {
			t.Fatal(err)
		}
		// By way of a kubeconfig, as another process would.
		path := filepath.Join(t.TempDir(), "kubeconfig")
		if err := c.WriteKubeconfig(path, cfg); err != nil {
			t.Fatal(err)
		}
		cfg, err = clientcmd.BuildConfigFromFlags("", path)
		if err != nil {
			t.Fatal(err)
		}
		account, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := account.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Fatalf("listing nodes without rights: %v, want Forbidden", err)
		}
		if err := c.Apply(ctx, []byte(readNodes)); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			_, err := account.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
			return err
		})
	})

	t.Run("apply a kind and an object of it, twice", func(t *testing.T) {
		for range 2 {
			if err := c.Apply(ctx, []byte(lampKind), []byte(lamp)); err != nil {
				t.Fatal(err)
			}
		}
		err := c.Apply(ctx, []byte("kind: Nonsense\napiVersion: v1\nmetadata: {name: such}\n"))
		if err == nil || !strings.Contains(err.Error(), `Nonsense "such"`) {
			t.Errorf("applying an unknown kind: %v, want an error that names the object", err)
		}
	})

	t.Run("API server goes away and comes back", func(t *testing.T) {
		c.StopAPIServer()
		if _, err := nodes.List(ctx, metav1.ListOptions{}); err == nil {
			t.Fatal("the API server answers though it is stopped")
		}
		if err := c.StartAPIServer(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := nodes.Get(ctx, "runner", metav1.GetOptions{}); err != nil {
			t.Fatalf("the data are lost: %v", err)
		}
		// The others go on: a new node and pod come to life.
		create(t, fakeNode("third"))
		eventually(t, time.Minute, ready("third"))
		pod := fakePod("late")
		pod.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": "third"}
		if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, phaseIs(ctx, client, "late", corev1.PodRunning))
	})

	t.Run("nothing remains when the context ends", func(t *testing.T) {
		cancel()
		for name, p := range c.running {
			select {
			case <-p.done:
			case <-time.After(10 * time.Second):
				t.Errorf("%s still runs", name)
			}
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
		if exists(c.dir) {
			t.Errorf("%s still exists", c.dir)
		}
		if err := c.StartAPIServer(t.Context()); !errors.Is(err, errStopped) {
			t.Errorf("starting the API server of a stopped cluster: %v", err)
		}
	})
}

// TestStartFails uses scripts in place of the binaries.
func TestStartFails(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name, script string
		ctx          context.Context
		want         string
	}{
		{"binary ends", "echo disk on fire; exit 3", t.Context(), "disk on fire"},
		{"context ends", "exec sleep 600", cancelled, context.Canceled.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("TMPDIR", t.TempDir())
			bin := t.TempDir()
			for _, name := range []string{etcd, apiServer, controllerManager, scheduler, kwok} {
				if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+test.script+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			_, err := Start(test.ctx, Config{BinDir: bin})
			if err == nil || !strings.Contains(err.Error(), etcd) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want one with %q and %q", err, etcd, test.want)
			}
			left, err := os.ReadDir(os.TempDir())
			if err != nil || len(left) != 0 {
				t.Errorf("left behind: %v (%v)", left, err)
			}
		})
	}
}

func TestFindBinaries(t *testing.T) {
	complete := t.TempDir()
	for _, name := range []string{etcd, apiServer, controllerManager, scheduler, kwok} {
		writeFile(t, filepath.Join(complete, name))
	}
	repo := t.TempDir()
	writeFile(t, filepath.Join(repo, "go.mod"))
	writeFile(t, filepath.Join(repo, "inner", "go.mod"))
	partial := filepath.Join(repo, ".cache", "cluster")
	writeFile(t, filepath.Join(partial, etcd))

	t.Run("environment", func(t *testing.T) {
		t.Setenv(BinEnv, complete)
		if dir, err := FindBinaries(); err != nil || dir != complete {
			t.Errorf("got %q, %v", dir, err)
		}
	})
	t.Run("one missing", func(t *testing.T) {
		t.Setenv(BinEnv, "")
		t.Chdir(filepath.Join(repo, "inner"))
		dir, err := FindBinaries()
		if dir != partial || !errors.Is(err, ErrNoBinaries) || !strings.Contains(err.Error(), apiServer) {
			t.Errorf("got %q, %v; want %q and an error that names %s", dir, err, partial, apiServer)
		}
	})
	t.Run("none", func(t *testing.T) {
		t.Setenv(BinEnv, "")
		t.Chdir(t.TempDir())
		if _, err := FindBinaries(); !errors.Is(err, ErrNoBinaries) || !strings.Contains(err.Error(), "make cluster") {
			t.Errorf("got %v, want an error that says what to do", err)
		}
	})
}

func writeFile(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
}

// eventually calls check until it returns nil, and fails the test with its last error if it
// does not within the limit.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s: %v", limit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func nodeIs(ctx context.Context, client kubernetes.Interface, name string, want corev1.ConditionStatus) error {
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady && condition.Status == want {
			return nil
		}
	}
	return fmt.Errorf("node %s is not Ready=%s: %v", name, want, node.Status.Conditions)
}

func phaseIs(ctx context.Context, client kubernetes.Interface, name string, want corev1.PodPhase) func() error {
	return func() error {
		pod, err := client.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
		if err == nil && pod.Status.Phase != want {
			err = fmt.Errorf("pod %s is %s, want %s: %v", name, pod.Status.Phase, want, pod.Status.Conditions)
		}
		return err
	}
}

func wantNotFound(err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err == nil:
		return errors.New("it still exists")
	}
	return err
}

func fakeNode(name string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name:        name,
			Labels:      map[string]string{"kubernetes.io/hostname": name},
			Annotations: map[string]string{FakeNodeAnnotation: "fake"},
		},
		Status: corev1.NodeStatus{Capacity: corev1.ResourceList{
			corev1.ResourceCPU:    resource.MustParse("8"),
			corev1.ResourceMemory: resource.MustParse("32Gi"),
			corev1.ResourcePods:   resource.MustParse("110"),
		}},
	}
}

func fakePod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: "setup", Image: "example.invalid/setup"}},
			Containers:     []corev1.Container{{Name: "main", Image: "example.invalid/main"}},
		},
	}
}

func engines() *appsv1.DaemonSet {
	labels := map[string]string{"app": "engine"}
	return &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "engine"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: fakePod("").Spec},
		},
	}
}

const readNodes = `
kind: ClusterRole
apiVersion: rbac.authorization.k8s.io/v1
metadata: {name: read-nodes}
rules: [{apiGroups: [""], resources: [nodes], verbs: [list]}]
---
kind: ClusterRoleBinding
apiVersion: rbac.authorization.k8s.io/v1
metadata: {name: read-nodes}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: read-nodes}
subjects: [{kind: ServiceAccount, namespace: hearth, name: hearth}]
---
`

const lampKind = `
kind: CustomResourceDefinition
apiVersion: apiextensions.k8s.io/v1
metadata: {name: lamps.example.org}
spec:
  group: example.org
  scope: Cluster
  names: {kind: Lamp, plural: lamps, singular: lamp}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, properties: {lit: {type: boolean}}}}}}
`

const lamp = `
kind: Lamp
apiVersion: example.org/v1
metadata: {name: hall}
spec: {lit: true}
`
