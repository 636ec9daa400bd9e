package controller

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// bounds are the annotations that win over the policy at a time.
func bounds(s nodegroups.Settings, now time.Time) scoring.Bounds {
	return scoring.Bounds{MinWarm: s.MinWarmAt(now), MaxWarm: s.MaxWarm, MaxIdle: s.MaxIdle, Park: s.Park == nodegroups.ParkStop}
}

// plan decides for every idle node, and asks for the idle nodes that min-warm
// wants and that are not there.
func (o *owner) plan() {
	now := time.Now()
	o.planned = now
	for _, id := range slices.Sorted(maps.Keys(o.fleet)) {
		o.serveWaiting()
		g := o.fleet[id]
		o.dirty[id] = true
		settings := g.Settings()
		if !settings.Runner() || !g.Synced() {
			continue
		}
		var nodes []scoring.Node
		var held []model.Verdict
		idle := 0
		for _, n := range g.Nodes() {
			switch n.Phase {
			case model.PhaseReady:
			case model.PhaseDraining, model.PhaseParking, model.PhaseParked:
				// Nothing to decide; but the worth says who is taken back, and
				// which parked node goes first.
				held = append(held, model.Verdict{Instance: n.ID, Score: o.scored(n, now).Score(now)})
				continue
			default:
				continue
			}
			node := o.scored(n, now)
			if !n.Node.Ready {
				// No job can use it: it neither counts as warm nor goes by
				// the plan. Dead for long, it loses its protection.
				held = append(held, model.Verdict{
					Instance: n.ID, Decision: model.DecisionKeep, Score: node.Score(now),
					Reasons: []model.Reason{{Code: "not-ready", Text: "its Node is not Ready"}},
				})
				continue
			}
			if !n.Busy {
				idle++
			}
			if m := n.Node.Marks; m.Protected && !m.ProtectedByUs {
				// Left out of the plan: released in vain it would keep those
				// that go after it from ever going.
				held = append(held, model.Verdict{
					Instance: n.ID, Decision: model.DecisionKeep, Score: node.Score(now),
					Reasons: []model.Reason{{Code: "person", Text: "a person disabled its scale-down"}},
				})
				continue
			}
			nodes = append(nodes, node)
		}
		b := bounds(settings, now)
		verdicts := scoring.Plan(nodes, b, now)
		for _, v := range verdicts {
			switch _, released := o.releasedAt[v.Instance]; {
			case v.Decision == model.DecisionKeep:
				delete(o.releasedAt, v.Instance)
			case !released:
				o.releasedAt[v.Instance] = now
			}
		}
		o.apply(g, nodegroups.Decide{Verdicts: append(verdicts, held...)})
		if want := b.MinWarm - idle; want > 0 && o.mayRecord(id, now) {
			// A prescale that is not recorded is simply asked again.
			ctx, cancel := context.WithTimeout(o.ctx, o.cfg.RecordWithin/2)
			err := o.write(ctx, id, nodegroups.Prescale{Want: want, Reason: "min-warm", Prefer: o.preferred(g, now)})
			cancel()
			if err != nil && nodegroups.KindOf(err) != nodegroups.KindUnavailable {
				o.log.Error("launching for min-warm failed", "nodegroup", id, "err", err)
			}
		}
	}
}

// scored is a node as the policy sees it.
func (o *owner) scored(n nodegroups.NodeStatus, now time.Time) scoring.Node {
	since := n.Node.ReadyChanged
	if idle := o.history.idleSince[n.Node.Name]; idle.After(since) {
		since = idle
	}
	for _, use := range o.history.keys[n.ID] {
		if use.Last.After(since) && !use.Last.After(now) {
			since = use.Last
		}
	}
	return scoring.Node{
		Instance: n.ID, Busy: n.Busy, IdleSince: since, ReleasedAt: o.releasedAt[n.ID], Keys: o.history.keys[n.ID],
	}
}

func (o *owner) parked(g *nodegroups.Group, now time.Time) (parked []scoring.Node) {
	if !g.HasParked() {
		return nil
	}
	for _, n := range g.Nodes() {
		if n.Phase == model.PhaseParked {
			parked = append(parked, o.scored(n, now))
		}
	}
	return parked
}

// preferred ranks the parked nodes of a group for the jobs that wait.
func (o *owner) preferred(g *nodegroups.Group, now time.Time) []model.InstanceID {
	parked := o.parked(g, now)
	if len(parked) == 0 {
		return nil
	}
	ranked, _ := scoring.RankParked(parked, o.history.waiting(g.Spec().ID), g.Settings().JobsPerNode, len(parked), now)
	return ranked
}
