package controller

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// command is one write of cluster-autoscaler's, carried out by the owner.
type command struct {
	ctx   context.Context //nolint:containedctx // travels with the request that it belongs to
	group model.GroupID   // empty: all groups
	do    func(o *owner, ctx context.Context) error
	reply chan error
	// taken is set by whoever is first: the owner that answers or the caller
	// that gives up.
	taken atomic.Bool
}

func errUnavailable(group model.GroupID, reason, text string) error {
	return nodegroups.Refuse(nodegroups.KindUnavailable, group, reason, "%s", text)
}

// submit has the owner carry out do, and waits until it is recorded.
func (c *Controller) submit(ctx context.Context, group model.GroupID, do func(*owner, context.Context) error) error {
	if c.view.Load() == nil {
		return errUnavailable(group, "not-synced", "not leading, or the first snapshot is not there yet")
	}
	within := c.cfg.RecordWithin
	if group == "" {
		within += time.Second // it records nothing, but may come just after a request whose record is not answered
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	cmd := &command{ctx: ctx, group: group, do: do, reply: make(chan error, 1)}
	select {
	case c.commands <- cmd:
	case <-ctx.Done():
		return errUnavailable(group, "busy", "the fleet did not take the request in time")
	}
	select {
	case err := <-cmd.reply:
		return err
	case <-ctx.Done():
		if cmd.taken.CompareAndSwap(false, true) {
			return errUnavailable(group, "not-recorded", "the change was not recorded in time")
		}
		return <-cmd.reply // the owner was first
	}
}

// command carries out one write. A change that nobody waited for any more
// stays in force, but cluster-autoscaler believes that it failed: its nodes are
// hidden again until it asks anew.
func (o *owner) command(cmd *command) {
	if cmd.ctx.Err() != nil {
		return
	}
	err := cmd.do(o, cmd.ctx)
	if cmd.taken.CompareAndSwap(false, true) {
		cmd.reply <- err
		return
	}
	if err == nil && cmd.group != "" {
		o.forget(cmd.group)
	}
}

// write applies a command to a group: recorded, then in force, then published.
func (o *owner) write(ctx context.Context, id model.GroupID, event nodegroups.Event) error {
	g := o.fleet[id]
	if g == nil {
		return nodegroups.Refuse(nodegroups.KindNotFound, "", "unknown-group", "unknown node group %q", string(id))
	}
	next := g.Clone()
	out, err := next.Step(event, time.Now())
	if err != nil {
		if e, ok := errors.AsType[*nodegroups.Error](err); ok && e.Kind == nodegroups.KindVetoed {
			o.cfg.Metrics.Vetoes.WithLabelValues(string(id), e.Reason).Inc()
			o.log.Info("deletion vetoed", "nodegroup", id, "reason", e.Reason, "err", err)
		}
		return err
	}
	if out.Commit == nodegroups.CommitFirst {
		if err := o.record(ctx, next); err != nil {
			o.log.Error("recording failed; the request is refused", "nodegroup", id, "err", err)
			return errUnavailable(id, "not-recorded", "the change could not be recorded")
		}
	}
	o.fleet[id] = next
	o.dirty[id] = true
	o.committed(next, out)
	if v := next.View(); v != nil && v != g.View() {
		if fleet := o.view.Load(); fleet != nil {
			o.view.Store(fleet.With(v))
		}
	}
	return nil
}

// Refresh begins a loop of cluster-autoscaler's: every group's view is made
// anew. It needs neither the cloud nor the API server.
func (c *Controller) Refresh(ctx context.Context) error {
	return c.submit(ctx, "", func(o *owner, _ context.Context) error {
		for _, g := range o.fleet {
			o.apply(g, nodegroups.Refresh{})
		}
		o.publish()
		return nil
	})
}

// IncreaseSize raises a group's target size by delta.
func (c *Controller) IncreaseSize(ctx context.Context, id model.GroupID, delta int) error {
	return c.submit(ctx, id, func(o *owner, ctx context.Context) error {
		event := nodegroups.IncreaseSize{Delta: delta}
		if g := o.fleet[id]; g != nil {
			event.Prefer = o.preferred(g, time.Now())
		}
		return o.write(ctx, id, event)
	})
}

// DeleteNodes accepts the removal of instances; all or none.
func (c *Controller) DeleteNodes(ctx context.Context, id model.GroupID, ids []model.InstanceID) error {
	return c.submit(ctx, id, func(o *owner, ctx context.Context) error {
		for _, i := range ids {
			if owner := o.groupOf[i]; owner != "" && owner != id && o.fleet[id] != nil {
				return nodegroups.Refuse(nodegroups.KindInvalid, id, "other-group", "instance %q belongs to node group %q", string(i), string(owner))
			}
		}
		return o.write(ctx, id, nodegroups.DeleteNodes{Instances: ids})
	})
}

// DecreaseTargetSize cancels instances that are not born yet.
func (c *Controller) DecreaseTargetSize(ctx context.Context, id model.GroupID, delta int) error {
	return c.submit(ctx, id, func(o *owner, ctx context.Context) error {
		return o.write(ctx, id, nodegroups.DecreaseTargetSize{Delta: delta})
	})
}

// Prescale makes sure that at least want nodes are on their way to the group
// before cluster-autoscaler asks for them.
func (c *Controller) Prescale(ctx context.Context, id model.GroupID, want int, reason string) error {
	return c.submit(ctx, id, func(o *owner, ctx context.Context) error {
		event := nodegroups.Prescale{Want: want, Reason: reason}
		if g := o.fleet[id]; g != nil {
			event.Prefer = o.preferred(g, time.Now())
		}
		return o.write(ctx, id, event)
	})
}

// Forget says that cluster-autoscaler may have lost its memory of what it
// asked for: in all groups, nodes that are not Ready yet are hidden again.
func (c *Controller) Forget(ctx context.Context) error {
	return c.submit(ctx, "", func(o *owner, _ context.Context) error {
		for id := range o.fleet {
			o.forget(id)
		}
		return nil
	})
}

// ForgetGroup is Forget for one group: an IncreaseSize was recorded whose
// answer never reached cluster-autoscaler.
func (c *Controller) ForgetGroup(ctx context.Context, id model.GroupID) error {
	return c.submit(ctx, "", func(o *owner, _ context.Context) error {
		o.forget(id)
		return nil
	})
}

func (o *owner) forget(id model.GroupID) {
	g := o.fleet[id]
	if g == nil {
		return
	}
	o.apply(g, nodegroups.Forget{})
	if fleet, v := o.view.Load(), g.View(); fleet != nil && v != nil && fleet.Group(id) != nil {
		o.view.Store(fleet.With(v))
	}
}
