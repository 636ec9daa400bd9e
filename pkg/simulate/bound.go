package simulate

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Bounds returns two lower bounds, in dollars, on the total cost of a trace in
// a world: infrastructure plus delay, where a job's delay is what it waits and
// what a cold cache slows it by. Both let the policy know the whole future.
//
//   - prescient holds for every policy whatever.
//   - reactive holds for the policies that start nothing ahead of need: at
//     every moment each node that boots or resumes has a waiting job of its
//     own. It need not be the same job all the time, nor the one that runs
//     there in the end; but no job counts so for more than the longer of a
//     boot and a resume in all. What to keep, park and release may still be
//     decided in hindsight.
//
// The time that starting nodes spend without such a job is a policy's head
// start. Starts ahead of the demand have one, and so has the rest of a start
// whose job got another slot in the meantime. For every policy
//
//	total + DelayPrice × head start ≥ reactive,
//
// so a policy gets below the reactive bound by its head start or not at all.
//
// The result depends on neither the order of the jobs nor that of equal
// arrivals. It takes O(n log n) time.
//
// # Proof
//
// Prices are per second: p of a running node, q of a parked one, D of delay.
// S is the slots of a node, R and B the seconds of a resume and a boot, x⁺ is
// max(x, 0). Where q > p, q counts as p: that only lowers the cost.
//
// Take any history of the world. Job i arrives at a(i), has the warm duration
// d(i), starts at s(i) ≥ a(i), runs d(i) + slow(i) seconds, where slow(i) is 0 or
// cold(i), what a cold cache adds, and ends at e(i). Let f(i) = a(i) + d(i): no
// policy ends it sooner. Its delay is e(i) − f(i) = s(i) − a(i) + slow(i).
// Starts that come to nothing are left out: without them it costs less. A
// release that the end of the history cuts short counts as a node kept ready.
//
// Step 1, demand that does not depend on the policy. Let J(t) be the number of
// jobs with a(i) ≤ t < f(i). Waiting moves a job's real end, but never J: all
// that follows compares the nodes of the history with J, so that nothing is
// assumed about how one delay shifts what comes after it.
//
// Step 2, delay. Let own(i) be how long i waits as some start's own job (0 in
// the prescient case, where starts need none). Let u(i) be how much of
// [a(i), f(i)) it neither runs nor waits so. Before f(i), then, it runs for d(i)
// less u(i) and the part of own(i) that falls there; the rest of its
// d(i) + slow(i) seconds, and of own(i), come after f(i). Hence
//
//	delay(i) = own(i) + u(i) + slow(i) + excess(i), excess(i) ≥ 0.
//
// Let N(t) be the nodes that are ready (prescient), or ready or starting
// (reactive). Of the J(t) jobs at most S per ready node run, and at most one
// per starting node is its own; so at least (J − S·N)⁺ do neither, and
// Σ u(i) ≥ ∫ (J − S·N)⁺ dt. In the reactive class Σ own(i) is R for each resume
// and B for each boot; in general it is less by the head start at most.
//
// Step 3, infrastructure. A ready node costs p. A start costs p·R or p·B; the
// reactive bound has it in N. A release costs p for ReleaseLag. Let P(t) be the
// nodes parked, in their release lag, or (prescient) resuming, each at q: then
// there remain (p − q)·ReleaseLag for each release, and in the prescient case
// (p − q)·R for each resume and p·B for each boot, at the moment the node is
// ready. With steps 2 and 3 the history costs at least
//
//	∫ p·N + q·P + D·(J − S·N)⁺ dt + Σ (price of each resume, boot, release)
//	    + D·Σ (slow(i) + excess(i)),
//
// where a resume is priced (p − q)·R or D·R, and a boot p·B or D·B.
//
// Step 4, levels. Number the levels 1, 2, …; level m is running while N ≥ m,
// parked while N < m ≤ N + P, gone otherwise; its demand is the part of J
// between S·(m − 1) and S·m. Then N, P and (J − S·N)⁺ are sums over the levels.
// So are the prices: a release moves the level N to parked; a resume moves the
// level N + 1 from parked to running; a parked node that goes away moves the
// level N + P to gone; a boot moves the level N + 1 to running, and if that was
// parked, the level N + P + 1 from gone to parked: its price is that of the
// resume and, for the rest, of the move from gone to parked. (A resume counts
// as no dearer than a boot.) Hence the cost is at least the sum of every level's
// own cheapest course, and those are found one by one: number of nodes,
// MaxNodes and which job runs where are forgotten, which only lowers the cost.
//
// In a level's cheapest course the move from gone to parked is not needed: its
// price can be paid when the level next runs, and the rent is saved. Between
// two changes of its demand the cost is linear in the moment of each move, so
// that moving at the changes is as good; that leaves three numbers per level,
// the least cost so far of being running, parked, gone. The world begins
// without nodes; what happens after the level's last demand is free.
//
// Step 5, cold caches. Relaxation: a key is warm everywhere once it was used
// anywhere within WarmFor. Sort the jobs of one key by arrival and let
// F(i) = a(i) + max(B, R) + 2·(d(i) + cold(i)). A new group begins at the first
// job, and at each job i with
//
//	a(i) > WarmFor + cold(i) + (greatest F of the jobs before it).
//
// Claim: Σ slow + excess of the key's jobs ≥ Σ c(g) over its groups g, with c(g)
// the least cold(i) in g. As own(i) ≤ max(B, R), u(i) ≤ d(i), slow(i) ≤ cold(i),
//
//	excess(i) ≥ e(i) − F(i) + cold(i).   (*)
//
// Let k be the first job of g to start. If it is cold, slow(k) ≥ c(g). If it is
// warm, a job j of another group h started before k and had the key in use at
// some moment since s(k) − WarmFor. Let A(g) be the first arrival of g.
//
//   - h earlier: e(j) ≥ A(g) − WarmFor, and we let j pay: by (*) it has
//     A(g) − WarmFor − F(j) + cold(j). By the rule of the groups
//     A(g) − WarmFor ≥ c(g) + A(g−1), and A(h+1) − WarmFor ≥ c(h+1) + F(j); so
//     this is at least c(h+1) + … + c(g) + c(h): enough for all the groups
//     after its own, up to g, that j may have to pay for, and for its own.
//   - h later: k cannot start before j arrives, e(k) ≥ A(h) ≥ F(k), and we let k
//     pay: by (*) it has at least cold(k) ≥ c(g); and if it has to pay for later
//     groups too, the case above left it c(g) for its own.
//
// No money is used twice: steps 2 to 4 use own and u, this one slow and excess.
//
// Step 6. Jobs run at least Σ d(i) seconds on slots of p/S: with small delay
// prices that is more than the levels'. And what holds for every policy holds
// for the reactive ones.
func Bounds(t Trace, w World) (reactive, prescient float64) {
	price, delay := w.Price/3600, w.DelayPrice/3600
	parked := min(w.ParkedPrice/3600, price)
	boot, resume := w.Boot.Seconds(), w.Resume.Seconds()

	var work float64
	var arrivals, ends []int64
	for _, j := range t.Jobs {
		if j.Duration > 0 {
			work += float64(j.Duration)
			arrivals = append(arrivals, j.Arrival)
			ends = append(ends, j.Arrival+j.Duration)
		}
	}
	slices.Sort(arrivals)
	slices.Sort(ends)

	c := levelCosts{
		running: price, parked: parked, delay: delay,
		release: (price - parked) * w.ReleaseLag.Seconds(),
	}
	c.boot = price * boot
	c.resume = min((price-parked)*resume, c.boot)
	prescient = cheapestLevels(arrivals, ends, w.Slots, c)

	c.boot = delay * boot
	c.resume = min(delay*resume, c.boot)
	reactive = cheapestLevels(arrivals, ends, w.Slots, c)

	prescient = max(prescient, work*price/float64(w.Slots))
	reactive = max(reactive, prescient)
	cold := delay * float64(coldSeconds(t.Jobs, w))
	return reactive + cold, prescient + cold
}

// levelCosts are the prices of step 4: rates in dollars a second, moves in
// dollars.
type levelCosts struct {
	running, parked, delay float64
	resume, boot, release  float64
}

// level is what step 4 knows of a level: the least cost up to since of being
// running, parked and gone then, and the jobs it has had to run from then on.
type level struct {
	running, parked, gone float64
	since                 int64
	jobs                  int
}

// advance moves the level's clock to now: first the moves, then the time.
func (l *level) advance(now int64, c levelCosts) {
	running := min(l.running, l.parked+c.resume, l.gone+c.boot)
	parked := min(l.parked, l.running+c.release)
	gone := min(l.gone, parked)

	passed := float64(now - l.since)
	delay := c.delay * float64(l.jobs)
	l.running = running + passed*c.running
	l.parked = parked + passed*(c.parked+delay)
	l.gone = gone + passed*delay
	l.since = now
}

// cheapestLevels is the sum of every level's cheapest course. Arrivals and
// ends, without delay, are sorted.
func cheapestLevels(arrivals, ends []int64, slots int, c levelCosts) float64 {
	var levels []level
	jobs := 0
	for len(ends) > 0 {
		if len(arrivals) > 0 && arrivals[0] < ends[0] {
			now := arrivals[0]
			arrivals = arrivals[1:]
			top := jobs / slots
			if top == len(levels) {
				levels = append(levels, level{running: math.Inf(1), parked: math.Inf(1), since: now})
			}
			levels[top].advance(now, c)
			levels[top].jobs++
			jobs++
			continue
		}
		now := ends[0]
		ends = ends[1:]
		jobs--
		top := jobs / slots
		levels[top].advance(now, c)
		levels[top].jobs--
	}
	var sum float64
	for _, l := range levels {
		sum += min(l.running, l.parked, l.gone)
	}
	return sum
}

// coldSeconds is the delay that cold caches cost at least (step 5).
func coldSeconds(jobs []Job, w World) int64 {
	jobs = slices.Clone(jobs)
	slices.SortFunc(jobs, func(a, b Job) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Arrival, b.Arrival), cmp.Compare(a.Duration, b.Duration))
	})
	start := int64(max(w.Boot, w.Resume) / time.Second)
	warmFor := int64(w.WarmFor / time.Second)

	var sum, least, latest int64 // c of the groups before, c so far, greatest F
	for i, j := range jobs {
		cold := w.Cold(j.Duration) - j.Duration
		f := j.Arrival + start + 2*(j.Duration+cold)
		if i == 0 || jobs[i-1].Key != j.Key {
			sum, least, latest = sum+least, cold, f
		} else if j.Arrival > warmFor+cold+latest {
			sum, least = sum+least, cold
		}
		least, latest = min(least, cold), max(latest, f)
	}
	return sum + least
}
