package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/internal/kwok"
	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/placement"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// cluster is a control plane in which Hearth is installed.
type cluster struct {
	*localcluster.Cluster
	admin  client.WithWatch // may do everything
	hearth client.WithWatch // has the rights that are shipped
	config *rest.Config     // of hearth
}

func TestAgainstAnAPIServer(t *testing.T) {
	if _, err := localcluster.FindBinaries(); err != nil {
		t.Skipf("SKIPPED, nothing here is tested: %v", err)
	}
	c := start(t)
	t.Run("store", func(t *testing.T) { testStore(t, c) })
	t.Run("memories", func(t *testing.T) { testMemories(t, c) })
	t.Run("columns", func(t *testing.T) { testColumns(t, c) })
	t.Run("nodes", func(t *testing.T) { testNodes(t, c) })
	t.Run("engines", func(t *testing.T) { testEngines(t, c) })
	t.Run("instances", func(t *testing.T) { testInstances(t, c) })
	t.Run("events", func(t *testing.T) { testEvents(t, c) })
	t.Run("jobs of runners", func(t *testing.T) { testRunnerJobs(t, c) })
	t.Run("placement certificate", func(t *testing.T) { testPlacementCertificate(t, c) })
	t.Run("leader", func(t *testing.T) { testLeader(t, c) })
	t.Run("rights", func(t *testing.T) { testRights(t, c) })
	t.Run("broken watch", func(t *testing.T) { testBrokenWatch(t, c) }) // last: others would see the API server go
}

func start(t *testing.T) *cluster {
	t.Helper()
	running, err := localcluster.Start(t.Context(), localcluster.Config{})
	must(t, err)
	t.Cleanup(func() { must(t, running.Stop()) })
	c := &cluster{Cluster: running}
	must(t, c.Apply(t.Context(), append(deploy.CRDs(), deploy.RBAC(), deploy.RBACKwok(), deploy.RBACPlacement(), deploy.Placement())...))
	c.config, err = c.ServiceAccountConfig(t.Context(), deploy.Namespace, deploy.ServiceAccount)
	must(t, err)
	c.config.QPS, c.config.Burst = 200, 400
	c.hearth, err = kube.NewClient(c.config)
	must(t, err)
	c.admin, err = kube.NewClient(c.AdminConfig())
	must(t, err)
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until check returns nil.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// run runs f until the test ends.
func run(t *testing.T, f func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { f(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
}

var morning = time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)

func testStore(t *testing.T, c *cluster) {
	s := kube.NewStore(c.hearth)
	record := nodegroups.Record{Sequence: 1, Target: 200, Hidden: 3, Intents: map[model.InstanceID]nodegroups.Intent{}}
	for i, stage := range []nodegroups.Stage{nodegroups.StageDraining, nodegroups.StageEngine, nodegroups.StageStopping, nodegroups.StageStarting} {
		for j, desired := range []model.Desired{model.DesiredGone, model.DesiredParked, model.DesiredRunning} {
			id := model.InstanceID(fmt.Sprintf("aws:///eu-central-1a/i-%d%d%s", i, j, strings.Repeat("0", 400)))
			record.Intents[id] = nodegroups.Intent{Desired: desired, Stage: stage, Since: morning}
			if stage == nodegroups.StageStopping {
				record.Intents[id] = nodegroups.Intent{
					Desired: desired, Stage: stage, Since: morning, Engine: "6f9619ff-8b86-d011-b42d-00c04fc964ff", Exit: nodegroups.ExitVanished,
				}
			}
		}
	}
	summary := model.GroupSummary{Min: 1, Max: 300, Phases: map[model.Phase]int{}}
	for i, p := range model.Phases() {
		summary.Phases[p] = i
	}
	// Texts and numbers that the schemas would refuse must not cost a record.
	summary.Ready = -1
	summary.Conditions = []model.Condition{{Type: "AnnotationsValid", Message: "\xff" + strings.Repeat("é", 50_000)}}

	for _, group := range []model.GroupID{"runners-s", "Team A/runners"} {
		record.Sequence = 1
		must(t, s.SaveGroup(t.Context(), group, record, summary))
		var o v1alpha1.RunnerNodeGroup
		must(t, c.admin.Get(t.Context(), client.ObjectKey{Name: v1alpha1.GroupName(group)}, &o))
		o.Annotations = map[string]string{"hearth.dev/min-warm": "2"}
		must(t, c.admin.Update(t.Context(), &o)) // a conflict for the next write
		record.Sequence = 2
		must(t, s.SaveGroup(t.Context(), group, record, summary))

		records, annotations, _, err := kube.NewStore(c.hearth).Load(t.Context())
		must(t, err)
		if diff := cmp.Diff(record, records[group], cmpopts.EquateApproxTime(0)); diff != "" {
			t.Errorf("record of %q (-want +got):\n%s", group, diff)
		}
		if annotations[group]["hearth.dev/min-warm"] != "2" {
			t.Errorf("annotations of %q: %v", group, annotations[group])
		}

		next := kube.NewStore(c.hearth)
		_, _, _, err = next.Load(t.Context())
		must(t, err)
		record.Sequence = 3
		must(t, next.SaveGroup(t.Context(), group, record, summary))
		record.Sequence = 4
		must(t, next.SaveGroup(t.Context(), group, record, summary))
		record.Sequence = 3
		if err := s.SaveGroup(t.Context(), group, record, summary); !errors.Is(err, model.ErrSuperseded) {
			t.Errorf("the old leader: %v; want ErrSuperseded", err)
		}
		// A person deletes the object: it is made anew, with the record.
		must(t, c.admin.Delete(t.Context(), &v1alpha1.RunnerNodeGroup{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.GroupName(group)}}))
		record.Sequence = 5
		must(t, next.SaveGroup(t.Context(), group, record, summary))
	}

	n := model.NodeRecord{
		ID: "aws:///eu-central-1a/i-0abc", Group: "runners-s", Node: "ip-10-0-0-1", Desired: model.DesiredRunning,
		Phase: model.PhaseReady, Since: morning, CacheBytes: 12<<30 + 5, ConnectedClients: -1, Score: math.Inf(1),
		Decision: model.DecisionKeep, Reason: strings.Repeat("é", 5000),
		Conditions: []model.Condition{{Type: "Engine", True: true}},
	}
	for i := range 50 {
		n.Warmth = append(n.Warmth, model.KeyWarmth{Key: model.CacheKey(fmt.Sprintf("%0253d", i)), Warmth: 0.82, Uses: i})
	}
	must(t, s.SaveNode(t.Context(), n))
	for _, phase := range model.Phases() {
		n.Phase = phase
		must(t, s.SaveNode(t.Context(), n))
	}
	for _, desired := range []model.Desired{model.DesiredParked, model.DesiredGone} {
		n.Desired, n.Decision = desired, ""
		must(t, s.SaveNode(t.Context(), n))
	}
	for range 2 {
		must(t, s.DeleteNode(t.Context(), n.ID))
	}
}

// table asks for what kubectl get shows.
func table(t *testing.T, c *cluster, resource string) (columns []string, rows [][]any) {
	t.Helper()
	clientset, err := kubernetes.NewForConfig(c.AdminConfig())
	must(t, err)
	body, err := clientset.RESTClient().Get().AbsPath("/apis/hearth.dev/v1alpha1/"+resource).
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(t.Context())
	must(t, err)
	var answer metav1.Table
	must(t, json.Unmarshal(body, &answer))
	var shown []int // without -o wide
	for i, d := range answer.ColumnDefinitions {
		if d.Priority == 0 {
			shown = append(shown, i)
			columns = append(columns, strings.ToUpper(d.Name))
		}
	}
	for _, r := range answer.Rows {
		var cells []any
		for _, i := range shown {
			cells = append(cells, r.Cells[i])
		}
		rows = append(rows, cells)
	}
	return columns, rows
}

func testColumns(t *testing.T, c *cluster) {
	s := kube.NewStore(c.hearth)
	for _, phase := range []model.Phase{model.PhaseReady, model.PhaseLaunching} {
		must(t, s.SaveNode(t.Context(), model.NodeRecord{
			ID: "kwok://c/" + model.InstanceID(phase), Group: "c", Desired: model.DesiredRunning, Phase: phase,
		}))
	}
	must(t, s.SaveNode(t.Context(), model.NodeRecord{
		ID: "kwok://c/Ready", Group: "c", Desired: model.DesiredRunning, Phase: model.PhaseReady,
		Warmth:     []model.KeyWarmth{{Key: "a", Warmth: 0.82}, {Key: "b", Warmth: 0.5}},
		CacheBytes: 12 << 30, ConnectedClients: 3, Decision: model.DecisionKeep,
	}))
	columns, _ := table(t, c, "runnernodegroups")
	if want := "NAME TARGET READY PARKED HIDDEN MIN MAX WARM AGE"; strings.Join(columns, " ") != want {
		t.Errorf("rng shows %v; want %s", columns, want)
	}
	columns, rows := table(t, c, "runnernodes")
	if want := "NAME GROUP PHASE WARMTH CACHE CLIENTS DECISION AGE"; strings.Join(columns, " ") != want {
		t.Errorf("rn shows %v; want %s", columns, want)
	}
	shown := map[string]bool{}
	for _, row := range rows {
		shown[fmt.Sprint(row[1:7]...)] = true
	}
	for _, want := range [][]any{
		{"c", "Ready", "0.82", "12Gi", 3.0, "keep"},
		{"c", "Launching", nil, nil, nil, nil},
	} {
		if !shown[fmt.Sprint(want...)] {
			t.Errorf("no row %v among %v", want, rows)
		}
	}
}

func selector(t *testing.T) kube.EngineSelector {
	t.Helper()
	s, err := labels.Parse("app.kubernetes.io/name=dagger-helm")
	must(t, err)
	return kube.EngineSelector{Labels: s}
}

func testNodes(t *testing.T, c *cluster) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "acts"}}
	must(t, c.admin.Create(t.Context(), node))
	n, uid := kube.NewNodes(c.hearth, selector(t)), string(node.UID)
	get := func() *corev1.Node {
		t.Helper()
		o := &corev1.Node{}
		must(t, c.admin.Get(t.Context(), client.ObjectKey{Name: "acts"}, o))
		return o
	}
	hasTaint := func(o *corev1.Node) bool {
		for _, taint := range o.Spec.Taints {
			if strings.HasSuffix(taint.Key, "/hearth-draining") {
				return true
			}
		}
		return false
	}
	must(t, n.Taint(t.Context(), "acts", uid))
	if !hasTaint(get()) {
		t.Error("not tainted")
	}
	must(t, n.Untaint(t.Context(), "acts", uid))
	if hasTaint(get()) {
		t.Error("still tainted")
	}
	must(t, n.ClearCATaint(t.Context(), "acts", uid))
	must(t, n.Label(t.Context(), "acts", uid, "Team A"))
	must(t, n.Mark(t.Context(), "acts", uid, model.Marks{Decision: model.DecisionKeep, Reason: "warm", Protected: true}))
	if o := get(); o.Labels[v1alpha1.NodeGroupLabel] != v1alpha1.GroupLabel("Team A") || len(o.Annotations) < 4 {
		t.Errorf("labels %v, annotations %v", o.Labels, o.Annotations)
	}

	must(t, c.admin.Create(t.Context(), runnerPod("on-acts", func(p *corev1.Pod) { p.Spec.NodeName = "acts" })))
	must(t, c.admin.Create(t.Context(), runnerPod("elsewhere", func(p *corev1.Pod) { p.Spec.NodeName = "nowhere" })))
	pods, err := n.PodsOn(t.Context(), "acts")
	must(t, err)
	if len(pods) != 1 || pods[0].Name != "on-acts" {
		t.Errorf("runner pods %v; want on-acts alone", pods)
	}

	must(t, n.Uninstall(t.Context()))
	if o := get(); o.Labels[v1alpha1.NodeGroupLabel] != "" || len(o.Annotations) > 1 { // one is the controller manager's
		t.Errorf("after uninstall: labels %v, annotations %v", o.Labels, o.Annotations)
	}
	must(t, n.Delete(t.Context(), "acts", "the uid of another"))
	get()
	for range 2 {
		must(t, n.Delete(t.Context(), "acts", uid))
	}
	if err := c.admin.Get(t.Context(), client.ObjectKey{Name: "acts"}, &corev1.Node{}); !apierrors.IsNotFound(err) {
		t.Errorf("after the deletion: %v; want NotFound", err)
	}
}

func runnerPod(name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"hearth.dev/cache-key": "dagger"}},
		Spec: corev1.PodSpec{
			Containers:                    []corev1.Container{{Name: "c", Image: "none"}},
			TerminationGracePeriodSeconds: new(int64(0)),
		},
	}
	change(p)
	return p
}

// seen is a sink that keeps the newest state of everything.
type seen struct {
	mu          sync.Mutex
	nodes       map[model.InstanceID]model.Node
	pods        map[string]model.Pod
	annotations map[model.GroupID]map[string]string
}

func newSeen() *seen {
	return &seen{nodes: map[model.InstanceID]model.Node{}, pods: map[string]model.Pod{}, annotations: map[model.GroupID]map[string]string{}}
}

func (s *seen) NodeChanged(n model.Node)                    { s.mu.Lock(); defer s.mu.Unlock(); s.nodes[n.ID] = n }
func (s *seen) NodeGone(n model.Node)                       { s.mu.Lock(); defer s.mu.Unlock(); delete(s.nodes, n.ID) }
func (s *seen) PodChanged(p model.Pod)                      { s.mu.Lock(); defer s.mu.Unlock(); s.pods[p.Name] = p }
func (s *seen) PodGone(p model.Pod)                         { s.mu.Lock(); defer s.mu.Unlock(); delete(s.pods, p.Name) }
func (*seen) RunnerComing(model.GroupID, string, time.Time) {}

func (s *seen) AnnotationsChanged(g model.GroupID, a map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.annotations[g] = a
}

func (s *seen) node(id model.InstanceID) model.Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes[id]
}

func (s *seen) pod(name string) model.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pods[name]
}

// watch runs a feed under Hearth's rights and waits until it is synced.
func watch(t *testing.T, c *cluster) *seen {
	t.Helper()
	sink := newSeen()
	f, err := kube.NewFeed(kube.FeedConfig{
		Client: c.hearth, Sink: sink, Engines: selector(t), Logger: slog.New(slog.DiscardHandler),
		KeysFor: func(model.GroupID) []string { return nil },
	})
	must(t, err)
	run(t, f.Run)
	eventually(t, func() error {
		if !f.Synced() {
			return errors.New("the feed is not synced")
		}
		return nil
	})
	return sink
}

// ephemeralRunners is as much of GitHub's CRD as Hearth knows of.
const ephemeralRunners = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: ephemeralrunners.actions.github.com}
spec:
  group: actions.github.com
  scope: Namespaced
  names: {kind: EphemeralRunner, listKind: EphemeralRunnerList, plural: ephemeralrunners, singular: ephemeralrunner}
  versions:
  - name: v1alpha1
    served: true
    storage: true
    subresources: {status: {}}
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
`

// testRunnerJobs: what a GitHub runner has picked up is told of its pod.
func testRunnerJobs(t *testing.T, c *cluster) {
	must(t, c.Apply(t.Context(), []byte(ephemeralRunners)))
	must(t, c.admin.Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "linux-x7", Namespace: "default"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "runner", Image: "runner"}}},
	}))
	sink := watch(t, c)
	runner := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"runnerScaleSetId": int64(1)}}}
	runner.SetAPIVersion("actions.github.com/v1alpha1")
	runner.SetKind("EphemeralRunner")
	runner.SetNamespace("default")
	runner.SetName("linux-x7")
	eventually(t, func() error { // the administrator's client has to learn of the kind
		return client.IgnoreAlreadyExists(c.admin.Create(t.Context(), runner.DeepCopy()))
	})
	status := []byte(`{"status":{"jobRepositoryName":"acme/shop","jobWorkflowRef":"acme/shop/.github/workflows/ci.yml@refs/heads/main"}}`)
	must(t, c.admin.Status().Patch(t.Context(), runner, client.RawPatch(types.MergePatchType, status)))
	eventually(t, func() error {
		if p := sink.pod("linux-x7"); p.Job != "github/acme/shop/.github/workflows/ci.yml" {
			return fmt.Errorf("the pod is told as %+v", p)
		}
		return nil
	})
}

// testPlacementCertificate: the rights that are shipped do to make a
// certificate, to renew it and to make the API server trust it.
func testPlacementCertificate(t *testing.T, c *cluster) {
	now := time.Now()
	s, err := placement.NewSecret(placement.SecretConfig{
		Client: c.hearth, Namespace: deploy.Namespace, Name: deploy.PlacementName, Webhook: deploy.PlacementName,
		Hosts: []string{"hearth-placement.hearth.svc"}, Now: func() time.Time { return now }, Logger: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	bundle := func() (ca []byte, cert []byte) {
		hook := &admissionregistrationv1.MutatingWebhookConfiguration{}
		must(t, c.admin.Get(t.Context(), client.ObjectKey{Name: deploy.PlacementName}, hook))
		secret := &corev1.Secret{}
		_ = c.admin.Get(t.Context(), client.ObjectKey{Namespace: deploy.Namespace, Name: deploy.PlacementName}, secret)
		if hook.Webhooks[0].ClientConfig.Service == nil || *hook.Webhooks[0].FailurePolicy != admissionregistrationv1.Ignore {
			t.Errorf("the webhook configuration is %+v", hook.Webhooks[0])
		}
		return hook.Webhooks[0].ClientConfig.CABundle, secret.Data[corev1.TLSCertKey]
	}
	// lead until what came of it is ok.
	lead := func(ok func() error) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); s.Lead(ctx) }()
		defer func() { cancel(); <-ended }()
		eventually(t, ok)
	}
	lead(func() error {
		if ca, cert := bundle(); len(ca) == 0 || len(cert) == 0 {
			return fmt.Errorf("CA of %d bytes, certificate of %d", len(ca), len(cert))
		}
		return nil
	})
	ca, first := bundle()
	now = now.Add(300 * 24 * time.Hour)
	lead(func() error {
		if same, cert := bundle(); !bytes.Equal(ca, same) || bytes.Equal(cert, first) {
			return errors.New("the certificate was not renewed, or the authority was")
		}
		return nil
	})
}

// testInstances takes an instance of the embedded backend through its life.
func testInstances(t *testing.T, c *cluster) {
	const group = "runners-i"
	b, err := kwok.New(kwok.Config{
		Client: c.hearth, Namespace: deploy.Namespace, BootDelay: time.Second, ResumeDelay: time.Second,
		Logger: slog.New(slog.DiscardHandler),
		Groups: []model.NodeGroup{{ID: group, Max: 5, Template: model.Template{
			Capacity: map[string]string{"cpu": "8", "memory": "32Gi", "pods": "110"}, Zone: "a", InstanceType: "kwok.8x",
			Taints: []model.Taint{{Key: "ci", Value: "true", Effect: "NoSchedule"}},
		}}},
	})
	must(t, err)
	run(t, func(ctx context.Context) { _ = b.Run(ctx) })
	sink := watch(t, c)

	only := func() (model.Instance, error) {
		s, err := b.Snapshot(t.Context())
		if err != nil || len(s.Errors) > 0 || len(s.Groups[group].Instances) != 1 {
			return model.Instance{}, fmt.Errorf("snapshot %+v, error %w; want one instance", s, err)
		}
		return s.Groups[group].Instances[0], nil
	}
	readyIs := func(want bool) func() error {
		return func() error {
			i, err := only()
			if err != nil {
				return err
			}
			if n := sink.node(i.ID); n.Name == "" || n.Ready != want {
				return fmt.Errorf("instance %s, node %+v; want it ready: %v", i.State, n, want)
			}
			return nil
		}
	}
	must(t, b.Resize(t.Context(), group, 1))
	eventually(t, readyIs(true))
	i, err := only()
	must(t, err)
	n := sink.node(i.ID)
	if n.Labels[v1alpha1.NodeGroupLabel] != group || n.UID == "" {
		t.Errorf("node %+v", n)
	}

	// A pod that asks for the group runs there, and is told.
	must(t, c.admin.Create(t.Context(), runnerPod("job", func(p *corev1.Pod) {
		p.Annotations = map[string]string{localcluster.RunForAnnotation: "1s"}
		p.Spec.NodeSelector = map[string]string{v1alpha1.NodeGroupLabel: group}
		p.Spec.Tolerations = []corev1.Toleration{{Key: "ci", Operator: corev1.TolerationOpExists}}
	})))
	eventually(t, func() error {
		p := sink.pod("job")
		if p.Node != n.Name || p.Kind != model.PodRunner || p.Key != "dagger" || p.Group != group || p.Started.IsZero() || p.Finished.IsZero() {
			return fmt.Errorf("pod %+v; want it finished on %q", p, n.Name)
		}
		return nil
	})

	// Stopped, its kubelet is silent; Hearth deletes the Node; started, it
	// registers anew under the same name.
	ids := []model.InstanceID{i.ID}
	must(t, b.Stop(t.Context(), group, ids))
	eventually(t, readyIs(false))
	must(t, kube.NewNodes(c.hearth, selector(t)).Delete(t.Context(), n.Name, n.UID))
	must(t, b.Start(t.Context(), group, ids))
	eventually(t, readyIs(true))
	if again := sink.node(i.ID); again.Name != n.Name || again.UID == n.UID {
		t.Errorf("node %s %s after the resume; before: %s %s", again.Name, again.UID, n.Name, n.UID)
	}

	// Stopped and started while the Node stays, it is Ready again.
	must(t, b.Stop(t.Context(), group, ids))
	eventually(t, readyIs(false))
	must(t, b.Start(t.Context(), group, ids))
	eventually(t, readyIs(true))

	must(t, b.Terminate(t.Context(), group, ids))
	eventually(t, func() error {
		s, err := b.Snapshot(t.Context())
		if err != nil || len(s.Groups[group].Instances) > 0 || sink.node(i.ID).Ready {
			return fmt.Errorf("after the end: %+v, node ready: %v, error %w", s, sink.node(i.ID).Ready, err)
		}
		return nil
	})
	must(t, kube.NewNodes(c.hearth, selector(t)).Delete(t.Context(), n.Name, ""))
}

func testEvents(t *testing.T, c *cluster) {
	store := kube.NewStore(c.hearth)
	must(t, store.SaveGroup(t.Context(), "runners-e", nodegroups.Record{Sequence: 1}, model.GroupSummary{}))
	e := kube.NewEvents(c.hearth, store, slog.New(slog.DiscardHandler))
	run(t, e.Run)
	for range 3 {
		e.Group("runners-e", model.SeverityWarning, "LaunchFailed", "no capacity")
		e.Node(model.Node{Name: "n-e", UID: "u"}, model.SeverityNormal, "Draining", "cold")
	}
	eventually(t, func() error {
		var list corev1.EventList
		if err := c.admin.List(t.Context(), &list, client.InNamespace("default")); err != nil {
			return err
		}
		counted := map[string]int32{}
		for _, e := range list.Items {
			if e.Source.Component == "hearth" {
				counted[e.InvolvedObject.Kind+" "+e.InvolvedObject.Name+" "+e.Reason] = e.Count
			}
		}
		want := map[string]int32{"RunnerNodeGroup runners-e LaunchFailed": 3, "Node n-e Draining": 3}
		if diff := cmp.Diff(want, counted); diff != "" {
			return fmt.Errorf("events (-want +got):\n%s", diff)
		}
		return nil
	})
}

func testLeader(t *testing.T, c *cluster) {
	for _, name := range []string{"hearth-1", "hearth-2"} {
		must(t, c.admin.Create(t.Context(), runnerPod(name, func(p *corev1.Pod) { p.Namespace = deploy.Namespace })))
	}
	for _, leader := range []string{"hearth-1", "hearth-2"} {
		must(t, kube.LabelLeader(t.Context(), c.hearth, deploy.Namespace, leader))
		var list corev1.PodList
		must(t, c.admin.List(t.Context(), &list, client.MatchingLabels{"hearth.dev/leader": "true"}))
		if len(list.Items) != 1 || list.Items[0].Name != leader {
			t.Errorf("%d pods labelled; want %s alone", len(list.Items), leader)
		}
	}
}

// testRights: what is not needed is not granted.
func testMemories(t *testing.T, c *cluster) {
	m := kube.NewMemories(c.hearth, deploy.Namespace)
	most := bytes.Repeat([]byte{0, 0xff, 'x'}, 512<<10/3)
	for _, group := range []model.GroupID{"runners-a", "Team A/runners", model.GroupID(strings.Repeat("x", 255))} {
		for _, want := range [][]byte{[]byte("first"), most} {
			must(t, m.SaveLearnt(t.Context(), group, want))
			// Another life: nothing but what was written is known.
			all, err := kube.NewMemories(c.hearth, deploy.Namespace).LoadLearnt(t.Context())
			must(t, err)
			if !bytes.Equal(all[group], want) {
				t.Errorf("%q: read %d bytes, want %d", group, len(all[group]), len(want))
			}
		}
	}
	var list corev1.ConfigMapList
	must(t, c.admin.List(t.Context(), &list, client.MatchingLabels{"hearth.dev/learnt": "true"}))
	if len(list.Items) != 3 {
		t.Errorf("%d ConfigMaps, want 3", len(list.Items))
	}
}

func testRights(t *testing.T, c *cluster) {
	clientset, err := kubernetes.NewForConfig(c.config)
	must(t, err)
	for _, tt := range []struct {
		allowed                          bool
		verb, group, resource, namespace string
	}{
		{true, "create", "coordination.k8s.io", "leases", "hearth"},
		{true, "update", "coordination.k8s.io", "leases", "hearth"},
		{false, "update", "coordination.k8s.io", "leases", "kube-system"},
		{false, "delete", "coordination.k8s.io", "leases", "hearth"},
		{false, "update", "", "nodes", ""},
		{false, "update", "", "nodes/status", ""},
		{false, "patch", "", "nodes/status", ""},
		{false, "deletecollection", "", "nodes", ""},
		{true, "create", "", "secrets", "hearth"},
		{false, "create", "", "secrets", "default"},
		{false, "get", "", "secrets", "hearth"}, // but for its own
		{false, "get", "admissionregistration.k8s.io", "mutatingwebhookconfigurations", ""},
		{false, "create", "admissionregistration.k8s.io", "mutatingwebhookconfigurations", ""},
		{true, "watch", "actions.github.com", "ephemeralrunners", ""},
		{false, "patch", "actions.github.com", "ephemeralrunners", ""},
		{false, "list", "", "secrets", ""},
		{false, "create", "", "pods", "hearth"},
		{false, "create", "", "pods", "default"},
		{true, "patch", "", "pods", "default"},  // of engines, wherever they are
		{true, "delete", "", "pods", "default"}, // likewise
		{false, "patch", "", "pods/status", "default"},
		{false, "update", "", "pods", "default"},
		{false, "deletecollection", "", "pods", "default"},
		{false, "create", "", "pods/eviction", "default"},
		{false, "create", "", "pods/exec", "hearth"},
		{false, "create", "", "events", "kube-system"},
		{false, "get", "", "configmaps", "kube-system"},
		{true, "update", "", "configmaps", "hearth"},
		{false, "update", "", "configmaps", "default"},
		{false, "watch", "", "configmaps", "hearth"},
		{false, "delete", "", "configmaps", "hearth"},
		{false, "update", "hearth.dev", "runnernodegroups", ""},
		{false, "delete", "hearth.dev", "runnernodegroups", ""},
		{false, "deletecollection", "hearth.dev", "runnernodes", ""},
		{false, "impersonate", "", "serviceaccounts", "hearth"},
		{false, "create", "", "serviceaccounts/token", "hearth"},
		{false, "update", "rbac.authorization.k8s.io", "clusterroles", ""},
	} {
		resource, sub, _ := strings.Cut(tt.resource, "/")
		review, err := clientset.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), &authorizationv1.SelfSubjectAccessReview{
			Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
				Verb: tt.verb, Group: tt.group, Resource: resource, Subresource: sub, Namespace: tt.namespace,
			}},
		}, metav1.CreateOptions{})
		must(t, err)
		if review.Status.Allowed != tt.allowed {
			t.Errorf("%s %s in %q: allowed is %v; want %v", tt.verb, tt.resource, tt.namespace, review.Status.Allowed, tt.allowed)
		}
	}
}

// testBrokenWatch: the API server goes away and comes back; the feed tells
// what happened since.
func testBrokenWatch(t *testing.T, c *cluster) {
	for _, name := range []string{"stays", "goes"} {
		must(t, c.admin.Create(t.Context(), &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{ProviderID: "kwok://w/" + name},
		}))
	}
	sink := watch(t, c)
	if sink.node("kwok://w/goes").Name != "goes" {
		t.Error("a node was not told")
	}
	c.StopAPIServer()
	if err := kube.NewNodes(c.hearth, selector(t)).Taint(t.Context(), "stays", ""); err == nil {
		t.Error("a node was tainted while the API server was away")
	}
	must(t, c.StartAPIServer(t.Context()))
	eventually(t, func() error {
		return client.IgnoreNotFound(c.admin.Delete(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "goes"}}))
	})
	eventually(t, func() error {
		return kube.NewNodes(c.hearth, selector(t)).Taint(t.Context(), "stays", "")
	})
	eventually(t, func() error {
		if n := sink.node("kwok://w/goes"); n.Name != "" {
			return errors.New("the deletion was not told")
		}
		if n := sink.node("kwok://w/stays"); !n.Draining {
			return fmt.Errorf("the taint was not told: %+v", n)
		}
		return nil
	})
}
