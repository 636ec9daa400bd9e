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
	return scoring.Bounds{
		MinWarm: s.MinWarmAt(now), MaxWarm: s.MaxWarm, MaxIdle: s.MaxIdle,
		Park: s.Park == nodegroups.ParkStop, Prewarm: s.Prescale,
	}
}

// plan decides for the nodes of every group, and asks for the nodes that
// min-warm or the forecast want and that are not there.
func (o *owner) plan() {
	now := time.Now()
	o.planned = now
	for _, id := range slices.Sorted(maps.Keys(o.fleet)) {
		o.serveWaiting()
		g := o.fleet[id]
		o.dirty[id] = true
		if g.Settings().Runner() && g.Synced() {
			o.planGroup(g, now)
		}
	}
	o.explainPlan(now)
}

func (o *owner) planGroup(g *nodegroups.Group, now time.Time) {
	settings, statuses := g.Settings(), g.Nodes()
	l := o.learntOf(g)
	l.observe(statuses, now)
	request := scoring.Request{Bounds: bounds(settings, now), Costs: l.costs(settings), Memory: l.memory, Now: now}
	request.Bounds.Coming = g.Coming()
	l.memory.Keys.SetPenalty(settings.ColdPenalty)
	var others []held
	idle := 0
	for _, n := range statuses {
		node := o.scored(n, now)
		m := n.Node.Marks
		switch {
		case n.Phase == model.PhaseParked:
			node.Parked = true
			request.Nodes = append(request.Nodes, node)
		case n.Phase == model.PhaseDraining || n.Phase == model.PhaseParking:
			// Nothing to decide; but the worth says who is taken back.
			others = append(others, held{node, nil})
		case n.Phase != model.PhaseReady:
		case !n.Node.Ready:
			// No job can use it: it neither counts as warm nor goes by the
			// plan. Dead for long, it loses its protection.
			others = append(others, held{node, &model.Reason{Code: "not-ready", Text: "its Node is not Ready"}})
		case n.Busy:
			request.Bounds.Busy++
			text := "its engine has sessions"
			if o.history.busy(n.Node.Name) {
				text = "it runs a CI job"
			}
			others = append(others, held{node, &model.Reason{Code: "busy", Text: text}})
		case m.Protected && !m.ProtectedByUs:
			// Left out of the plan: released in vain it would keep those that
			// go after it from ever going.
			idle++
			others = append(others, held{node, &model.Reason{Code: "person", Text: "a person disabled its scale-down"}})
		default:
			idle++
			request.Nodes = append(request.Nodes, node)
		}
	}
	answer := scoring.Decide(request)
	for _, v := range answer.Verdicts {
		switch _, since := o.wantedAt[v.Instance]; {
		case !scoring.Wanted(v):
			delete(o.wantedAt, v.Instance)
		case !since:
			o.wantedAt[v.Instance] = now
		}
	}
	scoring.Pace(answer.Verdicts, request.Nodes, request.Bounds.Park, now)
	for _, v := range answer.Verdicts {
		switch _, released := o.releasedAt[v.Instance]; {
		case v.Decision == model.DecisionKeep:
			delete(o.releasedAt, v.Instance)
		case !released:
			o.releasedAt[v.Instance] = now
		}
	}
	l.memory.Decided(answer.Verdicts)
	verdicts := answer.Verdicts
	stock := scoring.NewStock(request.Nodes, now)
	for _, h := range others {
		verdicts = append(verdicts, h.verdict(stock, l.memory.Keys, now))
	}
	o.apply(g, nodegroups.Decide{Verdicts: verdicts})
	if want := request.Bounds.MinWarm - idle; want > 0 && want >= request.Bounds.Coming+len(answer.Resume) {
		o.prescale(g, nodegroups.Prescale{Want: want, Reason: "min-warm", Prefer: o.preferred(g, now)}, now)
	} else if ahead := len(answer.Resume); ahead > 0 {
		o.prescale(g, nodegroups.Prescale{Want: request.Bounds.Coming + ahead, Reason: "forecast", Prefer: answer.Resume}, now)
	}
}

// held is a node for which the plan decides nothing.
type held struct {
	node    scoring.Node
	because *model.Reason
}

func (h held) verdict(stock scoring.Stock, keys *scoring.Keys, now time.Time) model.Verdict {
	v := model.Verdict{Instance: h.node.Instance, Score: stock.Missed(h.node, scoring.Key{}, keys, now)}
	if h.because != nil {
		v.Decision, v.Reasons = model.DecisionKeep, []model.Reason{*h.because}
	}
	return v
}

// prescale asks for nodes ahead of cluster-autoscaler. One that is not recorded
// is simply asked again.
func (o *owner) prescale(g *nodegroups.Group, e nodegroups.Prescale, now time.Time) {
	id := g.Spec().ID
	if !o.mayRecord(id, now) {
		return
	}
	ctx, cancel := context.WithTimeout(o.ctx, o.cfg.RecordWithin/2)
	defer cancel()
	if err := o.write(ctx, id, e); err != nil && nodegroups.KindOf(err) != nodegroups.KindUnavailable {
		o.log.Error("starting nodes ahead failed", "nodegroup", id, "reason", e.Reason, "err", err)
	}
}

// scored is a node as the policy sees it.
func (o *owner) scored(n nodegroups.NodeStatus, now time.Time) scoring.Node {
	since := n.Node.ReadyChanged
	if idle := o.history.idleSince[n.Node.Name]; idle.After(since) {
		since = idle
	}
	uses := o.history.uses[n.ID]
	for _, u := range uses {
		if u.Last.After(since) && !u.Last.After(now) {
			since = u.Last
		}
	}
	if n.Phase == model.PhaseParked {
		since = n.Since
		if len(uses) > 0 {
			since = uses[0].Last
		}
	}
	return scoring.Node{Instance: n.ID, IdleSince: since, ReleasedAt: o.releasedAt[n.ID], WantedAt: o.wantedAt[n.ID], Uses: uses}
}

func (o *owner) parked(g *nodegroups.Group, now time.Time) (parked []scoring.Node) {
	if !g.HasParked() {
		return nil
	}
	for _, n := range g.Nodes() {
		if n.Phase == model.PhaseParked {
			node := o.scored(n, now)
			node.Parked = true
			parked = append(parked, node)
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
	ranked, _ := scoring.RankParked(parked, o.history.waiting(g.Spec().ID), g.Settings().JobsPerNode, len(parked), o.learntOf(g).memory.Keys, now)
	return ranked
}
