package kwok

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func group(id string) model.NodeGroup {
	return model.NodeGroup{ID: model.GroupID(id), Max: 10, Template: model.Template{
		Capacity: map[string]string{"cpu": "8", "memory": "32Gi", "pods": "110"},
		Labels:   map[string]string{"team": "a"},
		Taints:   []model.Taint{{Key: "ci", Value: "true", Effect: "NoSchedule"}},
		Zone:     "a", InstanceType: "kwok.8x",
	}}
}

// world is a cluster with one running backend in virtual time.
type world struct {
	t       *testing.T
	client  client.Client
	backend *Backend
	stop    func()
}

func newWorld(t *testing.T, c client.Client, groups ...model.NodeGroup) *world {
	t.Helper()
	b, err := New(Config{
		Client: c, Namespace: "hearth", Groups: groups,
		BootDelay: 20 * time.Second, ResumeDelay: 5 * time.Second,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = b.Run(ctx) }()
	w := &world{t: t, client: c, backend: b, stop: func() { cancel(); <-done }}
	t.Cleanup(w.stop)
	synctest.Wait() // the first tick is over
	return w
}

func (w *world) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) snapshot(id string) model.GroupSnapshot {
	w.t.Helper()
	s, err := w.backend.Snapshot(w.t.Context())
	w.must(err)
	w.must(s.Errors[model.GroupID(id)])
	return s.Groups[model.GroupID(id)]
}

// states counts a group's instances by state.
func (w *world) states(id string) map[model.InstanceState]int {
	n := map[model.InstanceState]int{}
	for _, i := range w.snapshot(id).Instances {
		n[i.State]++
	}
	return n
}

func (w *world) wantStates(id string, want map[model.InstanceState]int) {
	w.t.Helper()
	if diff := cmp.Diff(want, w.states(id)); diff != "" {
		w.t.Errorf("instances by state (-want +got):\n%s", diff)
	}
}

func (w *world) ids(id string) (ids []model.InstanceID) {
	for _, i := range w.snapshot(id).Instances {
		ids = append(ids, i.ID)
	}
	return ids
}

func (w *world) nodes() map[model.InstanceID]corev1.Node {
	w.t.Helper()
	var list corev1.NodeList
	w.must(w.client.List(w.t.Context(), &list))
	nodes := map[model.InstanceID]corev1.Node{}
	for _, n := range list.Items {
		nodes[model.InstanceID(n.Spec.ProviderID)] = n
	}
	return nodes
}

func newClient(objects ...client.Object) client.Client {
	return fake.NewClientBuilder().WithScheme(clientscheme.Scheme).WithObjects(objects...).Build()
}

func TestNodesRegisterFromTheTemplate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("runners-a"))
		w.must(w.backend.Resize(t.Context(), "runners-a", 1))
		if s := w.snapshot("runners-a"); s.Desired != 1 || len(s.Instances) != 0 {
			t.Errorf("at once: desired %d, %d instances; want 1 and none", s.Desired, len(s.Instances))
		}
		w.wait(19 * time.Second)
		w.wantStates("runners-a", map[model.InstanceState]int{model.InstancePending: 1})
		if n := len(w.nodes()); n != 0 {
			t.Errorf("%d nodes before the boot was over", n)
		}
		w.wait(3 * time.Second)
		id := w.ids("runners-a")[0]
		node := w.nodes()[id]
		if !strings.HasPrefix(string(id), "kwok://runners-a/") {
			t.Errorf("providerID %q", id)
		}
		wantLabels := map[string]string{
			"hearth.dev/node-group":  "runners-a",
			"kubernetes.io/hostname": node.Name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
			"node.kubernetes.io/instance-type": "kwok.8x", "topology.kubernetes.io/zone": "a",
			"team": "a",
		}
		if diff := cmp.Diff(wantLabels, node.Labels); diff != "" {
			t.Errorf("labels (-want +got):\n%s", diff)
		}
		wantTaints := []corev1.Taint{{Key: "ci", Value: "true", Effect: "NoSchedule"}}
		if diff := cmp.Diff(wantTaints, node.Spec.Taints); diff != "" {
			t.Errorf("taints (-want +got):\n%s", diff)
		}
		if node.Annotations["kwok.x-k8s.io/node"] != "fake" {
			t.Errorf("annotations %v do not make kwok play it", node.Annotations)
		}
		if cpu, all := node.Status.Allocatable.Cpu().String(), node.Status.Capacity.Memory().String(); cpu != "8" || all != "32Gi" {
			t.Errorf("allocatable cpu %s, memory %s; want 8, 32Gi", cpu, all)
		}
	})
}

func TestGroupsBeginAtTheirMinimum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := group("a")
		g.Min = 2
		w := newWorld(t, newClient(), g)
		if s := w.snapshot("a"); s.Desired != 2 {
			t.Errorf("desired %d; want 2", s.Desired)
		}
		w.wait(30 * time.Second)
		w.wantStates("a", map[model.InstanceState]int{model.InstanceRunning: 2})
	})
}

// TestRestartInTheMiddleOfABoot ends the process while instances boot: the
// next one finds them and lets them end their boot on time.
func TestRestartInTheMiddleOfABoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient()
		w := newWorld(t, c, group("a"))
		w.must(w.backend.Resize(t.Context(), "a", 3))
		w.wait(5 * time.Second)
		before := w.ids("a")
		w.stop()
		w.wait(10 * time.Second)

		w = newWorld(t, c, group("a"))
		w.wait(8 * time.Second)
		w.wantStates("a", map[model.InstanceState]int{model.InstanceRunning: 3})
		if diff := cmp.Diff(before, w.ids("a")); diff != "" {
			t.Errorf("instances changed (-before +after):\n%s", diff)
		}
		if n := len(w.nodes()); n != 3 {
			t.Errorf("%d nodes; want 3", n)
		}
	})
}

func TestStopAndStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("a"))
		w.must(w.backend.Resize(t.Context(), "a", 1))
		w.wait(25 * time.Second)
		ids := w.ids("a")
		name := w.nodes()[ids[0]].Name

		for range 2 { // each call may be repeated
			w.must(w.backend.Stop(t.Context(), "a", ids))
		}
		if err := w.backend.Start(t.Context(), "a", ids); err == nil {
			t.Error("an instance that was still stopping was started")
		}
		w.wait(5 * time.Second)
		w.wantStates("a", map[model.InstanceState]int{model.InstanceStopped: 1})
		if node := w.nodes()[ids[0]]; node.Annotations["kwok.hearth.dev/unready"] != "true" {
			t.Errorf("the kubelet of a stopped instance still reports: %v", node.Annotations)
		}
		w.wait(5 * time.Minute)
		if len(w.nodes()) != 1 {
			t.Error("the backend deleted the Node of a stopped instance; that is Hearth's work")
		}

		// With the Node left behind, it is taken over.
		for range 2 {
			w.must(w.backend.Start(t.Context(), "a", ids))
		}
		if s := w.snapshot("a"); s.Desired != 1 {
			t.Errorf("desired %d after start; want 1", s.Desired)
		}
		w.wait(7 * time.Second)
		if node := w.nodes()[ids[0]]; node.Name != name || node.Annotations["kwok.hearth.dev/unready"] != "" {
			t.Errorf("after the start: node %q, annotations %v", node.Name, node.Annotations)
		}

		// With the Node deleted, it registers again under the same name.
		w.must(w.backend.Stop(t.Context(), "a", ids))
		w.wait(5 * time.Second)
		node := w.nodes()[ids[0]]
		w.must(w.client.Delete(t.Context(), &node))
		w.must(w.backend.Start(t.Context(), "a", ids))
		w.wait(7 * time.Second)
		if node := w.nodes()[ids[0]]; node.Name != name {
			t.Errorf("registered as %q; want %q", node.Name, name)
		}
		w.wantStates("a", map[model.InstanceState]int{model.InstanceRunning: 1})
	})
}

func TestTerminate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("a"))
		w.must(w.backend.Resize(t.Context(), "a", 3))
		w.wait(25 * time.Second)
		gone := w.ids("a")[:1]
		for range 2 {
			w.must(w.backend.Terminate(t.Context(), "a", append(gone, "kwok://a/nobody")))
		}
		w.wait(10 * time.Second)
		if s := w.snapshot("a"); s.Desired != 2 || len(s.Instances) != 2 {
			t.Errorf("desired %d, %d instances; want 2 and 2: nothing takes the place of a terminated one", s.Desired, len(s.Instances))
		}
		if node := w.nodes()[gone[0]]; node.Annotations["kwok.hearth.dev/unready"] != "true" {
			t.Error("the Node of a terminated instance is still well")
		}
		w.must(w.backend.Terminate(t.Context(), "a", gone)) // long gone
		w.wait(orphanAge + tendEvery)
		if _, there := w.nodes()[gone[0]]; there {
			t.Error("the Node of an instance that does not exist was left for more than two minutes")
		}
		if n := len(w.nodes()); n != 2 {
			t.Errorf("%d nodes; want 2", n)
		}
	})
}

func TestKilledInstanceIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("a"))
		w.must(w.backend.Resize(t.Context(), "a", 1))
		w.wait(25 * time.Second)
		killed := w.ids("a")[0]
		w.must(w.backend.KillInstance(t.Context(), killed))
		w.wait(25 * time.Second)
		ids := w.ids("a")
		if len(ids) != 1 || ids[0] == killed {
			t.Errorf("instances %v; want one that is not %q", ids, killed)
		}
		if w.backend.KillInstance(t.Context(), killed) == nil || w.backend.KillInstance(t.Context(), "aws:///a/i-1") == nil {
			t.Error("an instance that does not exist was killed")
		}
	})
}

func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("a"), group("b"))
		w.must(w.backend.SetFaults(t.Context(), "a", Faults{CapacityUntil: time.Now().Add(time.Minute)}))
		w.must(w.backend.SetFaults(t.Context(), "b", Faults{NeverBoot: 1}))
		asked := time.Now()
		w.must(w.backend.Resize(t.Context(), "a", 2))
		w.must(w.backend.Resize(t.Context(), "b", 2))
		w.wait(2 * time.Second)
		first := w.snapshot("a").Failure
		if first == nil || first.Class != model.FailureCapacity || first.At.Before(asked) {
			t.Fatalf("failure %+v", first)
		}
		w.wait(20 * time.Second)
		if second := w.snapshot("a").Failure; second == nil || second.Activity == first.Activity {
			t.Errorf("second attempt %+v; want another activity than %+v", second, first)
		}
		w.wait(time.Minute)
		if s := w.snapshot("a"); s.Failure != nil || len(s.Instances) != 2 {
			t.Errorf("with capacity again: failure %+v, %d instances", s.Failure, len(s.Instances))
		}
		w.wantStates("b", map[model.InstanceState]int{model.InstanceRunning: 2})
		registered := 0
		for id := range w.nodes() {
			if strings.HasPrefix(string(id), "kwok://b/") {
				registered++
			}
		}
		if registered != 1 {
			t.Errorf("%d nodes of b registered; want 1: the other never boots", registered)
		}
	})
}

// TestBrokenConfigMap: what a person spoils in one group is told, and does not
// touch the others.
func TestBrokenConfigMap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("a"), group("b"))
		w.must(w.backend.Resize(t.Context(), "a", 1))
		w.wait(time.Second)
		var cm corev1.ConfigMap
		key := client.ObjectKey{Namespace: "hearth", Name: "hearth-kwok-a"}
		w.must(w.client.Get(t.Context(), key, &cm))
		cm.Data["faults"] = `{"capacityUntill": "2026-01-05T08:00:40Z"}`
		w.must(w.client.Update(t.Context(), &cm))

		s, err := w.backend.Snapshot(t.Context())
		w.must(err)
		if err := s.Errors["a"]; err == nil || !strings.Contains(err.Error(), "capacityUntill") {
			t.Errorf("error %v does not name the unknown field", err)
		}
		if _, read := s.Groups["a"]; read {
			t.Error("a group that cannot be read is among those that were")
		}
		w.must(w.backend.Resize(t.Context(), "b", 1))
		w.wait(25 * time.Second)
		w.wantStates("b", map[model.InstanceState]int{model.InstanceRunning: 1})

		w.must(w.client.Get(t.Context(), key, &cm))
		cm.Data["faults"] = `{}`
		w.must(w.client.Update(t.Context(), &cm))
		w.wait(25 * time.Second)
		w.wantStates("a", map[model.InstanceState]int{model.InstanceRunning: 1})
	})
}

func TestSetGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newClient(), group("a"))
		w.must(w.backend.Resize(t.Context(), "a", 1))
		w.wait(25 * time.Second)
		w.backend.SetGroups([]model.NodeGroup{group("b")})
		if err := w.backend.Resize(t.Context(), "a", 2); err == nil {
			t.Error("a group that is not declared was resized")
		}
		w.wait(5 * time.Minute)
		if len(w.nodes()) != 1 {
			t.Error("the node of a group that is no longer declared was touched")
		}
		w.backend.SetGroups([]model.NodeGroup{group("a")})
		w.wantStates("a", map[model.InstanceState]int{model.InstanceRunning: 1})
	})
}

// TestConflictsAreRetried: of two writers that read the same state, the second
// reads again, and neither write is lost.
func TestConflictsAreRetried(t *testing.T) {
	var conflicts atomic.Int32
	var backend *Backend
	inner := newClient()
	c := interceptor.NewClient(inner.(client.WithWatch), interceptor.Funcs{
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			if conflicts.Add(1) == 1 {
				// Somebody else writes between the read and the write.
				if err := backend.SetFaults(ctx, "a", Faults{NeverBoot: 7}); err != nil {
					t.Error(err)
				}
			}
			return c.Update(ctx, o, opts...)
		},
	})
	backend, err := New(Config{Client: c, Namespace: "hearth", Groups: []model.NodeGroup{group("a")}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	for _, desired := range []int{1, 3} { // the first creates the ConfigMap
		if err := backend.Resize(t.Context(), "a", desired); err != nil {
			t.Fatal(err)
		}
	}
	stored, err := backend.list(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := decode(group("a"), stored["hearth-kwok-a"])
	if err != nil {
		t.Fatal(err)
	}
	if got.Desired != 3 || got.faults.NeverBoot != 7 {
		t.Errorf("desired %d, faults %+v; want 3 and 7 that never boot", got.Desired, got.faults)
	}
}

func TestNothingIsWrittenAfterTheContextEnded(t *testing.T) {
	c := newClient()
	b, err := New(Config{Client: c, Namespace: "hearth", Groups: []model.NodeGroup{group("a")}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Resize(ctx, "a", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Resize: %v; want it to be cancelled", err)
	}
	if err := b.work(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("work: %v; want it to be cancelled", err)
	}
	var list corev1.ConfigMapList
	if err := c.List(t.Context(), &list); err != nil || len(list.Items) > 0 {
		t.Errorf("%d ConfigMaps, error %v; want none", len(list.Items), err)
	}
}

// TestOutage: the API server is away for a while; the cloud goes on where it
// was.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		refused := apierrors.NewServiceUnavailable("away")
		inner := newClient()
		c := interceptor.NewClient(inner.(client.WithWatch), interceptor.Funcs{
			List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
				if away.Load() {
					return refused
				}
				return c.List(ctx, l, opts...)
			},
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				if away.Load() {
					return refused
				}
				return c.Create(ctx, o, opts...)
			},
		})
		w := newWorld(t, c, group("a"))
		w.must(w.backend.Resize(t.Context(), "a", 1))
		w.wait(5 * time.Second)
		away.Store(true)
		if _, err := w.backend.Snapshot(t.Context()); !apierrors.IsServiceUnavailable(err) {
			t.Errorf("Snapshot during the outage: %v", err)
		}
		w.wait(30 * time.Second)
		away.Store(false)
		w.wait(2 * time.Second)
		w.wantStates("a", map[model.InstanceState]int{model.InstanceRunning: 1})
		if len(w.nodes()) != 1 {
			t.Error("no node registered after the outage")
		}
	})
}

func TestConfigIsChecked(t *testing.T) {
	broken := group("a")
	broken.Template.Capacity["cpu"] = "eight"
	logger := slog.New(slog.DiscardHandler)
	for name, cfg := range map[string]Config{
		"no client":    {Namespace: "hearth", Logger: logger},
		"no namespace": {Client: newClient(), Logger: logger},
		"no logger":    {Client: newClient(), Namespace: "hearth"},
		"bad quantity": {Client: newClient(), Namespace: "hearth", Logger: logger, Groups: []model.NodeGroup{broken}},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestNamesOfInstances(t *testing.T) {
	for _, id := range []model.GroupID{"a", "team/a b", model.GroupID(strings.Repeat("x", 250))} {
		instanceID, node := newInstanceID(id)
		if got, ok := groupOf(instanceID); !ok || got != id {
			t.Errorf("group of %q is %q, %v; want %q", instanceID, got, ok, id)
		}
		if len(node) > 63 || strings.ContainsAny(node, "/ ") {
			t.Errorf("node name %q", node)
		}
		again, _ := newInstanceID(id)
		if again == instanceID {
			t.Errorf("%q was made twice", again)
		}
	}
	for _, foreign := range []model.InstanceID{"", "kwok://", "aws:///a/i-1"} {
		if g, ok := groupOf(foreign); ok {
			t.Errorf("group of %q is %q; want none", foreign, g)
		}
	}
}
