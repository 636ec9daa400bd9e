package simulate

import (
	"strconv"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// forecaster drives scoring.Decide, the policy with forecast, rent-or-buy bounds
// and prewarming that the live controller does not use yet. It plans when its
// last plan said that it would change, and when a node became idle: that one
// is kept for a while whatever else is true, so only the time of the next plan
// depends on it.
type forecaster struct {
	costs    scoring.Costs
	bounds   scoring.Bounds
	forecast *scoring.Forecast
	next     int64
	arrived  bool
}

// Knobs are what a person may set of the live policy in a simulation.
type Knobs struct {
	// TimeValue is what an hour of waiting is taken to be worth, in dollars:
	// the annotation time-value. Zero means the world's price.
	TimeValue float64
	// Trust in the forecast; zero means the default.
	Trust float64
	// Prewarm resumes parked nodes ahead of expected jobs.
	Prewarm bool
}

func newForecaster(w World, k Knobs) *forecaster {
	if k.TimeValue == 0 {
		k.TimeValue = w.DelayPrice
	}
	return &forecaster{
		costs: scoring.Costs{
			Running: w.Price, Parked: w.ParkedPrice, TimeValue: k.TimeValue,
			Boot: w.Boot, Resume: w.Resume, ColdPenalty: 3 * time.Minute, Trust: k.Trust,
		},
		bounds:   scoring.Bounds{MaxWarm: 1 << 30, Park: true, Prewarm: k.Prewarm},
		forecast: scoring.NewForecast(w.Resume),
	}
}

func (h *forecaster) Arrived(f *Fleet, p *Pod) {
	h.forecast.Observe(f.Name(p.Key), f.Busy()+len(f.Waiting), time.Unix(f.Now, 0))
	h.arrived = true
}

func (h *forecaster) Finished(f *Fleet, p *Pod) {
	// It is kept for the least time that any node is.
	sooner(&h.next, f.Now+1)
}

func (h *forecaster) Place(f *Fleet, p *Pod) Choice { return warmestFirst{}.Place(f, p) }

// parkable is a node as the policy sees it.
func parkable(f *Fleet, n *Node) scoring.Node {
	s := scoring.Node{
		Instance: model.InstanceID("sim:///" + strconv.Itoa(n.ID)), Parked: n.State != Idle,
		Keys: make(map[model.CacheKey]model.KeyUse, len(n.Uses)),
	}
	since := n.Since
	if n.State != Idle && len(n.Uses) > 0 {
		since = n.Uses[0].Last
	}
	s.IdleSince = time.Unix(since, 0)
	for _, u := range n.Uses {
		s.Keys[f.Name(u.Key)] = model.KeyUse{Last: time.Unix(u.Last, 0), Count: u.Count}
	}
	return s
}

func (h *forecaster) Plan(f *Fleet) Plan {
	if h.next > f.Now && (!h.arrived || !h.bounds.Prewarm) {
		return Plan{Next: h.next}
	}
	h.arrived = false
	nodes := make([]scoring.Node, 0, len(f.Idle)+len(f.Resumable))
	byID := make(map[model.InstanceID]*Node, cap(nodes))
	for _, list := range [][]*Node{f.Idle, f.Resumable} {
		for _, n := range list {
			s := parkable(f, n)
			nodes = append(nodes, s)
			byID[s.Instance] = n
		}
	}
	bounds := h.bounds
	bounds.Busy = f.Busy()
	for _, n := range f.OnTheWay {
		if f.Unpromised(n) {
			bounds.Coming++
		}
	}
	answer := scoring.Decide(scoring.Request{
		Nodes: nodes, Bounds: bounds, Costs: h.costs, Forecast: h.forecast, Now: time.Unix(f.Now, 0),
	})
	plan := Plan{}
	for _, v := range answer.Verdicts {
		switch v.Decision {
		case model.DecisionPark:
			plan.Park = append(plan.Park, byID[v.Instance])
		case model.DecisionRelease:
			plan.Release = append(plan.Release, byID[v.Instance])
		}
	}
	for _, id := range answer.Resume {
		if n := byID[id]; f.CanResume(n) {
			plan.Resume = append(plan.Resume, n)
		}
	}
	h.next = max(answer.Next.Unix(), f.Now+1)
	plan.Next = h.next
	return plan
}
