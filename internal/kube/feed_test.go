package kube

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// logSink writes down what it is told.
type logSink struct {
	mu    sync.Mutex
	lines []string
}

func (s *logSink) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

// take returns the lines since the last call.
func (s *logSink) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := s.lines
	s.lines = nil
	return lines
}

func (s *logSink) NodeChanged(n model.Node) { s.note("node %s %s ready=%v", n.Name, n.UID, n.Ready) }
func (s *logSink) NodeGone(n model.Node)    { s.note("node %s %s gone", n.Name, n.UID) }
func (s *logSink) PodChanged(p model.Pod) {
	s.note("pod %s %s on %q key %q engine=%v finished=%v", p.Name, p.UID, p.Node, p.Key, p.Kind == model.PodEngine, !p.Finished.IsZero())
}
func (s *logSink) PodGone(p model.Pod)                        { s.note("pod %s %s gone", p.Name, p.UID) }
func (discard) RunnerComing(model.GroupID, string, time.Time) {}

func (*logSink) RunnerComing(model.GroupID, string, time.Time) {}

func (s *logSink) AnnotationsChanged(g model.GroupID, a map[string]string) {
	s.note("annotations of %s: %v", g, a)
}

// listOnly says of a client in memory that it cannot stream lists.
type listOnly struct{ client.WithWatch }

func (listOnly) IsWatchListSemanticsUnSupported() bool { return true }

func newFeed(t *testing.T, c client.WithWatch) (*Feed, *logSink) {
	t.Helper()
	sink := &logSink{}
	f, err := NewFeed(FeedConfig{
		Client: listOnly{c}, Sink: sink, Engines: engineSelector(t), Logger: slog.New(slog.DiscardHandler),
		KeysFor: func(g model.GroupID) []string {
			if g == "Team A" {
				return []string{"repo"}
			}
			return nil
		},
	})
	must(t, err)
	return f, sink
}

func node(name, uid, group string, ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(uid), Labels: map[string]string{v1alpha1.NodeGroupLabel: v1alpha1.GroupLabel(model.GroupID(group))}},
		Spec:       corev1.NodeSpec{ProviderID: "kwok://" + name},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}},
	}
}

func pod(name, uid, node string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Name: name, UID: types.UID(uid), Labels: labels, CreationTimestamp: metav1.NewTime(morning)},
		Spec:       corev1.PodSpec{NodeName: node},
	}
}

func TestFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		unclaimed := node("unclaimed", "n9", "b", corev1.ConditionTrue)
		unclaimed.Spec.ProviderID = ""
		logs := pod("logs", "p9", "n", nil)
		logs.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Controller: new(true)}}
		c := newClient(t, interceptor.Funcs{},
			node("n", "n1", "Team A", corev1.ConditionFalse), unclaimed,
			pod("job", "p1", "n", map[string]string{"repo": "r", "hearth.dev/cache-key": "k"}), logs,
			pod("engine", "p2", "n", map[string]string{"app.kubernetes.io/name": "dagger-helm"}),
			&v1alpha1.RunnerNodeGroup{
				ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.GroupName("Team A"), UID: "g1", Annotations: map[string]string{"hearth.dev/min-warm": "1", "other": "x"}},
				Spec:       v1alpha1.RunnerNodeGroupSpec{ID: "Team A"},
			},
		)
		f, sink := newFeed(t, c)
		if f.Synced() {
			t.Error("synced before it ran")
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { f.Run(ctx) })
		defer running.Wait()
		defer cancel()

		step := func(what string, do func(), want ...string) {
			t.Helper()
			do()
			synctest.Wait()
			if diff := cmp.Diff(want, sink.take()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
		}
		update := func(o client.Object, change func()) func() {
			return func() {
				t.Helper()
				must(t, c.Get(t.Context(), client.ObjectKeyFromObject(o), o))
				base := o.DeepCopyObject().(client.Object)
				change()
				must(t, c.Patch(t.Context(), o.DeepCopyObject().(client.Object), client.MergeFrom(base)))
				must(t, c.Status().Patch(t.Context(), o, client.MergeFrom(base)))
			}
		}

		synctest.Wait()
		if !f.Synced() {
			t.Error("not synced")
		}
		lines := sink.take()
		if len(lines) != 4 {
			t.Fatalf("told at first: %q", lines)
		}
		if lines[0] > lines[1] { // of two watches
			lines[0], lines[1] = lines[1], lines[0]
		}
		if diff := cmp.Diff([]string{
			"annotations of Team A: map[hearth.dev/min-warm:1]",
			"node n n1 ready=false",
			`pod engine p2 on "n" key "" engine=true finished=false`,
			`pod job p1 on "n" key "r" engine=false finished=false`,
		}, lines); diff != "" {
			t.Errorf("told at first (-want +got):\n%s", diff)
		}

		var n corev1.Node
		n.Name = "n"
		step("a heartbeat", update(&n, func() { n.Status.Conditions[0].LastHeartbeatTime = metav1.NewTime(morning) }))
		step("ready", update(&n, func() { n.Status.Conditions[0].Status = corev1.ConditionTrue }), "node n n1 ready=true")
		unclaimed.ResourceVersion = ""
		step("claimed", update(unclaimed, func() { unclaimed.Spec.ProviderID = "kwok://b/1" }), "node unclaimed n9 ready=true")

		job := pod("job", "p1", "n", nil)
		step("finished", update(job, func() { job.Status.Phase = corev1.PodSucceeded }),
			`pod job p1 on "n" key "r" engine=false finished=true`)
		step("pod gone", func() { must(t, c.Delete(t.Context(), job)) }, "pod job p1 gone")
		step("pending pod", func() {
			must(t, c.Create(t.Context(), pod("next", "p3", "", map[string]string{"hearth.dev/cache-key": "k"})))
		},
			`pod next p3 on "" key "k" engine=false finished=false`)
		relabelled := pod("next", "p3", "", nil)
		step("relabelled: it ends and begins", update(relabelled, func() { relabelled.Labels = map[string]string{"app.kubernetes.io/name": "dagger-helm"} }),
			"pod next p3 gone", `pod next p3 on "" key "" engine=true finished=false`)
		step("ignored pod gone", func() { must(t, c.Delete(t.Context(), logs)) })

		group := &v1alpha1.RunnerNodeGroup{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.GroupName("Team A")}}
		step("annotated", update(group, func() { group.Annotations["hearth.dev/min-warm"] = "2" }), "annotations of Team A: map[hearth.dev/min-warm:2]")
		step("annotated otherwise", update(group, func() { group.Annotations["other"] = "y" }))
		step("group gone", func() { must(t, c.Delete(t.Context(), group)) }, "annotations of Team A: map[]")
		step("node gone", func() { must(t, c.Delete(t.Context(), &n)) }, "node n n1 gone")
	})
}

// TestReplace: after a broken connection a whole list takes the place of what
// was known. An object of the same name is another one when its UID is.
func TestReplace(t *testing.T) {
	f, sink := newFeed(t, newClient(t, interceptor.Funcs{}))
	must(t, f.nodes.Replace([]any{node("a", "1", "g", corev1.ConditionTrue), node("b", "2", "g", corev1.ConditionTrue)}, ""))
	sink.take()
	must(t, f.nodes.Replace([]any{
		node("a", "1", "g", corev1.ConditionTrue), // as it was
		node("b", "3", "g", corev1.ConditionFalse),
	}, ""))
	if diff := cmp.Diff([]string{"node b 2 gone", "node b 3 ready=false"}, sink.take()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	must(t, f.nodes.Replace(nil, ""))
	if n := len(sink.take()); n != 2 || len(f.nodeLabels) != 0 {
		t.Errorf("%d told, %d labels kept; want 2 and none", n, len(f.nodeLabels))
	}
	// What becomes of no interest is gone.
	p := pod("p", "4", "a", nil)
	must(t, f.pods.Add(p))
	p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	must(t, f.pods.Update(p))
	if diff := cmp.Diff([]string{`pod p 4 on "a" key "" engine=false finished=false`, "pod p 4 gone"}, sink.take()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFeedConfigIsChecked(t *testing.T) {
	if _, err := NewFeed(FeedConfig{}); err == nil {
		t.Error("an empty configuration was taken")
	}
}

// BenchmarkFeedMemory says how much is kept of a node with 20 labels, 4 job
// pods and 10 pods that are ignored.
func BenchmarkFeedMemory(b *testing.B) {
	const nodes = 1000
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var perNode float64
	for b.Loop() {
		f, err := NewFeed(FeedConfig{
			Client: fake.NewClientBuilder().Build(), Sink: discard{}, Engines: engineSelector(b), Logger: slog.New(slog.DiscardHandler),
			KeysFor: func(model.GroupID) []string { return nil },
		})
		if err != nil {
			b.Fatal(err)
		}
		before := heap()
		for i := range nodes {
			n := node(fmt.Sprint("node-", i), fmt.Sprint("node-uid-", i), "runners", corev1.ConditionTrue)
			for j := range 19 {
				n.Labels[fmt.Sprintf("example.com/a-usual-label-%d", j)] = fmt.Sprintf("a usual value %d %d", i, j)
			}
			n.Annotations = map[string]string{"large": strings.Repeat("x", 4096)}
			if err := f.nodes.Add(n); err != nil {
				b.Fatal(err)
			}
			for j := range 14 {
				name := fmt.Sprintf("pod-%d-%d", i, j)
				p := pod(name, "uid of "+name, n.Name, map[string]string{"hearth.dev/cache-key": "a/usual-key"})
				p.Annotations = n.Annotations
				if j >= 4 {
					p.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Controller: new(true)}}
				}
				if err := f.pods.Add(p); err != nil {
					b.Fatal(err)
				}
			}
		}
		perNode = float64(heap()-before) / nodes
		runtime.KeepAlive(f)
	}
	b.ReportMetric(perNode, "B/node")
	b.ReportMetric(perNode*1000/(1<<20), "MiB/1000-nodes")
}

// discard is a sink that forgets.
type discard struct{}

func (discard) NodeChanged(model.Node)                              {}
func (discard) NodeGone(model.Node)                                 {}
func (discard) PodChanged(model.Pod)                                {}
func (discard) PodGone(model.Pod)                                   {}
func (discard) AnnotationsChanged(model.GroupID, map[string]string) {}
