package kube

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	disabled   = "cluster-autoscaler.kubernetes.io/scale-down-disabled"
	disabledBy = "hearth.dev/scale-down-disabled-by"
)

// face is what the acts may change of a Node.
type face struct {
	Annotations, Labels map[string]string
	Taints              []corev1.Taint
	Unschedulable       bool
}

func (f face) node() *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n", UID: "u", Annotations: f.Annotations, Labels: f.Labels},
		Spec:       corev1.NodeSpec{Taints: f.Taints, Unschedulable: f.Unschedulable},
	}
}

func faceOf(t *testing.T, c client.Client) face {
	t.Helper()
	var n corev1.Node
	must(t, c.Get(t.Context(), client.ObjectKey{Name: "n"}, &n))
	return face{n.Annotations, n.Labels, n.Spec.Taints, n.Spec.Unschedulable}
}

func TestActs(t *testing.T) {
	var (
		draining    = corev1.Taint{Key: "status-taint.cluster-autoscaler.kubernetes.io/hearth-draining", Effect: "NoSchedule"}
		toBeDeleted = corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Value: "1767600000", Effect: "NoSchedule"}
		candidate   = corev1.Taint{Key: "DeletionCandidateOfClusterAutoscaler", Value: "1767600000", Effect: "PreferNoSchedule"}
		ci          = corev1.Taint{Key: "ci", Value: "true", Effect: "NoSchedule"}
	)
	type act func(context.Context, *Nodes) error
	mark := func(m model.Marks) act {
		return func(ctx context.Context, n *Nodes) error { return n.Mark(ctx, "n", "u", m) }
	}
	label := func(ctx context.Context, n *Nodes) error { return n.Label(ctx, "n", "u", "runners-a") }
	taint := func(ctx context.Context, n *Nodes) error { return n.Taint(ctx, "n", "u") }
	untaint := func(ctx context.Context, n *Nodes) error { return n.Untaint(ctx, "n", "u") }
	clearCA := func(ctx context.Context, n *Nodes) error { return n.ClearCATaint(ctx, "n", "u") }
	unmark := func(ctx context.Context, n *Nodes) error { return n.Unmark(ctx, "n", "u") }
	uninstall := func(ctx context.Context, n *Nodes) error { return n.Uninstall(ctx) }
	keep := model.Marks{Decision: model.DecisionKeep, Reason: "warm", Protected: true}
	release := model.Marks{Decision: model.DecisionRelease, Reason: "cold"}
	kept := map[string]string{"hearth.dev/decision": "keep", "hearth.dev/reason": "warm", disabled: "true", disabledBy: "hearth"}
	ours := face{
		Annotations: map[string]string{"hearth.dev/decision": "keep", "hearth.dev/reason": "warm", disabled: "true", disabledBy: "hearth", "team": "a"},
		Labels:      map[string]string{"hearth.dev/node-group": "runners-a", "cache.hearth.dev/0a1b": "warm", "team": "a"},
		Taints:      []corev1.Taint{ci, draining, toBeDeleted},
	}
	bare := face{
		Annotations: map[string]string{"team": "a"},
		Labels:      map[string]string{"team": "a"},
		Taints:      []corev1.Taint{ci, toBeDeleted},
	}

	for _, tt := range []struct {
		name         string
		act          act
		before, want face
	}{
		{"taint beside others", taint, face{Taints: []corev1.Taint{ci}}, face{Taints: []corev1.Taint{ci, draining}}},
		{"taint what is tainted", taint, face{Taints: []corev1.Taint{draining}}, face{Taints: []corev1.Taint{draining}}},

		{"take a drain back, with CA's taints and cordon", untaint,
			face{Taints: []corev1.Taint{ci, draining, toBeDeleted, candidate}, Unschedulable: true}, face{Taints: []corev1.Taint{ci}}},
		{"take a drain back, a person's cordon stays", untaint,
			face{Taints: []corev1.Taint{draining}, Unschedulable: true}, face{Unschedulable: true}},
		{"clear CA's taint, not ours", clearCA,
			face{Taints: []corev1.Taint{draining, toBeDeleted}, Unschedulable: true}, face{Taints: []corev1.Taint{draining}}},

		{"keep", mark(keep), face{}, face{Annotations: kept}},
		{"keep what is kept", mark(keep), face{Annotations: kept}, face{Annotations: kept}},
		{"release what is kept", mark(release), face{Annotations: kept},
			face{Annotations: map[string]string{"hearth.dev/decision": "release", "hearth.dev/reason": "cold"}}},
		{"no decision", mark(model.Marks{}), face{Annotations: kept}, face{}},
		{"keep beside a person's own", mark(keep), face{Annotations: map[string]string{disabled: "true"}},
			face{Annotations: map[string]string{disabled: "true", "hearth.dev/decision": "keep", "hearth.dev/reason": "warm"}}},
		{"release beside a person's own", mark(release), face{Annotations: map[string]string{disabled: "true"}},
			face{Annotations: map[string]string{disabled: "true", "hearth.dev/decision": "release", "hearth.dev/reason": "cold"}}},
		{"a person's false is their own too", mark(keep), face{Annotations: map[string]string{disabled: "false"}},
			face{Annotations: map[string]string{disabled: "false", "hearth.dev/decision": "keep", "hearth.dev/reason": "warm"}}},
		{"ours, spoiled by a person, is put right", mark(keep), face{Annotations: map[string]string{disabled: "false", disabledBy: "hearth"}},
			face{Annotations: kept}},
		{"a marker of somebody else's is not ours", mark(release), face{Annotations: map[string]string{disabled: "true", disabledBy: "ops"}},
			face{Annotations: map[string]string{disabled: "true", disabledBy: "ops", "hearth.dev/decision": "release", "hearth.dev/reason": "cold"}}},

		{"label", label, face{}, face{Labels: map[string]string{"hearth.dev/node-group": "runners-a"}}},
		{"label of a person's stays", label,
			face{Labels: map[string]string{"hearth.dev/node-group": "b"}}, face{Labels: map[string]string{"hearth.dev/node-group": "b"}}},

		{"unmark", unmark, ours, bare},
		{"uninstall", uninstall, ours, bare},
		{"uninstall leaves a person's own", uninstall, face{Annotations: map[string]string{disabled: "true"}}, face{Annotations: map[string]string{disabled: "true"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			patches := 0
			c := newClient(t, interceptor.Funcs{
				Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
					patches++
					return c.Patch(ctx, o, p, opts...)
				},
			}, tt.before.node())
			n := NewNodes(c, engineSelector(t))
			must(t, tt.act(t.Context(), n))
			if diff := cmp.Diff(tt.want, faceOf(t, c), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			patches = 0
			must(t, tt.act(t.Context(), n))
			if patches != 0 {
				t.Errorf("done again it wrote %d times; want never", patches)
			}
		})
	}
}

func TestNodesThatAreGone(t *testing.T) {
	acts := map[string]func(context.Context, *Nodes, string) error{
		"taint":   func(ctx context.Context, n *Nodes, uid string) error { return n.Taint(ctx, "n", uid) },
		"untaint": func(ctx context.Context, n *Nodes, uid string) error { return n.Untaint(ctx, "n", uid) },
		"mark": func(ctx context.Context, n *Nodes, uid string) error {
			return n.Mark(ctx, "n", uid, model.Marks{Protected: true})
		},
		"label": func(ctx context.Context, n *Nodes, uid string) error { return n.Label(ctx, "n", uid, "g") },
	}
	for name, act := range acts {
		c := newClient(t, interceptor.Funcs{})
		must(t, act(t.Context(), NewNodes(c, engineSelector(t)), "u"))

		c = newClient(t, interceptor.Funcs{}, face{}.node())
		must(t, act(t.Context(), NewNodes(c, engineSelector(t)), "an earlier one of the same name"))
		if diff := cmp.Diff(face{}, faceOf(t, c), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s changed another node (-before +after):\n%s", name, diff)
		}
	}
	must(t, NewNodes(newClient(t, interceptor.Funcs{}), engineSelector(t)).Delete(t.Context(), "n", "u"))
}

func TestDelete(t *testing.T) {
	var options client.DeleteOptions
	c := newClient(t, interceptor.Funcs{
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			options = client.DeleteOptions{}
			options.ApplyOptions(opts)
			return c.Delete(ctx, o, opts...)
		},
	}, face{}.node())
	must(t, NewNodes(c, engineSelector(t)).Delete(t.Context(), "n", "u"))
	if p := options.Preconditions; p == nil || p.UID == nil || *p.UID != "u" {
		t.Errorf("preconditions %v; want the UID", p)
	}
	if err := c.Get(t.Context(), client.ObjectKey{Name: "n"}, &corev1.Node{}); !apierrors.IsNotFound(err) {
		t.Errorf("after the deletion: %v; want NotFound", err)
	}
}

// TestOthersTaintsAreKept: somebody changes the taints between our read and
// our write. Neither change is lost.
func TestOthersTaintsAreKept(t *testing.T) {
	theirs := corev1.Taint{Key: "theirs", Effect: corev1.TaintEffectNoSchedule}
	interfered := false
	c := newClient(t, interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			if !interfered {
				interfered = true
				var n corev1.Node
				must(t, c.Get(ctx, client.ObjectKey{Name: "n"}, &n))
				n.Spec.Taints = []corev1.Taint{theirs}
				must(t, c.Update(ctx, &n))
			}
			return c.Patch(ctx, o, p, opts...)
		},
	}, face{Taints: []corev1.Taint{{Key: "old", Effect: corev1.TaintEffectNoSchedule}}}.node())
	must(t, NewNodes(c, engineSelector(t)).Taint(t.Context(), "n", "u"))
	var keys []string
	for _, taint := range faceOf(t, c).Taints {
		keys = append(keys, taint.Key)
	}
	if want := []string{"theirs", taintDraining}; !slices.Equal(keys, want) {
		t.Errorf("taints %v; want %v", keys, want)
	}
}

// TestFailuresAreTold: above all, a request that timed out is no success.
func TestFailuresAreTold(t *testing.T) {
	for name, failure := range map[string]error{
		"timeout":   context.DeadlineExceeded,
		"cancelled": context.Canceled,
		"conflict":  apierrors.NewConflict(corev1.Resource("nodes"), "n", errors.New("always")),
		"forbidden": apierrors.NewForbidden(corev1.Resource("nodes"), "n", errors.New("no right")),
	} {
		c := newClient(t, interceptor.Funcs{
			Patch: func(context.Context, client.WithWatch, client.Object, client.Patch, ...client.PatchOption) error {
				return failure
			},
		}, face{}.node())
		n := NewNodes(c, engineSelector(t))
		if err := n.Taint(t.Context(), "n", "u"); !errors.Is(err, failure) {
			t.Errorf("%s: Taint returned %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := newClient(t, interceptor.Funcs{}, face{}.node())
	if err := NewNodes(c, engineSelector(t)).Taint(ctx, "n", "u"); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: Taint returned %v", err)
	}
	if diff := cmp.Diff(face{}, faceOf(t, c), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("something was written after the context had ended:\n%s", diff)
	}
}

func TestPodsOn(t *testing.T) {
	pod := func(name, node string, change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Name: name}, Spec: corev1.PodSpec{NodeName: node}}
		change(p)
		return p
	}
	c := newClient(t, interceptor.Funcs{},
		pod("job", "n", func(*corev1.Pod) {}),
		pod("elsewhere", "m", func(*corev1.Pod) {}),
		pod("waiting", "", func(*corev1.Pod) {}),
		pod("over", "n", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed; p.CreationTimestamp = metav1.NewTime(morning) }),
		pod("engine", "n", func(p *corev1.Pod) { p.Labels = map[string]string{"app.kubernetes.io/name": "dagger-helm"} }),
		pod("logs", "n", func(p *corev1.Pod) {
			p.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Controller: new(true)}}
		}),
	)
	pods, err := NewNodes(c, engineSelector(t)).PodsOn(t.Context(), "n")
	must(t, err)
	kinds := map[string]model.PodKind{}
	for _, p := range pods {
		kinds[p.Name] = p.Kind
	}
	if diff := cmp.Diff(map[string]model.PodKind{"job": model.PodRunner, "engine": model.PodEngine}, kinds); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The Node of an instance is looked for at the API server; who asks while all are
// being read shares the next reading, and nobody is answered by an older one.
func TestNodeOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists := 0
		var mu sync.Mutex
		c := newClient(t, interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			mu.Lock()
			lists++
			mu.Unlock()
			err := c.List(ctx, list, opts...)
			time.Sleep(time.Second)
			return err
		}}, node("n-1", "u-1", "runners", corev1.ConditionTrue))
		n := NewNodes(c, engineSelector(t))
		id := nodeFrom(node("n-1", "u-1", "runners", corev1.ConditionTrue)).ID
		found, err := n.NodeOf(t.Context(), id)
		if err != nil || found.Name != "n-1" || !found.Ready {
			t.Errorf("found %+v, %v", found, err)
		}
		if none, err := n.NodeOf(t.Context(), "fake:///nobody"); err != nil || none.Name != "" {
			t.Errorf("found %+v, %v", none, err)
		}
		before := lists
		var asking sync.WaitGroup
		for range 50 {
			asking.Go(func() {
				if _, err := n.NodeOf(t.Context(), id); err != nil {
					t.Error(err)
				}
			})
		}
		asking.Wait()
		if lists-before > 2 {
			t.Errorf("50 who asked at once took %d readings", lists-before)
		}
		must(t, c.Delete(t.Context(), node("n-1", "u-1", "", "")))
		if late, err := n.NodeOf(t.Context(), id); err != nil || late.Name != "" {
			t.Errorf("a node that is gone was found: %+v, %v", late, err)
		}
	})
	broken := newClient(t, interceptor.Funcs{List: func(context.Context, client.WithWatch, client.ObjectList, ...client.ListOption) error {
		return errors.New("refused")
	}})
	if _, err := NewNodes(broken, engineSelector(t)).NodeOf(t.Context(), "i"); err == nil {
		t.Error("a reading that failed found nothing, and said so as if it were true")
	}
}
