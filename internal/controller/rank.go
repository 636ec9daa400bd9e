package controller

import (
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// spare is capacity of a group that needs no launch. It never changes once
// published.
type spare struct {
	hidden      int // nodes on their way
	parked      []scoring.Node
	jobsPerNode int
	price       float64 // dollars an hour, zero when not known
}

// publishSpare makes the present spare capacity what BestOptions reads.
func (o *owner) publishSpare() {
	now := time.Now()
	all := make(map[model.GroupID]spare, len(o.fleet))
	for id, g := range o.fleet {
		s := spare{hidden: g.Record().Hidden, parked: o.parked(g, now), jobsPerNode: g.Settings().JobsPerNode}
		if price := g.Settings().NodePrice; price != nil {
			s.price = *price
		}
		all[id] = s
	}
	o.Controller.spare.Store(&all)
}

// Option is one way to serve pending jobs: Nodes more nodes of a group.
type Option struct {
	Group model.GroupID
	Nodes int
	// Jobs counts the pods that it serves by cache key; those of no known key
	// are under the empty one.
	Jobs map[model.CacheKey]int
}

// BestOption returns the group whose option serves its jobs best, empty when
// there are no options. It answers from memory and is safe for concurrent use.
func (c *Controller) BestOption(options []Option) model.GroupID {
	var all map[model.GroupID]spare
	if p := c.spare.Load(); p != nil {
		all = *p
	}
	ranked := make([]scoring.Option, 0, len(options))
	for _, o := range options {
		s := all[o.Group]
		jobs := 0
		waiting := make(map[scoring.Key]int, len(o.Jobs))
		for key, n := range o.Jobs {
			jobs += n
			if key != "" {
				waiting[scoring.KeyOf(key)] = n
			}
		}
		// What the owner has learnt of keys is its own; groups are compared by
		// warmth alone.
		_, warmth := scoring.RankParked(s.parked, waiting, s.jobsPerNode, o.Nodes, scoring.NewKeys(0), time.Now())
		ranked = append(ranked, scoring.Option{
			Group: o.Group, Nodes: o.Nodes, Jobs: jobs, Ready: s.hidden + len(s.parked), Warmth: warmth, Price: s.price,
		})
	}
	if len(ranked) == 0 {
		return ""
	}
	return scoring.RankOptions(ranked)[0].Group
}
