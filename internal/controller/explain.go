package controller

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// Report is what the last plan came to, for people: nil before the first and
// while not leading. It answers from memory and is safe for concurrent use; the
// report must not be changed.
func (c *Controller) Report() *explain.Report {
	if c.view.Load() == nil {
		return nil
	}
	return c.report.Load()
}

// explainPlan makes what the plan has just come to what Report returns.
func (o *owner) explainPlan(now time.Time) {
	r := &explain.Report{At: now, Queue: o.queue(), Groups: make([]explain.Group, 0, len(o.fleet))}
	for _, id := range slices.Sorted(maps.Keys(o.fleet)) {
		r.Groups = append(r.Groups, o.explainGroup(o.fleet[id], now))
	}
	o.report.Store(r)
}

func (o *owner) explainGroup(g *nodegroups.Group, now time.Time) explain.Group {
	settings, id := g.Settings(), g.Spec().ID
	record := g.Record()
	e := explain.Group{
		ID: string(id), At: now, Role: string(settings.Role), Target: record.Target, Hidden: record.Hidden,
		Settings: explain.Settings{
			MinWarm: settings.MinWarmAt(now), MaxWarm: settings.MaxWarm,
			Park: string(settings.Park), MaxParked: settings.MaxParked, MaxParkedSeconds: settings.MaxParkedAge.Seconds(),
			JobsPerNode: settings.JobsPerNode, TimeValue: settings.TimeValue,
		},
	}
	if settings.MaxIdle != nil {
		e.Settings.MaxIdleSeconds = new(settings.MaxIdle.Seconds())
	}
	for _, p := range o.problems[id] {
		e.Problems = append(e.Problems, p.Error())
	}
	if failing := o.cloudErrors[id]; failing != "" {
		e.Problems = append(e.Problems, "reading the cloud failed: "+failing)
	}
	if !g.Synced() {
		e.Problems = append(e.Problems, "the cloud has not been read yet; nothing is planned before it was")
	}
	statuses := g.Nodes()
	e.Nodes = make([]explain.Node, 0, len(statuses))
	for _, n := range statuses {
		node := o.explainNode(n, settings.Runner(), now)
		switch node.State {
		case explain.StateBusy:
			e.Busy++
		case explain.StateIdle:
			e.Idle++
		case explain.StateNotReady:
			e.NotReady++
		case explain.StateStarting:
			e.Starting++
		case explain.StateLeaving:
			e.Leaving++
		case explain.StateParked:
			e.Parked++
		}
		e.Nodes = append(e.Nodes, node)
	}
	slices.SortFunc(e.Nodes, inOrder)
	if settings.Runner() {
		l := o.learntOf(g)
		costs, forecast := l.costs(settings), l.memory.Forecast
		e.Settings.NodePrice, e.Settings.ParkedPrice = costs.Running, costs.Parked
		_, saves := l.memory.Keys.Of(scoring.KeyOf("")) // of a key of which nothing was learnt: the group's
		o.account(g, e, costs, saves, now)
		e.Learnt = explain.Learnt{BootSeconds: l.memory.Boot.Seconds(), ResumeSeconds: l.memory.Resume.Seconds(), ColdPenaltySeconds: saves}
		e.Forecast = explain.Forecast{
			BatchesPerHour: forecast.Rate(1, now), IdleNodes: e.Idle, IdleBatchesPerHour: forecast.Rate(max(e.Idle, 1), now),
			Weeks: forecast.Weeks(),
		}
	}
	return e
}

// inOrder sorts by state, then the first to go first: as the plan does.
func inOrder(a, b explain.Node) int {
	rank := func(n explain.Node) int { return slices.Index(explain.States(), n.State) }
	if a.State != b.State {
		return cmp.Compare(rank(a), rank(b))
	}
	unused := 0
	if a, b := unusedSince(a), unusedSince(b); a != nil && b != nil {
		unused = a.Compare(*b)
	}
	return cmp.Or(cmp.Compare(a.Score, b.Score), unused, cmp.Compare(a.Instance, b.Instance))
}

func unusedSince(n explain.Node) *time.Time {
	if n.State == explain.StateParked && n.LastUsed != nil {
		return n.LastUsed
	}
	return n.Since
}

func (o *owner) explainNode(n nodegroups.NodeStatus, runner bool, now time.Time) explain.Node {
	e := explain.Node{
		Name: string(n.Node.Name), Instance: string(n.ID), State: stateOf(n), Phase: string(n.Phase), Hidden: n.Hidden,
		Jobs: o.history.perNode[n.Node.Name], Decision: string(n.Verdict.Decision), Score: n.Verdict.Score,
	}
	for _, r := range n.Verdict.Reasons {
		e.Reasons = append(e.Reasons, explain.Reason{Code: r.Code, Text: r.Text})
	}
	if !runner {
		e.Decision, e.Reasons = "", []explain.Reason{{Code: "plain", Text: "its group is plain: cluster-autoscaler alone decides"}}
	} else if e.Decision == "" {
		e.Reasons = o.undecided(n)
	}
	if e.State != explain.StateBusy && e.State != explain.StateNotReady {
		since := n.Since
		if e.State == explain.StateIdle {
			since = o.scored(n, now).IdleSince
		}
		if !since.IsZero() {
			e.Since = &since
		}
	}
	uses := o.history.uses[n.ID]
	if len(uses) > 0 {
		e.LastUsed = new(uses[0].Last)
	}
	for _, u := range uses[:min(len(uses), scoring.KeysHeld)] { // the last used, and so the warmest, first
		w := u.Warmth(now)
		if w == 0 {
			continue
		}
		if e.WarmKeys++; len(e.Keys) < explain.MaxKeys {
			e.Keys = append(e.Keys, explain.Key{Key: string(u.Key.Value()), Warmth: w, LastUsed: u.Last, Jobs: u.Count})
		}
	}
	return e
}

func stateOf(n nodegroups.NodeStatus) explain.State {
	switch n.Phase {
	case model.PhaseLaunching, model.PhaseResuming:
		return explain.StateStarting
	case model.PhaseParked:
		return explain.StateParked
	case model.PhaseReady:
		switch {
		case !n.Node.Ready:
			return explain.StateNotReady
		case n.Busy:
			return explain.StateBusy
		}
		return explain.StateIdle
	default:
		return explain.StateLeaving
	}
}

// undecided are the reasons of a node for which the plan has nothing to decide:
// where it is in its life, and what brought it there.
func (o *owner) undecided(n nodegroups.NodeStatus) []explain.Reason {
	var r explain.Reason
	switch n.Phase {
	case model.PhaseLaunching:
		r = explain.Reason{Code: "launching", Text: "it has not been Ready yet"}
	case model.PhaseResuming:
		return []explain.Reason{{Code: "resuming", Text: "it comes back with its cache from being parked"}}
	case model.PhaseDraining:
		r = explain.Reason{Code: "draining", Text: "it was given up, and no new job may start on it"}
	case model.PhaseParking:
		r = explain.Reason{Code: "parking", Text: "it was given up, and is being stopped with its cache"}
	case model.PhaseParked:
		r = explain.Reason{Code: "parked", Text: "it is stopped with its cache"}
	case model.PhaseTerminating:
		r = explain.Reason{Code: "terminating", Text: "it was given up, and is being terminated"}
	default:
		r = explain.Reason{Code: "unplanned", Text: "the plan has not seen it yet"}
	}
	reasons := []explain.Reason{r}
	if before := o.reported[o.groupOf[n.ID]][n.ID].record; before.Reason != "" && n.Phase != model.PhaseLaunching {
		reasons = append(reasons, explain.Reason{Code: "earlier", Text: "before: " + before.Reason})
	}
	return reasons
}
