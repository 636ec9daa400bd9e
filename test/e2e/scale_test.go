package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/kwok"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/internal/refautoscaler"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

const (
	groupLabel        = "hearth.dev/node-group"
	scaleDownDisabled = "cluster-autoscaler.kubernetes.io/scale-down-disabled"
	toBeDeleted       = "ToBeDeletedByClusterAutoscaler"
	drainTaint        = "status-taint.cluster-autoscaler.kubernetes.io/hearth-draining"
)

// runners declares the node group "runners", whose nodes take one job of 6 CPUs
// at a time. More annotations are YAML.
func runners(bootDelay string, size int, annotations string) string {
	return fmt.Sprintf(`backend:
  kwok: {bootDelay: %s, resumeDelay: 1s}
nodeGroups:
- id: runners
  max: %d
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, zone: a, instanceType: kwok.8x}
  annotations: {hearth.dev/role: runner, %s}
`, bootDelay, size, annotations)
}

// job is a CI job that fills a node of "runners" until it is finished.
func job(name, key string) playground.Job {
	return playground.Job{Name: name, Group: "runners", Key: key, CPU: "6"}
}

func (g *ground) submit(jobs ...playground.Job) {
	g.t.Helper()
	g.must(g.Submit(g.ctx, jobs...))
}

func (g *ground) finish(names ...string) {
	g.t.Helper()
	g.must(g.Finish(g.ctx, names...))
}

// create creates the pod of a job after it was changed.
func (g *ground) create(j playground.Job, change func(*corev1.Pod)) {
	g.t.Helper()
	pod := j.Pod()
	change(pod)
	_, err := g.Kube.CoreV1().Pods(pod.Namespace).Create(g.ctx, pod, metav1.CreateOptions{})
	g.must(err)
}

// annotate does what kubectl annotate does; a nil value removes the key.
func (g *ground) annotate(object client.Object, annotations map[string]any) {
	g.t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	g.must(err)
	g.must(g.Client.Patch(g.ctx, object, client.RawPatch(types.MergePatchType, patch)))
}

// annotateGroup annotates a RunnerNodeGroup, once the provider has made it.
func (g *ground) annotateGroup(name string, annotations map[string]any) {
	g.t.Helper()
	g.eventually("the RunnerNodeGroup", 10*time.Second, func() error {
		_, err := g.group(name)
		return err
	})
	g.annotate(&v1alpha1.RunnerNodeGroup{ObjectMeta: metav1.ObjectMeta{Name: name}}, annotations)
}

func (g *ground) annotateNode(name string, annotations map[string]any) {
	g.t.Helper()
	g.annotate(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, annotations)
}

func (g *ground) node(name string) (*corev1.Node, error) {
	return g.Kube.CoreV1().Nodes().Get(g.ctx, name, metav1.GetOptions{})
}

// nodeThat fails until the node is there and ok.
func (g *ground) nodeThat(name string, ok func(*corev1.Node) bool) func() error {
	return func() error {
		node, err := g.node(name)
		if err == nil && !ok(node) {
			err = fmt.Errorf("node %s has annotations %v, taints %v", name, node.Annotations, node.Spec.Taints)
		}
		return err
	}
}

func released(node *corev1.Node) bool {
	_, disabled := node.Annotations[scaleDownDisabled]
	return node.Annotations["hearth.dev/decision"] == "release" && !disabled
}

func tainted(key string) func(*corev1.Node) bool {
	return func(node *corev1.Node) bool {
		return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
	}
}

func not(ok func(*corev1.Node) bool) func(*corev1.Node) bool {
	return func(node *corev1.Node) bool { return !ok(node) }
}

// gone fails until there is no such node.
func (g *ground) gone(name string) func() error {
	return func() error {
		_, err := g.node(name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, fmt.Errorf("node %s is there", name))
	}
}

// sizes fails until the group's record says so.
func (g *ground) sizes(group string, target, hidden int) func() error {
	return func() error {
		rng, err := g.group(group)
		if err == nil && (rng.Status.Target != target || rng.Status.Hidden != hidden) {
			err = fmt.Errorf("group %s has target %d and %d hidden, want %d and %d", group, rng.Status.Target, rng.Status.Hidden, target, hidden)
		}
		return err
	}
}

// runnerNodes returns the RunnerNodes of a group by the name of their node.
func (g *ground) runnerNodes(group string) (map[string]v1alpha1.RunnerNode, error) {
	var list v1alpha1.RunnerNodeList
	if err := g.Client.List(g.ctx, &list); err != nil {
		return nil, err
	}
	byNode := map[string]v1alpha1.RunnerNode{}
	for _, rn := range list.Items {
		if rn.Spec.NodeGroup == group {
			byNode[rn.Status.NodeName] = rn
		}
	}
	return byNode, nil
}

// metric sums the samples of a metric that have all the labels, each written
// as name="value".
func metric(text, name string, labels ...string) (sum float64) {
	for line := range strings.Lines(text) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		family, _, _ := strings.Cut(series, "{")
		if family != name || slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(series, l) }) {
			continue
		}
		if f, err := strconv.ParseFloat(value, 64); err == nil {
			sum += f
		}
	}
	return sum
}

// wire is a node as cluster-autoscaler sends it.
func wire(node *corev1.Node) *externalgrpc.ExternalGrpcNode {
	return &externalgrpc.ExternalGrpcNode{
		ProviderID: node.Spec.ProviderID, Name: node.Name, Labels: node.Labels, Annotations: node.Annotations,
	}
}

func (g *ground) deleteNodes(provider externalgrpc.CloudProviderClient, group string, node *corev1.Node) error {
	_, err := provider.NodeGroupDeleteNodes(g.ctx, &externalgrpc.NodeGroupDeleteNodesRequest{
		Id: group, Nodes: []*externalgrpc.ExternalGrpcNode{wire(node)},
	})
	return err
}

// TestScaleFromZeroByTemplate: pods that only the template of one group
// promises to satisfy get nodes of that group, though it has none yet.
func TestScaleFromZeroByTemplate(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", `backend:
  kwok: {bootDelay: 1s}
nodeGroups:
- id: general
  max: 5
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, zone: a, instanceType: kwok.8x}
- id: special
  max: 5
  template:
    capacity: {cpu: "16", memory: 64Gi, pods: "110"}
    labels: {tier: special}
    taints: [{key: dedicated, value: ci, effect: NoSchedule}]
    zone: b
    instanceType: kwok.16x
`)
	g.Autoscaler(nil)
	tolerant := func(p *corev1.Pod) {
		p.Spec.Tolerations = []corev1.Toleration{{Key: "dedicated", Value: "ci", Effect: corev1.TaintEffectNoSchedule}}
	}
	g.create(playground.Job{Name: "intolerant", CPU: "1"}, func(p *corev1.Pod) {
		p.Spec.NodeSelector = map[string]string{"tier": "special"}
	})
	g.create(playground.Job{Name: "labelled", CPU: "10"}, func(p *corev1.Pod) {
		tolerant(p)
		p.Spec.NodeSelector = map[string]string{
			"tier": "special", corev1.LabelTopologyZone: "b", corev1.LabelInstanceTypeStable: "kwok.16x",
		}
	})
	g.create(playground.Job{Name: "large", CPU: "12"}, func(p *corev1.Pod) {
		tolerant(p)
		p.Spec.NodeSelector = nil
	})
	g.create(playground.Job{Name: "general", CPU: "6"}, func(p *corev1.Pod) { p.Spec.NodeSelector = nil })

	g.eventually("the pods to run", 40*time.Second, g.pods(corev1.PodRunning, "labelled", "large", "general"))
	for pod, group := range map[string]string{"labelled": "special", "large": "special", "general": "general"} {
		node, err := g.node(g.nodeOf(pod))
		g.must(err)
		if node.Labels[groupLabel] != group {
			t.Errorf("pod %s runs on a node of group %q, want %q", pod, node.Labels[groupLabel], group)
		}
		if group == "special" && (node.Labels["tier"] != "special" || !tainted("dedicated")(node)) {
			t.Errorf("node %s has labels %v and taints %v, not those of its template", node.Name, node.Labels, node.Spec.Taints)
		}
	}
	if node := g.nodeOf("intolerant"); node != "" {
		t.Errorf("the pod without a toleration runs on %s", node)
	}
	// The pod that cannot run was looked at beside the others all the time.
	for group, want := range map[string]int{"special": 2, "general": 1} {
		if got := g.Instances(group); got != want {
			t.Errorf("group %s launched %d instances, want %d", group, got, want)
		}
	}
}

// TestColdestGoesFirst: of idle nodes the coldest goes, then the next, and
// min-warm stays; a node that a person protects stays too and holds up no
// other.
func TestColdestGoesFirst(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", runners("1s", 5, `hearth.dev/max-idle: 3s, hearth.dev/scale-down-unneeded-time: 1s`))
	g.Autoscaler(nil)
	// One node for each; then one more job on the second and two on the third.
	first := []string{"cold", "mild", "hot", "person"}
	for _, key := range first[:3] {
		g.submit(playground.Job{Name: key, Group: "runners", Key: key, CPU: "5"})
	}
	g.submit(playground.Job{Name: "person", Group: "runners", CPU: "5"}) // of no key: the coldest of all
	g.eventually("the first jobs to run", 40*time.Second, g.pods(corev1.PodRunning, first...))
	on := map[string]string{}
	for _, name := range first {
		on[name] = g.nodeOf(name)
	}
	// A person makes the protection their own, since Hearth's is there already.
	g.annotateNode(on["person"], map[string]any{scaleDownDisabled: "true", "hearth.dev/scale-down-disabled-by": nil})
	more := []string{"mild-2", "hot-2", "hot-3"}
	for _, name := range more {
		key, _, _ := strings.Cut(name, "-")
		g.create(playground.Job{Name: name, Key: key, CPU: "1"}, func(p *corev1.Pod) {
			p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: on[key]}
		})
	}
	g.eventually("the other jobs to run", 20*time.Second, g.pods(corev1.PodRunning, more...))
	g.finish(append(first, more...)...)
	g.eventually("the jobs to end", 10*time.Second, func() error {
		pods, err := g.Kube.CoreV1().Pods(metav1.NamespaceDefault).List(g.ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d pods are left", len(pods.Items))
		}
		return err
	})
	// Not before: while every node is busy, or unknown, it asks for another.
	for _, node := range on {
		g.eventually("the nodes to be known", 20*time.Second, g.knows("runners", node))
	}
	g.annotateGroup("runners", map[string]any{"hearth.dev/min-warm": "1"})

	seen := map[string]v1alpha1.RunnerNode{}
	g.eventually("the cold nodes to go", 60*time.Second, func() error {
		byNode, err := g.runnerNodes("runners")
		maps.Copy(seen, byNode)
		if gone := g.Deleted(); len(gone) < 2 {
			err = errors.Join(err, fmt.Errorf("only %q went", gone))
		}
		return errors.Join(err, g.readyNodes("runners", 2)())
	})
	if got, want := g.Deleted(), []string{on["cold"], on["mild"]}; !slices.Equal(got, want) {
		t.Errorf("nodes went in the order %q, want %q", got, want)
	}
	for _, key := range []string{"cold", "mild"} {
		if rn := seen[on[key]]; rn.Status.Decision != "release" {
			t.Errorf("the RunnerNode of the %s node said %q (%s)", key, rn.Status.Decision, rn.Status.Reason)
		}
	}
	score := func(key string) float64 {
		f, err := strconv.ParseFloat(seen[on[key]].Status.Score, 64)
		g.must(err)
		return f
	}
	if score("cold") >= score("mild") {
		t.Errorf("scores are %g of the cold and %g of the mild node", score("cold"), score("mild"))
	}
	g.eventually("the rest to be told", 10*time.Second, func() error {
		rng, err := g.group("runners")
		if err != nil {
			return err
		}
		if s := rng.Status; s.Target != 2 || s.Ready != 2 || s.Warm != 2 {
			return fmt.Errorf("target %d, ready %d, warm %d, want 2 of each", s.Target, s.Ready, s.Warm)
		}
		byNode, err := g.runnerNodes("runners")
		if err == nil && (len(byNode) != 2 || byNode[on["hot"]].Status.Decision != "keep") {
			err = fmt.Errorf("RunnerNodes are %v", slices.Collect(maps.Keys(byNode)))
		}
		return err
	})
	// Nothing more goes, and what the person wrote is as it was.
	g.always("min-warm and the person's node stay", 6*time.Second, func() error {
		return errors.Join(g.readyNodes("runners", 2)(), g.nodeThat(on["person"], func(n *corev1.Node) bool {
			return n.Annotations[scaleDownDisabled] == "true" && n.Annotations["hearth.dev/scale-down-disabled-by"] == ""
		})())
	})
}

// TestBusyNodeIsNotDeleted: who asks to delete a released node on which a job
// has just begun is refused, and may ask again when the job has ended.
func TestBusyNodeIsNotDeleted(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 5, `hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s`))
	ca := g.CloudProvider()
	targetSize := func() int32 {
		answer, err := ca.NodeGroupTargetSize(g.ctx, &externalgrpc.NodeGroupTargetSizeRequest{Id: "runners"})
		g.must(err)
		return answer.GetTargetSize()
	}

	_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 1})
	g.must(err)
	g.eventually("a node", 20*time.Second, g.readyNodes("runners", 1))
	node, err := g.node(g.Launched("runners")[0])
	g.must(err)
	g.eventually("its release", 20*time.Second, g.nodeThat(node.Name, released))
	g.submit(job("first", "acme/api"))
	g.eventually("the job to run", 10*time.Second, g.pods(corev1.PodRunning, "first"))
	if err := g.deleteNodes(ca, "runners", node); status.Code(err) != codes.FailedPrecondition {
		t.Fatalf("deleting a busy node: %v, want FailedPrecondition", err)
	}
	if got := targetSize(); got != 1 {
		t.Errorf("target size is %d after the veto, want 1", got)
	}
	metrics, err := provider.Metrics(g.ctx)
	g.must(err)
	if got := metric(metrics, "hearth_veto_total", `nodegroup="runners"`, `reason="busy"`); got != 1 {
		t.Errorf("hearth_veto_total counts %g, want 1", got)
	}
	g.finish("first")
	g.eventually("the deletion to be accepted", 20*time.Second, func() error {
		err := g.deleteNodes(ca, "runners", node)
		if err != nil && status.Code(err) != codes.FailedPrecondition {
			t.Fatalf("deleting: %v", err)
		}
		return err
	})
	if got := targetSize(); got != 0 {
		t.Errorf("target size is %d after the deletion, want 0", got)
	}
	if err := g.deleteNodes(ca, "runners", node); err != nil || targetSize() != 0 {
		t.Errorf("deleting it again: %v, target size %d", err, targetSize())
	}
	g.eventually("the node to go", 20*time.Second, g.gone(node.Name))

	// The same through an autoscaler: it has tainted the node when a pod comes
	// that the taint does not stop.
	g.Autoscaler(func(f *refautoscaler.Flags) { f.NodeDeleteDelayAfterTaint = 3 * time.Second })
	g.submit(job("second", "acme/api"))
	g.eventually("the second job to run", 40*time.Second, g.pods(corev1.PodRunning, "second"))
	name := g.nodeOf("second")
	g.finish("second")
	g.eventually("the autoscaler to want the node", 30*time.Second, g.nodeThat(name, tainted(toBeDeleted)))
	g.create(job("late", "acme/api"), func(p *corev1.Pod) { p.Spec.NodeName = name })
	g.eventually("the autoscaler to let go", 30*time.Second, g.nodeThat(name, not(tainted(toBeDeleted))))
	g.always("the busy node stays", 3*time.Second, func() error {
		return errors.Join(g.nodeThat(name, not(tainted(drainTaint)))(), g.pods(corev1.PodRunning, "late")())
	})
	g.finish("late")
	g.eventually("the node to go after all", 60*time.Second, g.gone(name))
	if got := g.Instances("runners"); got != 2 {
		t.Errorf("%d instances were launched, want 2", got)
	}
}

// TestPrescaledNodesAreAbsorbed: nodes that were launched ahead of the
// autoscaler are its own once it asks, however many they are.
func TestPrescaledNodesAreAbsorbed(t *testing.T) {
	g := newGround(t)
	sizes := map[string]int{"six": 6, "two": 2}
	g.Provider("provider", `backend:
  kwok: {bootDelay: 12s}
nodeGroups:
- id: six
  max: 10
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {hearth.dev/role: runner}
- id: two
  max: 10
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {hearth.dev/role: runner}
`)
	g.Autoscaler(nil)
	for group, n := range sizes {
		g.annotateGroup(group, map[string]any{"hearth.dev/min-warm": strconv.Itoa(n)})
	}
	for group, n := range sizes {
		g.eventually("nodes to be launched ahead", 10*time.Second, func() error {
			if got := len(g.cloudGroup(group).Instances); got != n {
				return fmt.Errorf("%d instances of %s", got, group)
			}
			return g.sizes(group, 0, n)()
		})
		// What comes from now on is for the pods alone.
		g.annotateGroup(group, map[string]any{"hearth.dev/min-warm": "0"})
	}
	var pods []string
	for group, n := range sizes {
		for i := range n {
			name := fmt.Sprintf("%s-%d", group, i)
			g.submit(playground.Job{Name: name, Group: group, Key: "acme/api", CPU: "6"})
			pods = append(pods, name)
		}
	}
	for group, n := range sizes {
		g.eventually("the autoscaler's request", 15*time.Second, g.sizes(group, n, 0))
	}
	if nodes := append(g.Launched("six"), g.Launched("two")...); len(nodes) > 0 {
		t.Fatalf("nodes %q came before the autoscaler asked for them: it was not absorbed", nodes)
	}
	g.eventually("the pods to run", 40*time.Second, g.pods(corev1.PodRunning, pods...))
	for group, n := range sizes {
		if nodes, instances := len(g.Launched(group)), g.Instances(group); nodes != n || instances != n {
			t.Errorf("group %s launched %d instances and %d nodes for %d pods", group, instances, nodes, n)
		}
	}
	// A second order would be on its way by now.
	g.always("nothing is ordered twice", 2*time.Second, func() error {
		for group, n := range sizes {
			if err := g.sizes(group, n, 0)(); err != nil {
				return err
			}
			if got := g.Instances(group); got != n {
				return fmt.Errorf("group %s has launched %d instances", group, got)
			}
		}
		return nil
	})
	g.noComplaints()
}

// noComplaints fails the test if the autoscaler held a group for unhealthy or
// failing, or told a pod that no group helps it. In groups that scaled down it
// may have taken a node for upcoming, from its own taint until its request to
// delete it.
func (g *ground) noComplaints(scaledDown ...string) {
	g.t.Helper()
	events, err := g.Kube.CoreV1().Events("").List(g.ctx, metav1.ListOptions{})
	g.must(err)
	for _, e := range events.Items {
		if e.Reason == "NotTriggerScaleUp" || e.Reason == "FailedToScaleUpGroup" || e.Reason == "ScaleUpTimedOut" {
			g.t.Errorf("the autoscaler told %s %s: %s: %s", e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range g.events {
		if e.Kind == refautoscaler.UpcomingSkipped && slices.Contains(scaledDown, e.Group) {
			continue
		}
		switch e.Kind {
		case refautoscaler.GroupSkipped, refautoscaler.ScaleUpFailed, refautoscaler.ScaleUpTimedOut,
			refautoscaler.NoScaleUp, refautoscaler.UpcomingSkipped, refautoscaler.ClusterUnhealthy:
			g.t.Errorf("the autoscaler said: %s", e)
		default:
		}
	}
}

// TestCapacityFailureMovesPods: when a cloud has no machines for one group the
// pods run in another, soon; and the group works again when the cloud does.
func TestCapacityFailureMovesPods(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", `backend:
  kwok: {bootDelay: 1s}
nodeGroups:
- id: cheap
  max: 5
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, labels: {pool: ci}}
  annotations: {hearth.dev/role: runner, hearth.dev/node-price: "0.1"}
- id: dear
  max: 5
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, labels: {pool: ci}}
  annotations: {hearth.dev/role: runner, hearth.dev/node-price: "0.5"}
`)
	g.must(g.cloud.SetFaults(g.ctx, "cheap", kwok.Faults{CapacityAbove: new(int)}))
	g.placeholders("cheap")

	g.Autoscaler(func(f *refautoscaler.Flags) {
		f.InitialNodeGroupBackoffDuration, f.MaxNodeGroupBackoffDuration = 4*time.Second, 4*time.Second
	})
	count := func(name string, labels ...string) float64 {
		text, err := provider.Metrics(g.ctx)
		g.must(err)
		return metric(text, name, labels...)
	}
	loops := func() float64 { return count("grpc_server_handled_total", `grpc_method="Refresh"`) }
	given := func() float64 {
		return count("hearth_scale_events_total", `nodegroup="cheap"`, `action="cancel"`, `reason="launch-failed"`)
	}
	before := given()
	for _, name := range []string{"one", "two"} {
		g.create(playground.Job{Name: name, CPU: "6"}, func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"pool": "ci"} })
	}
	var failedAt float64
	g.eventually("the cloud to fail", 30*time.Second, func() error {
		failedAt = loops()
		// The autoscaler may have moved on before it was seen.
		if g.cloudGroup("cheap").Failure == nil && g.sizes("dear", 2, 0)() != nil {
			return errors.New("no failure")
		}
		return nil
	})
	g.eventually("the other group to grow", 10*time.Second, g.sizes("dear", 2, 0))
	// One loop may pass before the provider reads the cloud's failure (of AWS
	// it does so every 5 s, as long as five loops here); two are for the
	// autoscaler to act on it.
	most := 3.0
	if onAWS() {
		most = 9
	}
	if n := loops() - failedAt; n > most {
		t.Errorf("the other group grew %g loops after the failure, want at most %g", n, most)
	}
	if n := given() - before; n != 2 {
		t.Errorf("the failing group had %g launches, which the autoscaler took back, want 2", n)
	}
	g.must(g.sizes("cheap", 0, 0)())
	g.eventually("the pods to run", 30*time.Second, g.pods(corev1.PodRunning, "one", "two"))
	if cheap, dear := g.Instances("cheap"), g.Instances("dear"); cheap != 0 || dear != 2 {
		t.Errorf("%d instances of the failing group, %d of the other, want 0 and 2", cheap, dear)
	}

	// A pod that only the failing group can serve makes it fail again; then
	// the cloud has machines.
	g.submit(playground.Job{Name: "three", Group: "cheap", Key: "acme/api", CPU: "6"})
	g.eventually("the group to fail again", 40*time.Second, func() error {
		if given() < before+3 {
			return errors.New("nothing more was taken back")
		}
		return g.sizes("cheap", 0, 0)()
	})
	g.must(g.cloud.SetFaults(g.ctx, "cheap", kwok.Faults{}))
	g.eventually("the pod to run", 60*time.Second, g.pods(corev1.PodRunning, "three"))
	if got := g.Instances("cheap"); got != 1 {
		t.Errorf("%d instances of the recovered group, want 1", got)
	}
}

// placeholders shows what an autoscaler is told of instances that the cloud
// cannot start: ids that are never used twice, which it may delete.
func (g *ground) placeholders(group string) {
	g.t.Helper()
	ca := g.CloudProvider()
	used := map[string]bool{}
	failed := func() (nodes []*externalgrpc.ExternalGrpcNode) {
		_, err := ca.Refresh(g.ctx, &externalgrpc.RefreshRequest{})
		g.must(err)
		answer, err := ca.NodeGroupNodes(g.ctx, &externalgrpc.NodeGroupNodesRequest{Id: group})
		g.must(err)
		for _, i := range answer.GetInstances() {
			s := i.GetStatus()
			if s.GetInstanceState() != externalgrpc.InstanceStatus_instanceCreating ||
				s.GetErrorInfo().GetErrorCode() == "" || s.GetErrorInfo().GetInstanceErrorClass() != 1 || used[i.GetId()] {
				g.t.Errorf("instance %v, used before: %t", i, used[i.GetId()])
			}
			nodes = append(nodes, &externalgrpc.ExternalGrpcNode{ProviderID: i.GetId(), Name: i.GetId()})
		}
		return nodes
	}
	for range 2 {
		_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: group, Delta: 2})
		g.must(err)
		var nodes []*externalgrpc.ExternalGrpcNode
		g.eventually("placeholders", 15*time.Second, func() error {
			if nodes = failed(); len(nodes) != 2 {
				return fmt.Errorf("%d placeholders", len(nodes))
			}
			return nil
		})
		for range 2 { // the second time there is nothing left to do
			_, err := ca.NodeGroupDeleteNodes(g.ctx, &externalgrpc.NodeGroupDeleteNodesRequest{Id: group, Nodes: nodes})
			g.must(err)
			g.must(g.sizes(group, 0, 0)())
		}
		for _, node := range nodes {
			used[node.GetProviderID()] = true
		}
		if left := failed(); len(left) > 0 {
			g.t.Errorf("placeholders are left: %v", left)
		}
		g.eventually("the cloud to want none", 10*time.Second, func() error {
			if desired := g.cloudGroup(group).Desired; desired != 0 {
				return fmt.Errorf("the cloud works towards %d", desired)
			}
			return nil
		})
	}
}

// TestNeverBoots: an instance that never becomes a node is removed after
// max-node-provision-time and replaced; and what is not born can be taken back.
func TestNeverBoots(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", runners("1s", 5, `hearth.dev/max-node-provision-time: 6s`))
	ca := g.CloudProvider()
	decrease := func(delta int32) error {
		_, err := ca.NodeGroupDecreaseTargetSize(g.ctx, &externalgrpc.NodeGroupDecreaseTargetSizeRequest{Id: "runners", Delta: delta})
		return err
	}
	g.must(g.cloud.SetFaults(g.ctx, "runners", kwok.Faults{CapacityAbove: new(int)}))
	_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 3})
	g.must(err)
	for _, step := range []struct {
		delta int32
		code  codes.Code
		left  int
	}{{0, codes.InvalidArgument, 3}, {1, codes.InvalidArgument, 3}, {-1, codes.OK, 2}, {-5, codes.OK, 0}, {-1, codes.OK, 0}} {
		if err := decrease(step.delta); status.Code(err) != step.code {
			t.Errorf("decreasing by %d: %v, want %s", step.delta, err, step.code)
		}
		g.must(g.sizes("runners", step.left, 0)())
	}
	g.eventually("the cloud to want none", 10*time.Second, func() error {
		if desired := g.cloudGroup("runners").Desired; desired != 0 {
			return fmt.Errorf("the cloud works towards %d", desired)
		}
		return nil
	})

	g.must(g.cloud.SetFaults(g.ctx, "runners", kwok.Faults{NeverBoot: 1}))
	g.Autoscaler(func(f *refautoscaler.Flags) { f.InitialNodeGroupBackoffDuration = 2 * time.Second })
	g.submit(job("one", "acme/api"), job("two", "acme/api"))
	g.eventually("both pods to run", 60*time.Second, g.pods(corev1.PodRunning, "one", "two"))
	g.eventually("the broken instance to go", 20*time.Second, func() error {
		if n := len(g.cloudGroup("runners").Instances); n != 2 {
			return fmt.Errorf("the cloud has %d instances", n)
		}
		return g.sizes("runners", 2, 0)()
	})
	if nodes, instances := len(g.Launched("runners")), g.Instances("runners"); nodes != 2 || instances != 3 {
		t.Errorf("%d nodes of %d instances, want 2 of 3", nodes, instances)
	}
}

// TestAnnotationsOfTheGroup: what people annotate a RunnerNodeGroup with wins
// over the config at once; what cannot be used is reported and harms nothing.
func TestAnnotationsOfTheGroup(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 5, `hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s, hearth.dev/scale-down-utilization-threshold: "0.4"`))
	g.Autoscaler(nil)
	ca := g.CloudProvider()
	threshold := func(want float64) func() error {
		return func() error {
			answer, err := ca.NodeGroupGetOptions(g.ctx, &externalgrpc.NodeGroupAutoscalingOptionsRequest{
				Id: "runners", Defaults: &externalgrpc.NodeGroupAutoscalingOptions{ScaleDownUtilizationThreshold: 0.5},
			})
			if got := answer.GetNodeGroupAutoscalingOptions().GetScaleDownUtilizationThreshold(); err == nil && got != want {
				err = fmt.Errorf("scale-down-utilization-threshold is %g, want %g", got, want)
			}
			return err
		}
	}
	g.must(threshold(0.4)())
	g.annotateGroup("runners", map[string]any{"hearth.dev/scale-down-utilization-threshold": "0.25"})
	// At once: the autoscaler sees it at its next loop.
	g.eventually("the new threshold", 3*time.Second, threshold(0.25))
	g.annotateGroup("runners", map[string]any{"hearth.dev/min-warm": "1"})
	g.eventually("a launch for min-warm", 3*time.Second, g.sizes("runners", 0, 1))
	g.eventually("the warm node, told to the autoscaler", 20*time.Second, func() error {
		return errors.Join(g.readyNodes("runners", 1)(), g.sizes("runners", 1, 0)())
	})

	// Bad values: the default is used, and the group works.
	g.annotateGroup("runners", map[string]any{
		"hearth.dev/scale-down-utilization-threshold": "a lot", "hearth.dev/max-idel": "5m",
	})
	complaints := func(want float64) func() error {
		return func() error {
			rng, err := g.group("runners")
			if err != nil {
				return err
			}
			condition := meta.FindStatusCondition(rng.Status.Conditions, "AnnotationsValid")
			if condition == nil || (condition.Status == metav1.ConditionTrue) != (want == 0) {
				return fmt.Errorf("condition AnnotationsValid is %v", condition)
			}
			for _, word := range []string{"scale-down-utilization-threshold", `"a lot"`, "max-idel"} {
				if want > 0 && !strings.Contains(condition.Message, word) {
					return fmt.Errorf("condition %q lacks %s", condition.Message, word)
				}
			}
			text, err := provider.Metrics(g.ctx)
			if got := metric(text, "hearth_annotation_errors", `nodegroup="runners"`); err == nil && got != want {
				err = fmt.Errorf("hearth_annotation_errors is %g, want %g", got, want)
			}
			return err
		}
	}
	g.eventually("the complaints", 10*time.Second, complaints(2))
	g.eventually("an event for each", 10*time.Second, func() error {
		events, err := g.Kube.CoreV1().Events(metav1.NamespaceDefault).List(g.ctx, metav1.ListOptions{
			FieldSelector: "reason=InvalidAnnotation,involvedObject.kind=RunnerNodeGroup,involvedObject.name=runners",
		})
		if err == nil && len(events.Items) != 2 {
			err = fmt.Errorf("%d events", len(events.Items))
		}
		return err
	})
	// No options are given while nodes start: those are awaited here and below.
	g.eventually("the default threshold", 10*time.Second, threshold(0.5))
	g.submit(job("one", "acme/api"), job("two", "acme/api"))
	g.eventually("jobs to run all the same", 30*time.Second, g.pods(corev1.PodRunning, "one", "two"))
	g.finish("one", "two")

	// Without them the config's values are in force again.
	g.annotateGroup("runners", map[string]any{
		"hearth.dev/min-warm": nil, "hearth.dev/scale-down-utilization-threshold": nil, "hearth.dev/max-idel": nil,
	})
	g.eventually("the complaints to end", 10*time.Second, complaints(0))
	g.eventually("the config's threshold", 10*time.Second, threshold(0.4))
	g.eventually("the nodes to go", 40*time.Second, g.readyNodes("runners", 0))
}

// TestPlainGroup: without the role runner a group is scaled as any other cloud
// provider would have it, whatever its annotations say.
func TestPlainGroup(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", `backend:
  kwok: {bootDelay: 1s}
nodeGroups:
- id: runners
  max: 5
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {hearth.dev/min-warm: "2", hearth.dev/max-idle: 1h, hearth.dev/park: stop}
`)
	g.Autoscaler(nil)
	ca := g.CloudProvider()
	answer, err := ca.NodeGroupGetOptions(g.ctx, &externalgrpc.NodeGroupAutoscalingOptionsRequest{
		Id: "runners", Defaults: &externalgrpc.NodeGroupAutoscalingOptions{ScaleDownUtilizationThreshold: 0.3},
	})
	g.must(err)
	if o := answer.GetNodeGroupAutoscalingOptions(); o.GetScaleDownUtilizationThreshold() != 0.3 || o.GetIgnoreDaemonSetsUtilization() || o.ScaleDownUnneeded() != 0 {
		t.Errorf("options are %v, want the autoscaler's own", o)
	}
	g.submit(job("one", "acme/api"))
	g.eventually("the job to run", 40*time.Second, g.pods(corev1.PodRunning, "one"))
	idle := g.nodeOf("one")
	g.finish("one")
	g.eventually("the idle node to go", 30*time.Second, g.gone(idle))

	// A busy node goes as well, when it is asked for: no other provider vetoes.
	g.submit(job("two", "acme/api"))
	g.eventually("the second job to run", 40*time.Second, g.pods(corev1.PodRunning, "two"))
	node, err := g.node(g.nodeOf("two"))
	g.must(err)
	g.eventually("its instance to be known", 20*time.Second, g.knows("runners", node.Name))
	g.must(g.deleteNodes(ca, "runners", node))
	g.eventually("the busy node to go", 20*time.Second, g.gone(node.Name))
	g.eventually("the instances to go", 20*time.Second, func() error {
		if n := len(g.cloudGroup("runners").Instances); n != 0 {
			return fmt.Errorf("the cloud has %d instances", n)
		}
		return g.sizes("runners", 0, 0)()
	})
	if got := g.Instances("runners"); got != 2 {
		t.Errorf("%d instances were launched, want 2", got)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for name, keys := range g.annotated {
		for key := range keys {
			if strings.HasPrefix(key, model.Prefix+"/") || key == scaleDownDisabled {
				t.Errorf("node %s was annotated with %s", name, key)
			}
		}
	}
}

// TestParkAndResume: with park=stop an idle node is stopped, and the job that
// it is warm for brings it back before anything is launched.
func TestParkAndResume(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", runners("1s", 5, `hearth.dev/park: stop, hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s`))
	g.Autoscaler(nil)
	g.submit(job("api", "acme/api"), job("web", "acme/web"))
	g.eventually("the jobs to run", 40*time.Second, g.pods(corev1.PodRunning, "api", "web"))
	instanceOf := func(pod string) model.InstanceID {
		node, err := g.node(g.nodeOf(pod))
		g.must(err)
		return model.InstanceID(node.Spec.ProviderID)
	}
	api, web := instanceOf("api"), instanceOf("web")
	g.finish("api", "web")
	parked := func(n int) func() error {
		return func() error {
			stopped := 0
			for _, i := range g.cloudGroup("runners").Instances {
				if i.State == model.InstanceStopped {
					stopped++
				}
			}
			rng, err := g.group("runners")
			if err == nil && (stopped != n || rng.Status.Parked != n) {
				err = fmt.Errorf("%d instances are stopped, %d told to be parked, want %d", stopped, rng.Status.Parked, n)
			}
			return err
		}
	}
	g.eventually("both to be parked", 60*time.Second, func() error {
		return errors.Join(parked(2)(), g.readyNodes("runners", 0)(), g.sizes("runners", 0, 0)())
	})
	var list v1alpha1.RunnerNodeList
	g.must(g.Client.List(g.ctx, &list))
	for _, rn := range list.Items {
		if rn.Spec.Desired != "Parked" || rn.Status.Phase != "Parked" || len(rn.Status.Warmth) != 1 {
			t.Errorf("RunnerNode %s: desired %s, phase %s, warmth %v", rn.Name, rn.Spec.Desired, rn.Status.Phase, rn.Status.Warmth)
		}
	}

	g.submit(job("web-again", "acme/web"))
	g.eventually("the job to run again", 40*time.Second, g.pods(corev1.PodRunning, "web-again"))
	if got := instanceOf("web-again"); got != web {
		t.Errorf("the job runs on %s, want the parked %s that ran it before", got, web)
	}
	if got := g.Instances("runners"); got != 2 {
		t.Errorf("%d instances were launched, want no more than the first 2", got)
	}
	// Two jobs: one parked node is left, so one is launched.
	g.submit(job("api-again", "acme/api"), job("docs", "acme/docs"))
	g.eventually("two more jobs to run", 40*time.Second, g.pods(corev1.PodRunning, "api-again", "docs"))
	if !slices.Contains([]model.InstanceID{instanceOf("api-again"), instanceOf("docs")}, api) {
		t.Errorf("the jobs run on %s and %s, want the parked %s among them", instanceOf("api-again"), instanceOf("docs"), api)
	}
	if got := g.Instances("runners"); got != 3 {
		t.Errorf("%d instances were launched, want 3", got)
	}
}

// TestUninstall: `hearth serve --uninstall` leaves nothing of Hearth's on the
// nodes, and everything of others.
func TestUninstall(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 5, `hearth.dev/min-warm: "2", hearth.dev/scale-down-unneeded-time: 1s`))
	g.eventually("protected nodes", 20*time.Second, func() error {
		if err := g.readyNodes("runners", 2)(); err != nil {
			return err
		}
		for _, name := range g.Launched("runners") {
			if err := g.nodeThat(name, func(n *corev1.Node) bool { return n.Annotations[scaleDownDisabled] == "true" })(); err != nil {
				return err
			}
		}
		return nil
	})
	g.must(provider.Terminate(g.ctx))
	ours, persons := g.Launched("runners")[0], g.Launched("runners")[1]
	// As after a death in the middle of a drain.
	node, err := g.node(ours)
	g.must(err)
	node.Spec.Taints = append(node.Spec.Taints,
		corev1.Taint{Key: drainTaint, Effect: corev1.TaintEffectNoSchedule},
		corev1.Taint{Key: "someone/else", Effect: corev1.TaintEffectNoSchedule})
	_, err = g.Kube.CoreV1().Nodes().Update(g.ctx, node, metav1.UpdateOptions{})
	g.must(err)
	g.annotateNode(persons, map[string]any{scaleDownDisabled: "true", "hearth.dev/scale-down-disabled-by": nil})

	g.must(provider.Uninstall(g.ctx))
	for _, name := range []string{ours, persons} {
		node, err := g.node(name)
		g.must(err)
		for _, keys := range []map[string]string{node.Annotations, node.Labels} {
			for key := range keys {
				if strings.Contains(key, model.Prefix) {
					t.Errorf("node %s has kept %s", name, key)
				}
			}
		}
		if tainted(drainTaint)(node) {
			t.Errorf("node %s has kept the drain taint", name)
		}
		if _, has := node.Annotations[scaleDownDisabled]; has != (name == persons) {
			t.Errorf("node %s has scale-down-disabled: %t", name, has)
		}
		if name == ours && !tainted("someone/else")(node) {
			t.Errorf("node %s has lost a taint of somebody else's", name)
		}
	}
	if got := g.cloudGroup("runners").Instances; len(got) != 2 {
		t.Errorf("the cloud has %d instances after it, want 2", len(got))
	}
}
