package simulate

import (
	"cmp"
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

// A dollar an hour is a dollar a second here, so that the sums can be done by
// hand.
const perSecond = 3600

func TestBoundsByHand(t *testing.T) {
	// A running second costs 1, a parked one 0.1, a second of delay 20. A boot
	// takes 10 s, a resume 4 s, a release lag 2 s.
	world := World{
		Boot: 10 * time.Second, Resume: 4 * time.Second, ReleaseLag: 2 * time.Second,
		Price: 1 * perSecond, ParkedPrice: 0.1 * perSecond, DelayPrice: 20 * perSecond,
		Slots: 1, KeysHeld: 20, WarmFor: 1000 * time.Second,
	}
	with := func(change func(*World)) World {
		w := world
		change(&w)
		return w
	}
	job := func(arrival, duration int64) Job { return Job{Arrival: arrival, Duration: duration, Key: "k"} }
	cold := func(w *World) { w.ColdFactor = 0.5 }

	for _, test := range []struct {
		name                string
		jobs                []Job
		world               World
		reactive, prescient float64
	}{
		{name: "no jobs", world: world},
		{
			name: "one job", jobs: []Job{job(0, 100)}, world: world,
			reactive: 100 + 20*10, prescient: 100 + 10,
		},
		{
			name: "one job, cold", jobs: []Job{job(0, 100)}, world: with(cold),
			reactive: 100 + 20*10 + 20*50, prescient: 100 + 10 + 20*50,
		},
		{
			name: "a short gap is kept through", jobs: []Job{job(0, 100), job(103, 100)}, world: world,
			reactive: 203 + 20*10, prescient: 203 + 10,
		},
		{
			// Prescient: 0.9·2 for the release, 0.1·50 parked, 0.9·4 for the resume;
			// boots cost 10 + 1.8. Reactive: kept, 50 < 20·4.
			name: "a gap worth parking", jobs: []Job{job(0, 100), job(150, 100)}, world: world,
			reactive: 250 + 20*10, prescient: 200 + 10 + 1.8 + 5 + 3.6,
		},
		{
			// Parked for 1000 s costs the reactive one 100 + 80 + 1.8, a boot 200 +
			// 1.8; the prescient one boots for 10 + 1.8.
			name: "a long gap", jobs: []Job{job(0, 100), job(1100, 100)}, world: world,
			reactive: 200 + 20*10 + 181.8, prescient: 200 + 10 + 11.8,
		},
		{
			// 2 s of waiting cost less than a start: 40 against 200 or, ahead, 2 + 10.
			name: "the second waits for the first's slot", jobs: []Job{job(0, 100), job(98, 2)}, world: world,
			reactive: 100 + 20*10 + 20*2, prescient: 102 + 20,
		},
		{
			name: "two slots of one node", jobs: []Job{job(0, 100), job(50, 100)},
			world:    with(func(w *World) { w.Slots = 2 }),
			reactive: 150 + 20*10, prescient: 150 + 10,
		},
		{
			name: "delay for nothing", jobs: []Job{job(0, 100), job(0, 50)},
			world:    with(func(w *World) { w.DelayPrice = 0 }),
			reactive: 150, prescient: 150,
		},
		{
			// The second comes 1000 s after F of the first, plus its own 50: still warm.
			name: "warm", jobs: []Job{job(0, 100), job(10+2*150+1000+50, 100)},
			world:    with(func(w *World) { cold(w); w.Price = 0; w.ParkedPrice = 0; w.Boot = 10 * time.Second }),
			reactive: 20*(10+50) + 0, prescient: 20 * 50,
		},
		{
			name: "cold again", jobs: []Job{job(0, 100), job(10+2*150+1000+51, 100)},
			world:    with(func(w *World) { cold(w); w.Price = 0; w.ParkedPrice = 0 }),
			reactive: 20 * (10 + 50 + 50), prescient: 20 * (50 + 50),
		},
		{
			name: "each key by itself, its shortest job cold", world: with(func(w *World) { cold(w); w.Price = 0; w.Boot, w.Resume = 0, 0 }),
			jobs: []Job{job(0, 100), job(0, 60), {Arrival: 0, Duration: 20, Key: "l"}},
			// Nodes cost nothing here, so nobody waits.
			reactive: 20 * (30 + 10), prescient: 20 * (30 + 10),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			reactive, prescient := Bounds(Trace{Jobs: test.jobs}, test.world)
			if !near(reactive, test.reactive) || !near(prescient, test.prescient) {
				t.Errorf("reactive %v, prescient %v; want %v and %v", reactive, prescient, test.reactive, test.prescient)
			}
		})
	}
}

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-9*(1+math.Abs(a)+math.Abs(b)) }

// atMost is a ≤ b but for rounding.
func atMost(a, b float64) bool { return a <= b || near(a, b) }

// The bounds hold for the best of all policies, found by trying them all.
func TestBoundsAgainstEveryPolicy(t *testing.T) {
	var reactiveRatios, prescientRatios []float64
	rapid.Check(t, func(t *rapid.T) {
		trace, world := smallCase(t)
		reactive, prescient := Bounds(trace, world)
		free := cheapestOfAll(trace, world, 0)
		paid := cheapestOfAll(trace, world, world.DelayPrice/3600)
		never := cheapestOfAll(trace, world, math.Inf(1))
		if free > paid || paid > never {
			t.Fatalf("the best policy costs %v, %v with its head start, %v without any", free, paid, never)
		}
		if !atMost(prescient, free) {
			t.Errorf("prescient bound %v, but a policy costs %v", prescient, free)
		}
		if !atMost(reactive, paid) {
			t.Errorf("reactive bound %v, but a policy costs %v with its head start", reactive, paid)
		}
		if world.MaxNodes >= len(trace.Jobs) { // the bounds know of no such limit
			reactiveRatios = append(reactiveRatios, reactive/never)
			prescientRatios = append(prescientRatios, prescient/free)
		}
	})
	t.Logf("bound ÷ best policy where nodes are no limit, mean of %d: reactive %.3f, prescient %.3f",
		len(reactiveRatios), mean(reactiveRatios), mean(prescientRatios))
}

func mean(list []float64) float64 {
	var sum float64
	for _, x := range list {
		sum += x
	}
	return sum / float64(len(list))
}

func smallCase(t *rapid.T) (Trace, World) {
	seconds := func(most int, name string) time.Duration {
		return time.Duration(rapid.IntRange(0, most).Draw(t, name)) * time.Second
	}
	world := World{
		Boot: seconds(4, "boot"), Resume: seconds(3, "resume"), ReleaseLag: seconds(2, "release lag"),
		Price:       rapid.SampledFrom([]float64{0.1, 0.5, 2}).Draw(t, "price") * perSecond,
		ParkedPrice: rapid.SampledFrom([]float64{0, 0.03, 0.3}).Draw(t, "parked price") * perSecond,
		DelayPrice:  rapid.SampledFrom([]float64{0.2, 1, 8}).Draw(t, "delay price") * perSecond,
		Slots:       rapid.IntRange(1, 2).Draw(t, "slots"),
		ColdFactor:  rapid.SampledFrom([]float64{0, 0.5, 1}).Draw(t, "cold factor"),
		KeysHeld:    rapid.IntRange(1, 2).Draw(t, "keys held"),
		WarmFor:     seconds(4, "warm for"),
		MaxNodes:    rapid.IntRange(1, 3).Draw(t, "nodes"),
	}
	most := []int{0, 5, 4, 3}[world.MaxNodes] // what can be tried in milliseconds
	spread := rapid.SampledFrom([]int64{2, 6, 40}).Draw(t, "spread")
	var trace Trace
	for i := range rapid.IntRange(1, most).Draw(t, "jobs") {
		trace.Jobs = append(trace.Jobs, Job{
			ID:       fmt.Sprint(i),
			Arrival:  rapid.Int64Range(0, spread).Draw(t, "arrival"),
			Duration: rapid.Int64Range(1, 3).Draw(t, "duration"),
			Key:      rapid.SampledFrom([]model.CacheKey{"k", "l"}).Draw(t, "key"),
		})
	}
	trace.Sort()
	return trace, world
}

// cheapestOfAll is the cost of the best policy for MaxNodes nodes. All moves
// are tried, second by second, the cheapest histories first. Each second that a
// starting node spends without a waiting job of its own costs headStart: for
// nothing it is any policy, for ever so much a reactive one.
func cheapestOfAll(t Trace, w World, headStart float64) float64 {
	b := bruteForce{
		jobs: t.Jobs, world: w, headStart: headStart,
		price: w.Price / 3600, parked: w.ParkedPrice / 3600, delay: w.DelayPrice / 3600,
		boot: int8(w.Boot / time.Second), resume: int8(w.Resume / time.Second),
		lag: int8(w.ReleaseLag / time.Second), warmFor: int8(w.WarmFor / time.Second),
		known: map[position]float64{},
	}
	start := position{at: -max(b.boot, b.resume)}
	for i, j := range t.Jobs {
		start.waits[i] = 1
		if j.Key == "l" {
			b.keys[i] = 1
		}
	}
	b.reach(start, 0)
	for {
		next := heap.Pop(&b.open).(history)
		switch {
		case next.cost > b.known[next.position]: // a cheaper way there was found since
		case b.done(next.position):
			return next.cost
		default:
			b.moveNodes(next.position, next.cost, 0)
		}
	}
}

type bruteForce struct {
	jobs                            []Job
	keys                            [maxBruteJobs]int8
	world                           World
	price, parked, delay, headStart float64
	boot, resume, lag, warmFor      int8
	known                           map[position]float64 // the least cost of getting there
	open                            histories
}

// history is a way to a position, and what it cost.
type history struct {
	position
	cost float64
}

type histories []history

func (h histories) Len() int           { return len(h) }
func (h histories) Less(i, j int) bool { return h[i].cost < h[j].cost }
func (h histories) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *histories) Push(x any)        { *h = append(*h, x.(history)) }
func (h *histories) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	*h = (*h)[:last]
	return x
}

const (
	maxBruteJobs  = 5
	maxBruteNodes = 3
)

// bruteState of a node.
type bruteState int8

const (
	bruteGone bruteState = iota
	bruteReady
	bruteStarting
	bruteStoppingToPark
	bruteStoppingToGo
	bruteParked
)

type bruteNode struct {
	state bruteState
	left  int8    // seconds until it is ready, parked or gone
	runs  [2]int8 // seconds left of the job on each slot
	key   [2]int8 // its key
	used  [2]int8 // by key: seconds since its last use, plus 1; 0 is not held
}

func (n bruteNode) idle() bool { return n.runs == [2]int8{} }

// warm says whether the key is held, or used at this moment, here.
func (n bruteNode) warm(key, warmFor int8) bool {
	for slot := range n.runs {
		if n.runs[slot] != 0 && n.key[slot] == key {
			return true
		}
	}
	return n.used[key] != 0 && n.used[key]-1 <= warmFor
}

// position is all that the future depends on.
type position struct {
	at    int8
	nodes [maxBruteNodes]bruteNode
	waits [maxBruteJobs]int8 // 0 started; 1 not; more: seconds as a start's own job, plus 1
}

func (p position) canonical() position {
	slices.SortFunc(p.nodes[:], func(a, b bruteNode) int {
		return cmp.Or(cmp.Compare(a.state, b.state), cmp.Compare(a.left, b.left),
			slices.Compare(a.runs[:], b.runs[:]), slices.Compare(a.key[:], b.key[:]), slices.Compare(a.used[:], b.used[:]))
	})
	return p
}

// reach notes a position before its moves.
func (b *bruteForce) reach(p position, cost float64) {
	p = p.canonical()
	if before, ok := b.known[p]; (!ok || cost < before) && !math.IsInf(cost, 1) {
		b.known[p] = cost
		heap.Push(&b.open, history{p, cost})
	}
}

func (b *bruteForce) done(p position) bool {
	for _, n := range p.nodes {
		if !n.idle() {
			return false
		}
	}
	return p.waits == [maxBruteJobs]int8{}
}

// moveNodes tries every move of the nodes from i on, then every placement.
func (b *bruteForce) moveNodes(p position, cost float64, i int) {
	if i == b.world.MaxNodes {
		b.placeJobs(p, cost, 0)
		return
	}
	b.moveNodes(p, cost, i+1)
	// In the canonical order the nodes that do not exist come first.
	n := &p.nodes[len(p.nodes)-1-i]
	was := *n
	become := func(now, then bruteState, seconds int8) {
		*n = was
		if n.state, n.left = now, seconds; seconds == 0 {
			n.state = then
		}
		if n.state == bruteGone {
			*n = bruteNode{}
		}
		b.moveNodes(p, cost, i+1)
	}
	switch {
	case was.state == bruteGone:
		become(bruteStarting, bruteReady, b.boot)
	case was.state == bruteParked:
		become(bruteStarting, bruteReady, b.resume)
		become(bruteGone, bruteGone, 0)
	case was.state == bruteReady && was.idle():
		become(bruteStoppingToPark, bruteParked, b.lag)
		become(bruteStoppingToGo, bruteGone, b.lag)
	}
}

// placeJobs tries every placement of the waiting jobs from i on.
func (b *bruteForce) placeJobs(p position, cost float64, i int) {
	if i == len(b.jobs) {
		b.wait(p, cost)
		return
	}
	b.placeJobs(p, cost, i+1)
	if p.waits[i] == 0 || b.jobs[i].Arrival > int64(p.at) {
		return
	}
	key, duration := b.keys[i], b.jobs[i].Duration
	for at, n := range p.nodes {
		slot := slices.Index(n.runs[:b.world.Slots], 0)
		if n.state != bruteReady || slot < 0 {
			continue
		}
		took, slowed := duration, 0.0
		if !n.warm(key, b.warmFor) {
			took = b.world.Cold(duration)
			slowed = b.delay * float64(took-duration)
		}
		next := p
		next.nodes[at].runs[slot], next.nodes[at].key[slot] = int8(took), key
		next.waits[i] = 0
		b.placeJobs(next, cost+slowed, i+1)
	}
}

// wait pays for the second that begins now, and lets it pass.
func (b *bruteForce) wait(p position, cost float64) {
	starting := 0
	for i := range p.nodes {
		n := &p.nodes[i]
		switch n.state {
		case bruteGone:
			continue
		case bruteParked:
			cost += b.parked
		default:
			cost += b.price
		}
		if n.state == bruteStarting {
			starting++
		}
		for key := range n.used {
			if n.used[key] != 0 && n.used[key] <= b.warmFor+1 {
				n.used[key]++
			}
		}
		for slot := range n.runs {
			if n.runs[slot] == 0 {
				continue
			}
			if n.runs[slot]--; n.runs[slot] == 0 {
				key := n.key[slot]
				n.key[slot] = 0
				n.used[key] = 1
				if b.world.KeysHeld == 1 {
					n.used[1-key] = 0
				}
			}
		}
		if n.left > 0 {
			if n.left--; n.left == 0 {
				switch n.state {
				case bruteStarting:
					n.state = bruteReady
				case bruteStoppingToPark:
					n.state = bruteParked
				case bruteStoppingToGo:
					*n = bruteNode{}
				}
			}
		}
	}
	// The jobs that have most of their turn left come first.
	turn := max(b.boot, b.resume)
	var own []*int8
	for i := range b.jobs {
		if p.waits[i] == 0 || b.jobs[i].Arrival > int64(p.at) {
			continue
		}
		cost += b.delay
		if p.waits[i] <= turn {
			own = append(own, &p.waits[i])
		}
	}
	slices.SortStableFunc(own, func(a, b *int8) int { return cmp.Compare(*a, *b) })
	for _, waits := range own[:min(starting, len(own))] {
		*waits++
	}
	if alone := starting - len(own); alone > 0 && b.headStart > 0 {
		cost += b.headStart * float64(alone)
	}
	p.at++
	b.reach(p, cost)
}

// More to do, or dearer, is never cheaper; dearer in everything is dearer by
// as much; when it all happens does not matter.
func TestBoundsGrow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		trace, world := mediumCase(t)
		reactive, prescient := Bounds(trace, world)
		if reactive < prescient {
			t.Errorf("reactive %v is below prescient %v", reactive, prescient)
		}
		if prescient < 0 || math.IsNaN(reactive) || math.IsInf(reactive, 0) {
			t.Errorf("reactive %v, prescient %v", reactive, prescient)
		}
		grows := func(what string, trace Trace, world World) {
			t.Helper()
			r, p := Bounds(trace, world)
			if !atMost(reactive, r) || !atMost(prescient, p) {
				t.Errorf("%s: from %v and %v to %v and %v", what, reactive, prescient, r, p)
			}
		}
		factor := rapid.Float64Range(1, 3).Draw(t, "factor")
		dearer := world
		dearer.Price *= factor
		grows("price", trace, dearer)
		dearer = world
		dearer.DelayPrice *= factor
		grows("delay price", trace, dearer)
		dearer = world
		dearer.WarmFor /= 2
		dearer.WarmFor = dearer.WarmFor.Truncate(time.Second)
		grows("warm for less", trace, dearer)

		dearer = world
		dearer.Price, dearer.ParkedPrice, dearer.DelayPrice = factor*world.Price, factor*world.ParkedPrice, factor*world.DelayPrice
		if r, p := Bounds(trace, dearer); !near(r, factor*reactive) || !near(p, factor*prescient) {
			t.Errorf("all %v times as dear: from %v and %v to %v and %v", factor, reactive, prescient, r, p)
		}

		later := Trace{Jobs: slices.Clone(trace.Jobs)}
		for i := range later.Jobs {
			later.Jobs[i].Arrival += 1_700_000_000
		}
		if r, p := Bounds(later, world); r != reactive || p != prescient {
			t.Errorf("later: from %v and %v to %v and %v", reactive, prescient, r, p)
		}

		// Cold caches aside: a long start makes groups harder to tell apart, and
		// one more job can join two groups.
		world.ColdFactor = 0
		reactive, prescient = Bounds(trace, world)
		dearer = world
		dearer.Boot += time.Minute
		grows("boot", trace, dearer)
		dearer = world
		dearer.Resume += time.Minute
		grows("resume", trace, dearer)
		more := Trace{Jobs: append(slices.Clone(trace.Jobs), mediumJob(t, "more"))}
		grows("one more job", more, world)
	})
}

func TestBoundsIgnoreOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		trace, world := mediumCase(t)
		before := slices.Clone(trace.Jobs)
		reactive, prescient := Bounds(trace, world)
		if !slices.Equal(before, trace.Jobs) {
			t.Fatal("the trace was changed")
		}
		shuffled := Trace{Jobs: rapid.Permutation(trace.Jobs).Draw(t, "order")}
		if r, p := Bounds(shuffled, world); r != reactive || p != prescient {
			t.Errorf("in another order %v and %v, want %v and %v", r, p, reactive, prescient)
		}
	})
}

func mediumCase(t *rapid.T) (Trace, World) {
	world := DefaultWorld()
	world.Slots = rapid.IntRange(1, 4).Draw(t, "slots")
	world.Price = rapid.Float64Range(0, 10).Draw(t, "price")
	world.ParkedPrice = rapid.Float64Range(0, 2).Draw(t, "parked price")
	world.DelayPrice = rapid.Float64Range(0, 50).Draw(t, "delay price")
	world.WarmFor = time.Duration(rapid.IntRange(0, 10_000).Draw(t, "warm for")) * time.Second
	var trace Trace
	for i := range rapid.IntRange(0, 40).Draw(t, "jobs") {
		trace.Jobs = append(trace.Jobs, mediumJob(t, fmt.Sprint(i)))
	}
	return trace, world
}

func mediumJob(t *rapid.T, id string) Job {
	return Job{
		ID:       id,
		Arrival:  rapid.Int64Range(0, 20_000).Draw(t, "arrival"),
		Duration: rapid.Int64Range(1, 3000).Draw(t, "duration"),
		Key:      rapid.SampledFrom([]model.CacheKey{"a", "b", "c", "d", "e"}).Draw(t, "key"),
	}
}

// On real traces: every policy we have is above the prescient bound.
func TestBoundsOnRealTraces(t *testing.T) {
	dir := os.Getenv("HEARTH_TRACES")
	if dir == "" {
		t.Skip("HEARTH_TRACES names no folder of traces")
	}
	for _, name := range []string{"bitcoin-core-ci", "multi-repo-gha"} {
		t.Run(name, func(t *testing.T) {
			file, err := os.Open(filepath.Join(dir, name, "jobs.csv.gz"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			trace, err := Read(name, file)
			if err != nil {
				t.Fatal(err)
			}
			world := DefaultWorld()
			reactive, prescient := Bounds(trace, world)
			t.Logf("%d jobs, %d keys: reactive $%.0f, prescient $%.0f", len(trace.Jobs), trace.Keys(), reactive, prescient)
			for _, policy := range Policies() {
				result, err := Run(trace, world, policy, Options{Seed: 1})
				if err != nil {
					t.Error(err)
					continue
				}
				t.Logf("%-16s $%.0f, %.2f × reactive, %.2f × prescient", result.Name, result.Total(), result.Total()/reactive, result.Total()/prescient)
				if !atMost(prescient, result.Total()) {
					t.Errorf("%s costs $%v, less than the prescient bound %v", result.Name, result.Total(), prescient)
				}
			}
		})
	}
}

func BenchmarkBounds(b *testing.B) {
	for _, jobs := range []int{10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(jobs), func(b *testing.B) {
			random := rand.New(rand.NewPCG(1, 2))
			var trace Trace
			now := int64(1_700_000_000)
			for len(trace.Jobs) < jobs { // bursts, up to 500 jobs at once
				now += random.Int64N(1000)
				for range 1 + random.IntN(36) {
					trace.Jobs = append(trace.Jobs, Job{
						Arrival: now, Duration: 1 + random.Int64N(5000),
						Key: model.CacheKey(fmt.Sprint(random.IntN(2000))),
					})
				}
			}
			world := DefaultWorld()
			b.ReportAllocs()
			for b.Loop() {
				Bounds(trace, world)
			}
		})
	}
}
