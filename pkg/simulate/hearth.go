package simulate

import (
	"strconv"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// hearth drives pkg/scoring as the live controller does.
type hearth struct {
	deaf
	bounds scoring.Bounds
	nodes  map[*Node]scoring.Node
	byID   map[model.InstanceID]*Node
	next   int64 // before then the plan does not change
}

// tick is how often the live controller plans.
const tick = 10

func newHearth() *hearth {
	return &hearth{
		bounds: scoring.Bounds{MaxWarm: 1 << 30, Park: true},
		nodes:  map[*Node]scoring.Node{}, byID: map[model.InstanceID]*Node{},
	}
}

func (h *hearth) scored(n *Node) scoring.Node {
	s, known := h.nodes[n]
	if !known {
		s.Instance = model.InstanceID("sim:///" + strconv.Itoa(n.ID))
		s.Keys = map[model.CacheKey]model.KeyUse{}
	}
	s.Busy, s.IdleSince = n.Jobs > 0, time.Unix(n.Since, 0)
	h.nodes[n], h.byID[s.Instance] = s, n
	return s
}

func (h *hearth) Finished(f *Fleet, p *Pod) {
	s := h.scored(p.Node)
	clear(s.Keys)
	for _, u := range p.Node.Uses {
		s.Keys[f.Name(u.Key)] = model.KeyUse{Last: time.Unix(u.Last, 0), Count: u.Count}
	}
}

func (h *hearth) Place(f *Fleet, p *Pod) Choice { return warmestFirst{}.Place(f, p) }

func (h *hearth) Plan(f *Fleet) Plan {
	now := time.Unix(f.Now, 0)
	if f.Now < h.next {
		return Plan{Next: h.next}
	}
	plan := Plan{Release: f.due(f.Resumable, parkedFor, new(int64))}
	for _, n := range plan.Release {
		delete(h.byID, h.nodes[n].Instance)
		delete(h.nodes, n)
	}
	var nodes []scoring.Node
	for _, n := range f.Idle {
		s := h.scored(n)
		nodes = append(nodes, s)
		sooner(&plan.Next, max(n.Since+seconds(scoring.DefaultMaxIdle), f.Now+tick))
	}
	h.next = plan.Next
	for _, v := range scoring.Plan(nodes, h.bounds, now) {
		if v.Decision == model.DecisionPark {
			plan.Park = append(plan.Park, h.byID[v.Instance])
		}
	}
	return plan
}
