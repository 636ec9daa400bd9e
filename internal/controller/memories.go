package controller

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

const (
	// keepEvery is the time between two writes of what a group has learnt:
	// more than that is never lost.
	keepEvery = 10 * time.Minute
	// loadTries is how often what was kept is tried to be read before
	// everything is learnt anew: a fault that passes must not cost weeks, and
	// one that stays must not keep Hearth from serving.
	loadTries = 3
	// lastWrites bounds all writes at the end.
	lastWrites = 5 * time.Second
)

// memories is how far keeping what was learnt has come.
type memories struct {
	kept    map[model.GroupID][]byte // by an earlier life, until the group needs it
	writing model.GroupID            // the group that is being written; empty: none
}

// keeping is how far a group's memory has been kept.
type keeping struct {
	contains time.Time // the arrivals up to then are in the memory as it was read
	changed  bool      // since it was last kept
	triedAt  time.Time // to keep it, or when it was read
	failing  bool      // the last write failed
}

// keptMemory is the end of a write.
type keptMemory struct {
	group model.GroupID
	err   error
}

// loadMemories reads what an earlier life has kept; nothing once that has
// failed loadTries times.
func (o *owner) loadMemories(ctx context.Context) map[model.GroupID][]byte {
	kept := map[model.GroupID][]byte{}
	for try := 1; try <= loadTries; try++ {
		callCtx, cancel := context.WithTimeout(ctx, 3*time.Second)
		loaded, err := o.cfg.Memories.LoadLearnt(callCtx)
		cancel()
		if err == nil {
			maps.Copy(kept, loaded)
			break
		}
		if ctx.Err() != nil {
			break
		}
		if try == loadTries {
			o.log.Warn("reading what was learnt failed; everything is learnt anew", "err", err)
			break
		}
		pause(ctx, time.Second)
	}
	return kept
}

// remembered returns what an earlier life has learnt of a group, or else a
// memory of nothing.
func (o *owner) remembered(group model.GroupID, c scoring.Costs) (*scoring.Memory, keeping) {
	now := time.Now()
	data, has := o.memories.kept[group]
	delete(o.memories.kept, group) // declared again it would be out of date
	if has {
		memory, at, err := scoring.Load(data, c, now)
		if err == nil {
			o.log.Info("what was learnt is remembered", "nodegroup", group, "learnt", at, "weeks", memory.Forecast.Weeks(), "keys", memory.Keys.Len())
			return memory, keeping{contains: at, triedAt: now}
		}
		o.log.Warn("what was learnt cannot be used; it is learnt anew", "nodegroup", group, "err", err)
	}
	return scoring.NewMemory(c), keeping{triedAt: now}
}

// keepMemories writes what one group has learnt beside the loop, if one is due:
// that for which it was tried longest ago.
func (o *owner) keepMemories(now time.Time) {
	if o.memories.writing != "" {
		return
	}
	var group model.GroupID
	var due *learnt
	for _, id := range slices.Sorted(maps.Keys(o.fleet)) {
		l := o.learnt[id]
		if l != nil && l.changed && now.Sub(l.triedAt) >= keepEvery && (due == nil || l.triedAt.Before(due.triedAt)) {
			group, due = id, l
		}
	}
	if due == nil {
		return
	}
	o.memories.writing = group
	due.changed, due.triedAt = false, now
	memory := due.memory.CopyAt(now) // saving takes too long for the loop
	o.beside(o.clusters, func(ctx context.Context) {
		err := o.keep(ctx, group, memory, now)
		select {
		case o.kept <- keptMemory{group, err}:
		case <-o.ctx.Done():
		}
	})
}

func (c *Controller) keep(ctx context.Context, group model.GroupID, memory *scoring.Memory, at time.Time) error {
	data, err := memory.Save(at)
	if err != nil {
		return err
	}
	return c.cfg.Memories.SaveLearnt(ctx, group, data)
}

// keptMemory takes in the end of a write.
func (o *owner) keptMemory(k keptMemory) {
	o.memories.writing = ""
	l := o.learnt[k.group]
	if l == nil {
		return
	}
	if k.err != nil {
		l.changed = true
		if !l.failing {
			o.log.Warn("keeping what was learnt failed; it is tried again every 10 minutes", "nodegroup", k.group, "err", k.err)
		}
	}
	l.failing = k.err != nil
}

// keepAll writes what all groups have learnt since they were last written, when
// the loop has ended. One that was under way is written again.
func (o *owner) keepAll() {
	o.work.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(o.ctx), lastWrites)
	defer cancel()
	now := time.Now()
	for _, id := range slices.Sorted(maps.Keys(o.fleet)) {
		l := o.learnt[id]
		if l == nil || !l.changed && id != o.memories.writing {
			continue
		}
		if err := o.keep(ctx, id, l.memory.CopyAt(now), now); err != nil {
			o.log.Warn("keeping what was learnt failed", "nodegroup", id, "err", err)
			if ctx.Err() != nil {
				return
			}
		}
	}
}
