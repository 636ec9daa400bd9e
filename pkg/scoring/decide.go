package scoring

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// DefaultTrust is how far a forecast may move the rent-or-buy bound: to a third
// or to three times of it. The price of that trust is a worst case of four
// times the better choice in hindsight, instead of two.
const DefaultTrust = 3

// Costs are what the plan weighs against each other.
type Costs struct {
	// Running and Parked are the prices of a node, TimeValue that of somebody's
	// waiting, in dollars an hour.
	Running, Parked, TimeValue float64
	// Boot and Resume are how long a job waits for a launched and for a resumed
	// node; ColdPenalty is what a job loses on a node that is cold for it.
	Boot, Resume, ColdPenalty time.Duration
	// Trust in the forecast, at least 1: it may shorten or lengthen what is
	// kept within [1/Trust, Trust] of the rent-or-buy bound. Zero means
	// DefaultTrust.
	Trust float64
}

func (c Costs) trust() float64 {
	if c.Trust == 0 {
		return DefaultTrust
	}
	return max(c.Trust, 1)
}

// dollars is what a span of waiting costs.
func (c Costs) dollars(d time.Duration) float64 { return c.TimeValue * max(d, 0).Hours() }

// step is one rung of running → parked → gone: what a node costs more by
// staying on it, and what its absence costs the next job.
type step struct {
	rent float64 // $/h
	buy  float64 // $
}

// bound is how long the rent takes to reach the buy.
func (s step) bound() time.Duration {
	const forever = 365 * 24 * time.Hour
	if s.rent <= 0 {
		return forever
	}
	return time.Duration(min(s.buy/s.rent*float64(time.Hour), float64(forever)))
}

// worth says whether n uses an hour pay the rent.
func (s step) worth(rate float64) bool { return rate*s.buy > s.rent }

// running is the step from running to what comes next: parked, or gone where
// parking is off. warm is how warm the node is for the jobs that may come.
func (c Costs) running(park bool, warm float64) step {
	if park {
		return step{c.Running - c.Parked, c.dollars(c.Resume)}
	}
	return step{c.Running, c.gone(0, warm)}
}

// gone is what the absence of a node costs the next job that would have used
// it, when instead of after `instead` it waits for a boot.
func (c Costs) gone(instead time.Duration, warm float64) float64 {
	return c.dollars(c.Boot-instead) + warm*c.dollars(c.ColdPenalty)
}

// parked is the step from parked to gone.
func (c Costs) parked(warm float64) step {
	return step{c.Parked, c.gone(c.Resume, warm)}
}

// Request is everything that a plan rests on.
type Request struct {
	// Nodes are the group's ready and parked nodes; busy ones too.
	Nodes    []Node
	Bounds   Bounds
	Costs    Costs
	Forecast *Forecast
	Now      time.Time
}

// Answer is a plan.
type Answer struct {
	// Verdicts decide for every node, the first to go first.
	Verdicts []model.Verdict
	// Resume are parked nodes to bring back ahead of expected jobs, the most
	// valuable first.
	Resume []model.InstanceID
	// Next is when the plan would change though nothing happens.
	Next time.Time
}

// Decide decides for every node of a group: which idle ones keep running, which
// are parked or go, which parked ones go for good, and which come back ahead
// of time.
//
// The k-th of the idle nodes, in order of marginal value, is used by those
// batches of jobs that need k nodes at once. It keeps running while the
// forecast's rate of such batches, times the waiting that it saves, pays its
// price; and whatever the forecast says, at least for 1/Trust and at most for
// Trust times the rent-or-buy bound since it was used last: the time in which
// its rent reaches the price of its absence. Parked nodes likewise, against
// being gone. Annotations win over both.
func Decide(r Request) Answer {
	p := planner{Request: r, next: r.Now.Add(24 * time.Hour)}
	if r.Forecast == nil {
		p.Forecast = NewForecast(0)
	}
	p.soonest(nextHour(r.Now)) // the forecast changes with the hour
	return p.plan()
}

func nextHour(t time.Time) time.Time { return t.Truncate(time.Hour).Add(time.Hour) }

type planner struct {
	Request
	next   time.Time
	shares map[model.CacheKey]float64
}

func (p *planner) soonest(t time.Time) {
	if t.After(p.Now) && t.Before(p.next) {
		p.next = t
	}
}

func (p *planner) plan() Answer {
	p.shares = p.Forecast.Shares(p.Now)
	ranked := p.rank()
	var idle, parked []*candidate
	busy := p.Bounds.Busy
	answer := Answer{}
	verdicts := make([]model.Verdict, len(ranked))
	for i, c := range ranked {
		v := &verdicts[len(ranked)-1-i] // the least valuable first
		*v = model.Verdict{Instance: c.node.Instance, Decision: model.DecisionKeep, Score: c.score}
		c.verdict = v
		switch {
		case c.node.Busy:
			busy++
			v.Reasons = []model.Reason{{Code: "busy", Text: "it runs a CI job"}}
		case c.node.Parked:
			parked = append(parked, c)
		default:
			idle = append(idle, c)
		}
	}
	p.planIdle(idle)
	p.planParked(busy+len(idle), parked)
	answer.Resume = p.prewarm(idle, parked)
	answer.Verdicts, answer.Next = verdicts, p.next
	return answer
}

// heldKey is a key that an engine holds.
type heldKey struct {
	key model.CacheKey
	use model.KeyUse
}

// held returns the keys that the node's engine is believed to hold, most
// recently used first.
func (n Node) held() []heldKey {
	keys := make([]heldKey, 0, len(n.Keys))
	for key, use := range n.Keys {
		keys = append(keys, heldKey{key, use})
	}
	slices.SortFunc(keys, func(a, b heldKey) int {
		if c := b.use.Last.Compare(a.use.Last); c != 0 {
			return c
		}
		return cmp.Compare(a.key, b.key)
	})
	return keys[:min(len(keys), KeysHeld)]
}

// candidate is a node with its marginal value.
type candidate struct {
	node    Node
	warmth  float64 // for the key it used last: what the next job of that key would save here
	score   float64
	verdict *model.Verdict
}

// strangers is the share that a key gets of which the forecast knows nothing:
// enough to order nodes before anything was learnt.
const strangers = 1e-3

// rank orders nodes by marginal value, the most valuable first. A node's value
// is the share of the expected jobs that it is warm for, each key weighted by
// how warm the node is and halved for every node that is warmer for it: a
// second copy is worth half of the first, a third half of that. One pass over
// the nodes of each key, so it costs keys × log(nodes) for each node.
func (p *planner) rank() []*candidate {
	type copyOf struct {
		node   int
		warmth float64
	}
	ranked := make([]*candidate, len(p.Nodes))
	copies := make(map[model.CacheKey][]copyOf, len(p.shares))
	for i, n := range p.Nodes {
		c := &candidate{node: n}
		ranked[i] = c
		for _, held := range n.held() {
			if w := Warmth(held.use, p.Now); w > 0 {
				c.warmth = max(c.warmth, w)
				copies[held.key] = append(copies[held.key], copyOf{i, w})
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(copies)) { // in a fixed order: sums of floats depend on it
		nodes := copies[key]
		slices.SortFunc(nodes, func(a, b copyOf) int {
			return cmp.Or(cmp.Compare(b.warmth, a.warmth), cmp.Compare(p.Nodes[a.node].Instance, p.Nodes[b.node].Instance))
		})
		worth := p.shares[key] + strangers
		for _, c := range nodes {
			ranked[c.node].score += worth * c.warmth
			worth /= 2
		}
	}
	slices.SortFunc(ranked, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(b.score, a.score), b.node.IdleSince.Compare(a.node.IdleSince), cmp.Compare(a.node.Instance, b.node.Instance))
	})
	return ranked
}

// planIdle decides which idle nodes keep running.
func (p *planner) planIdle(idle []*candidate) {
	leave := model.DecisionRelease
	if p.Bounds.Park {
		leave = model.DecisionPark
	}
	trust := p.Costs.trust()
	for i, c := range idle {
		k := i + 1
		since := p.Now.Sub(c.node.IdleSince)
		s := p.Costs.running(p.Bounds.Park, c.warmth)
		bound := s.bound()
		low, high := scale(bound, 1/trust), scale(bound, trust)
		rate := p.Forecast.Rate(k, p.Now)
		wanted := s.worth(rate)
		because := func(d model.Decision, code, format string, args ...any) {
			c.verdict.Decision = d
			c.verdict.Reasons = append(c.verdict.Reasons, model.Reason{Code: code, Text: fmt.Sprintf(format, args...)})
		}
		switch {
		case k <= p.Bounds.MinWarm:
			because(model.DecisionKeep, "min-warm", "it is among the %d most valuable idle nodes, which min-warm keeps", p.Bounds.MinWarm)
		case k > p.Bounds.MaxWarm:
			because(leave, "max-warm", "%d more valuable nodes are idle, max-warm is %d", i, p.Bounds.MaxWarm)
		case p.Bounds.MaxIdle != nil && since >= *p.Bounds.MaxIdle:
			because(leave, "max-idle", "idle for %s, max-idle is %s", round(since), *p.Bounds.MaxIdle)
		case since < low:
			p.soonest(c.node.IdleSince.Add(low))
			because(model.DecisionKeep, "recent", "idle for %s: its rent is far from what its absence costs, which it reaches after %s", round(since), round(bound))
		case wanted && since < high:
			p.soonest(c.node.IdleSince.Add(high))
			because(model.DecisionKeep, "forecast", "%.2f times an hour jobs need %d nodes at once, which pays its rent of $%.2f/h", rate, k, s.rent)
		case wanted:
			because(leave, "bound", "idle for %s: whatever is forecast, the rent paid is %.1f times what its absence costs", round(since), since.Hours()/bound.Hours())
		default:
			because(leave, "idle", "idle for %s, and only %.2f times an hour jobs need %d nodes at once: its rent of $%.2f/h does not pay", round(since), rate, k, s.rent)
		}
		if p.Bounds.MaxIdle != nil {
			p.soonest(c.node.IdleSince.Add(*p.Bounds.MaxIdle))
		}
	}
}

func scale(d time.Duration, by float64) time.Duration {
	return time.Duration(min(float64(d)*by, float64(10*365*24*time.Hour)))
}

func round(d time.Duration) time.Duration { return d.Round(time.Second) }

// planParked decides which parked nodes go for good. They are used after those
// that run.
func (p *planner) planParked(running int, parked []*candidate) {
	trust := p.Costs.trust()
	for i, c := range parked {
		m := running + i + 1
		since := p.Now.Sub(c.node.IdleSince)
		s := p.Costs.parked(c.warmth)
		low, high := scale(s.bound(), 1/trust), scale(s.bound(), trust)
		rate := p.Forecast.Uses(m)
		because := func(d model.Decision, code, format string, args ...any) {
			c.verdict.Decision = d
			c.verdict.Reasons = append(c.verdict.Reasons, model.Reason{Code: code, Text: fmt.Sprintf(format, args...)})
		}
		switch {
		case since < low:
			p.soonest(c.node.IdleSince.Add(low))
			because(model.DecisionKeep, "recent", "unused for %s: its storage has cost little so far", round(since))
		case s.worth(rate) && since < high:
			p.soonest(c.node.IdleSince.Add(high))
			because(model.DecisionKeep, "forecast", "%.1f times a week jobs need %d nodes, which pays its storage", rate*HoursOfWeek, m)
		default:
			because(model.DecisionRelease, "parked-too-long", "unused for %s: its storage costs more than its return would save", round(since))
		}
	}
}

// prewarm chooses parked nodes to resume ahead of time: as many as the
// forecast would keep running if they ran. It stops when no job has come for
// as long as one node may be kept on a forecast: then the forecast is wrong.
func (p *planner) prewarm(idle, parked []*candidate) (resume []model.InstanceID) {
	if !p.Bounds.Park || !p.Bounds.Prewarm || p.Forecast.Weeks() < 1 {
		return nil
	}
	s := p.Costs.running(true, 0)
	if p.Now.Sub(p.Forecast.Last()) > scale(s.bound(), p.Costs.trust()) {
		return nil
	}
	k := len(idle) + p.Bounds.Coming
	for _, c := range parked {
		k++
		if k > p.Bounds.MaxWarm || !s.worth(p.Forecast.Rate(k, p.Now)) {
			break
		}
		resume = append(resume, c.node.Instance)
	}
	return resume
}
