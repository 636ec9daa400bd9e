package controller

import (
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

const (
	// unknownPrice of a node, in $/h, is a round figure for the 8-core spot
	// instances that CI runs on; parkedShare of a node's price is what its disk
	// costs while it is stopped (100 GB of gp3).
	unknownPrice = 0.40
	parkedShare  = 0.03
	// usualBoot and usualResume are taken until nodes of the group were seen to
	// start: what EC2 instances of EKS take.
	usualBoot, usualResume = 120 * time.Second, 45 * time.Second
	// fresh is how old a pod may be and still be told as arriving: after a
	// restart there are those that did long ago.
	fresh = 10 * time.Minute
)

// learnt is what a group's policy has learnt, and what is being observed for
// it. The memory is kept now and then; where it is lost the policy keeps nodes as
// long as the rent-or-buy bound says until it knows better.
type learnt struct {
	memory *scoring.Memory
	jobs   int // that run or wait, as far as they were told to arrive
	// starting are the nodes that are on their way, since when, and whether they
	// were parked.
	starting map[model.InstanceID]start
	keeping
}

type start struct {
	since  time.Time
	resume bool
}

func (o *owner) learntOf(g *nodegroups.Group) *learnt {
	id := g.Spec().ID
	l := o.learnt[id]
	if l == nil {
		l = &learnt{starting: map[model.InstanceID]start{}}
		l.memory, l.keeping = o.remembered(id, costs(g.Settings(), usualBoot, usualResume))
		o.learnt[id] = l
	}
	return l
}

// costs are what the plan weighs against each other.
func (l *learnt) costs(s nodegroups.Settings) scoring.Costs {
	return costs(s, l.memory.Boot, l.memory.Resume)
}

func costs(s nodegroups.Settings, boot, resume time.Duration) scoring.Costs {
	c := scoring.Costs{
		Running: unknownPrice, TimeValue: s.TimeValue, ColdPenalty: s.ColdPenalty, Boot: boot, Resume: resume,
	}
	if s.NodePrice != nil {
		c.Running = *s.NodePrice
	}
	c.Parked = parkedShare * c.Running
	if s.ParkedPrice != nil {
		c.Parked = *s.ParkedPrice
	}
	return c
}

// arrived takes in that a pod has come to run on a node of the group, or does no
// longer; before is what was known of it. A pod that never gets a node says
// nothing about jobs.
func (o *owner) arrived(before seenPod, p model.Pod, group model.GroupID, gone bool, now time.Time) {
	seen := before
	if !gone {
		seen = o.history.pods[p.UID]
	}
	g := o.fleet[group]
	over := gone || !p.Finished.IsZero()
	switch {
	case seen.group != "" && over:
		if l := o.learnt[seen.group]; l != nil && l.jobs > 0 {
			l.jobs--
		}
		seen.group = ""
	case seen.group == "" && !over && p.Node != "" && g != nil && g.Settings().Runner():
		l := o.learntOf(g)
		l.jobs++
		seen.group = group
		// Those that came before the memory was kept are in it.
		if key := p.Key; now.Sub(p.Created) < fresh && p.Created.After(l.contains) {
			slots := g.Settings().JobsPerNode
			l.memory.JobArrived(scoring.KeyOf(key), (l.jobs+slots-1)/slots, slots, p.Created)
			l.changed = true
		}
	default:
		return
	}
	if !gone {
		o.history.pods[p.UID] = seen
	}
}

// told takes in that a job has started, on a node that became ready then, or has
// ended, unless an earlier life did.
func (l *learnt) told(p model.Pod, news *job, ready time.Time) {
	if news.ended && p.Finished.After(l.contains) {
		l.memory.Keys.Finished(news.key, news.warm, news.took)
		l.changed = true
	}
	if news.started && p.Started.After(l.contains) {
		l.memory.JobStarted(ready.After(p.Created))
		l.changed = true
	}
}

// observe takes in how a group's nodes are: how long those that started took,
// and for the ledger how many are busy and idle.
func (l *learnt) observe(nodes []nodegroups.NodeStatus, now time.Time) {
	busy, idle := 0, 0
	starting := map[model.InstanceID]start{}
	for _, n := range nodes {
		switch n.Phase {
		case model.PhaseLaunching, model.PhaseResuming:
			starting[n.ID] = start{n.Since, n.Phase == model.PhaseResuming}
		case model.PhaseReady:
			if s, was := l.starting[n.ID]; was && n.Node.Ready && !s.since.IsZero() {
				l.memory.Started(s.resume, n.Node.ReadyChanged.Sub(s.since))
			}
			if n.Busy {
				busy++
			} else {
				idle++
			}
		}
	}
	l.starting = starting
	l.memory.Ledger.Nodes(busy, idle, now)
}
