package scoring_test

import (
	"fmt"
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

// busyHour is a forecast in which size jobs arrive together perHour times
// every hour, for two weeks until now.
func busyHour(size, perHour int) *scoring.Forecast {
	f := scoring.NewForecast(45 * time.Second)
	for at := now.Add(-14 * 24 * time.Hour); at.Before(now); at = at.Add(time.Hour / time.Duration(perHour)) {
		for i := range size {
			f.Observe(model.CacheKey(fmt.Sprint("k", i)), i+1, at)
		}
	}
	return f
}

func TestDecide(t *testing.T) {
	busy := node("busy", 2*time.Hour, "k1")
	busy.Busy = true
	parked := func(id string, age time.Duration, keys ...string) scoring.Node {
		n := node(id, age, keys...)
		n.Parked = true
		return n
	}
	for _, tc := range []struct {
		name     string
		nodes    []scoring.Node
		bounds   scoring.Bounds
		forecast *scoring.Forecast
		want     map[model.InstanceID]string
		resume   []model.InstanceID
	}{
		{
			name:   "coldest first, min-warm stays",
			nodes:  []scoring.Node{node("warm", 5*time.Hour, "a", "b"), node("tepid", 5*time.Hour, "a"), node("cold", 5*time.Hour)},
			bounds: scoring.Bounds{MinWarm: 1, MaxWarm: 10, Park: true},
			want:   map[model.InstanceID]string{"cold": "park idle", "tepid": "park idle", "warm": "keep min-warm"},
		}, {
			name:   "a busy node is no candidate",
			nodes:  []scoring.Node{busy, node("idle", 5*time.Hour, "a")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true},
			want:   map[model.InstanceID]string{"busy": "keep busy", "idle": "park idle"},
		}, {
			name:   "a third of the bound is kept whatever the forecast",
			nodes:  []scoring.Node{node("a", 19*time.Minute, "k"), node("b", 20*time.Minute, "k")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true},
			want:   map[model.InstanceID]string{"a": "keep recent", "b": "park idle"},
		}, {
			name:   "the forecast keeps as many as are used often enough",
			nodes:  []scoring.Node{node("a", time.Hour, "k0"), node("b", time.Hour, "k0"), node("c", time.Hour, "k0")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true}, forecast: busyHour(2, 3),
			want: map[model.InstanceID]string{"a": "keep forecast", "b": "keep forecast", "c": "park idle"},
		}, {
			name:   "no forecast keeps beyond trust times the bound",
			nodes:  []scoring.Node{node("a", 174*time.Minute, "k0"), node("b", 173*time.Minute, "k0")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true}, forecast: busyHour(2, 3),
			want: map[model.InstanceID]string{"a": "park bound", "b": "keep forecast"},
		}, {
			name:   "max-warm and max-idle win",
			nodes:  []scoring.Node{node("a", time.Second, "k"), node("b", 2*time.Second), node("c", time.Second)},
			bounds: scoring.Bounds{MaxWarm: 2, MaxIdle: new(2 * time.Second)},
			want:   map[model.InstanceID]string{"a": "keep recent", "b": "release max-warm", "c": "keep recent"},
		}, {
			name:   "where parking is off the absence costs a boot and the cache",
			nodes:  []scoring.Node{node("cold", 50*time.Minute), node("warm", 50*time.Minute, "k")},
			bounds: scoring.Bounds{MaxWarm: 10},
			want:   map[model.InstanceID]string{"cold": "release idle", "warm": "keep recent"},
		}, {
			name:   "parked nodes come back before a burst that pays for them",
			nodes:  []scoring.Node{node("a", time.Minute, "k0"), parked("b", time.Hour, "k0"), parked("c", time.Hour, "k1")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true}, forecast: busyHour(2, 3),
			want:   map[model.InstanceID]string{"a": "keep recent", "b": "keep recent", "c": "keep recent"},
			resume: []model.InstanceID{"c"},
		}, {
			name:   "but not when one is on its way",
			nodes:  []scoring.Node{node("a", time.Minute, "k0"), parked("b", time.Hour, "k0"), parked("c", time.Hour, "k1")},
			bounds: scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true, Coming: 1}, forecast: busyHour(2, 3),
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
			answer := scoring.Decide(scoring.Request{Nodes: tc.nodes, Bounds: tc.bounds, Costs: costs(), Forecast: tc.forecast, Now: now})
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
	n := rapid.IntRange(0, 30).Draw(t, "nodes")
	nodes := make([]scoring.Node, n)
	for i := range nodes {
		nodes[i] = scoring.Node{
			Instance:  model.InstanceID(fmt.Sprintf("i-%02d", i)),
			Busy:      rapid.Bool().Draw(t, "busy"),
			IdleSince: now.Add(-time.Duration(rapid.IntRange(0, 72000).Draw(t, "idle")) * time.Second),
			Keys:      map[model.CacheKey]model.KeyUse{},
		}
		nodes[i].Parked = !nodes[i].Busy && rapid.Bool().Draw(t, "parked")
		for range rapid.IntRange(0, 30).Draw(t, "keys") {
			nodes[i].Keys[model.CacheKey(fmt.Sprint("k", rapid.IntRange(0, 40).Draw(t, "key")))] = model.KeyUse{
				Last:  now.Add(-time.Duration(rapid.IntRange(0, 100).Draw(t, "age")) * time.Hour),
				Count: rapid.IntRange(1, 50).Draw(t, "count"),
			}
		}
	}
	return nodes
}

func TestDecideProperties(t *testing.T) {
	forecast := busyHour(5, 3)
	rapid.Check(t, func(t *rapid.T) {
		r := scoring.Request{
			Nodes: randomFleet(t), Costs: costs(), Forecast: forecast, Now: now,
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
			if !n.Busy && !n.Parked {
				idle++
			}
		}
		kept := 0
		for _, v := range answer.Verdicts {
			n := byID[v.Instance]
			switch {
			case len(v.Reasons) == 0:
				t.Fatalf("%s: no reason given", v.Instance)
			case n.Busy && v.Decision != model.DecisionKeep:
				t.Fatalf("busy node %s: %s", v.Instance, v.Decision)
			case n.Parked && v.Decision == model.DecisionPark:
				t.Fatalf("parked node %s is to be parked", v.Instance)
			case !n.Busy && !n.Parked && v.Decision == model.DecisionKeep:
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
// nothing happens.
func TestNext(t *testing.T) {
	forecast := busyHour(3, 3)
	rapid.Check(t, func(t *rapid.T) {
		r := scoring.Request{
			Nodes: randomFleet(t), Costs: costs(), Forecast: forecast, Now: now,
			Bounds: scoring.Bounds{MaxWarm: 20, Park: true},
		}
		first := scoring.Decide(r)
		before := decided(first)
		r.Now = now.Add(time.Duration(rapid.Float64Range(0, 1).Draw(t, "part") * float64(first.Next.Sub(now)-1)))
		for id, d := range decided(scoring.Decide(r)) {
			// Warmth decays all the time, and may reorder nodes of nearly the
			// same worth; how many go does not change.
			if d != before[id] {
				count := func(m map[model.InstanceID]string) (n int) {
					for _, d := range m {
						if d[:4] == "keep" {
							n++
						}
					}
					return n
				}
				if a, b := count(before), count(decided(scoring.Decide(r))); a != b {
					t.Fatalf("%d kept at first and %d before Next", a, b)
				}
			}
		}
	})
}

func BenchmarkDecide(b *testing.B) {
	forecast := busyHour(20, 2)
	for _, size := range []int{50, 500, 5000} {
		nodes := make([]scoring.Node, size)
		for i := range nodes {
			nodes[i] = node(fmt.Sprintf("i-%05d", i), time.Duration(i)*time.Second)
			for k := range 50 {
				nodes[i].Keys[model.CacheKey(fmt.Sprint((i*7+k)%2000))] = model.KeyUse{Last: now.Add(-time.Duration(k) * time.Hour), Count: k + 1}
			}
		}
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			for b.Loop() {
				scoring.Decide(scoring.Request{Nodes: nodes, Bounds: scoring.Bounds{MaxWarm: size, Park: true}, Costs: costs(), Forecast: forecast, Now: now})
			}
		})
	}
}
