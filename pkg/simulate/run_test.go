package simulate_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/simulate"
)

func drawTrace(t *rapid.T) simulate.Trace {
	trace := simulate.Trace{Name: "drawn"}
	at := int64(t0)
	for i := range rapid.IntRange(1, 40).Draw(t, "jobs") {
		// Bursts, minutes, and days in which caches go cold.
		at += rapid.SampledFrom([]int64{0, 0, 0, 1, 20, 45, 60, 120, 300, 599, 600, 1000, 5000, 40_000, 300_000}).Draw(t, "gap")
		key := rapid.IntRange(0, 5).Draw(t, "key")
		trace.Jobs = append(trace.Jobs, simulate.Job{
			ID: fmt.Sprint(i), Arrival: at, Duration: rapid.Int64Range(1, 900).Draw(t, "duration"),
			Key: model.CacheKey(fmt.Sprint("k", key)), Group: fmt.Sprint("g", key%2),
		})
	}
	trace.Sort()
	return trace
}

func drawWorld(t *rapid.T) simulate.World {
	second := func(name string, most int) time.Duration {
		return time.Duration(rapid.IntRange(0, most).Draw(t, name)) * time.Second
	}
	return simulate.World{
		Boot: second("boot", 200), Resume: second("resume", 100), ReleaseLag: second("lag", 60),
		Price: rapid.Float64Range(0, 2).Draw(t, "price"), ParkedPrice: rapid.Float64Range(0, 0.5).Draw(t, "parked"),
		Slots: rapid.IntRange(1, 3).Draw(t, "slots"), ColdFactor: rapid.Float64Range(0, 3).Draw(t, "cold"),
		KeysHeld: rapid.IntRange(0, 6).Draw(t, "held"), WarmFor: second("warm", 500_000),
		DelayPrice: rapid.Float64Range(0, 60).Draw(t, "delay"), MaxNodes: rapid.IntRange(0, 5).Draw(t, "max"),
	}
}

// ledger follows every node by the changes that Watch tells of, apart from the
// engine's own sums.
type ledger struct {
	world simulate.World
	since map[int]int64
	state map[int]simulate.State
	spent [7]int64
	most  int
}

func (l *ledger) watch(at int64, n *simulate.Node) {
	l.until(n.ID, at)
	l.state[n.ID] = n.State
	running := 0
	for _, s := range l.state {
		if s != simulate.Parked && s != simulate.Gone {
			running++
		}
	}
	l.most = max(l.most, running)
}

func (l *ledger) until(id int, at int64) {
	if s, known := l.state[id]; known && s != simulate.Gone {
		l.spent[s] += at - l.since[id]
	}
	l.since[id] = at
}

// TestRun holds every policy, in drawn worlds and on drawn traces, to what must
// be true of all.
func TestRun(t *testing.T) {
	for _, policy := range simulate.Policies() {
		t.Run(policy.Name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				trace, world := drawTrace(t), drawWorld(t)
				l := &ledger{world: world, since: map[int]int64{}, state: map[int]simulate.State{}}
				var last int64
				o := simulate.Options{
					Seed: rapid.Uint64().Draw(t, "seed"), GroupOnly: rapid.Bool().Draw(t, "group only"),
					Halves: true, Samples: rapid.IntRange(0, 30).Draw(t, "samples"),
					Watch: func(at int64, n *simulate.Node) {
						if at < last {
							t.Fatalf("time goes back from %d to %d", last, at)
						}
						last = at
						l.watch(at, n)
					},
				}
				r, err := simulate.Run(trace, world, policy, o)
				if err != nil {
					t.Fatal(err)
				}
				checkConserved(t, trace, world, r)
				if world.MaxNodes > 0 && l.most > world.MaxNodes {
					t.Fatalf("%d nodes ran, the limit is %d", l.most, world.MaxNodes)
				}
				checkLedger(t, l, r)

				shuffled := trace
				shuffled.Jobs = slices.Clone(trace.Jobs)
				random := rand.New(rand.NewPCG(o.Seed, 7))
				random.Shuffle(len(shuffled.Jobs), func(i, j int) {
					shuffled.Jobs[i], shuffled.Jobs[j] = shuffled.Jobs[j], shuffled.Jobs[i]
				})
				o.Watch = nil
				again, err := simulate.Run(shuffled, world, policy, o)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(r, again); diff != "" {
					t.Fatalf("the order of the input shows, or chance:\n%s", diff)
				}
			})
		})
	}
}

// checkConserved: every job ran once, halves add up, and nothing is cheaper
// than the bounds.
func checkConserved(t *rapid.T, trace simulate.Trace, w simulate.World, r simulate.Result) {
	if r.Jobs != len(trace.Jobs) {
		t.Fatalf("%d of %d jobs ran", r.Jobs, len(trace.Jobs))
	}
	var work int64
	for _, j := range trace.Jobs {
		work += j.Duration
	}
	if busy := r.NodeSeconds[simulate.Busy]; busy*int64(w.Slots) < work+r.Slowed || busy > work+r.Slowed {
		t.Fatalf("nodes were busy for %d s with %d s of work in %d slots", busy, work+r.Slowed, w.Slots)
	}
	if r.Warm > r.Jobs || r.AfterBoot+r.AfterResume+r.AfterJob > r.Jobs || r.WaitP50 > r.WaitP95 || r.WaitP95 > r.WaitP99 {
		t.Fatalf("%+v does not fit together", r.Summary)
	}
	if r.First.Jobs+r.Second.Jobs != r.Jobs || r.First.Launches+r.Second.Launches != r.Launches ||
		!near(r.First.Total()+r.Second.Total(), r.Total()) {
		t.Fatalf("the halves\n%+v and\n%+v do not add up to\n%+v", *r.First, *r.Second, r.Summary)
	}
	if want := r.RunningNodeHours()*w.Price + r.ParkedNodeHours()*w.ParkedPrice; !near(r.Infrastructure, want) {
		t.Fatalf("infrastructure is $%v, want %v", r.Infrastructure, want)
	}
	if _, prescient := simulate.Bounds(trace, w); r.Total() < prescient-1e-6 {
		t.Fatalf("total $%v is less than the bound %v", r.Total(), prescient)
	}
}

// checkLedger: money is the sum of what every node did, and samples are its
// course.
func checkLedger(t *rapid.T, l *ledger, r simulate.Result) {
	for id := range l.state {
		l.until(id, r.End)
	}
	if diff := cmp.Diff(l.spent, r.NodeSeconds); diff != "" {
		t.Fatalf("node seconds by state (-by node +counted):\n%s", diff)
	}
	var sampled, counted float64
	for i, s := range r.Samples {
		until := r.End
		if i+1 < len(r.Samples) {
			until = r.Samples[i+1].At
		}
		for state, n := range s.Nodes {
			sampled += n * float64(until-s.At)
			counted += float64(r.NodeSeconds[state]) / float64(len(r.Samples))
		}
	}
	if !near(sampled, counted) {
		t.Fatalf("samples add up to %v node seconds of %v", sampled, counted)
	}
}

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-9*(1+math.Abs(a)+math.Abs(b)) }

// TestAlwaysOn: its pool is large enough that no job ever waits.
func TestAlwaysOn(t *testing.T) {
	policy, err := simulate.FindPolicy("always-on")
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		world := drawWorld(t)
		world.MaxNodes = 0
		r, err := simulate.Run(drawTrace(t), world, policy, simulate.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Waited != 0 {
			t.Fatalf("jobs waited for %d s", r.Waited)
		}
	})
}

// TestLongerIdle: with one job at a time and warm placement, a node that is
// kept much longer is launched no more often and warm no less often.
func TestLongerIdle(t *testing.T) {
	short, err1 := simulate.FindPolicy("ca-default")
	long, err2 := simulate.FindPolicy("ca-60m")
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		world := simulate.DefaultWorld()
		world.WarmFor = 365 * 24 * time.Hour
		var trace simulate.Trace
		at := int64(t0)
		for i := range rapid.IntRange(1, 50).Draw(t, "jobs") {
			duration := rapid.Int64Range(1, 500).Draw(t, "duration")
			trace.Jobs = append(trace.Jobs, simulate.Job{ID: fmt.Sprint(i), Arrival: at, Duration: duration, Key: "k"})
			at += 120 + world.Cold(duration) + rapid.Int64Range(0, 8000).Draw(t, "gap")
		}
		a, err1 := simulate.Run(trace, world, short, simulate.Options{})
		b, err2 := simulate.Run(trace, world, long, simulate.Options{})
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if b.Launches > a.Launches || b.Warm < a.Warm {
			t.Fatalf("10 min: %d launches, %d warm; 60 min: %d launches, %d warm", a.Launches, a.Warm, b.Launches, b.Warm)
		}
	})
}

func TestRunRefuses(t *testing.T) {
	policy := simulate.Policies()[0]
	job := simulate.Job{ID: "a", Arrival: t0, Duration: 10, Key: "k"}
	broken := errors.New("broken off")
	for name, run := range map[string]func() error{
		"no jobs": func() error {
			_, err := simulate.Run(simulate.Trace{}, simulate.DefaultWorld(), policy, simulate.Options{})
			return err
		},
		"no duration": func() error {
			job := job
			job.Duration = 0
			_, err := simulate.Run(simulate.Trace{Jobs: []simulate.Job{job}}, simulate.DefaultWorld(), policy, simulate.Options{})
			return err
		},
		"no slots": func() error {
			w := simulate.DefaultWorld()
			w.Slots = 0
			_, err := simulate.Run(simulate.Trace{Jobs: []simulate.Job{job}}, w, policy, simulate.Options{})
			return err
		},
		"fractions of a second": func() error {
			w := simulate.DefaultWorld()
			w.Boot = time.Millisecond
			_, err := simulate.Run(simulate.Trace{Jobs: []simulate.Job{job}}, w, policy, simulate.Options{})
			return err
		},
		"progress": func() error {
			trace := simulate.Trace{Jobs: make([]simulate.Job, 5000)}
			for i := range trace.Jobs {
				trace.Jobs[i] = job
			}
			_, err := simulate.Run(trace, simulate.DefaultWorld(), policy, simulate.Options{Progress: func(int) error { return broken }})
			if !errors.Is(err, broken) {
				t.Errorf("progress: error %v, want %v", err, broken)
			}
			return err
		},
	} {
		if err := run(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// scripted is a policy made of functions.
type scripted struct {
	place func(*simulate.Fleet, *simulate.Pod) simulate.Choice
	plan  func(*simulate.Fleet) simulate.Plan
}

func (scripted) Arrived(*simulate.Fleet, *simulate.Pod)  {}
func (scripted) Finished(*simulate.Fleet, *simulate.Pod) {}
func (s scripted) Place(f *simulate.Fleet, p *simulate.Pod) simulate.Choice {
	return s.place(f, p)
}
func (s scripted) Plan(f *simulate.Fleet) simulate.Plan { return s.plan(f) }

// TestPolicyMistakes: a policy that asks for the impossible is an error, never
// a wrong figure.
func TestPolicyMistakes(t *testing.T) {
	nothing := func(*simulate.Fleet) simulate.Plan { return simulate.Plan{} }
	launch := func(f *simulate.Fleet, p *simulate.Pod) simulate.Choice {
		switch {
		case len(f.Idle) > 0:
			return simulate.Take(f.Idle[0])
		case p.Promise != nil:
			return simulate.Wait()
		}
		return simulate.Launch()
	}
	whenBusy := func(plan func(*simulate.Node) simulate.Plan) func(*simulate.Fleet) simulate.Plan {
		return func(f *simulate.Fleet) simulate.Plan {
			for _, n := range f.All {
				if n.State == simulate.Busy {
					return plan(n)
				}
			}
			return simulate.Plan{}
		}
	}
	for name, s := range map[string]scripted{
		"waits for nothing": {place: func(*simulate.Fleet, *simulate.Pod) simulate.Choice { return simulate.Wait() }, plan: nothing},
		"places on a node that boots": {place: func(f *simulate.Fleet, _ *simulate.Pod) simulate.Choice {
			if len(f.OnTheWay) > 0 {
				return simulate.Take(f.OnTheWay[0])
			}
			return simulate.Launch()
		}, plan: nothing},
		"places on a full node": {place: func(f *simulate.Fleet, p *simulate.Pod) simulate.Choice {
			if p.ID == "b" && f.All[0].State == simulate.Busy {
				return simulate.Take(f.All[0])
			}
			return launch(f, p)
		}, plan: nothing},
		"awaits a busy node": {place: func(f *simulate.Fleet, p *simulate.Pod) simulate.Choice {
			if p.ID == "b" && f.All[0].State == simulate.Busy {
				return simulate.Await(f.All[0])
			}
			return launch(f, p)
		}, plan: nothing},
		"parks a busy node":    {launch, whenBusy(func(n *simulate.Node) simulate.Plan { return simulate.Plan{Park: []*simulate.Node{n}} })},
		"releases a busy node": {launch, whenBusy(func(n *simulate.Node) simulate.Plan { return simulate.Plan{Release: []*simulate.Node{n}} })},
		"resumes a busy node":  {launch, whenBusy(func(n *simulate.Node) simulate.Plan { return simulate.Plan{Resume: []*simulate.Node{n}} })},
		"plans in the past":    {launch, func(f *simulate.Fleet) simulate.Plan { return simulate.Plan{Next: f.Now} }},
	} {
		trace := simulate.Trace{Jobs: []simulate.Job{
			{ID: "a", Arrival: t0, Duration: 100, Key: "k"}, {ID: "b", Arrival: t0 + 1, Duration: 100, Key: "k"},
		}}
		_, err := simulate.Run(trace, simulate.DefaultWorld(), simulate.NamedPolicy{
			Name: name, New: func(simulate.Trace, simulate.World, *rand.Rand) simulate.Policy { return s },
		}, simulate.Options{})
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestFindPolicy(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range simulate.Policies() {
		if seen[p.Name] || p.Doc == "" {
			t.Errorf("policy %q is there twice or has no doc", p.Name)
		}
		seen[p.Name] = true
	}
	if _, err := simulate.FindPolicy("no-such"); err == nil {
		t.Error("found a policy that does not exist")
	}
}

// realTrace reads one of the shared traces, or skips.
func realTrace(tb testing.TB, name string) simulate.Trace {
	tb.Helper()
	dir := os.Getenv("HEARTH_TRACES")
	if dir == "" {
		tb.Skip("HEARTH_TRACES is not set: no real traces to read")
	}
	file, err := os.Open(filepath.Join(dir, name, "jobs.csv.gz"))
	if errors.Is(err, os.ErrNotExist) {
		tb.Skipf("%s is not in HEARTH_TRACES", name)
	}
	if err != nil {
		tb.Fatal(err)
	}
	defer file.Close()
	trace, err := simulate.Read(name, file)
	if err != nil {
		tb.Fatal(err)
	}
	return trace
}

func TestRealTraces(t *testing.T) {
	for name, want := range map[string][4]int{ // jobs, keys, rows, rejected
		"bitcoin-core-ci": {9542, 26, 17002, 7460},
		"multi-repo-gha":  {11524, 28, 11941, 417},
	} {
		trace := realTrace(t, name)
		if got := [4]int{len(trace.Jobs), trace.Keys(), trace.Rows, len(trace.Rejected)}; got != want {
			t.Errorf("%s: jobs, keys, rows, rejected are %v, want %v", name, got, want)
		}
	}
}

// TestRoughReplay compares with a replay that was written apart from this one,
// in 60 lines: one node, one job; a job waits for the node that was started for
// it and takes no other; a release costs nothing. So the shares of boots and
// resumes contain what is a wait for a job here, and money is a little less.
func TestRoughReplay(t *testing.T) {
	trace := realTrace(t, "bitcoin-core-ci")
	for _, want := range []struct {
		policy                                         string
		infrastructure, warm, boot, resume, delayPrice float64
	}{
		{"ca-default", 2190, 0.024, 0.789, 0, 50066},
		{"warm-pool-any", 1995, 0.667, 0.011, 0.86, 17615},
		{"simple-park-1m", 1528, 0.960, 0.018, 0.95, 5590},
		{"simple-park-5m", 1748, 0.961, 0.018, 0.85, 5173},
		{"simple-park-10m", 1999, 0.961, 0.019, 0.77, 4832},
	} {
		p, err := simulate.FindPolicy(want.policy)
		if err != nil {
			t.Fatal(err)
		}
		r, err := simulate.Run(trace, simulate.DefaultWorld(), p, simulate.Options{Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		waited := r.BootShare() + r.ResumeShare() + r.QueueShare()
		for _, c := range []struct {
			name           string
			got, want, off float64
		}{
			{"infrastructure", r.Infrastructure, want.infrastructure, 0.02 * want.infrastructure},
			{"warm hits", r.WarmHitRate(), want.warm, 0.01},
			{"jobs that waited", waited, want.boot + want.resume, 0.015},
			{"delay", r.Delay, want.delayPrice, 0.06 * want.delayPrice},
		} {
			if math.Abs(c.got-c.want) > c.off {
				t.Errorf("%s: %s %.4g, the rough replay has %.4g", want.policy, c.name, c.got, c.want)
			}
		}
	}
}

// BenchmarkRun is the size that has to take 60 s and 1 GiB at most for each
// policy: a million jobs with 2,000 keys on 500 nodes; then ten times the nodes.
func BenchmarkRun(b *testing.B) {
	for _, size := range []struct{ nodes, weeks int }{{500, 12}, {5000, 1}} {
		g := simulate.DefaultGenerated()
		g.Jobs, g.Keys, g.Weeks = 1_000_000, 2000, size.weeks
		trace, err := simulate.Generate(g, rand.New(rand.NewPCG(1, 1)))
		if err != nil {
			b.Fatal(err)
		}
		world := simulate.DefaultWorld()
		world.MaxNodes = size.nodes
		for _, name := range []string{"ca-default", "greedy-dual", "simple-park-10m", "hearth"} {
			p, err := simulate.FindPolicy(name)
			if err != nil {
				b.Fatal(err)
			}
			b.Run(fmt.Sprintf("%s/%d", p.Name, size.nodes), func(b *testing.B) {
				for b.Loop() {
					if _, err := simulate.Run(trace, world, p, simulate.Options{Seed: 1}); err != nil {
						b.Fatal(err)
					}
				}
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				b.ReportMetric(float64(m.Sys)/(1<<20), "MiB")
			})
		}
	}
}
