// Package scoring decides what warmth is worth: how warm a node is, which idle
// nodes stay, which go and in what order, which parked node comes back first,
// and which node group a scale-up should take. It is pure: time is an
// argument, every decision carries its reasons, and the result does not depend
// on the order of its input. It never acts and knows no cluster.
package scoring

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// HalfLife of warmth: after a day the repository has moved on by as much
	// as it kept.
	HalfLife = 24 * time.Hour
	// KeysHeld is how many of the most recently used keys an engine is
	// believed to hold; later keys push older ones out of its disk budget.
	KeysHeld = 20
	// WarmFor is how long after its last use a key counts as warm at all:
	// engines cut cache mounts after 48 h and the rest decays.
	WarmFor = 72 * time.Hour
	// DefaultMaxIdle is how long an idle node is kept running when no
	// annotation says otherwise: cluster-autoscaler's own default.
	DefaultMaxIdle = 10 * time.Minute
	// stuckAfter is how long a released node may stay before it no longer
	// holds up those that go after it: a pod of somebody's may keep
	// cluster-autoscaler from removing it.
	stuckAfter = 5 * time.Minute
)

// Node is one instance as the policy sees it.
type Node struct {
	Instance model.InstanceID
	// Busy nodes are never candidates. IdleSince is when the node last became
	// idle, or Ready if it never ran anything.
	Busy      bool
	Parked    bool // used by Decide
	IdleSince time.Time
	// ReleasedAt is since when the plan lets the node go; zero when it keeps it.
	ReleasedAt time.Time
	// Keys are the cache keys whose jobs ran here.
	Keys map[model.CacheKey]model.KeyUse
}

// Bounds are the annotations that win over the policy.
type Bounds struct {
	MinWarm, MaxWarm int
	// MaxIdle is how long an idle node may be kept; nil means DefaultMaxIdle.
	MaxIdle *time.Duration
	// Park: a node that goes is stopped instead of terminated.
	Park bool
	// Used by Decide. Prewarm: parked nodes may be resumed ahead of expected
	// jobs. Coming nodes are on their way already. Busy nodes are those that
	// are not among the nodes of the request.
	Prewarm      bool
	Coming, Busy int
}

// Warmth of one key, from 0 (cold) to 1 (just used).
func Warmth(use model.KeyUse, now time.Time) float64 {
	age := max(now.Sub(use.Last), 0)
	if use.Count == 0 || age > WarmFor {
		return 0
	}
	return math.Exp2(-age.Hours() / HalfLife.Hours())
}

// WarmthFor returns how warm the node is for one key.
func (n Node) WarmthFor(key model.CacheKey, now time.Time) float64 {
	use, ok := n.Keys[key]
	if !ok || len(n.Keys) > KeysHeld && !slices.ContainsFunc(n.held(), func(h heldKey) bool { return h.key == key }) {
		return 0
	}
	return Warmth(use, now)
}

// Score is the node's worth: the warmth of the keys it holds, each weighted by
// how often its jobs ran here (logarithmically: the tenth run says less than
// the second).
func (n Node) Score(now time.Time) float64 {
	var score float64
	for _, h := range n.held() {
		score += Warmth(h.use, now) * math.Log2(1+float64(h.use.Count))
	}
	return score
}

// Plan decides for every node of a group. Verdicts are sorted by score, the
// first to go first; ties break by id.
//
// Idle nodes are released coldest first and in rounds of half of what may go:
// cluster-autoscaler picks among released nodes in an order of its own, so the
// order is kept by what is released when.
func Plan(nodes []Node, bounds Bounds, now time.Time) []model.Verdict {
	verdicts := make([]model.Verdict, 0, len(nodes))
	byID := make(map[model.InstanceID]Node, len(nodes))
	for _, n := range nodes {
		byID[n.Instance] = n
		verdicts = append(verdicts, model.Verdict{Instance: n.Instance, Decision: model.DecisionKeep, Score: n.Score(now)})
	}
	slices.SortFunc(verdicts, func(a, b model.Verdict) int {
		return cmp.Or(cmp.Compare(a.Score, b.Score), cmp.Compare(a.Instance, b.Instance))
	})
	var idle []*model.Verdict
	for i := range verdicts {
		v := &verdicts[i]
		n := byID[v.Instance]
		if n.Busy {
			v.Reasons = append(v.Reasons, model.Reason{Code: "busy", Text: "it runs a CI job"})
			continue
		}
		v.Reasons = append(v.Reasons, warmthReason(n, now))
		idle = append(idle, v)
	}
	maxIdle := DefaultMaxIdle
	if bounds.MaxIdle != nil {
		maxIdle = *bounds.MaxIdle
	}
	// The warmest MinWarm stay whatever their age.
	staying := idle[max(0, len(idle)-bounds.MinWarm):]
	for _, v := range staying {
		v.Reasons = append(v.Reasons, model.Reason{Code: "min-warm", Text: fmt.Sprintf("it is among the %d warmest idle nodes that min-warm keeps", bounds.MinWarm)})
	}
	rest := idle[:len(idle)-len(staying)]
	surplus := len(idle) - max(bounds.MaxWarm, bounds.MinWarm)
	var going []*model.Verdict
	for i, v := range rest {
		since := now.Sub(byID[v.Instance].IdleSince)
		switch {
		case i < surplus:
			v.Reasons = append(v.Reasons, model.Reason{Code: "max-warm", Text: fmt.Sprintf("%d idle nodes are more than max-warm %d", len(idle), bounds.MaxWarm)})
			going = append(going, v)
		case since >= maxIdle:
			v.Reasons = append(v.Reasons, model.Reason{Code: "idle", Text: fmt.Sprintf("idle for %s, kept for at most %s", since.Round(time.Second), maxIdle)})
			going = append(going, v)
		default:
			v.Reasons = append(v.Reasons, model.Reason{Code: "recent", Text: fmt.Sprintf("idle for %s of at most %s", since.Round(time.Second), maxIdle)})
		}
	}
	stuck := 0
	for i, v := range going {
		released := byID[v.Instance].ReleasedAt
		switch {
		case !released.IsZero() && now.Sub(released) >= stuckAfter:
			stuck++ // something else keeps it: it must not keep those behind it
		case i > stuck && i-stuck >= (len(going)-stuck)/2:
			v.Reasons = append(v.Reasons, model.Reason{Code: "later", Text: "colder nodes go first"})
			continue
		}
		v.Decision = model.DecisionRelease
		if bounds.Park {
			v.Decision = model.DecisionPark
		}
	}
	return verdicts
}

// warmthReason names the warmest key, or says that there is none.
func warmthReason(n Node, now time.Time) model.Reason {
	held := n.held()
	if len(held) == 0 || Warmth(held[0].use, now) == 0 {
		return model.Reason{Code: "cold", Text: "no cache key is warm here"}
	}
	return model.Reason{Code: "warm", Text: fmt.Sprintf("warm for %d keys, most for %q (%d jobs, last %s ago)",
		len(held), clip(string(held[0].key)), held[0].use.Count, now.Sub(held[0].use.Last).Round(time.Second))}
}

func clip(s string) string {
	const most = 60
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

// RankParked orders parked nodes for the jobs that wait: at each turn the node
// that adds most warmth to jobs not yet served comes first; nodes that add
// nothing follow, the least valuable first, so that caches worth keeping stay
// parked. waiting counts jobs per key, jobsPerNode how many a node takes. The
// second result is the warmth that the first most nodes add (0 to the number
// of jobs).
func RankParked(parked []Node, waiting map[model.CacheKey]int, jobsPerNode, most int, now time.Time) ([]model.InstanceID, float64) {
	left := maps.Clone(waiting)
	open := slices.SortedFunc(slices.Values(parked), func(a, b Node) int {
		return cmp.Or(cmp.Compare(a.Score(now), b.Score(now)), cmp.Compare(a.Instance, b.Instance))
	})
	ranked := make([]model.InstanceID, 0, len(open))
	var warmth float64
	for len(open) > 0 {
		best, gain := -1, 0.0
		for i, n := range open {
			if g := fit(n, left, jobsPerNode, now); g > gain {
				best, gain = i, g
			}
		}
		if best < 0 {
			break
		}
		take(open[best], left, jobsPerNode, now)
		if len(ranked) < most {
			warmth += gain
		}
		ranked = append(ranked, open[best].Instance)
		open = slices.Delete(open, best, best+1)
	}
	for _, n := range open {
		ranked = append(ranked, n.Instance)
	}
	return ranked, warmth
}

// fit is the warmth that a node adds to the jobs left, its warmest keys first.
func fit(n Node, left map[model.CacheKey]int, slots int, now time.Time) (gain float64) {
	for _, key := range warmest(n, left, now) {
		jobs := min(slots, left[key])
		gain += float64(jobs) * n.WarmthFor(key, now)
		if slots -= jobs; slots == 0 {
			break
		}
	}
	return gain
}

func take(n Node, left map[model.CacheKey]int, slots int, now time.Time) {
	for _, key := range warmest(n, left, now) {
		jobs := min(slots, left[key])
		left[key] -= jobs
		if slots -= jobs; slots == 0 {
			return
		}
	}
}

func warmest(n Node, left map[model.CacheKey]int, now time.Time) []model.CacheKey {
	var keys []model.CacheKey
	for _, h := range n.held() {
		if left[h.key] > 0 && Warmth(h.use, now) > 0 {
			keys = append(keys, h.key)
		}
	}
	slices.SortStableFunc(keys, func(a, b model.CacheKey) int {
		return cmp.Compare(Warmth(n.Keys[b], now), Warmth(n.Keys[a], now))
	})
	return keys
}

// Option is one node group that a scale-up could take.
type Option struct {
	Group model.GroupID
	// Nodes that the option launches and Jobs (pods) that it serves.
	Nodes, Jobs int
	// Ready is how many of its nodes need no launch: hidden ones on their way
	// and parked ones.
	Ready int
	// Warmth is what the parked nodes would add to the waiting jobs
	// (0 to Jobs).
	Warmth float64
	// Price of one node in dollars an hour; zero means not known.
	Price float64
}

// RankOptions orders a scale-up's options, the best first: warm capacity that
// is already there, then capacity that is there, then price per job, then
// fewest nodes per job, then id. Options whose price is not known are compared
// without it.
func RankOptions(options []Option) []Option {
	ranked := slices.Clone(options)
	priced := !slices.ContainsFunc(options, func(o Option) bool { return o.Price == 0 })
	perJob := func(o Option, price float64) float64 { return price * float64(o.Nodes) / float64(max(o.Jobs, 1)) }
	slices.SortFunc(ranked, func(a, b Option) int {
		byPrice := 0
		if priced {
			byPrice = cmp.Compare(perJob(a, a.Price), perJob(b, b.Price))
		}
		return cmp.Or(
			cmp.Compare(b.Warmth, a.Warmth),
			cmp.Compare(min(b.Ready, b.Nodes), min(a.Ready, a.Nodes)),
			byPrice,
			cmp.Compare(perJob(a, 1), perJob(b, 1)),
			cmp.Compare(a.Group, b.Group),
		)
	})
	return ranked
}
