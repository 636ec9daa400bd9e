package simulate

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	hour = int64(3600)
	// parkedFor is how long parked nodes stay before they go, in the rules
	// that park: as long as their caches are warm in the default world.
	parkedFor = 72 * hour
)

// baselines are what hearth is compared with.
func baselines() []NamedPolicy {
	simple := func(idle time.Duration) func(Trace, World, *rand.Rand) Policy {
		return func(Trace, World, *rand.Rand) Policy {
			return &keeper{placement: warmestFirst{}, idle: seconds(idle), park: true}
		}
	}
	release := func(idle time.Duration) func(Trace, World, *rand.Rand) Policy {
		return func(_ Trace, _ World, r *rand.Rand) Policy {
			return &keeper{placement: leastAllocated{r}, idle: seconds(idle)}
		}
	}
	return []NamedPolicy{
		{Name: "ca-default", Doc: "cluster-autoscaler: gone after 10 min idle; kube-scheduler places on the least allocated node", New: release(10 * time.Minute)},
		{Name: "ca-60m", Doc: "the same with scale-down-unneeded-time 60 min", New: release(time.Hour)},
		{Name: "karpenter-empty", Doc: "Karpenter, WhenEmpty: gone after 30 s idle", New: release(30 * time.Second)},
		{Name: "always-on", Doc: "as many nodes as the busiest moment needs, never released", New: newAlwaysOn},
		{Name: "scheduled", Doc: "a pool for the average load of office hours (Mon-Fri 08-19 UTC) is kept through them; else as ca-default", New: newScheduled},
		{Name: "oldest-first", Doc: "Escalator: below 40 % (10 %) utilisation the 2 (5) oldest idle nodes go each minute, above 70 % nodes are added", New: newOldestFirst},
		{Name: "warm-pool-any", Doc: "stopped after 5 min idle, for 72 h at most; any stopped node comes back, kube-scheduler places", New: newWarmPoolAny},
		{Name: "ttl-histogram", Doc: "hybrid histogram keep-alive per key (Shahrad et al., ATC 2020): parked outside the 5th to 99th percentile of the key's idle times", New: newHistogram},
		{Name: "greedy-dual", Doc: "keep-alive as caching (Fuerst and Sharma, ASPLOS 2021): nodes stay until the pool is full, then the least frequency times cost goes", New: newGreedyDual},
		{Name: "simple-park-1m", Doc: "parked after 1 min idle, for 72 h at most; the warmest node comes back", New: simple(time.Minute)},
		{Name: "simple-park-5m", Doc: "the same after 5 min", New: simple(5 * time.Minute)},
		{Name: "simple-park-10m", Doc: "the same after 10 min", New: simple(10 * time.Minute)},
	}
}

// placement is where jobs go, one half of a policy.
type placement interface {
	Place(f *Fleet, p *Pod) Choice
}

// keeper keeps every idle node for the same time and then parks or releases
// it; parked ones go after parkedFor.
type keeper struct {
	deaf
	placement
	idle int64
	park bool
}

func (k *keeper) Plan(f *Fleet) Plan {
	var plan Plan
	due := f.due(f.Idle, k.idle, &plan.Next)
	if !k.park {
		plan.Release = due
		return plan
	}
	plan.Park = due
	plan.Release = f.due(f.Resumable, parkedFor, &plan.Next)
	return plan
}

// due returns the nodes of a list by Since that have been in it for that long,
// and puts down when the next one will have been.
func (f *Fleet) due(list []*Node, after int64, next *int64) []*Node {
	i := 0
	for i < len(list) && list[i].Since+after <= f.Now {
		i++
	}
	if i < len(list) {
		sooner(next, list[i].Since+after)
	}
	return slices.Clone(list[:i])
}

// sooner lowers a time at which a plan changes; 0 is never.
func sooner(next *int64, t int64) {
	if *next == 0 || t < *next {
		*next = t
	}
}

func newWarmPoolAny(_ Trace, _ World, r *rand.Rand) Policy {
	return &keeper{placement: leastAllocated{r}, idle: 300, park: true}
}

// alwaysOn launches its nodes at the beginning.
type alwaysOn struct {
	deaf
	leastAllocated
	size int
}

// newAlwaysOn sizes the pool so that no job ever waits, were every cache cold.
func newAlwaysOn(t Trace, w World, r *rand.Rand) Policy {
	peak := 0
	for _, s := range load(t, w.Cold) {
		peak = max(peak, s.jobs)
	}
	return &alwaysOn{leastAllocated: leastAllocated{r}, size: nodesFor(peak, w)}
}

func (a *alwaysOn) Plan(f *Fleet) Plan { return Plan{Launch: max(0, a.size-f.Live())} }

// scheduled keeps a pool in office hours, as the cron pools of other runner
// scalers do.
type scheduled struct {
	keeper
	size int
}

func newScheduled(t Trace, w World, r *rand.Rand) Policy {
	var jobSeconds, office int64
	for _, s := range load(t, func(warm int64) int64 { return warm }) {
		for from := s.from; from < s.to; {
			to := min(s.to, nextBound(from))
			if inOffice(from) {
				jobSeconds += int64(s.jobs) * (to - from)
				office += to - from
			}
			from = to
		}
	}
	size := 1
	if office > 0 {
		size = nodesFor(int((jobSeconds+office-1)/office), w)
	}
	return &scheduled{keeper{placement: leastAllocated{r}, idle: 600}, size}
}

const opens, closes = 8 * hour, 19 * hour

// dayOf returns the weekday, 0 for Sunday, and the second of the day, in UTC.
func dayOf(t int64) (weekday, second int64) {
	const day = 24 * hour
	second = (t%day + day) % day
	weekday = ((t-second)/day + 4) % 7 // the epoch began on a Thursday
	return (weekday + 7) % 7, second
}

func inOffice(t int64) bool {
	weekday, second := dayOf(t)
	return weekday >= 1 && weekday <= 5 && second >= opens && second < closes
}

// nextBound is when office hours begin or end next, or the day ends.
func nextBound(t int64) int64 {
	_, second := dayOf(t)
	switch {
	case second < opens:
		return t - second + opens
	case second < closes:
		return t - second + closes
	}
	return t - second + 24*hour
}

func (s *scheduled) Plan(f *Fleet) Plan {
	plan := Plan{Next: nextBound(f.Now)}
	pool := 0
	if inOffice(f.Now) {
		pool = s.size
	}
	due := f.due(f.Idle, s.idle, &plan.Next)
	plan.Release = due[:min(len(due), max(0, f.Live()-pool))]
	plan.Launch = max(0, pool-f.Live())
	return plan
}

// oldestFirst follows Escalator's documented example: once a minute the share
// of the slots that is asked for decides. Escalator also cordons busy nodes;
// here only idle ones go.
type oldestFirst struct {
	deaf
	leastAllocated
	scanned int64
}

const (
	scanEvery               = 60
	slowBelow, fastBelow    = 0.4, 0.1
	slowRemoval, fastRemove = 2, 5
	scaleUpAbove            = 0.7
)

func newOldestFirst(_ Trace, _ World, r *rand.Rand) Policy {
	return &oldestFirst{leastAllocated: leastAllocated{r}}
}

func (o *oldestFirst) Plan(f *Fleet) Plan {
	if f.Live() == 0 {
		return Plan{} // nothing to scan
	}
	plan := Plan{Next: f.Now - f.Now%scanEvery + scanEvery}
	if o.scanned == f.Now || f.Now%scanEvery != 0 {
		return plan
	}
	o.scanned = f.Now
	if len(f.OnTheWay) > 0 {
		return plan // its scale lock: wait for what was asked for
	}
	asked := float64(f.busy + len(f.Waiting))
	slots := f.Live() * f.World.Slots
	used := asked / float64(slots)
	remove := 0
	switch {
	case used > scaleUpAbove:
		plan.Launch = nodesFor(int(math.Ceil(asked/scaleUpAbove))-slots, f.World)
	case used < fastBelow:
		remove = fastRemove
	case used < slowBelow:
		remove = slowRemoval
	}
	for _, n := range f.All { // by launch
		if remove > 0 && n.State == Idle {
			plan.Release = append(plan.Release, n)
			remove--
		}
	}
	return plan
}

// greedyDual keeps idle nodes running until the pool is full. Then the one
// goes whose last job's key is worth least: the pool's age when the node was
// last used, plus how often the key was used times what a cold start of it
// costs (all nodes are of one size).
type greedyDual struct {
	deaf
	warmestFirst
	capacity int
	keys     []keyCost
	age      float64
	priority map[*Node]float64
}

// newGreedyDual sizes the pool as a person would that server: it suffices for
// 95 % of the time.
func newGreedyDual(t Trace, w World, _ *rand.Rand) Policy {
	stretches := load(t, func(warm int64) int64 { return warm })
	slices.SortFunc(stretches, func(a, b stretch) int { return cmp.Compare(a.jobs, b.jobs) })
	var total, sum int64
	for _, s := range stretches {
		total += s.to - s.from
	}
	capacity := 1
	for _, s := range stretches {
		if sum += s.to - s.from; sum*100 >= total*95 {
			capacity = max(1, nodesFor(s.jobs, w))
			break
		}
	}
	return &greedyDual{capacity: capacity, priority: map[*Node]float64{}}
}

// keyCost is what was seen of a key: how often, and how long its last warm and
// its last cold job ran.
type keyCost struct {
	uses       int
	warm, cold int64
}

func (g *greedyDual) Finished(f *Fleet, p *Pod) {
	if g.keys == nil {
		g.keys = make([]keyCost, len(f.keys))
	}
	k := &g.keys[p.Key]
	k.uses++
	if p.Warm {
		k.warm = p.Took
	} else {
		k.cold = p.Took
	}
	cost := seconds(f.World.Boot)
	if k.warm > 0 {
		cost += max(0, k.cold-k.warm)
	}
	g.priority[p.Node] = g.age + float64(k.uses)*float64(cost)
}

func (g *greedyDual) Plan(f *Fleet) Plan {
	var plan Plan
	excess := f.Live() - g.capacity
	if excess <= 0 || len(f.Idle) == 0 {
		return plan
	}
	plan.Release = slices.SortedStableFunc(slices.Values(f.Idle), func(a, b *Node) int {
		return cmp.Compare(g.priority[a], g.priority[b])
	})
	plan.Release = plan.Release[:min(excess, len(plan.Release))]
	for _, n := range plan.Release {
		g.age = max(g.age, g.priority[n])
		delete(g.priority, n)
	}
	return plan
}

// stretch is a time in which the number of jobs that run does not change, were
// every job to start when it arrives.
type stretch struct {
	from, to int64
	jobs     int
}

// load is how many jobs run at once over time; took is how long a job does,
// given its warm duration.
func load(t Trace, took func(int64) int64) []stretch {
	type step struct {
		at     int64
		change int
	}
	steps := make([]step, 0, 2*len(t.Jobs))
	for _, j := range t.Jobs {
		steps = append(steps, step{j.Arrival, 1}, step{j.Arrival + took(j.Duration), -1})
	}
	slices.SortFunc(steps, func(a, b step) int { return cmp.Compare(a.at, b.at) })
	var stretches []stretch
	jobs := 0
	for i, s := range steps {
		jobs += s.change
		if i+1 < len(steps) && steps[i+1].at > s.at {
			stretches = append(stretches, stretch{s.at, steps[i+1].at, jobs})
		}
	}
	return stretches
}

// nodesFor is how many nodes run that many jobs at once.
func nodesFor(jobs int, w World) int { return (jobs + w.Slots - 1) / w.Slots }
