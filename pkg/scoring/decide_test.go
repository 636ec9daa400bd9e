package scoring_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// costs are round: a resume costs $0.375 of waiting, so a running node that
// could be parked reaches its bound after 0.375 / 0.388 h, about 58 minutes.
func costs() scoring.Costs {
	return scoring.Costs{
		Running: 0.40, Parked: 0.012, TimeValue: 30,
		Boot: 120 * time.Second, Resume: 45 * time.Second, ColdPenalty: 3 * time.Minute,
	}
}

func decided(a scoring.Answer) map[model.InstanceID]string {
	out := map[model.InstanceID]string{}
	for _, v := range a.Verdicts {
		out[v.Instance] = string(v.Decision) + " " + v.Reasons[len(v.Reasons)-1].Code
	}
	return out
}

// experienced is a memory of two weeks until now in which size jobs arrived
// together perHour times every hour; nodes were kept for them, or else they
// waited.
func experienced(size, perHour int, kept bool) *scoring.Memory {
	idle := 0
	if kept {
		idle = size
	}
	m := scoring.NewMemory(costs())
	for at := now.Add(-14 * 24 * time.Hour); at.Before(now); at = at.Add(time.Hour / time.Duration(perHour)) {
		m.Ledger.Nodes(0, idle, at)
		for i := range size {
			m.JobArrived(scoring.KeyOf(model.CacheKey(fmt.Sprint("k", i))), i+1, 1, at)
			m.Ledger.Job(!kept)
		}
		m.Ledger.Nodes(size, 0, at)
		m.Ledger.Nodes(0, idle, at.Add(5*time.Minute))
	}
	return m
}

func TestDecide(t *testing.T) {
	three := []scoring.Node{node("a", time.Hour, "k0"), node("b", time.Hour, "k0"), node("c", time.Hour, "k0")}
	for _, tc := range []struct {
		name   string
		nodes  []scoring.Node
		bounds scoring.Bounds
		memory *scoring.Memory
		want   map[model.InstanceID]string
		resume []model.InstanceID
	}{
		{
			name:   "coldest first, min-warm stays",
			nodes:  []scoring.Node{node("warm", 5*time.Hour, "a", "b"), node("tepid", 5*time.Hour, "a"), node("cold", 5*time.Hour)},
			bounds: scoring.Bounds{MinWarm: 1, MaxWarm: 10, Park: true},
			want:   map[model.InstanceID]string{"cold": "park idle", "tepid": "park idle", "warm": "keep min-warm"},
		}, {
			name:   "while nothing is known, a third of the bound is kept",
			nodes:  []scoring.Node{node("a", 19*time.Minute, "k"), node("b", 20*time.Minute, "k")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true},
			want:   map[model.InstanceID]string{"a": "keep bound", "b": "park idle"},
		}, {
			name:   "once it is known that giving up early was cheaper, no longer than going and coming back takes",
			nodes:  []scoring.Node{node("a", 64*time.Second, "k9"), node("b", 65*time.Second, "k9")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true}, memory: experienced(2, 1, false),
			want: map[model.InstanceID]string{"a": "keep recent", "b": "park idle"},
		}, {
			name:  "the forecast keeps as many as are used often enough",
			nodes: three, bounds: scoring.Bounds{MaxWarm: 10, Park: true}, memory: experienced(2, 4, true),
			want: map[model.InstanceID]string{"a": "keep forecast", "b": "keep forecast", "c": "park idle"},
		}, {
			name:   "no forecast keeps beyond trust times the bound",
			nodes:  []scoring.Node{node("a", 174*time.Minute, "k0"), node("b", 173*time.Minute, "k0")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true}, memory: experienced(2, 4, true),
			want: map[model.InstanceID]string{"a": "park bound", "b": "keep forecast"},
		}, {
			name:   "max-warm and max-idle win",
			nodes:  []scoring.Node{node("a", time.Second, "k"), node("b", 2*time.Second), node("c", time.Second)},
			bounds: scoring.Bounds{MaxWarm: 2, MaxIdle: new(2 * time.Second)},
			want:   map[model.InstanceID]string{"a": "keep recent", "b": "release max-warm", "c": "keep recent"},
		}, {
			name:   "min-warm above max-warm wins",
			nodes:  []scoring.Node{node("a", time.Hour), node("b", time.Hour)},
			bounds: scoring.Bounds{MinWarm: 2, MaxWarm: 1, Park: true},
			want:   map[model.InstanceID]string{"a": "keep min-warm", "b": "keep min-warm"},
		}, {
			name:   "where parking is off the absence costs a boot and the cache",
			nodes:  []scoring.Node{node("cold", 51*time.Minute), node("warm", 51*time.Minute, "k")},
			bounds: scoring.Bounds{MaxWarm: 10},
			want:   map[model.InstanceID]string{"cold": "release idle", "warm": "keep bound"},
		}, {
			name:   "parked nodes come back before a burst that pays for them",
			nodes:  []scoring.Node{node("a", time.Minute, "k0"), parked("b", time.Hour, "k0"), parked("c", time.Hour, "k1")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true}, memory: experienced(2, 4, true),
			want:   map[model.InstanceID]string{"a": "keep recent", "b": "keep recent", "c": "keep recent"},
			resume: []model.InstanceID{"c"},
		}, {
			name:   "not where max-idle would give them up at once",
			nodes:  []scoring.Node{parked("b", time.Hour, "k0")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true, MaxIdle: new(time.Minute)}, memory: experienced(2, 4, true),
			want: map[model.InstanceID]string{"b": "keep recent"},
		}, {
			name:   "but not when one is on its way",
			nodes:  []scoring.Node{node("a", time.Minute, "k0"), parked("b", time.Hour, "k0"), parked("c", time.Hour, "k1")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true, Coming: 1}, memory: experienced(2, 4, true),
			want: map[model.InstanceID]string{"a": "keep recent", "b": "keep recent", "c": "keep recent"},
		}, {
			name:   "storage is cheap, and not for ever",
			nodes:  []scoring.Node{parked("old", 60*24*time.Hour, "k"), parked("young", 24*time.Hour, "k")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true},
			want:   map[model.InstanceID]string{"old": "release parked-too-long", "young": "keep recent"},
		}, {
			name: "nothing", want: map[model.InstanceID]string{},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer := scoring.Decide(scoring.Request{Nodes: tc.nodes, Bounds: tc.bounds, Costs: costs(), Memory: tc.memory, Now: now})
			if diff := cmp.Diff(tc.want, decided(answer)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tc.resume, answer.Resume); diff != "" {
				t.Errorf("resumed: %s", diff)
			}
			if !answer.Next.After(now) {
				t.Errorf("next change at %s, which is not after now", answer.Next)
			}
		})
	}
}

func randomFleet(t *rapid.T) []scoring.Node {
	nodes := make([]scoring.Node, rapid.IntRange(0, 30).Draw(t, "nodes"))
	for i := range nodes {
		n := node(fmt.Sprintf("i-%02d", i), time.Duration(rapid.IntRange(0, 72000).Draw(t, "idle"))*time.Second)
		n.Parked = rapid.Bool().Draw(t, "parked")
		for range rapid.IntRange(0, 30).Draw(t, "keys") {
			n.Uses = scoring.Used(n.Uses, use(fmt.Sprint("k", rapid.IntRange(0, 40).Draw(t, "key")),
				time.Duration(rapid.IntRange(0, 100).Draw(t, "age"))*time.Hour, rapid.IntRange(1, 50).Draw(t, "count")))
		}
		nodes[i] = n
	}
	return nodes
}

func TestDecideProperties(t *testing.T) {
	memory := experienced(5, 4, true)
	rapid.Check(t, func(t *rapid.T) {
		r := scoring.Request{
			Nodes: randomFleet(t), Costs: costs(), Memory: memory, Now: now,
			Bounds: scoring.Bounds{
				MinWarm: rapid.IntRange(0, 10).Draw(t, "min"), MaxWarm: rapid.IntRange(0, 20).Draw(t, "max"),
				Park: rapid.Bool().Draw(t, "park"), Prewarm: rapid.Bool().Draw(t, "prewarm"),
			},
		}
		answer := scoring.Decide(r)
		shuffled := r
		shuffled.Nodes = slices.Clone(r.Nodes)
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		random.Shuffle(len(shuffled.Nodes), func(i, j int) {
			shuffled.Nodes[i], shuffled.Nodes[j] = shuffled.Nodes[j], shuffled.Nodes[i]
		})
		if diff := cmp.Diff(answer, scoring.Decide(shuffled)); diff != "" {
			t.Fatalf("the order of the input matters: %s", diff)
		}
		if len(answer.Verdicts) != len(r.Nodes) {
			t.Fatalf("%d verdicts for %d nodes", len(answer.Verdicts), len(r.Nodes))
		}
		byID := map[model.InstanceID]scoring.Node{}
		idle := 0
		for _, n := range r.Nodes {
			byID[n.Instance] = n
			if !n.Parked {
				idle++
			}
		}
		kept := 0
		for _, v := range answer.Verdicts {
			n := byID[v.Instance]
			switch {
			case len(v.Reasons) == 0:
				t.Fatalf("%s: no reason given", v.Instance)
			case n.Parked && v.Decision == model.DecisionPark:
				t.Fatalf("parked node %s is to be parked", v.Instance)
			case !n.Parked && v.Decision == model.DecisionKeep:
				kept++
			}
		}
		if kept < min(idle, r.Bounds.MinWarm) {
			t.Fatalf("%d idle nodes kept, min-warm is %d of %d", kept, r.Bounds.MinWarm, idle)
		}
		if most := max(r.Bounds.MaxWarm, r.Bounds.MinWarm); kept > most {
			t.Fatalf("%d idle nodes kept, max-warm is %d", kept, most)
		}
		if idle+len(answer.Resume) > max(idle, r.Bounds.MaxWarm) {
			t.Fatalf("%d nodes resumed beside %d idle ones, max-warm is %d", len(answer.Resume), idle, r.Bounds.MaxWarm)
		}
		for _, id := range answer.Resume {
			if !byID[id].Parked || !r.Bounds.Prewarm {
				t.Fatalf("%s is to be resumed", id)
			}
		}
	})
}

// TestNext holds the promise that a plan does not change before Next when
// nothing happens, but for a forecast, which fades.
func TestNext(t *testing.T) {
	memory := experienced(3, 4, true)
	kept := func(a scoring.Answer) (n int) {
		for _, v := range a.Verdicts {
			if v.Decision == model.DecisionKeep {
				n++
			}
		}
		return n
	}
	rapid.Check(t, func(t *rapid.T) {
		r := scoring.Request{Nodes: randomFleet(t), Costs: costs(), Now: now, Bounds: scoring.Bounds{MaxWarm: 20, Park: rapid.Bool().Draw(t, "park")}}
		if rapid.Bool().Draw(t, "forecast") {
			r.Memory = memory
		}
		first := scoring.Decide(r)
		if !first.Next.After(now) {
			t.Fatalf("next change at %s, which is not after now", first.Next)
		}
		if slices.ContainsFunc(first.Verdicts, scoring.Wanted) {
			if in := first.Next.Sub(now); in > 5*time.Minute {
				t.Fatalf("a forecast is to be looked at again in %s", in)
			}
			return
		}
		r.Now = now.Add(time.Duration(rapid.Float64Range(0, 1).Draw(t, "part") * float64(first.Next.Sub(now)-1)))
		// Warmth decays all the time, and may reorder nodes of nearly the same
		// worth; how many go does not change.
		if a, b := kept(first), kept(scoring.Decide(r)); a != b {
			t.Fatalf("%d kept at first and %d before Next", a, b)
		}
	})
}

// TestPace: idle nodes go coldest first and by halves; one that does not go
// holds up nobody; and what was let go is not taken back on a whim.
func TestPace(t *testing.T) {
	cold := []scoring.Node{node("a", time.Hour), node("b", time.Hour), node("c", time.Hour), node("d", time.Hour)}
	wanted := func(n scoring.Node, ago time.Duration) scoring.Node {
		n.WantedAt = now.Add(-ago)
		return n
	}
	memory := experienced(4, 4, true)
	for _, tc := range []struct {
		name   string
		nodes  []scoring.Node
		memory *scoring.Memory
		want   map[model.InstanceID]string
	}{
		{"half of what may go", cold, nil, map[model.InstanceID]string{"a": "release idle", "b": "release idle", "c": "keep later", "d": "keep later"}},
		{"one that does not go holds up nobody", []scoring.Node{released(cold[0], 5*time.Minute), cold[1], cold[2]}, nil,
			map[model.InstanceID]string{"a": "release idle", "b": "release idle", "c": "keep later"}},
		{"wanted again just now", []scoring.Node{released(node("a", 10*time.Minute), time.Minute)}, memory, map[model.InstanceID]string{"a": "release released"}},
		{"wanted again for less than a minute", []scoring.Node{wanted(released(node("a", 10*time.Minute), time.Minute), 59*time.Second)}, memory,
			map[model.InstanceID]string{"a": "release released"}},
		{"wanted again for a minute", []scoring.Node{wanted(released(node("a", 10*time.Minute), 5*time.Minute), time.Minute)}, memory,
			map[model.InstanceID]string{"a": "keep forecast"}},
		{"parked nodes do not count", []scoring.Node{cold[0], parked("p", 60*24*time.Hour), parked("q", 60*24*time.Hour), cold[1]}, nil,
			map[model.InstanceID]string{"a": "release idle", "b": "keep later", "p": "release parked-too-long", "q": "release parked-too-long"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer := scoring.Decide(scoring.Request{Nodes: tc.nodes, Costs: costs(), Memory: tc.memory, Now: now, Bounds: scoring.Bounds{MaxWarm: 9}})
			scoring.Pace(answer.Verdicts, tc.nodes, false, now)
			if diff := cmp.Diff(tc.want, decided(answer)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestInVain: a node that went although the forecast wants it is not brought
// back before a job has started.
func TestInVain(t *testing.T) {
	m := experienced(2, 4, true)
	r := scoring.Request{
		Nodes: []scoring.Node{node("a", 3*time.Hour, "k0")}, Costs: costs(), Memory: m, Now: now,
		Bounds: scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true},
	}
	gone := scoring.Decide(r)
	if got := decided(gone)["a"]; got != "park bound" {
		t.Fatalf("decided %q", got)
	}
	m.Decided(gone.Verdicts)
	r.Nodes = []scoring.Node{parked("a", 3*time.Hour, "k0")}
	if again := scoring.Decide(r).Resume; len(again) > 0 {
		t.Errorf("brings back %v", again)
	}
	m.JobStarted(true)
	if again := scoring.Decide(r).Resume; len(again) != 1 {
		t.Errorf("after a job has come it brings back %v", again)
	}
}

// TestBatchesOfNodes: jobs that share a node need one.
func TestBatchesOfNodes(t *testing.T) {
	f := scoring.NewForecast(45 * time.Second)
	for run := range 20 {
		for i := range 10 {
			f.Arrived(1, 10, now.Add(time.Duration(run)*time.Hour+time.Duration(i)*time.Second))
		}
	}
	if got := f.Needed(); got != 1 {
		t.Errorf("ten jobs that share a node need %d", got)
	}
}

// TestOrderIsSteady: two nodes whose jobs ended seconds apart do not change
// places as minutes pass.
func TestOrderIsSteady(t *testing.T) {
	r := scoring.Request{
		Nodes: []scoring.Node{node("a", 10*time.Minute, "k"), node("b", 10*time.Minute+30*time.Second, "k")},
		Costs: costs(), Bounds: scoring.Bounds{MaxWarm: 10, Park: true},
	}
	for second := range 180 {
		r.Now = now.Add(time.Duration(second) * time.Second)
		if first := scoring.Decide(r).Verdicts[0].Instance; first != "b" {
			t.Fatalf("after %d s %s is the first to go, want the one that was used before", second, first)
		}
	}
}

// TestKeys: the rare is forgotten, what a cache saves is learnt from enough
// jobs, and until then from the others.
func TestKeys(t *testing.T) {
	k := scoring.NewKeys(3 * time.Minute)
	key := func(i int) scoring.Key { return scoring.KeyOf(model.CacheKey(fmt.Sprint("k", i))) }
	saves := func(i int) float64 { _, saves := k.Of(key(i)); return saves }
	for range 3 { // keys 0 and 2 are asked for equally often
		k.Arrived(key(0), now)
		k.Arrived(key(2), now)
	}
	for i := range 3 {
		if got := saves(0); got != 180 {
			t.Errorf("after %d jobs a cache saves %v s, want the cold penalty", i, got)
		}
		k.Finished(key(0), true, 10*time.Minute)
		k.Finished(key(0), false, 25*time.Minute)
	}
	if own, other := saves(0), saves(1); own != 900 || other != 900 {
		t.Errorf("a cache saves %v s, that of another key %v, want 900 s", own, other)
	}
	for range 3 { // cold is not slower
		k.Finished(key(2), true, time.Hour)
		k.Finished(key(2), false, 50*time.Minute)
	}
	if got := saves(2); got != 0 {
		t.Errorf("a cache that saves nothing saves %v s", got)
	}
	if got := saves(1); math.Abs(got-450) > 1e-6 {
		t.Errorf("an unknown key's cache saves %v s, want the average of 900 s and nothing", got)
	}
	// A key that somebody made up, whose jobs idle, is believed an hour and says
	// next to nothing of others.
	for range 3 {
		k.Arrived(key(0), now)
		k.Finished(key(3), true, time.Second)
		k.Finished(key(3), false, 6*time.Hour)
	}
	if made, other := saves(3), saves(1); made != 3600 || other > 700 {
		t.Errorf("a made-up key saves %v s, and others %v", made, other)
	}
	for i := range 3 * scoring.MaxKeys {
		k.Arrived(key(i), now.Add(time.Duration(i)*time.Second))
		k.Arrived(key(0), now.Add(time.Duration(i)*time.Second))
	}
	const stranger = 1e-3
	if share, _ := k.Of(key(0)); math.Abs(share-0.5) > 0.2 {
		t.Errorf("the share of the key of every other job is %v", share)
	}
	if share, _ := k.Of(key(1)); share != stranger {
		t.Errorf("a key that came once long ago has a share of %v", share)
	}
}

func BenchmarkDecide(b *testing.B) {
	memory := experienced(20, 2, true)
	for _, size := range []int{50, 500, 5000} {
		nodes := make([]scoring.Node, size)
		for i := range nodes {
			nodes[i] = node(fmt.Sprintf("i-%05d", i), time.Duration(i)*time.Second)
			for k := range 50 {
				nodes[i].Uses = scoring.Used(nodes[i].Uses, use(fmt.Sprint((i*7+k)%2000), time.Duration(k)*time.Hour, k+1))
			}
		}
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			for b.Loop() {
				scoring.Decide(scoring.Request{Nodes: nodes, Bounds: scoring.Bounds{MaxWarm: size, Park: true}, Costs: costs(), Memory: memory, Now: now})
			}
		})
	}
}
