package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/internal/dagger/enginetest"
	"github.com/hearth-ci/hearth/internal/kwok"
	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/internal/refautoscaler"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// hearth is the binary under test, built once by TestMain.
var hearth string

func TestMain(m *testing.M) {
	enginetest.Main()
	flag.Parse()
	if _, err := localcluster.FindBinaries(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": canary + "-aws", "AWS_EC2_METADATA_DISABLED": "true"} {
		if err := os.Setenv(name, value); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			os.Exit(1)
		}
	}
	dir, err := os.MkdirTemp("", "hearth-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	hearth = filepath.Join(dir, "hearth")
	if out, err := exec.Command("go", "build", "-o", hearth, "github.com/hearth-ci/hearth/cmd/provider").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: building hearth: %v\n%s", err, out)
		_ = os.RemoveAll(dir)
		os.Exit(1)
	}
	code := m.Run()
	if everything() {
		if err := unusedRights(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			code = 1
		}
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			code = 1
		}
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// ground is one test's control plane and what stands on it.
type ground struct {
	*playground.Playground
	t   *testing.T
	ctx context.Context
	// cloud is the embedded backend as whoever runs the cloud sees it: past the
	// provider, with an administrator's rights. It knows the groups once a
	// provider has been started.
	cloud cloud

	mu sync.Mutex
	// launched are all runner nodes that ever registered, by name, as they were
	// last seen; deleted those that went, in that order.
	launched map[string]*corev1.Node
	deleted  []string
	// annotated are the keys of all annotations that were ever on a node.
	annotated map[string]map[string]bool
	// instances are all instances that the cloud ever had.
	instances map[model.InstanceID]model.GroupID
	events    []refautoscaler.Event
}

// newGround starts a control plane for one test, which then runs beside others:
// they wait for most of their time. When the test fails, what the processes
// wrote last is in its output.
func newGround(t *testing.T) *ground { t.Helper(); return newGroundOn(t, onAWS()) }

func newGroundOn(t *testing.T, aws bool) *ground {
	t.Helper()
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	p, err := playground.Start(ctx, playground.Config{
		Hearth: hearth, Autoscaler: os.Getenv("CLUSTER_AUTOSCALER"), Audit: true,
		Logger: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	g := &ground{
		Playground: p, t: t, ctx: ctx, launched: map[string]*corev1.Node{},
		annotated: map[string]map[string]bool{}, instances: map[model.InstanceID]model.GroupID{},
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		g.checkAccess()
		g.checkSecrets()
		if t.Failed() {
			g.dump()
		}
		if err := p.Stop(); err != nil {
			t.Errorf("stopping: %v", err)
		}
	})
	if aws {
		a := newAmazon(p.Kube)
		g.cloud = a
		wg.Go(func() { a.run(ctx) })
	} else {
		g.cloud, err = kwok.New(kwok.Config{Client: p.Client, Namespace: deploy.Namespace, Logger: slog.New(slog.DiscardHandler)})
		g.must(err)
	}
	wg.Go(g.watchNodes)
	wg.Go(g.watchCloud)
	return g
}

// testWriter passes a log on to the test.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(line []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(line), "\n"))
	return len(line), nil
}

// dump logs the tails of all processes, without the requests that change
// nothing.
func (g *ground) dump() {
	logs, _ := filepath.Glob(filepath.Join(g.Cluster.LogDir(), "*.log"))
	for _, path := range logs {
		name := filepath.Base(path)
		if !strings.HasPrefix(name, "hearth") && !strings.HasPrefix(name, "cluster-autoscaler") {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		lines := slices.DeleteFunc(strings.SplitAfter(string(text), "\n"), func(line string) bool {
			return strings.Contains(line, "level=DEBUG msg=request")
		})
		const most = 200
		g.t.Logf("--- %s\n%s", name, strings.Join(lines[max(0, len(lines)-most):], ""))
	}
}

// watchNodes keeps count of every runner node that ever registers.
func (g *ground) watchNodes() {
	for g.ctx.Err() == nil {
		w, err := g.Kube.CoreV1().Nodes().Watch(g.ctx, metav1.ListOptions{LabelSelector: "hearth.dev/node-group"})
		if err != nil {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-g.ctx.Done():
			}
			continue
		}
		for e := range w.ResultChan() {
			node, ok := e.Object.(*corev1.Node)
			if !ok {
				continue
			}
			g.mu.Lock()
			if e.Type == watch.Deleted {
				g.deleted = append(g.deleted, node.Name)
			} else {
				g.launched[node.Name] = node
			}
			if g.annotated[node.Name] == nil {
				g.annotated[node.Name] = map[string]bool{}
			}
			for key := range node.Annotations {
				g.annotated[node.Name][key] = true
			}
			g.mu.Unlock()
		}
		w.Stop()
	}
}

// watchCloud keeps count of every instance. One is there for seconds at least,
// however short its life.
func (g *ground) watchCloud() {
	ticker := time.NewTicker(250 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-g.ctx.Done():
			return
		}
		snapshot, err := g.cloud.Snapshot(g.ctx)
		if err != nil {
			continue
		}
		g.mu.Lock()
		for group, s := range snapshot.Groups {
			for _, i := range s.Instances {
				g.instances[i.ID] = group
			}
		}
		g.mu.Unlock()
	}
}

// Instances returns how many instances the group ever had.
func (g *ground) Instances(group string) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, of := range g.instances {
		if of == model.GroupID(group) {
			n++
		}
	}
	return n
}

// Deleted returns the names of the nodes that went, the first to go first.
func (g *ground) Deleted() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.deleted)
}

// cloudGroup reads a group from the cloud.
func (g *ground) cloudGroup(group string) model.GroupSnapshot {
	g.t.Helper()
	snapshot, err := g.cloud.Snapshot(g.ctx)
	g.must(err)
	g.must(snapshot.Errors[model.GroupID(group)])
	return snapshot.Groups[model.GroupID(group)]
}

// Launched returns the names of all nodes of the group that ever registered.
func (g *ground) Launched(group string) (names []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for name, node := range g.launched {
		if node.Labels["hearth.dev/node-group"] == group {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Autoscaler starts the autoscaler with flags that a test may change.
func (g *ground) Autoscaler(change func(*refautoscaler.Flags)) *playground.Autoscaler {
	g.t.Helper()
	flags := playground.DefaultFlags()
	if change != nil {
		change(&flags)
	}
	a, err := g.StartAutoscaler(playground.AutoscalerConfig{Flags: flags, Observe: func(e refautoscaler.Event) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.events = append(g.events, e)
	}})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(a.Kill)
	return a
}

// StartProvider starts a replica, whose config is for the backend of the test.
func (g *ground) StartProvider(name, groups string) (*playground.Provider, error) {
	text, err := g.config(groups)
	if err != nil {
		return nil, err
	}
	return g.Playground.StartProvider(name, text)
}

// config makes of a config for the embedded backend one for the backend of the
// test, whose cloud then has its groups.
func (g *ground) config(text string) (string, error) {
	if a, aws := g.cloud.(*amazon); aws && strings.Contains(text, "kwok:") {
		return a.translate(text)
	}
	return text, nil
}

// Provider starts a replica and waits until it serves.
func (g *ground) Provider(name, groups string) *playground.Provider {
	g.t.Helper()
	p, err := g.StartProvider(name, groups)
	if err != nil {
		g.t.Fatal(err)
	}
	if _, aws := g.cloud.(*amazon); !aws {
		cfg, err := config.Load(p.ConfigFile)
		g.must(err)
		g.cloud.SetGroups(cfg.NodeGroups())
	}
	g.must(p.Serving(g.ctx, 30*time.Second))
	return p
}

// CloudProvider dials the provider as an autoscaler does. The connection is
// made before it returns: every new one makes the provider hide what is not
// Ready yet.
func (g *ground) CloudProvider() externalgrpc.CloudProviderClient {
	g.t.Helper()
	pair, err := g.Authority.Issue("tester")
	g.must(err)
	tls, err := g.Authority.ClientTLS(&pair)
	g.must(err)
	conn, err := grpc.NewClient(g.ProviderAddress(), grpc.WithTransportCredentials(credentials.NewTLS(tls)))
	g.must(err)
	g.t.Cleanup(func() { _ = conn.Close() })
	client := externalgrpc.NewCloudProviderClient(conn)
	_, err = client.NodeGroups(g.ctx, &externalgrpc.NodeGroupsRequest{}, grpc.WaitForReady(true))
	g.must(err)
	return client
}

func (g *ground) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// eventually waits until ok returns nil, and fails with its last error.
func (g *ground) eventually(what string, within time.Duration, ok func() error) {
	g.t.Helper()
	if _, aws := g.cloud.(*amazon); aws {
		within *= 3 // at rest AWS is read once a minute
	}
	deadline := time.Now().Add(within)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			g.t.Fatalf("waited %s for %s: %v", within, what, err)
		}
		time.Sleep(100 * time.Millisecond) // polls a condition
	}
}

// always fails if ok fails at any moment within the time.
func (g *ground) always(what string, within time.Duration, ok func() error) {
	g.t.Helper()
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err := ok(); err != nil {
			g.t.Fatalf("%s: %v", what, err)
		}
	}
}

// group reads a group's RunnerNodeGroup.
func (g *ground) group(name string) (*v1alpha1.RunnerNodeGroup, error) {
	var list v1alpha1.RunnerNodeGroupList
	if err := g.Client.List(g.ctx, &list); err != nil {
		return nil, err
	}
	for i := range list.Items {
		if list.Items[i].Name == name {
			return &list.Items[i], nil
		}
	}
	return nil, fmt.Errorf("no RunnerNodeGroup %q", name)
}

// nodes lists the present Nodes of a group.
func (g *ground) nodes(group string) ([]corev1.Node, error) {
	list, err := g.Kube.CoreV1().Nodes().List(g.ctx, metav1.ListOptions{LabelSelector: "hearth.dev/node-group=" + group})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// readyNodes fails until the group has exactly n Nodes, all Ready.
func (g *ground) readyNodes(group string, n int) func() error {
	return func() error {
		nodes, err := g.nodes(group)
		if err != nil {
			return err
		}
		ready := 0
		for _, node := range nodes {
			if slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
				return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			}) {
				ready++
			}
		}
		if ready != n || len(nodes) != n {
			return fmt.Errorf("%d of %d nodes of %s are ready, want %d", ready, len(nodes), group, n)
		}
		return nil
	}
}

// pods fails until every named pod has the phase.
func (g *ground) pods(phase corev1.PodPhase, names ...string) func() error {
	return func() error {
		var errs []error
		for _, name := range names {
			pod, err := g.Kube.CoreV1().Pods(metav1.NamespaceDefault).Get(g.ctx, name, metav1.GetOptions{})
			switch {
			case err != nil:
				errs = append(errs, err)
			case pod.Status.Phase != phase:
				errs = append(errs, fmt.Errorf("pod %s is %s", name, pod.Status.Phase))
			}
		}
		return errors.Join(errs...)
	}
}

// nodeOf returns the node that a pod is bound to.
func (g *ground) nodeOf(pod string) string {
	g.t.Helper()
	p, err := g.Kube.CoreV1().Pods(metav1.NamespaceDefault).Get(g.ctx, pod, metav1.GetOptions{})
	g.must(err)
	return p.Spec.NodeName
}
