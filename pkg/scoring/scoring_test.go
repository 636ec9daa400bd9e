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

var now = time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC)

func node(id string, idle time.Duration, keys ...string) scoring.Node {
	n := scoring.Node{Instance: model.InstanceID(id), IdleSince: now.Add(-idle), Keys: map[model.CacheKey]model.KeyUse{}}
	for _, k := range keys {
		n.Keys[model.CacheKey(k)] = model.KeyUse{Last: now.Add(-idle), Count: 1}
	}
	return n
}

func released(n scoring.Node, ago time.Duration) scoring.Node {
	n.ReleasedAt = now.Add(-ago)
	return n
}

func TestWarmth(t *testing.T) {
	for _, tc := range []struct {
		name string
		use  model.KeyUse
		want float64
	}{
		{"just used", model.KeyUse{Last: now, Count: 1}, 1},
		{"one half-life", model.KeyUse{Last: now.Add(-24 * time.Hour), Count: 3}, 0.5},
		{"two half-lives", model.KeyUse{Last: now.Add(-48 * time.Hour), Count: 1}, 0.25},
		{"too old", model.KeyUse{Last: now.Add(-73 * time.Hour), Count: 9}, 0},
		{"never used", model.KeyUse{}, 0},
		{"clock went back", model.KeyUse{Last: now.Add(time.Hour), Count: 1}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := scoring.Warmth(tc.use, now); math.Abs(got-tc.want) > 1e-9 {
				t.Errorf("Warmth = %v, want %v", got, tc.want)
			}
		})
	}
}

func TestEvictionPressure(t *testing.T) {
	n := node("a", 0)
	for i := range scoring.KeysHeld + 1 {
		n.Keys[model.CacheKey(fmt.Sprint(i))] = model.KeyUse{Last: now.Add(-time.Duration(i) * time.Minute), Count: 1}
	}
	if w := n.WarmthFor("0", now); w != 1 {
		t.Errorf("newest key: warmth %v, want 1", w)
	}
	if w := n.WarmthFor(model.CacheKey(fmt.Sprint(scoring.KeysHeld)), now); w != 0 {
		t.Errorf("key pushed out by %d later ones: warmth %v, want 0", scoring.KeysHeld, w)
	}
}

func decisions(verdicts []model.Verdict) map[model.InstanceID]string {
	out := map[model.InstanceID]string{}
	for _, v := range verdicts {
		out[v.Instance] = string(v.Decision) + " " + v.Reasons[len(v.Reasons)-1].Code
	}
	return out
}

func TestPlan(t *testing.T) {
	busy := node("busy", time.Hour, "k")
	busy.Busy = true
	for _, tc := range []struct {
		name   string
		nodes  []scoring.Node
		bounds scoring.Bounds
		want   map[model.InstanceID]string
	}{
		{
			"coldest first, min-warm stays",
			[]scoring.Node{node("warm", time.Hour, "a", "b"), node("tepid", time.Hour, "a"), node("cold", time.Hour)},
			scoring.Bounds{MinWarm: 1, MaxWarm: 10},
			map[model.InstanceID]string{"cold": "release idle", "tepid": "keep later", "warm": "keep min-warm"},
		}, {
			"a busy node is no candidate",
			[]scoring.Node{busy, node("idle", time.Hour, "a")},
			scoring.Bounds{MaxWarm: 10},
			map[model.InstanceID]string{"busy": "keep busy", "idle": "release idle"},
		}, {
			"max-warm releases the young too",
			[]scoring.Node{node("a", time.Second, "k"), node("b", time.Second)},
			scoring.Bounds{MaxWarm: 1},
			map[model.InstanceID]string{"a": "keep recent", "b": "release max-warm"},
		}, {
			"max-idle from the annotation",
			[]scoring.Node{node("a", 40*time.Second, "k")},
			scoring.Bounds{MaxWarm: 9, MaxIdle: new(30 * time.Second)},
			map[model.InstanceID]string{"a": "release idle"},
		}, {
			"parking",
			[]scoring.Node{node("a", time.Hour, "k")},
			scoring.Bounds{MaxWarm: 9, Park: true},
			map[model.InstanceID]string{"a": "park idle"},
		}, {
			"half of what may go",
			[]scoring.Node{node("a", time.Hour), node("b", time.Hour), node("c", time.Hour), node("d", time.Hour)},
			scoring.Bounds{MaxWarm: 9},
			map[model.InstanceID]string{"a": "release idle", "b": "release idle", "c": "keep later", "d": "keep later"},
		}, {
			"min-warm above max-warm wins",
			[]scoring.Node{node("a", time.Hour), node("b", time.Hour)},
			scoring.Bounds{MinWarm: 2, MaxWarm: 1},
			map[model.InstanceID]string{"a": "keep min-warm", "b": "keep min-warm"},
		}, {
			"a node that does not go holds up nobody",
			[]scoring.Node{released(node("a", time.Hour), 5*time.Minute), node("b", time.Hour), node("c", time.Hour)},
			scoring.Bounds{MaxWarm: 9},
			map[model.InstanceID]string{"a": "release idle", "b": "release idle", "c": "keep later"},
		}, {
			"max-idle of nothing",
			[]scoring.Node{node("a", 0, "k")},
			scoring.Bounds{MaxWarm: 9, MaxIdle: new(time.Duration)},
			map[model.InstanceID]string{"a": "release idle"},
		}, {
			"nothing",
			nil, scoring.Bounds{}, map[model.InstanceID]string{},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, decisions(scoring.Plan(tc.nodes, tc.bounds, now))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func randomNodes(t *rapid.T) []scoring.Node {
	n := rapid.IntRange(0, 30).Draw(t, "nodes")
	nodes := make([]scoring.Node, n)
	for i := range nodes {
		nodes[i] = scoring.Node{
			Instance:  model.InstanceID(fmt.Sprintf("i-%02d", i)),
			Busy:      rapid.Bool().Draw(t, "busy"),
			IdleSince: now.Add(-time.Duration(rapid.IntRange(0, 7200).Draw(t, "idle")) * time.Second),
			Keys:      map[model.CacheKey]model.KeyUse{},
		}
		for range rapid.IntRange(0, 30).Draw(t, "keys") {
			nodes[i].Keys[model.CacheKey(fmt.Sprint(rapid.IntRange(0, 40).Draw(t, "key")))] = model.KeyUse{
				Last:  now.Add(-time.Duration(rapid.IntRange(0, 100).Draw(t, "age")) * time.Hour),
				Count: rapid.IntRange(1, 50).Draw(t, "count"),
			}
		}
	}
	return nodes
}

func TestPlanProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := randomNodes(t)
		bounds := scoring.Bounds{
			MinWarm: rapid.IntRange(0, 10).Draw(t, "min"), MaxWarm: rapid.IntRange(0, 20).Draw(t, "max"),
			Park: rapid.Bool().Draw(t, "park"),
		}
		verdicts := scoring.Plan(nodes, bounds, now)
		shuffled := slices.Clone(nodes)
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if diff := cmp.Diff(verdicts, scoring.Plan(shuffled, bounds, now)); diff != "" {
			t.Fatalf("the order of the input matters: %s", diff)
		}
		if len(verdicts) != len(nodes) {
			t.Fatalf("%d verdicts for %d nodes", len(verdicts), len(nodes))
		}
		busy := map[model.InstanceID]bool{}
		idle := 0
		for _, n := range nodes {
			busy[n.Instance] = n.Busy
			if !n.Busy {
				idle++
			}
		}
		kept, warmestGone := 0, math.Inf(-1)
		for _, v := range verdicts {
			if len(v.Reasons) == 0 {
				t.Fatalf("%s: no reason given", v.Instance)
			}
			switch {
			case v.Decision == model.DecisionKeep && !busy[v.Instance]:
				kept++
			case v.Decision != model.DecisionKeep && busy[v.Instance]:
				t.Fatalf("busy node %s: %s", v.Instance, v.Decision)
			case v.Decision != model.DecisionKeep:
				warmestGone = max(warmestGone, v.Score)
			}
		}
		if kept < min(idle, bounds.MinWarm) {
			t.Fatalf("%d idle nodes kept, min-warm is %d of %d", kept, bounds.MinWarm, idle)
		}
		for _, v := range verdicts {
			for _, r := range v.Reasons {
				if r.Code == "min-warm" && v.Score < warmestGone {
					t.Fatalf("%s is kept as one of the warmest and is colder than one that goes", v.Instance)
				}
			}
		}
	})
}

func TestRankParked(t *testing.T) {
	a, b, c := node("a", time.Hour, "x"), node("b", time.Minute, "x", "y"), node("c", time.Hour)
	for _, tc := range []struct {
		name    string
		waiting map[model.CacheKey]int
		want    []model.InstanceID
		warmth  float64
	}{
		{"the warmer copy first", map[model.CacheKey]int{"x": 1}, []model.InstanceID{"b", "c", "a"}, 0.9995},
		{"two jobs, two copies", map[model.CacheKey]int{"x": 2}, []model.InstanceID{"b", "a", "c"}, 0.9995},
		{"a node serves one job at a time", map[model.CacheKey]int{"x": 1, "y": 1}, []model.InstanceID{"b", "c", "a"}, 0.9995},
		{"an unknown key takes the least valuable", map[model.CacheKey]int{"z": 1}, []model.InstanceID{"c", "a", "b"}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ranked, warmth := scoring.RankParked([]scoring.Node{a, b, c}, tc.waiting, 1, 1, now)
			if diff := cmp.Diff(tc.want, ranked); diff != "" {
				t.Error(diff)
			}
			if want := tc.warmth; math.Abs(warmth-want) > 0.001 {
				t.Errorf("the first node adds %v, want %v", warmth, want)
			}
		})
	}
}

func TestRankOptions(t *testing.T) {
	for _, tc := range []struct {
		name    string
		options []scoring.Option
		want    model.GroupID
	}{
		{"warm before cheap", []scoring.Option{{Group: "cheap", Nodes: 1, Jobs: 1, Price: 0.1}, {Group: "warm", Nodes: 1, Jobs: 1, Price: 0.9, Warmth: 0.5}}, "warm"},
		{"there before launch", []scoring.Option{{Group: "cheap", Nodes: 1, Jobs: 1, Price: 0.1}, {Group: "there", Nodes: 1, Jobs: 1, Price: 0.9, Ready: 1}}, "there"},
		{"cheaper per job", []scoring.Option{{Group: "small", Nodes: 4, Jobs: 4, Price: 0.2}, {Group: "big", Nodes: 1, Jobs: 4, Price: 0.7}}, "big"},
		{"price not known of one: fewest nodes", []scoring.Option{{Group: "small", Nodes: 4, Jobs: 4, Price: 0.01}, {Group: "big", Nodes: 1, Jobs: 4}}, "big"},
		{"ties by id", []scoring.Option{{Group: "b", Nodes: 1, Jobs: 1}, {Group: "a", Nodes: 1, Jobs: 1}}, "a"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := scoring.RankOptions(tc.options)[0].Group; got != tc.want {
				t.Errorf("best option %s, want %s", got, tc.want)
			}
		})
	}
}

func BenchmarkPlan(b *testing.B) {
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
				scoring.Plan(nodes, scoring.Bounds{MaxWarm: size}, now)
			}
		})
	}
}
