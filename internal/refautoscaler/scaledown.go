package refautoscaler

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// candidate is a node that could go now or later.
type candidate struct {
	*simulated
	group *nodeGroup
	departure
}

// unneeded is a candidate that the cluster could do without.
type unneeded struct {
	candidate
	since     time.Time
	threshold time.Duration
	err       error // the threshold could not be had: the node stays
}

// scaleDown finds the nodes that are not needed, and starts deleting those that have
// not been needed for long enough. Its error ends the loop.
func (a *Autoscaler) scaleDown(ctx context.Context, world snapshot, busy deletions, forbidden bool, now time.Time) error {
	candidates := a.candidates(ctx, world, busy, now)
	a.updateUnneeded(ctx, a.removable(ctx, world, candidates, busy, now), now)

	f := &a.cfg.Flags
	cooling := forbidden || a.lastScaleUp.Add(f.ScaleDownDelayAfterAdd).After(now) ||
		a.lastScaleDownFailure.Add(f.ScaleDownDelayAfterFailure).After(now) ||
		a.lastScaleDown.Add(f.ScaleDownDelayAfterDelete).After(now)
	var err error
	if !cooling && len(candidates) > 0 {
		var started bool
		if started, err = a.startDeletions(ctx, a.ripe(ctx, busy, now)); err != nil {
			a.lastScaleDownFailure = now
		} else if started {
			a.lastScaleDown = now
			a.state.recalculate(ctx)
		}
	}
	a.updateSoftTaints(ctx, world)
	return err
}

// candidates returns the nodes that are ours and above the group's minimum, in CA's
// order: empty ones first, then those that were unneeded before.
func (a *Autoscaler) candidates(ctx context.Context, world snapshot, busy deletions, now time.Time) []candidate {
	sizes := a.provider.knownTargetSizes(ctx)
	var result []candidate
	for _, n := range world {
		if n.upcoming || busy.has(n.node.Name) {
			continue
		}
		g := a.provider.ownGroupOf(ctx, n.node)
		if g == nil {
			continue
		}
		if size, ok := sizes[g.id]; ok && size > g.min {
			result = append(result, candidate{simulated: n, group: g, departure: a.cfg.Flags.departureOf(n, now)})
		}
	}
	rank := func(c candidate) int {
		r := 0
		if len(c.move) > 0 || c.blocked != nil {
			r += 4
		}
		if c.waiting {
			r += 2
		}
		if !a.isUnneeded(c.node.Name) {
			r++
		}
		return r
	}
	slices.SortStableFunc(result, func(x, y candidate) int { return rank(x) - rank(y) })
	return result
}

func (a *Autoscaler) isUnneeded(name string) bool {
	return slices.ContainsFunc(a.unneeded, func(u unneeded) bool { return u.node.Name == name })
}

// removable returns the candidates that the cluster could do without: little used,
// and the pods of each fit elsewhere once the ones before it are gone.
func (a *Autoscaler) removable(ctx context.Context, world snapshot, candidates []candidate, busy deletions, now time.Time) []candidate {
	for name, until := range a.unremovable {
		if !until.After(now) || world.get(name) == nil {
			delete(a.unremovable, name)
		}
	}
	gone := map[string]bool{}
	var result []candidate
	for _, c := range candidates {
		if _, recently := a.unremovable[c.node.Name]; recently {
			continue
		}
		if reason := a.ineligible(ctx, c, now); reason != "" {
			a.log.Debug("node stays", "node", c.node.Name, "reason", reason)
			continue
		}
		destination := func(n *simulated) bool {
			return !n.upcoming && n != c.simulated && !gone[n.node.Name] && !busy.has(n.node.Name)
		}
		c.departure = a.cfg.Flags.departureOf(c.simulated, now) // with pods moved here from other candidates
		if c.blocked != nil || !placeAll(world, c.move, destination) {
			a.log.Debug("node stays", "node", c.node.Name, "blocked", c.blocked)
			a.unremovable[c.node.Name] = now.Add(a.cfg.Flags.UnremovableNodeRecheckTimeout)
			continue
		}
		gone[c.node.Name] = true
		result = append(result, c)
	}
	return result
}

// placeAll puts all pods on acceptable nodes, or none.
func placeAll(world snapshot, pods []*corev1.Pod, acceptable func(*simulated) bool) bool {
	var placed []*simulated
	for _, p := range pods {
		n := world.place(p, acceptable)
		if n == nil {
			for _, n := range placed {
				n.pods = n.pods[:len(n.pods)-1]
			}
			return false
		}
		placed = append(placed, n)
	}
	return true
}

// ineligible returns why a node is not even considered, or "".
func (a *Autoscaler) ineligible(ctx context.Context, c candidate, now time.Time) string {
	switch {
	case beingDeleted(c.node, now):
		return "being deleted"
	case c.node.Annotations[scaleDownDisabled] == "true":
		return "scale-down disabled by annotation"
	}
	o, err := a.provider.options(ctx, c.group.id)
	if err != nil {
		return err.Error()
	}
	used, err := c.utilization(o.IgnoreDaemonSetsUtilization, now)
	if err != nil {
		return err.Error()
	}
	if used > o.ScaleDownUtilizationThreshold {
		return fmt.Sprintf("utilization %.2f", used)
	}
	return ""
}

// beingDeleted tells whether CA, maybe an earlier run of it, has just ordered the
// node's deletion.
func beingDeleted(node *corev1.Node, now time.Time) bool {
	for _, t := range node.Spec.Taints {
		if t.Key == toBeDeletedTaint {
			at, err := strconv.ParseInt(t.Value, 10, 64)
			return err == nil && now.Sub(time.Unix(at, 0)) < toBeDeletedFor
		}
	}
	return false
}

func (a *Autoscaler) updateUnneeded(ctx context.Context, removable []candidate, now time.Time) {
	since := map[string]time.Time{}
	for _, u := range a.unneeded {
		since[u.node.Name] = u.since
	}
	a.unneeded = nil
	for _, c := range removable {
		u := unneeded{candidate: c, since: now}
		if t, ok := since[c.node.Name]; ok {
			u.since = t
		}
		var o effectiveOptions
		o, u.err = a.provider.options(ctx, c.group.id)
		u.threshold = o.ScaleDownUnreadyTime
		if ready, _ := readinessOf(c.node); ready {
			u.threshold = o.ScaleDownUnneededTime
		}
		a.unneeded = append(a.unneeded, u)
	}
}

// ripe returns the nodes whose time has come, empty ones first, down to the minimum
// of each group.
func (a *Autoscaler) ripe(ctx context.Context, busy deletions, now time.Time) []candidate {
	sizes := a.provider.knownTargetSizes(ctx)
	var empty, occupied []candidate
	for _, mustDrain := range []bool{false, true} {
		for _, u := range a.unneeded {
			size, known := sizes[u.group.id]
			switch {
			case mustDrain != (len(u.move) > 0), u.err != nil, !known, u.waiting,
				u.threshold > 0 && !u.since.Add(u.threshold).Before(now),
				size-busy.inGroup(u.group.id) <= u.group.min:
				continue
			}
			sizes[u.group.id]--
			if mustDrain {
				occupied = append(occupied, u.candidate)
			} else {
				empty = append(empty, u.candidate)
			}
		}
	}
	return append(empty, occupied...)
}

// updateSoftTaints asks the scheduler to prefer other nodes to the unneeded ones.
func (a *Autoscaler) updateSoftTaints(ctx context.Context, world snapshot) {
	budget := a.cfg.Flags.MaxBulkSoftTaintCount
	for _, n := range world {
		unneeded, tainted := a.isUnneeded(n.node.Name), hasTaint(n.node, deletionCandidateTaint)
		if n.upcoming || unneeded == tainted || hasTaint(n.node, toBeDeletedTaint) ||
			budget <= 0 || a.provider.ownGroupOf(ctx, n.node) == nil {
			continue
		}
		budget--
		var err error
		if unneeded {
			err = a.taint(ctx, n.node.Name, deletionCandidateTaint, corev1.TaintEffectPreferNoSchedule, false)
		} else {
			err = a.untaint(ctx, n.node.Name, deletionCandidateTaint, false)
		}
		if err != nil {
			a.log.Warn("soft taint not changed", "node", n.node.Name, "err", err)
		}
	}
}
