package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/hearth-ci/hearth/internal/localcluster"
)

// TestInstallAutoscalerRights: a real cluster-autoscaler scales up and down with
// the account, rights and flags that the chart gives it, and the chart's own pods
// keep off the runner nodes. Expander and TLS are left out: names in the cluster
// do not resolve here.
func TestInstallAutoscalerRights(t *testing.T) {
	t.Parallel()
	binary := os.Getenv("CLUSTER_AUTOSCALER")
	if binary == "" {
		t.Skip("CLUSTER_AUTOSCALER names none")
	}
	ctx := t.Context()
	i, cluster := newInstallation(t)
	i.helm("install", "../../charts/hearth", "--create-namespace",
		"--set", "clusterAutoscaler.enabled=true,clusterAutoscaler.image.repository=x,clusterAutoscaler.image.tag=v1.36.1",
		"--set-json", `config.nodeGroups=[{"id":"runners","max":3,"template":{"capacity":{"cpu":"8","memory":"32Gi","pods":"110"},"zone":"a","instanceType":"kwok.8x"}}]`)
	for _, name := range []string{"hearth", "cluster-autoscaler"} {
		i.account(cluster, name)
	}
	provider, _ := i.config(i.secret("hearth-server"))
	path := filepath.Join(i.dir, "hearth.yaml")
	if out, err := exec.CommandContext(ctx, hearth, "check", "--config", path, "--live").CombinedOutput(); err != nil {
		t.Errorf("what helm test runs: %v\n%s", err, out)
	}
	// Plain, for 127.0.0.1 is not in the certificate.
	var file map[string]any
	text, err := os.ReadFile(path)
	i.must(err)
	i.must(yaml.Unmarshal(text, &file))
	if server, ok := file["server"].(map[string]any); ok {
		delete(server, "tls")
	}
	text, err = yaml.Marshal(file)
	i.must(err)
	i.must(os.WriteFile(path, text, 0o600))
	i.serve(cluster)

	d, err := i.kube.AppsV1().Deployments("ci-system").Get(ctx, "cluster-autoscaler", metav1.GetOptions{})
	i.must(err)
	i.must(os.WriteFile(filepath.Join(i.dir, "cloud.yaml"), fmt.Appendf(nil, "address: %q\n", provider), 0o600))
	probe := localcluster.FreeAddress()
	args := []string{"--kubeconfig=" + filepath.Join(i.dir, "cluster-autoscaler.kubeconfig"), "--cloud-config=" + filepath.Join(i.dir, "cloud.yaml"), "--expander=least-waste", "--address=" + probe, "--v=4"}
	for _, arg := range d.Spec.Template.Spec.Containers[0].Command[1:] {
		if !strings.HasPrefix(arg, "--cloud-config") && !strings.Contains(arg, "expander") {
			args = append(args, arg)
		}
	}
	ca, err := cluster.Spawn("cluster-autoscaler", binary, nil, args...)
	i.must(err)
	t.Cleanup(func() {
		ca.Kill()
		text, err := os.ReadFile(filepath.Join(cluster.LogDir(), "cluster-autoscaler.log"))
		if err != nil || len(text) == 0 {
			t.Errorf("it wrote nothing: %v", err)
		}
		for line := range strings.SplitSeq(string(text), "\n") {
			if strings.Contains(line, " is forbidden") {
				t.Error(line)
			}
		}
		if t.Failed() {
			t.Logf("cluster-autoscaler:\n%s", ca.LogTail())
		}
	})
	_, err = i.kube.CoreV1().Pods("default").Create(ctx, job("api", "acme/api").Pod(), metav1.CreateOptions{})
	i.must(err)
	i.eventually("the job to run", 120*time.Second, func() error {
		p, err := i.kube.CoreV1().Pods("default").Get(ctx, "api", metav1.GetOptions{})
		if err == nil && p.Status.Phase != corev1.PodRunning {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
	i.must(i.kube.CoreV1().Pods("default").Delete(ctx, "api", *metav1.NewDeleteOptions(0)))
	i.eventually("the node to go", 240*time.Second, func() error {
		nodes, err := i.kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err == nil && len(nodes.Items) > 0 {
			err = fmt.Errorf("%d nodes", len(nodes.Items))
		}
		return err
	})
	if _, err := i.kube.CoreV1().ConfigMaps("ci-system").Get(ctx, "cluster-autoscaler-status", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := i.kube.CoordinationV1().Leases("ci-system").Get(ctx, "cluster-autoscaler", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}
