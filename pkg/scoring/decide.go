package scoring

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// DefaultTrust is how far a forecast may move the rent-or-buy bound: to a
	// third or to three times of it. The price of that trust is a worst case of
	// four times the better choice in hindsight, instead of two.
	DefaultTrust = 3
	// margin is how many times its rent a forecast has to promise: the rent is
	// certain, the jobs are not. More than twice makes the defaults spend less
	// than four fifths of what cluster-autoscaler's do on the first half of
	// bitcoin-core-ci; docs/policy.md shows what other values of time-value,
	// which it divides, come to.
	margin = 2.2
	// lookAgain is how long a forecast is trusted that no job has confirmed: it
	// fades all the time.
	lookAgain = 5 * time.Minute
	// drain is how long a node still costs its price after it was given up:
	// its engine ends, then its instance.
	drain = 20 * time.Second
)

// Costs are what the plan weighs against each other.
type Costs struct {
	// Running and Parked are the prices of a node, TimeValue that of somebody's
	// waiting, in dollars an hour.
	Running, Parked, TimeValue float64
	// Boot and Resume are how long a job waits for a launched and for a resumed
	// node; ColdPenalty is what a job loses on a node that is cold for it,
	// until that was learnt.
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

// pays says whether n uses an hour pay the rent that many times.
func (s step) pays(rate, times float64) bool { return rate*s.buy > times*s.rent }

// running is the step from running to what comes next: parked, or gone where
// parking is off. lost is what the next job loses by the cache.
func (c Costs) running(park bool, lost time.Duration) step {
	if park {
		return step{c.Running - c.Parked, c.dollars(c.Resume)}
	}
	return step{c.Running, c.dollars(c.Boot + lost)}
}

// parked is the step from parked to gone.
func (c Costs) parked(lost time.Duration) step {
	return step{c.Parked, c.dollars(c.Boot - c.Resume + lost)}
}

// Bounds are the annotations that win over the policy, and what the fleet
// allows.
type Bounds struct {
	// MinWarm and MaxWarm bound the idle nodes that run.
	MinWarm, MaxWarm int
	// MaxIdle is how long an idle node may run at most; nil means that there is
	// no bound but the policy's.
	MaxIdle *time.Duration
	// Park: a node that goes is stopped instead of terminated.
	Park bool
	// Prewarm: nodes may be started ahead of expected jobs. Coming nodes are
	// on their way already, for no job that is known. Busy nodes are those that
	// are not among the nodes of the request.
	Prewarm      bool
	Coming, Busy int
}

// Request is everything that a plan rests on.
type Request struct {
	// Nodes are the group's idle and parked nodes.
	Nodes  []Node
	Bounds Bounds
	Costs  Costs
	Memory *Memory // nil has learnt nothing
	Now    time.Time
	// Terse leaves the texts of reasons out.
	Terse bool
}

// Answer is a plan.
type Answer struct {
	// Verdicts decide for every node: parked ones, then idle ones, each the
	// first to go first.
	Verdicts []model.Verdict
	// Resume are parked nodes to bring back ahead of expected jobs, the most
	// valuable first.
	Resume []model.InstanceID
	// Next is when the plan would change though nothing happens.
	Next time.Time
}

// Decide decides for every node of a group: which idle ones keep running, which
// are parked or go, which parked ones go for good, and which come back ahead
// of time. It is DecideIdle and DecideParked in one.
func Decide(r Request) Answer {
	var idle, parked []Node
	for _, n := range r.Nodes {
		if n.Parked {
			parked = append(parked, n)
		} else {
			idle = append(idle, n)
		}
	}
	r.Nodes = idle
	running, ahead := DecideIdle(r, len(parked))
	r.Nodes, r.Bounds.Busy = parked, r.Bounds.Busy+len(idle)
	answer := DecideParked(r, NewStock(idle, r.Now), ahead)
	answer.Verdicts = append(answer.Verdicts, running.Verdicts...)
	if running.Next.Before(answer.Next) {
		answer.Next = running.Next
	}
	return answer
}

// DecideIdle decides for the idle nodes of a request, which are all of its
// Nodes, beside a number of parked ones; and how many of those the forecast pays
// to bring back ahead of time.
//
// The k-th of the idle nodes, in order of marginal value, is used by those
// batches of jobs that need k nodes at once. It keeps running while the
// forecast's rate of such batches, times the waiting that it saves, pays its
// price with a margin. A forecast never keeps a node longer than Trust times
// the rent-or-buy bound, the time in which its rent reaches the price of its
// absence; nor does it give a node up before 1/Trust of the bound, unless the
// Ledger says that it can be afforded. Annotations win over all.
func DecideIdle(r Request, parked int) (answer Answer, ahead int) {
	p := newPlanner(r)
	p.soonest(r.Now.Truncate(time.Hour).Add(time.Hour)) // the forecast changes with the hour
	idle := p.rank(Stock{})
	p.planIdle(idle, parked)
	return p.answer(idle), Ahead(r, len(idle), parked)
}

// DecideParked decides which of the parked nodes of a request, which are all
// of its Nodes, go for good. They are used after those that run, whose copies
// are in stock. One is kept for 1/Trust of the bound in which its storage costs
// what its absence would, and after that, up to Trust times the bound, while
// jobs come to need it often enough. Of those that stay ahead are to be brought
// back, those that most of the expected jobs find warm.
func DecideParked(r Request, stock Stock, ahead int) Answer {
	p := newPlanner(r)
	parked := p.rank(stock)
	p.planParked(r.Bounds.Busy, parked)
	answer := p.answer(parked)
	if ahead > 0 {
		stay := slices.DeleteFunc(parked, func(c *candidate) bool { return c.verdict.Decision == model.DecisionRelease })
		slices.SortFunc(stay, byValue(func(c *candidate) float64 { return c.hits }))
		for _, c := range stay[:min(ahead, len(stay))] {
			answer.Resume = append(answer.Resume, c.node.Instance)
		}
	}
	return answer
}

// Ahead is how many parked nodes, of that many, the forecast pays to bring back
// ahead of expected jobs: as many as it would keep running if they ran. It costs
// no more than that.
func Ahead(r Request, idle, parked int) (ahead int) {
	if !r.Bounds.Park || !r.Bounds.Prewarm || r.Memory == nil || r.Memory.Forecast.Weeks() < 1 || r.Memory.inVain {
		return 0
	}
	if most := r.Bounds.MaxIdle; most != nil && *most <= Settle(r.Costs, true) {
		return 0 // it would be given up again at once
	}
	s := r.Costs.running(true, 0)
	trust := r.Costs.trust()
	high := scale(s.bound(), trust)
	if r.Now.Sub(r.Memory.Forecast.Last()) >= high { // no job came for as long as one may be kept
		return 0
	}
	for k := idle + r.Bounds.Coming + 1; ahead < parked && k <= r.Bounds.MaxWarm; k++ {
		rent := s.rent * high.Hours() * float64(k) // of all that wait, if no job comes
		if !s.pays(r.Memory.Forecast.Rate(k, r.Now), margin) || !r.Memory.Ledger.affords(s, trust, rent, 0) {
			break
		}
		ahead++
	}
	return ahead
}

type planner struct {
	Request
	next time.Time
}

func newPlanner(r Request) *planner {
	if r.Memory == nil {
		r.Memory = NewMemory(r.Costs)
	}
	return &planner{r, r.Now.Add(24 * time.Hour)}
}

func (p *planner) soonest(t time.Time) {
	if t.After(p.Now) && t.Before(p.next) {
		p.next = t
	}
}

// candidate is a node with its marginal value.
type candidate struct {
	node    Node
	verdict model.Verdict
	hits    float64       // share of the jobs that are expected to find their cache on it
	lost    time.Duration // what one of those loses when the node is gone
}

func (p *planner) because(c *candidate, d model.Decision, code, format string, args ...any) {
	c.verdict.Decision = d
	reason := model.Reason{Code: code}
	if !p.Terse {
		reason.Text = fmt.Sprintf(format, args...)
	}
	c.verdict.Reasons = append(c.verdict.Reasons, reason)
}

func (p *planner) answer(ranked []*candidate) Answer {
	verdicts := make([]model.Verdict, 0, len(ranked))
	for _, c := range slices.Backward(ranked) {
		verdicts = append(verdicts, c.verdict)
	}
	return Answer{Verdicts: verdicts, Next: p.next}
}

// rank orders nodes by marginal value, the most valuable first. A key that
// other nodes are warmer for counts half for each of them, so a second copy is
// worth half of the first; copies in stock come before all. It costs keys ×
// log(nodes) for each node.
func (p *planner) rank(stock Stock) []*candidate {
	copies, order := p.copies()
	values := make([]struct {
		hit, saves [KeysHeld]float64
	}, len(p.Nodes))
	for i, c := range copies {
		if i > 0 && c.key == copies[i-1].key {
			continue
		}
		key := order[c.key]
		share, saves := p.Memory.Keys.Of(key)
		share = math.Ldexp(share, -stock.copies[key])
		for _, c := range copies[i:] {
			if c.key != copies[i].key {
				break
			}
			v := &values[c.node]
			v.hit[c.use], v.saves[c.use] = share*c.warmth, saves
			share /= 2
		}
	}
	all := make([]candidate, len(p.Nodes))
	ranked := make([]*candidate, len(p.Nodes))
	for i, n := range p.Nodes {
		all[i].node = n
		p.value(&all[i], &values[i].hit, &values[i].saves)
		ranked[i] = &all[i]
	}
	slices.SortFunc(ranked, byValue(func(c *candidate) float64 { return c.verdict.Score }))
	return ranked
}

// copyOf a key is held by a node's use.
type copyOf struct {
	key, node, use int32
	warmth         float64
	last           int64 // warmth comes in steps, which must not decide an order
}

// copies returns what the nodes are warm for, key by key, the warmest first, and
// the keys by their number.
func (p *planner) copies() ([]copyOf, []Key) {
	number := make(map[Key]int32, min(len(p.Nodes)*KeysHeld, MaxKeys))
	var order []Key
	copies := make([]copyOf, 0, len(p.Nodes)*KeysHeld)
	for i, n := range p.Nodes {
		for j, u := range n.held() {
			w := u.Warmth(p.Now)
			if w == 0 {
				continue
			}
			k, known := number[u.Key]
			if !known {
				k = int32(len(order))
				number[u.Key] = k
				order = append(order, u.Key)
			}
			copies = append(copies, copyOf{k, int32(i), int32(j), w, u.Last.UnixNano()})
		}
	}
	// By key without comparing: a counting sort.
	begin := make([]int32, len(order)+1)
	for _, c := range copies {
		begin[c.key+1]++
	}
	for k := range order {
		begin[k+1] += begin[k]
	}
	sorted, next := make([]copyOf, len(copies)), slices.Clone(begin)
	for _, c := range copies {
		sorted[next[c.key]] = c
		next[c.key]++
	}
	for k := range order {
		slices.SortFunc(sorted[begin[k]:begin[k+1]], func(a, b copyOf) int {
			return cmp.Or(cmp.Compare(b.last, a.last), cmp.Compare(p.Nodes[a.node].Instance, p.Nodes[b.node].Instance))
		})
	}
	return sorted, order
}

// value works out what a node is expected to save the next job, in seconds. One
// that runs saves the time to resume another, for parking keeps its cache; one
// that is parked saves the boot and the cache.
func (p *planner) value(c *candidate, hit, saves *[KeysHeld]float64) {
	var saved float64
	for j := range c.node.held() { // in a fixed order: sums of floats depend on it
		c.hits += hit[j]
		saved += hit[j] * saves[j]
	}
	if c.hits > 0 {
		c.lost = time.Duration(saved / c.hits * float64(time.Second))
	}
	boot, resume := p.Costs.Boot.Seconds(), p.Costs.Resume.Seconds()
	c.verdict = model.Verdict{Instance: c.node.Instance, Decision: model.DecisionKeep}
	switch {
	case c.node.Parked:
		c.verdict.Score = c.hits*(boot-resume) + saved
	case p.Bounds.Park:
		c.verdict.Score = c.hits * resume
	default:
		c.verdict.Score = c.hits*boot + saved
	}
}

// byValue orders the most valuable first.
func byValue(value func(*candidate) float64) func(a, b *candidate) int {
	return func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(value(b), value(a)), b.node.IdleSince.Compare(a.node.IdleSince), cmp.Compare(b.node.Instance, a.node.Instance))
	}
}

// silent says that no job has come for as long as one node may be kept on a
// forecast of the step: then the forecast is wrong.
func (p *planner) silent(s step) bool {
	until := p.Memory.Forecast.Last().Add(scale(s.bound(), p.Costs.trust()))
	p.soonest(until)
	return !p.Now.Before(until)
}

// Settle is how long an idle node is left alone at least, unless its bound is
// shorter: as long as going and coming back take.
func Settle(c Costs, park bool) time.Duration {
	if park {
		return c.Resume + drain
	}
	return c.Boot + drain
}

// planIdle decides which idle nodes keep running.
func (p *planner) planIdle(idle []*candidate, parked int) {
	leave, settle := model.DecisionRelease, Settle(p.Costs, p.Bounds.Park)
	if p.Bounds.Park {
		leave = model.DecisionPark
	}
	trust := p.Costs.trust()
	given := parked // nodes that a job may wait for
	for i, c := range idle {
		k := i + 1
		since := p.Now.Sub(c.node.IdleSince)
		s := p.Costs.running(p.Bounds.Park, c.lost)
		bound := s.bound()
		low, high := scale(bound, 1/trust), scale(bound, trust)
		if p.Bounds.MaxIdle != nil {
			p.soonest(c.node.IdleSince.Add(*p.Bounds.MaxIdle))
		}
		var rate float64
		pays := func() bool {
			rate = p.Memory.Forecast.Rate(k, p.Now)
			return s.pays(rate, margin) && !p.silent(s)
		}
		switch {
		case k <= p.Bounds.MinWarm:
			p.because(c, model.DecisionKeep, "min-warm", "it is among the %d most valuable idle nodes, which min-warm keeps", p.Bounds.MinWarm)
		case k > p.Bounds.MaxWarm:
			p.because(c, leave, "max-warm", "%d more valuable nodes are idle, max-warm is %d", i, p.Bounds.MaxWarm)
		case p.Bounds.MaxIdle != nil && since >= *p.Bounds.MaxIdle:
			p.because(c, leave, tooLong, "idle for %s, max-idle is %s", round(since), *p.Bounds.MaxIdle)
		case since < settle && since < low:
			p.soonest(c.node.IdleSince.Add(min(settle, low)))
			p.because(c, model.DecisionKeep, "recent", "idle for %s, which is less than going and coming back takes", round(since))
		case pays() && since < high:
			p.soonest(c.node.IdleSince.Add(high))
			p.soonest(p.Now.Add(lookAgain))
			p.because(c, model.DecisionKeep, wanted, "%.2f times an hour jobs need %d nodes at once, which pays its rent of $%.2f/h", rate, k, s.rent)
		case pays():
			p.because(c, leave, spent, "idle for %s: whatever is forecast, the rent paid is %.1f times what its absence costs", round(since), since.Hours()/bound.Hours())
		case since < low && !p.Memory.Ledger.affords(s, trust, 0, given+1):
			p.soonest(c.node.IdleSince.Add(low))
			p.because(c, model.DecisionKeep, spent, "idle for %s: its rent reaches what its absence costs after %s, and too little is known to let it go much sooner", round(since), round(bound))
		default:
			p.because(c, leave, "idle", "idle for %s, and only %.2f times an hour jobs need %d nodes at once: its rent of $%.2f/h does not pay", round(since), rate, k, s.rent)
		}
		if c.verdict.Decision != model.DecisionKeep {
			given++
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
	trust, uses := p.Costs.trust(), p.Memory.Forecast.Uses()
	for i, c := range parked {
		m := running + i + 1
		since := p.Now.Sub(c.node.IdleSince)
		s := p.Costs.parked(c.lost)
		low, high := scale(s.bound(), 1/trust), scale(s.bound(), trust)
		rate := 0.0
		if m <= len(uses) {
			rate = uses[m-1]
		}
		switch {
		case since < low:
			p.soonest(c.node.IdleSince.Add(low))
			p.because(c, model.DecisionKeep, "recent", "unused for %s: its storage has cost little so far", round(since))
		case s.pays(rate, 1) && since < high:
			p.soonest(c.node.IdleSince.Add(high))
			p.because(c, model.DecisionKeep, "forecast", "%.1f times a week jobs need %d nodes, which pays its storage", rate*HoursOfWeek, m)
		default:
			p.because(c, model.DecisionRelease, "parked-too-long", "unused for %s: its storage costs more than its return would save", round(since))
		}
	}
}

const (
	// stuckAfter is how long a released node may stay before it no longer holds
	// up those that go after it: a pod of somebody's may keep cluster-autoscaler
	// from removing it.
	stuckAfter = 5 * time.Minute
	// resolve is how long the forecast must have wanted a released node before
	// it is kept again. Else every job that comes and goes on a neighbour would
	// change its mind.
	resolve = time.Minute
)

// Codes of reasons: the forecast pays for an idle node; or it does, and the
// node goes all the same, by its bound or by max-idle.
const (
	wanted  = "forecast"
	spent   = "bound"
	tooLong = "max-idle"
)

// Wanted says whether a node is kept because the forecast pays for it.
func Wanted(v model.Verdict) bool {
	return v.Decision == model.DecisionKeep && len(v.Reasons) > 0 && v.Reasons[0].Code == wanted
}

// Pace makes a plan one that can be carried out through cluster-autoscaler,
// which picks among the nodes that may go in an order of its own: they go
// coldest first, in rounds of half of what is left, and what was let go is not
// taken back on a whim. The verdicts are those of Decide, and are changed.
func Pace(verdicts []model.Verdict, nodes []Node, park bool, now time.Time) {
	leave := model.DecisionRelease
	if park {
		leave = model.DecisionPark
	}
	byID := make(map[model.InstanceID]Node, len(nodes))
	for _, n := range nodes {
		byID[n.Instance] = n
	}
	var going []*model.Verdict
	for i := range verdicts {
		v := &verdicts[i]
		n := byID[v.Instance]
		if !n.ReleasedAt.IsZero() && Wanted(*v) && (n.WantedAt.IsZero() || now.Sub(n.WantedAt) < resolve) {
			v.Decision = leave
			v.Reasons = append(v.Reasons, model.Reason{Code: "released", Text: "but it was let go, and that has been so for less than a minute"})
		}
		if v.Decision != model.DecisionKeep && !n.Parked {
			going = append(going, v)
		}
	}
	stuck := 0
	for i, v := range going {
		released := byID[v.Instance].ReleasedAt
		switch {
		case !released.IsZero() && now.Sub(released) >= stuckAfter:
			stuck++ // something else keeps it
		case i > stuck && i-stuck >= (len(going)-stuck)/2:
			v.Decision = model.DecisionKeep
			v.Reasons = append(v.Reasons, model.Reason{Code: "later", Text: "colder nodes go first"})
		}
	}
}
