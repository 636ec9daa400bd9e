package controller

import (
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

func woken(w *World) bool {
	select {
	case <-w.wake:
		return true
	default:
		return false
	}
}

// A stand-by waits for weeks: what is gone must leave no trace.
func TestWorldBeforeAnOwner(t *testing.T) {
	w := NewWorld([]model.NodeGroup{group(runners)})
	for i := range 1000 {
		n := model.Node{Name: model.NodeName(string(rune('a' + i%7))), UID: string(rune(i))}
		p := model.Pod{UID: string(rune('a' + i%7))}
		w.NodeChanged(n)
		w.PodChanged(p)
		w.NodeGone(n)
		w.PodGone(p)
	}
	w.NodeChanged(model.Node{Name: "stays", UID: "1"})
	w.NodeChanged(model.Node{Name: "stays", UID: "2"})
	if len(w.nodes) != 1 || len(w.pods) != 0 {
		t.Errorf("kept %d nodes and %d pods", len(w.nodes), len(w.pods))
	}
	nodes, pods, _ := w.take()
	if len(nodes) != 1 || nodes[0].gone || nodes[0].node.UID != "2" || len(pods) != 0 {
		t.Errorf("took %+v and %+v", nodes, pods)
	}
	// From now on it must tell the owner, once.
	w.NodeGone(model.Node{Name: "stays"})
	nodes, _, _ = w.take()
	if len(nodes) != 1 || !nodes[0].gone {
		t.Errorf("took %+v", nodes)
	}
	if nodes, pods, annotations := w.take(); len(nodes)+len(pods)+len(annotations) != 0 {
		t.Errorf("took %+v, %+v, %+v a second time", nodes, pods, annotations)
	}
}

func TestWorldKeepsTheNewest(t *testing.T) {
	w := NewWorld(nil)
	w.take()
	woken(w)
	w.PodChanged(model.Pod{UID: "b"})
	w.PodChanged(model.Pod{UID: "a"})
	w.PodChanged(model.Pod{UID: "a", Node: "n"})
	w.NodeChanged(model.Node{Name: "n", UID: "1"})
	w.NodeGone(model.Node{Name: "n", UID: "1"})
	w.NodeChanged(model.Node{Name: "n", UID: "2"})
	w.AnnotationsChanged(runners, annotation("min-warm", "1"))
	w.AnnotationsChanged(runners, annotation("min-warm", "2"))
	if !woken(w) || woken(w) {
		t.Error("the owner must be woken once for a batch")
	}
	nodes, pods, annotations := w.take()
	if len(pods) != 2 || pods[0].pod.UID != "a" || pods[0].pod.Node != "n" || pods[1].pod.UID != "b" {
		t.Errorf("pods %+v", pods)
	}
	if len(nodes) != 1 || nodes[0].gone || nodes[0].node.UID != "2" {
		t.Errorf("nodes %+v", nodes)
	}
	if got := annotations[runners][model.Prefix+"/min-warm"]; got != "2" {
		t.Errorf("annotations %v", annotations)
	}
}

func TestWorldKeysFor(t *testing.T) {
	w := NewWorld([]model.NodeGroup{group(runners, "cache-keys", "repo")})
	check := func(want ...string) {
		t.Helper()
		if got := w.KeysFor(runners); !slices.Equal(got, want) {
			t.Errorf("keys %v, want %v", got, want)
		}
	}
	check("repo")
	w.AnnotationsChanged(runners, annotation("cache-keys", "repo, workflow"))
	check("repo", "workflow")
	w.SetGroups([]model.NodeGroup{group(runners, "cache-keys", "other")})
	check("repo", "workflow") // the object's annotation still wins
	w.AnnotationsChanged(runners, nil)
	check("other")
	w.SetGroups(nil)
	check()
}

// A watch is never held up by an owner that is busy.
func TestWorldNeverBlocks(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		l.store.always(hangBefore)
		asked := make(chan error, 1)
		go func() { asked <- l.increase(runners, 1) }()
		time.Sleep(time.Second) // the owner waits for its record
		began := time.Now()
		for range 10_000 {
			l.world.PodChanged(model.Pod{UID: "p", Kind: model.PodRunner})
			l.world.NodeChanged(model.Node{Name: "n", ID: "x"})
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the watch waited %s for the owner", took)
		}
		if err := <-asked; err == nil {
			t.Error("the record hung, and the request was granted")
		}
	})
}
