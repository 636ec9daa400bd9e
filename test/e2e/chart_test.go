package e2e

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

// TestChart: the API server takes every object of the chart, whatever is
// switched on, but for those of cert-manager and Prometheus, which it does not
// know.
func TestChart(t *testing.T) {
	g := newGroundOn(t, false)
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ci-system"}}
	_, err := g.Kube.CoreV1().Namespaces().Create(g.ctx, namespace, metav1.CreateOptions{})
	g.must(err)
	// A pod, as the Helm test is one, is not taken without its account.
	_, err = g.Kube.CoreV1().ServiceAccounts("ci-system").Create(g.ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "hearth"}}, metav1.CreateOptions{})
	g.must(err)
	out, err := exec.CommandContext(g.ctx, "go", "tool", "-modfile=../../tools/helm/go.mod", "helm",
		"template", "hearth", "../../charts/hearth", "--namespace", "ci-system", "--include-crds",
		"--set", "image.repository=images.example/hearth", "--set", "config.backend.kwok.bootDelay=1s",
		"--set", "tls.certManager.enabled=false", "--set", "tls.selfSigned.enabled=true", "--set", "dashboards.enabled=true",
		"--set", "clusterAutoscaler.enabled=true,clusterAutoscaler.image.repository=x,clusterAutoscaler.image.tag=v1.36.1",
		"--set", "ingress.enabled=true,ingress.host=hooks.example.com,ingress.className=nginx,ingress.tlsSecretName=hooks",
		"--set", "placement.enabled=true", "--set", "networkPolicy.enabled=true", "--set-json", `networkPolicy.httpFrom=["monitoring"]`,
		"--set-json", `secrets=["github.webhook","`+strings.Repeat("a", 100)+`1","`+strings.Repeat("a", 100)+`2"]`, "--set-json", `tolerations=[{"key":"support","operator":"Exists"}]`,
		"--set-json", `serviceAccount.annotations={"a":"b"}`, "--set-json", `imagePullSecrets=[{"name":"pull"}]`,
		"--set", "nodeSelector.role=support", "--set", "podLabels.team=ci", "--set", "podAnnotations.note=x",
	).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	kinds := map[string]int{}
	for part := range strings.SplitSeq(string(out), "\n---\n") {
		o := &unstructured.Unstructured{}
		g.must(yaml.Unmarshal([]byte(part), &o.Object))
		if len(o.Object) == 0 {
			continue
		}
		kinds[o.GetKind()]++
		// A new control plane answers for a while that a webhook or type is not there yet.
		g.eventually(o.GetKind()+" "+o.GetName(), 20*time.Second, func() error {
			return g.Client.Apply(g.ctx, client.ApplyConfigurationFromUnstructured(o.DeepCopy()), client.DryRunAll, client.ForceOwnership, client.FieldOwner("helm"))
		})
	}
	for _, kind := range []string{"CustomResourceDefinition", "Deployment", "ClusterRole", "Role", "MutatingWebhookConfiguration", "NetworkPolicy", "PodDisruptionBudget", "Ingress", "Secret"} {
		if kinds[kind] == 0 {
			t.Errorf("no %s among %v", kind, kinds)
		}
	}
}
