package kube

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// runEvents runs events until the test ends and returns a way to read what is
// written.
func runEvents(t *testing.T, c client.Client, store *Store) (*Events, func() []corev1.Event) {
	t.Helper()
	e := NewEvents(c, store, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return e, func() []corev1.Event {
		t.Helper()
		var list corev1.EventList
		must(t, c.List(t.Context(), &list, client.InNamespace("default")))
		return list.Items
	}
}

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient(t, interceptor.Funcs{}, &v1alpha1.RunnerNodeGroup{
			ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.GroupName("Team A"), UID: "g"},
			Spec:       v1alpha1.RunnerNodeGroupSpec{ID: "Team A"},
		})
		store := NewStore(c)
		_, _, _, err := store.Load(t.Context())
		must(t, err)
		e, written := runEvents(t, c, store)

		for range 3 {
			e.Node(model.Node{Name: "n", UID: "u"}, model.SeverityNormal, "Draining", "cold")
			time.Sleep(time.Second)
		}
		list := written()
		if len(list) != 1 || list[0].Count != 3 || list[0].Type != "Normal" || list[0].Reason != "Draining" ||
			list[0].InvolvedObject.Kind != "Node" || list[0].InvolvedObject.UID != "u" {
			t.Errorf("written: %+v; want one event that was seen 3 times", list)
		}
		must(t, c.Delete(t.Context(), &list[0])) // events expire
		e.Node(model.Node{Name: "n", UID: "u"}, model.SeverityNormal, "Draining", "cold")
		time.Sleep(time.Second)
		if list = written(); len(list) != 1 {
			t.Errorf("%d events after the first expired; want 1", len(list))
		}
		must(t, c.Delete(t.Context(), &list[0]))

		e.Group("Team A", model.SeverityWarning, "LaunchFailed", "no capacity")
		time.Sleep(time.Second)
		list = written()
		if len(list) != 1 || list[0].Type != "Warning" || list[0].InvolvedObject.UID != "g" ||
			list[0].InvolvedObject.APIVersion != "hearth.dev/v1alpha1" || list[0].InvolvedObject.Name != v1alpha1.GroupName("Team A") {
			t.Errorf("written: %+v", list)
		}
	})
}

// TestEventsAreBounded: much to tell neither blocks nor floods the API server.
func TestEventsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient(t, interceptor.Funcs{})
		e, written := runEvents(t, c, NewStore(c))
		for i := range 10_000 {
			n := model.Node{Name: model.NodeName(fmt.Sprint("n", i)), UID: fmt.Sprint(i)}
			e.Node(n, model.SeverityNormal, "Draining", "cold")
		}
		synctest.Wait()
		if n := len(written()); n > eventRate+1 {
			t.Errorf("%d events at once; want at most %d", n, eventRate)
		}
		time.Sleep(time.Minute)
		if n := len(written()); n > eventQueue+eventRate+1 || n < eventQueue/2 {
			t.Errorf("%d events in the end; want at most %d", n, eventQueue+eventRate+1)
		}
		before := len(written())
		for i := range 100 {
			e.Node(model.Node{Name: "n", UID: "u"}, model.SeverityNormal, fmt.Sprint("Reason", i), "x")
			time.Sleep(time.Second)
		}
		about := len(written()) - before
		if most := objectEventBurst + 100/10 + 1; about > most || about < objectEventBurst {
			t.Errorf("%d events about one node; want %d to %d", about, objectEventBurst, most)
		}
	})
}

func TestLabelLeader(t *testing.T) {
	pod := func(namespace, name string, labels map[string]string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(name), Labels: labels}}
	}
	leader := func() map[string]string { return map[string]string{"hearth.dev/leader": "true", "app": "hearth"} }
	c := newClient(t, interceptor.Funcs{},
		pod("hearth", "old", leader()), pod("hearth", "new", map[string]string{"app": "hearth"}), pod("other", "theirs", leader()))
	for range 2 {
		must(t, LabelLeader(t.Context(), c, "hearth", "new"))
		var list corev1.PodList
		must(t, c.List(t.Context(), &list, client.MatchingLabels{"hearth.dev/leader": "true"}))
		var names []string
		for _, p := range list.Items {
			names = append(names, p.Name)
		}
		if fmt.Sprint(names) != "[new theirs]" {
			t.Errorf("labelled: %v; want new, and theirs of another namespace", names)
		}
	}
	must(t, LabelLeader(t.Context(), c, "hearth", "gone"))
}
