package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// recorder writes to the store: at once where an answer rests on it, else
// beside the loop, the newest state only. Writes of one group never overtake
// each other.
type recorder struct {
	store Store
	log   *slog.Logger

	mu      sync.Mutex
	groups  map[model.GroupID]groupWrite
	nodes   map[model.InstanceID]model.NodeRecord
	dropped map[model.InstanceID]bool
	wake    chan struct{}

	// writing holds one token per group under way.
	writing map[model.GroupID]chan struct{}
}

type groupWrite struct {
	record  nodegroups.Record
	summary model.GroupSummary
}

func newRecorder(store Store, log *slog.Logger) *recorder {
	return &recorder{
		store: store, log: log,
		groups:  map[model.GroupID]groupWrite{},
		nodes:   map[model.InstanceID]model.NodeRecord{},
		dropped: map[model.InstanceID]bool{},
		wake:    make(chan struct{}, 1),
		writing: map[model.GroupID]chan struct{}{},
	}
}

// token returns the lock of a group's writes.
func (r *recorder) token(id model.GroupID) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.writing[id]
	if t == nil {
		t = make(chan struct{}, 1)
		r.writing[id] = t
	}
	return t
}

// now writes a group's record and returns when it is written.
func (r *recorder) now(ctx context.Context, id model.GroupID, record nodegroups.Record, summary model.GroupSummary) error {
	token := r.token(id)
	select {
	case token <- struct{}{}:
		defer func() { <-token }()
	case <-ctx.Done():
		return ctx.Err()
	}
	r.mu.Lock()
	delete(r.groups, id) // what waited to be written is older
	r.mu.Unlock()
	return r.store.SaveGroup(ctx, id, record, summary)
}

// later writes a group's record soon.
func (r *recorder) later(id model.GroupID, record nodegroups.Record, summary model.GroupSummary) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.groups[id] = groupWrite{record, summary}
	r.signal()
}

func (r *recorder) saveNode(n model.NodeRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodes[n.ID] = n
	delete(r.dropped, n.ID)
	r.signal()
}

func (r *recorder) dropNode(id model.InstanceID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropped[id] = true
	delete(r.nodes, id)
	r.signal()
}

func (r *recorder) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run writes what waits until ctx ends. Failures are tried again with a pause;
// what has been replaced meanwhile is not.
func (r *recorder) run(ctx context.Context, stop context.CancelCauseFunc) {
	for {
		select {
		case <-r.wake:
		case <-ctx.Done():
			return
		}
		if err := r.flush(ctx); err != nil && ctx.Err() == nil {
			if errors.Is(err, model.ErrSuperseded) {
				stop(err)
				return
			}
			r.log.Warn("writing records failed; trying again", "err", err)
			select {
			case <-time.After(2 * time.Second):
			case <-ctx.Done():
				return
			}
			r.mu.Lock()
			r.signal()
			r.mu.Unlock()
		}
	}
}

const (
	// writers is how many RunnerNodes are written at a time, batch how many
	// before what waits of the groups is looked at again.
	writers = 8
	batch   = 200
)

// flush writes everything that waits of the groups and a batch of what waits of
// the nodes, and keeps what could not be written.
func (r *recorder) flush(ctx context.Context) error {
	r.mu.Lock()
	groups := slices.Sorted(maps.Keys(r.groups))
	nodes := take(r.nodes, batch)
	dropped := take(r.dropped, batch)
	if len(r.nodes)+len(r.dropped) > 0 {
		r.signal()
	}
	r.mu.Unlock()

	var failed []error
	for _, id := range groups {
		if err := r.flushGroup(ctx, id); err != nil {
			failed = append(failed, err)
		}
	}
	var work errgroup.Group
	work.SetLimit(writers)
	write := func(call func(context.Context) error, keep func()) {
		work.Go(func() error {
			callCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			if err := call(callCtx); err != nil {
				r.mu.Lock()
				defer r.mu.Unlock()
				failed = append(failed, err)
				keep()
			}
			return nil
		})
	}
	for id, n := range nodes {
		write(func(ctx context.Context) error { return r.store.SaveNode(ctx, n) }, func() {
			if _, newer := r.nodes[id]; !newer && !r.dropped[id] {
				r.nodes[id] = n
			}
		})
	}
	for id := range dropped {
		write(func(ctx context.Context) error { return r.store.DeleteNode(ctx, id) }, func() {
			if _, again := r.nodes[id]; !again {
				r.dropped[id] = true
			}
		})
	}
	_ = work.Wait() // failed has them all
	if err := errors.Join(failed...); len(failed) <= 1 || errors.Is(err, model.ErrSuperseded) {
		return err
	}
	return fmt.Errorf("%d writes failed, the first: %w", len(failed), failed[0])
}

// take removes up to n entries.
func take[V any](from map[model.InstanceID]V, n int) map[model.InstanceID]V {
	taken := map[model.InstanceID]V{}
	for id, v := range from {
		if len(taken) == n {
			break
		}
		taken[id] = v
		delete(from, id)
	}
	return taken
}

func (r *recorder) flushGroup(ctx context.Context, id model.GroupID) error {
	token := r.token(id)
	select {
	case token <- struct{}{}:
		defer func() { <-token }()
	case <-ctx.Done():
		return ctx.Err()
	}
	r.mu.Lock()
	w, waits := r.groups[id]
	delete(r.groups, id)
	r.mu.Unlock()
	if !waits {
		return nil
	}
	callCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	err := r.store.SaveGroup(callCtx, id, w.record, w.summary)
	if err != nil {
		r.mu.Lock()
		if _, newer := r.groups[id]; !newer {
			r.groups[id] = w
		}
		r.mu.Unlock()
	}
	return err
}
