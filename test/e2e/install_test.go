package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/internal/refautoscaler"
)

// TestInstall: `helm install` into an empty cluster, and the loop runs with what it
// installed and nothing else: the chart's definitions, service account and rights,
// config file and certificates. The process runs here, since nothing runs images.
// An upgrade keeps certificates and RunnerNodes, and so does an uninstall.
func TestInstall(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	i, cluster := newInstallation(t)
	i.helm("install", "../../charts/hearth", "--create-namespace")
	server, before := i.secret("hearth-server"), i.secret("hearth-client")
	i.account(cluster, "hearth")
	provider, expander := i.config(server)
	i.serve(cluster)
	flags := playground.DefaultFlags()
	autoscaler, err := refautoscaler.New(refautoscaler.Config{
		Flags: flags, Kube: i.kube, Provider: i.dial(provider, before, true), Expander: i.dial(expander, before, false), Logger: i.logger,
	})
	i.must(err)
	scaling, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for scaling.Err() == nil { // as a Deployment would start it again
			_ = autoscaler.Run(scaling)
		}
	}()
	t.Cleanup(func() { stop(); <-ended })

	_, err = i.kube.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, job("api", "acme/api").Pod(), metav1.CreateOptions{})
	i.must(err)
	i.eventually("the job to run", 90*time.Second, func() error {
		p, err := i.kube.CoreV1().Pods(metav1.NamespaceDefault).Get(ctx, "api", metav1.GetOptions{})
		if err == nil && p.Status.Phase != corev1.PodRunning {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
	c, err := kube.NewClient(cluster.AdminConfig())
	i.must(err)
	nodes := func() map[string]string {
		t.Helper()
		var list v1alpha1.RunnerNodeList
		i.must(c.List(ctx, &list))
		uids := map[string]string{}
		for _, n := range list.Items {
			uids[n.Name] = string(n.UID)
		}
		return uids
	}
	recorded := nodes()
	if len(recorded) != 1 {
		t.Fatalf("RunnerNodes %v", recorded)
	}
	kept := func(when string) {
		t.Helper()
		if now := nodes(); fmt.Sprint(now) != fmt.Sprint(recorded) {
			t.Errorf("%s: RunnerNodes %v, before %v", when, now, recorded)
		}
	}

	// The next version of the chart.
	next := filepath.Join(i.dir, "next")
	i.must(os.CopyFS(next, os.DirFS("../../charts/hearth")))
	about, err := os.ReadFile(filepath.Join(next, "Chart.yaml"))
	i.must(err)
	changed := strings.Replace(string(about), "\nversion: ", "\nversion: 9", 1)
	if changed == string(about) {
		t.Fatal("the chart has no version")
	}
	i.must(os.WriteFile(filepath.Join(next, "Chart.yaml"), []byte(changed), 0o600))
	i.helm("upgrade", next, "--set", "replicas=3")
	kept("after the upgrade")
	if after := i.secret("hearth-client"); string(after["tls.crt"]) != string(before["tls.crt"]) {
		t.Error("the upgrade has made new certificates")
	}
	d, err := i.kube.AppsV1().Deployments("ci-system").Get(ctx, "hearth", metav1.GetOptions{})
	if err != nil || *d.Spec.Replicas != 3 {
		t.Errorf("the upgrade did not arrive: %v", err)
	}
	i.run("rollback", "hearth", "--namespace", "ci-system", "--kubeconfig", i.admin)
	kept("after the rollback")
	i.run("uninstall", "hearth", "--namespace", "ci-system", "--kubeconfig", i.admin)
	kept("after the uninstall")
}

// installation is Hearth as installed by the chart.
type installation struct {
	t          *testing.T
	ctx        context.Context
	logger     *slog.Logger
	dir, admin string
	kube       kubernetes.Interface
}

// newInstallation starts an empty cluster to install into.
func newInstallation(t *testing.T) (*installation, *localcluster.Cluster) {
	t.Helper()
	logger := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	cluster, err := localcluster.Start(t.Context(), localcluster.Config{Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.Stop() })
	dir := t.TempDir()
	i := &installation{t: t, ctx: t.Context(), logger: logger, dir: dir, admin: filepath.Join(dir, "admin.kubeconfig")}
	i.must(cluster.WriteKubeconfig(i.admin, cluster.AdminConfig()))
	i.kube, err = kubernetes.NewForConfig(cluster.AdminConfig())
	i.must(err)
	return i, cluster
}

// account writes the kubeconfig of an installed service account.
func (i *installation) account(cluster *localcluster.Cluster, name string) {
	i.t.Helper()
	account, err := cluster.ServiceAccountConfig(i.ctx, "ci-system", name)
	i.must(err)
	i.must(cluster.WriteKubeconfig(filepath.Join(i.dir, name+".kubeconfig"), account))
}

// serve runs Hearth with the config file until the test ends.
func (i *installation) serve(cluster *localcluster.Cluster) {
	i.t.Helper()
	process, err := cluster.Spawn("hearth", hearth, nil, "serve", "--config", filepath.Join(i.dir, "hearth.yaml"), "--log-format", "text")
	i.must(err)
	i.t.Cleanup(func() {
		process.Kill()
		if i.t.Failed() {
			i.t.Logf("hearth:\n%s", process.LogTail())
		}
	})
}

func (i *installation) must(err error) {
	i.t.Helper()
	if err != nil {
		i.t.Fatal(err)
	}
}

func (i *installation) eventually(what string, within time.Duration, ok func() error) {
	i.t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) { // polls a condition
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			i.t.Fatalf("waited %s for %s: %v", within, what, err)
		}
	}
}

func (i *installation) run(args ...string) {
	i.t.Helper()
	cmd := exec.CommandContext(i.ctx, "go", append([]string{"tool", "-modfile=../../tools/helm/go.mod", "helm"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		i.t.Fatalf("helm %s: %v\n%s", args[0], err, out)
	}
}

func (i *installation) helm(verb, chart string, more ...string) {
	i.t.Helper()
	i.run(append([]string{
		verb, "hearth", chart, "--namespace", "ci-system", "--kubeconfig", i.admin,
		"--set", "image.repository=images.example/hearth", "--set", "tls.certManager.enabled=false,tls.selfSigned.enabled=true",
		"--set-json", `config.backend={"kwok":{"bootDelay":"1s","resumeDelay":"1s"}}`,
		"--set-json", `config.nodeGroups=[{"id":"runners","max":3,"template":{"capacity":{"cpu":"8","memory":"32Gi","pods":"110"},"zone":"a","instanceType":"kwok.8x"},"annotations":{"hearth.dev/role":"runner"}}]`,
	}, more...)...)
}

func (i *installation) secret(name string) map[string][]byte {
	i.t.Helper()
	s, err := i.kube.CoreV1().Secrets("ci-system").Get(i.ctx, name, metav1.GetOptions{})
	i.must(err)
	return s.Data
}

// config writes the installed config file and its certificates as they would be
// mounted, but for where files are and ports are taken; it returns the addresses of provider and expander.
func (i *installation) config(server map[string][]byte) (provider, expander string) {
	i.t.Helper()
	for name, text := range server {
		i.must(os.WriteFile(filepath.Join(i.dir, name), text, 0o600))
	}
	m, err := i.kube.CoreV1().ConfigMaps("ci-system").Get(i.ctx, "hearth-config", metav1.GetOptions{})
	i.must(err)
	var file map[string]any
	i.must(yaml.Unmarshal([]byte(strings.ReplaceAll(m.Data["hearth.yaml"], "/etc/hearth/tls", i.dir)), &file))
	provider, expander = localcluster.FreeAddress(), localcluster.FreeAddress()
	at, ok := file["server"].(map[string]any)
	if !ok {
		i.t.Fatalf("the config has no server:\n%s", m.Data["hearth.yaml"])
	}
	at["address"], at["expanderAddress"] = provider, expander
	file["http"] = map[string]any{"address": localcluster.FreeAddress()}
	file["kubernetes"] = map[string]any{"kubeconfig": filepath.Join(i.dir, "hearth.kubeconfig")}
	text, err := yaml.Marshal(file)
	i.must(err)
	i.must(os.WriteFile(filepath.Join(i.dir, "hearth.yaml"), text, 0o600))
	return provider, expander
}

// dial connects as cluster-autoscaler does, with the installed certificate or none.
func (i *installation) dial(address string, secret map[string][]byte, shows bool) *grpc.ClientConn {
	i.t.Helper()
	authority := x509.NewCertPool()
	if !authority.AppendCertsFromPEM(secret["ca.crt"]) {
		i.must(errors.New("no authority"))
	}
	config := &tls.Config{RootCAs: authority, ServerName: "hearth.ci-system.svc", MinVersion: tls.VersionTLS12}
	if shows {
		pair, err := tls.X509KeyPair(secret["tls.crt"], secret["tls.key"])
		i.must(err)
		config.Certificates = []tls.Certificate{pair}
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	i.must(err)
	i.t.Cleanup(func() { _ = conn.Close() })
	return conn
}
