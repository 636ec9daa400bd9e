package kube

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMemoriesSurvive(t *testing.T) {
	c := newClient(t, interceptor.Funcs{})
	want := map[model.GroupID][]byte{}
	for _, group := range []model.GroupID{"a", "Team A/runners", model.GroupID(strings.Repeat("x", 255))} {
		for _, data := range []string{"first\x00\xff", "second"} {
			must(t, NewMemories(c, "hearth").SaveLearnt(t.Context(), group, []byte(data)))
			want[group] = []byte(data)
			got, err := NewMemories(c, "hearth").LoadLearnt(t.Context())
			must(t, err)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		}
	}
	// Elsewhere there is nothing, and a copy is nobody's.
	if got, err := NewMemories(c, "other").LoadLearnt(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("in another namespace: %v, %v", got, err)
	}
	var o corev1.ConfigMap
	must(t, c.Get(t.Context(), client.ObjectKey{Namespace: "hearth", Name: memoryName("a")}, &o))
	o.Name, o.ResourceVersion, o.BinaryData = "backup", "", map[string][]byte{learntKey: []byte("old")}
	must(t, c.Create(t.Context(), &o))
	got, err := NewMemories(c, "hearth").LoadLearnt(t.Context())
	must(t, err)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("with a copy (-want +got):\n%s", diff)
	}
}

func TestMemoriesOverwrite(t *testing.T) {
	conflicts := 2
	c := newClient(t, interceptor.Funcs{
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			if conflicts > 0 {
				conflicts--
				return apierrors.NewConflict(schema.GroupResource{Resource: "configmaps"}, o.GetName(), errors.New("changed"))
			}
			return c.Update(ctx, o, opts...)
		},
	})
	m := NewMemories(c, "hearth")
	must(t, m.SaveLearnt(t.Context(), "a", []byte("1")))
	must(t, m.SaveLearnt(t.Context(), "a", []byte("2")))
	got, err := m.LoadLearnt(t.Context())
	must(t, err)
	if string(got["a"]) != "2" || conflicts != 0 {
		t.Errorf("got %q after %d conflicts", got["a"], 2-conflicts)
	}
}

func TestMemoriesFail(t *testing.T) {
	refused := errors.New("refused")
	c := newClient(t, interceptor.Funcs{
		Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
			return refused
		},
		List: func(context.Context, client.WithWatch, client.ObjectList, ...client.ListOption) error { return refused },
	})
	m := NewMemories(c, "hearth")
	if err := m.SaveLearnt(t.Context(), "a", nil); !errors.Is(err, refused) {
		t.Errorf("saving: %v", err)
	}
	if _, err := m.LoadLearnt(t.Context()); !errors.Is(err, refused) {
		t.Errorf("loading: %v", err)
	}
}
