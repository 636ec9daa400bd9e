package dagger

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestWatcher follows one engine from its pod to what is told of it.
func TestWatcher(t *testing.T) {
	var clients, bytes atomic.Int64
	bytes.Store(1 << 30)
	target := serve(t, "n", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "dagger_connected_clients %d\ndagger_local_cache_total_disk_size_bytes %d\n", clients.Load(), bytes.Load())
	})
	told := make(chan model.EngineUse)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := NewWatcher(target.Addr.Port(), func(u model.EngineUse) {
		select {
		case told <- u:
		case <-ctx.Done():
		}
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.every = time.Millisecond
	ended := make(chan struct{})
	go func() { defer close(ended); w.Run(ctx) }()
	defer func() { cancel(); <-ended }()

	node := model.Node{Name: "n", UID: "1", Labels: map[string]string{model.Prefix + "/node-group": "runners"}}
	engine := model.Pod{Namespace: "dagger", Name: "engine", UID: "e", Node: "n", Kind: model.PodEngine, IP: target.Addr.Addr().String()}
	stray := engine
	stray.UID, stray.Node, stray.Name = "s", "elsewhere", "stray"
	w.PodChanged(stray)
	w.PodChanged(model.Pod{UID: "r", Node: "n", Kind: model.PodRunner, IP: "127.0.0.1"})
	w.NodeChanged(node)
	w.PodChanged(engine)

	// until waits for what is wanted; all else must be of the engine too.
	until := func(what string, is func(model.EngineUse) bool) (u model.EngineUse) {
		t.Helper()
		for {
			select {
			case u = <-told:
				if u.Node != "n" || u.Pod != "dagger/engine" {
					t.Fatalf("told of %+v", u)
				}
				if is(u) {
					return u
				}
			case <-ctx.Done():
				t.Fatalf("never told that it is %s; last of %+v", what, u)
			}
		}
	}
	idle := until("idle", func(u model.EngineUse) bool { return u.Activity == model.ActivityIdle })
	if idle.CacheBytes != 1<<30 || idle.Clients != 0 || idle.At.IsZero() {
		t.Errorf("idle: %+v", idle)
	}
	clients.Store(2)
	// As long as it is not settled that it is busy, idle is as old as it is.
	settled := idle.At
	busy := until("busy", func(u model.EngineUse) bool {
		if u.Clients == 0 {
			settled = u.At
		}
		if u.Activity == model.ActivityIdle && u.At.After(settled) {
			t.Errorf("idle as of %s with %d clients; the last quiet reading was at %s", u.At, u.Clients, settled)
		}
		return u.Activity == model.ActivityBusy
	})
	if busy.Clients != 2 {
		t.Errorf("busy: %+v", busy)
	}
	// Another node by that name: what was known of the old one's engine is not
	// true of it.
	w.NodeGone(node)
	clients.Store(0)
	node.UID = "2"
	w.NodeChanged(node)
	until("unknown", func(u model.EngineUse) bool { return u.Activity == model.ActivityUnknown })
	until("idle again", func(u model.EngineUse) bool { return u.Activity == model.ActivityIdle })
	w.PodGone(engine)
	w.PodGone(stray)
}
