// Package charts tests the Helm chart: that it carries the manifests of deploy,
// what it makes of good and bad values, and that Hearth takes the config file
// that it writes.
package charts

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/config"
)

var update = flag.Bool("update", false, "copy the manifests of deploy into the chart")

// TestChartCarriesDeploy: there is one source of rights and definitions.
func TestChartCarriesDeploy(t *testing.T) {
	want := map[string][]byte{
		"files/rbac.yaml": deploy.RBAC(), "files/rbac-kwok.yaml": deploy.RBACKwok(),
		"files/rbac-placement.yaml": deploy.RBACPlacement(), "files/placement.yaml": deploy.Placement(),
	}
	for _, crd := range deploy.CRDs() {
		var o struct {
			Metadata struct{ Name string }
		}
		if err := yaml.Unmarshal(crd, &o); err != nil {
			t.Fatal(err)
		}
		plural, group, _ := strings.Cut(o.Metadata.Name, ".")
		want["crds/"+group+"_"+plural+".yaml"] = crd
	}
	for file, text := range want {
		path := filepath.Join("hearth", file)
		if *update {
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, text) {
			t.Errorf("%s is not deploy's (make generate): %v", path, err)
		}
	}
}

// helm runs the pinned Helm.
func helm(t *testing.T, args ...string) (out string, err error) {
	t.Helper()
	if testing.Short() {
		t.Skip("building Helm takes minutes")
	}
	cmd := exec.Command("go", append([]string{"tool", "-modfile=../tools/helm/go.mod", "helm"}, args...)...)
	var buffer, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &buffer, &problems
	if err = cmd.Run(); err != nil {
		return problems.String(), err
	}
	return buffer.String(), nil
}

// good are the least values, for AWS unless others name a backend.
func good(more ...string) []string {
	args := []string{"template", "hearth", "hearth", "--namespace", "ci-system", "--set", "image.repository=images.example/hearth"}
	if !strings.Contains(strings.Join(more, " "), "config.backend.") {
		args = append(args, "--set-json", `config.backend={"aws":{"region":"eu-central-1"}}`)
	}
	return append(args, more...)
}

// TestUpgradeRestarts: pods are replaced when something changes that Hearth
// reads once, and not for node groups.
func TestUpgradeRestarts(t *testing.T) {
	note := func(values ...string) string {
		t.Helper()
		out, err := helm(t, good(values...)...)
		if err != nil {
			t.Fatal(out)
		}
		_, after, found := strings.Cut(out, "hearth.dev/config:")
		if !found {
			t.Fatal("no note of the config")
		}
		line, _, _ := strings.Cut(after, "\n")
		return line
	}
	before := note()
	if note("--set-json", `config.nodeGroups=[{"id":"runners"}]`) != before {
		t.Error("pods are replaced for a node group")
	}
	for _, change := range []string{"config.engines.metricsPort=9091", "placement.enabled=true"} {
		if note("--set", change) == before {
			t.Errorf("pods stay with %s", change)
		}
	}
}

func TestLint(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", "hearth"); err == nil {
		t.Errorf("linted without values: %s", out)
	}
	if out, err := helm(t, "lint", "--strict", "hearth", "--set", "image.repository=x", "--set-json", `config.backend={"kwok":{}}`); err != nil {
		t.Errorf("%s", out)
	}
}

func TestBadValues(t *testing.T) {
	for name, tt := range map[string]struct {
		values []string
		says   string
	}{
		"no image":                    {[]string{"--set", "image.repository="}, "/image/repository"},
		"no backend":                  {[]string{"--set-json", "config.backend=null"}, "/config"},
		"two backends":                {[]string{"--set-json", `config.backend={"aws":{},"kwok":{}}`}, "/config/backend"},
		"an unknown value":            {[]string{"--set", "replicaCount=3"}, "replicaCount"},
		"no replicas":                 {[]string{"--set", "replicas=0"}, "/replicas"},
		"a digest that is none":       {[]string{"--set", "image.digest=latest"}, "/image/digest"},
		"a config of the chart":       {[]string{"--set", "config.server.address=:1"}, "server"},
		"no certificate at all":       {[]string{"--set", "tls.certManager.enabled=false"}, "tls.secretName: want the name of a Secret"},
		"two sources of certificates": {[]string{"--set", "tls.selfSigned.enabled=true"}, "tls.selfSigned.enabled: want it without"},
		"certificates for no time":    {[]string{"--set", "tls.selfSigned.days=0"}, "/tls/selfSigned/days"},
		"an autoscaler without image": {[]string{"--set", "clusterAutoscaler.enabled=true"}, "/clusterAutoscaler/image"},
		"an autoscaler of old":        {[]string{"--set", "clusterAutoscaler.enabled=true,clusterAutoscaler.image.repository=x,clusterAutoscaler.image.tag=v1.30.0"}, "/clusterAutoscaler/image/tag"},
		"an argument that is no flag": {[]string{"--set-json", `clusterAutoscaler.extraArgs=["v=4"]`}, "/clusterAutoscaler/extraArgs"},
		"an autoscaler without certificate": {[]string{"--set", "tls.certManager.enabled=false,tls.secretName=x,clusterAutoscaler.enabled=true,clusterAutoscaler.image.repository=x,clusterAutoscaler.image.tag=v1.36.1"},
			"clusterAutoscaler.enabled: its certificate"},
		"an ingress to nowhere":  {[]string{"--set", "ingress.enabled=true"}, "/ingress/host"},
		"a log level of its own": {[]string{"--set", "logLevel=loud"}, "/logLevel"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := helm(t, good(tt.values...)...)
			if err == nil || !strings.Contains(out, tt.says) {
				t.Errorf("%v: %s; want %q", err, out, tt.says)
			}
		})
	}
}

// objects splits a rendered chart.
func objects(t *testing.T, text string) (all []map[string]any) {
	t.Helper()
	for part := range strings.SplitSeq(text, "\n---\n") {
		var o map[string]any
		if err := yaml.Unmarshal([]byte(part), &o); err != nil {
			t.Fatalf("%v in\n%s", err, part)
		}
		if len(o) > 0 {
			all = append(all, o)
		}
	}
	return all
}

// Hearth takes the config that the chart writes, whatever values it is made
// from, and everything is in the namespace of the release.
func TestRenderedConfig(t *testing.T) {
	for name, values := range map[string][]string{
		"least": nil,
		"kwok": {
			"--set", "config.backend.kwok.bootDelay=1s",
			"--set-json", `config.nodeGroups=[{"id":"runners","max":3,"template":{"capacity":{"cpu":"8","memory":"32Gi","pods":"110"}}}]`,
		},
		"everything": {
			"--set", "placement.enabled=true", "--set", "serviceMonitor.enabled=true", "--set", "prometheusRule.enabled=true", "--set", "dashboards.enabled=true",
			"--set", "clusterAutoscaler.enabled=true,clusterAutoscaler.image.repository=x,clusterAutoscaler.image.tag=v1.36.1", "--set-json", `clusterAutoscaler.extraArgs=["--v=4"]`,
			"--set", "ingress.enabled=true,ingress.host=hooks.example.com,ingress.className=nginx,ingress.tlsSecretName=hooks",
			"--set-json", `networkPolicy.httpFrom=["monitoring","ingress"]`, "--set-json", `secrets=["github-webhook"]`,
			"--set-json", `config.ci={"github":{"webhookSecretFile":"/etc/hearth/secrets/github-webhook/secret"}}`,
			"--set-json", `config.engines={"namespaces":["dagger"]}`, "--set-json", `config.leaderElection={"leaseDuration":"30s","renewDeadline":"20s"}`,
			"--set-json", `tolerations=[{"key":"support","operator":"Exists"}]`, "--set", "nodeSelector.role=support",
			"--set-json", `serviceAccount.annotations={"eks.amazonaws.com/role-arn":"arn:aws:iam::1:role/hearth"}`,
		},
		"self-signed":          {"--set", "tls.certManager.enabled=false,tls.selfSigned.enabled=true"},
		"its own certificates": {"--set", "tls.certManager.enabled=false", "--set", "tls.secretName=hearth-tls"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := helm(t, good(values...)...)
			if err != nil {
				t.Fatal(out)
			}
			kinds := map[string]int{}
			for _, o := range objects(t, out) {
				kind, _ := o["kind"].(string)
				kinds[kind]++
				metadata, _ := o["metadata"].(map[string]any)
				if namespace := metadata["namespace"]; namespace != nil && namespace != "ci-system" && namespace != "default" {
					t.Errorf("%s %v is in namespace %v", kind, metadata["name"], namespace)
				}
				if kind != "ConfigMap" || metadata["name"] != "hearth-config" {
					continue
				}
				text, _ := yaml.Marshal(o)
				var m corev1.ConfigMap
				if err := yaml.Unmarshal(text, &m); err != nil {
					t.Fatal(err)
				}
				dir := t.TempDir() // stands in for what is mounted
				path := filepath.Join(dir, "hearth.yaml")
				for name, text := range map[string]string{
					"hearth.yaml": strings.ReplaceAll(m.Data["hearth.yaml"], "/etc/hearth/tls", dir), "tls.crt": "", "tls.key": "", "ca.crt": "",
				} {
					if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				c, err := config.Load(path)
				if err != nil {
					t.Fatalf("%v in\n%s", err, m.Data["hearth.yaml"])
				}
				if c.LeaderElection.Namespace != "ci-system" || !c.LeaderElection.Enabled || len(c.Problems()) > 0 {
					t.Errorf("%+v, %v", c.LeaderElection, c.Problems())
				}
			}
			for _, kind := range []string{"Deployment", "ServiceAccount", "ClusterRole", "PodDisruptionBudget", "Service", "ConfigMap"} {
				if kinds[kind] == 0 {
					t.Errorf("no %s", kind)
				}
			}
			if withCertManager := !strings.Contains(strings.Join(values, " "), "certManager.enabled=false"); (kinds["Certificate"] > 0) != withCertManager {
				t.Errorf("%d certificates", kinds["Certificate"])
			}
			if strings.Contains(out, "hearth.hearth.svc") || strings.Contains(out, "namespace: hearth\n") {
				t.Error("the default namespace is left somewhere")
			}
		})
	}
}

// TestSelfSigned: the certificates that Helm makes are for each other, and for
// Hearth's name.
func TestSelfSigned(t *testing.T) {
	out, err := helm(t, good("--set", "tls.certManager.enabled=false,tls.selfSigned.enabled=true")...)
	if err != nil {
		t.Fatal(out)
	}
	secrets := map[string]map[string][]byte{}
	for _, o := range objects(t, out) {
		text, _ := yaml.Marshal(o)
		var s corev1.Secret
		if o["kind"] == "Secret" {
			if err := yaml.UnmarshalStrict(text, &s); err != nil {
				t.Fatal(err)
			}
			secrets[s.Name] = s.Data
		}
	}
	server, client := secrets["hearth-server"], secrets["hearth-client"]
	authority := x509.NewCertPool()
	if !authority.AppendCertsFromPEM(server["ca.crt"]) || !bytes.Equal(server["ca.crt"], client["ca.crt"]) {
		t.Fatalf("want one authority in %v", secrets)
	}
	for _, tc := range []struct {
		secret map[string][]byte
		name   string
		usage  x509.ExtKeyUsage
	}{{server, "hearth.ci-system.svc", x509.ExtKeyUsageServerAuth}, {client, "", x509.ExtKeyUsageClientAuth}} {
		pair, err := tls.X509KeyPair(tc.secret["tls.crt"], tc.secret["tls.key"])
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := certificate.Verify(x509.VerifyOptions{Roots: authority, DNSName: tc.name, KeyUsages: []x509.ExtKeyUsage{tc.usage}}); err != nil {
			t.Error(err)
		}
		if left := time.Until(certificate.NotAfter); left < 1094*24*time.Hour || left > 1096*24*time.Hour {
			t.Errorf("it is good for %s", left)
		}
	}
}
