package controller

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// recording runs f with a recorder that is not run yet, and run to run it.
func recording(t *testing.T, f func(t *testing.T, r *recorder, store *fakeStore, log *logBuffer, run func())) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		store, log := newFakeStore(), &logBuffer{}
		r := newRecorder(store.open(), slog.New(slog.NewTextHandler(log, nil)))
		ctx, cancel := context.WithCancelCause(context.Background())
		ended := make(chan struct{})
		close(ended)
		f(t, r, store, log, func() {
			ended = make(chan struct{})
			go func() { defer close(ended); r.run(ctx, cancel) }()
		})
		cancel(nil)
		<-ended
	})
}

func target(n int) nodegroups.Record { return nodegroups.Record{Sequence: int64(n), Target: n} }

func TestRecorderWritesTheNewestOnly(t *testing.T) {
	recording(t, func(t *testing.T, r *recorder, store *fakeStore, _ *logBuffer, run func()) {
		for n := range 5 {
			r.later(runners, target(n+1), model.GroupSummary{})
			r.saveNode(model.NodeRecord{ID: "i", Score: float64(n)})
		}
		run()
		time.Sleep(time.Second)
		if got := store.record(runners).Target; got != 5 || store.count("save-group") != 1 {
			t.Errorf("target %d after %d writes", got, store.count("save-group"))
		}
		if got := store.nodeRecords()["i"].Score; got != 4 || store.count("save-node") != 1 {
			t.Errorf("score %v after %d writes", got, store.count("save-node"))
		}
	})
}

// What waited to be written is older than what is written at once.
func TestRecorderNeverGoesBack(t *testing.T) {
	recording(t, func(t *testing.T, r *recorder, store *fakeStore, _ *logBuffer, run func()) {
		r.later(runners, target(1), model.GroupSummary{})
		if err := r.now(t.Context(), runners, target(2), model.GroupSummary{}); err != nil {
			t.Fatal(err)
		}
		run()
		time.Sleep(time.Minute)
		if got := store.record(runners).Target; got != 2 {
			t.Errorf("target %d, want 2", got)
		}
		// An older write that is under way is waited for.
		store.setLatency(time.Second)
		r.later(runners, target(3), model.GroupSummary{})
		time.Sleep(100 * time.Millisecond)
		if err := r.now(t.Context(), runners, target(4), model.GroupSummary{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if got := store.record(runners).Target; got != 4 {
			t.Errorf("target %d, want 4", got)
		}
		// One group does not wait for another.
		store.always(hangBefore)
		r.later(runners, target(5), model.GroupSummary{})
		time.Sleep(100 * time.Millisecond)
		store.heal()
		began := time.Now()
		if err := r.now(t.Context(), "other", target(1), model.GroupSummary{}); err != nil || time.Since(began) > time.Second {
			t.Errorf("writing another group: %v after %s", err, time.Since(began))
		}
	})
}

func TestRecorderTriesAgain(t *testing.T) {
	recording(t, func(t *testing.T, r *recorder, store *fakeStore, log *logBuffer, run func()) {
		store.always(failBefore)
		run()
		r.later(runners, target(1), model.GroupSummary{})
		for _, id := range []model.InstanceID{"goes", "stays", "changes"} {
			r.saveNode(model.NodeRecord{ID: id})
		}
		r.dropNode("was")
		time.Sleep(time.Second)
		r.dropNode("goes")
		r.saveNode(model.NodeRecord{ID: "changes", Score: 1})
		r.saveNode(model.NodeRecord{ID: "was"}) // came back
		time.Sleep(time.Minute)
		if lines := log.count("writing records failed"); lines < 10 || lines > 40 || log.count("5 writes failed, the first: ") == 0 {
			t.Errorf("%d lines a minute: %s", lines, log.tail(1))
		}
		store.heal()
		time.Sleep(5 * time.Second)
		records := store.nodeRecords()
		if _, there := records["goes"]; there || len(records) != 3 || records["changes"].Score != 1 || store.record(runners).Target != 1 {
			t.Errorf("in the end %v and %+v", records, store.record(runners))
		}
	})
}
