package test

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/pkg/model"
)

const finalizer = "hearth.dev/exit-code"

// testEngines: the pod of an engine that was told to stop stays until it is
// let go of, another pod of its name is left alone, and one that somebody else
// deletes is not held up.
func testEngines(t *testing.T, c *cluster) {
	const theirs = "example.com/theirs"
	engine := func(finalizers ...string) model.Pod {
		t.Helper()
		p := runnerPod("engine", func(p *corev1.Pod) {
			p.Finalizers, p.Spec.NodeName = finalizers, "nowhere"
			p.Spec.TerminationGracePeriodSeconds = new(int64(30))
		})
		must(t, c.admin.Create(t.Context(), p))
		return model.Pod{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)}
	}
	// get returns the pod, nil when there is none.
	get := func() *corev1.Pod {
		t.Helper()
		o := &corev1.Pod{}
		err := c.admin.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: "engine"}, o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		must(t, err)
		return o
	}
	// kubelet ends a deleted pod as the kubelet does: at once.
	kubelet := func() {
		t.Helper()
		must(t, client.IgnoreNotFound(c.admin.Delete(t.Context(), get(), client.GracePeriodSeconds(0))))
	}
	e := kube.NewEngines(c.hearth)
	stop := func(p model.Pod, want bool) {
		t.Helper()
		gone, err := e.StopEngine(t.Context(), p)
		must(t, err)
		if gone != want {
			t.Fatalf("StopEngine says gone: %t", gone)
		}
	}

	p := engine(theirs)
	stranger := p
	stranger.UID = "00000000-0000-0000-0000-000000000000"
	stop(stranger, true)
	must(t, e.ReleaseEngine(t.Context(), stranger))
	if o := get(); o.DeletionTimestamp != nil || !slices.Equal(o.Finalizers, []string{theirs}) {
		t.Fatalf("a stranger of its name was stopped: %v", o.ObjectMeta)
	}
	stop(p, false)
	stop(p, false)
	kubelet()
	if o := get(); o == nil || o.DeletionTimestamp == nil || *o.DeletionGracePeriodSeconds != 0 ||
		!slices.Contains(o.Finalizers, finalizer) || !slices.Contains(o.Finalizers, theirs) {
		t.Fatalf("after the kubelet's deletion: %v", o)
	}
	must(t, e.ReleaseEngine(t.Context(), p))
	must(t, e.ReleaseEngine(t.Context(), p))
	if o := get(); o == nil || !slices.Equal(o.Finalizers, []string{theirs}) {
		t.Fatalf("after the release: %v", o)
	}
	// As long as somebody else holds it, it exists; nothing can be added to it.
	stop(p, false)
	if o := get(); !slices.Equal(o.Finalizers, []string{theirs}) {
		t.Fatalf("a finalizer was added to what is being deleted: %v", o.Finalizers)
	}
	theirPatch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`))
	must(t, c.admin.Patch(t.Context(), get(), theirPatch))
	if o := get(); o != nil {
		t.Fatalf("still there: %v", o)
	}
	stop(p, true)
	must(t, e.ReleaseEngine(t.Context(), p))

	p = engine()
	stop(p, false)
	kubelet()
	must(t, e.Uninstall(t.Context()))
	eventually(t, func() error {
		var list corev1.PodList
		must(t, c.admin.List(t.Context(), &list))
		for _, o := range list.Items {
			if slices.Contains(o.Finalizers, finalizer) || o.Name == "engine" {
				return fmt.Errorf("left over: %s, deleted at %v, finalizers %v", o.Name, o.DeletionTimestamp, o.Finalizers)
			}
		}
		return nil
	})
}
