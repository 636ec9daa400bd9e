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
	n := scoring.Node{Instance: model.InstanceID(id), IdleSince: now.Add(-idle)}
	for _, k := range keys {
		n.Uses = scoring.Used(n.Uses, use(k, idle, 1))
	}
	return n
}

func parked(id string, age time.Duration, keys ...string) scoring.Node {
	n := node(id, age, keys...)
	n.Parked = true
	return n
}

func released(n scoring.Node, ago time.Duration) scoring.Node {
	n.ReleasedAt = now.Add(-ago)
	return n
}

func use(key string, ago time.Duration, count int) scoring.Use {
	return scoring.Use{Key: scoring.KeyOf(model.CacheKey(key)), Last: now.Add(-ago), Count: count}
}

func TestWarmth(t *testing.T) {
	for _, tc := range []struct {
		name string
		use  scoring.Use
		want float64
	}{
		{"just used", use("k", 0, 1), 1},
		{"one half-life", use("k", 24*time.Hour, 3), 0.5},
		{"two half-lives", use("k", 48*time.Hour, 1), 0.25},
		{"too old", use("k", 73*time.Hour, 9), 0},
		{"never used", scoring.Use{}, 0},
		{"clock went back", use("k", -time.Hour, 1), 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.use.Warmth(now); math.Abs(got-tc.want) > 1e-9 {
				t.Errorf("Warmth = %v, want %v", got, tc.want)
			}
		})
	}
}

func TestEvictionPressure(t *testing.T) {
	n := node("a", 0)
	for i := range scoring.KeysHeld + 1 {
		n.Uses = scoring.Used(n.Uses, use(fmt.Sprint(i), time.Duration(i)*time.Minute, 1))
	}
	if w := n.WarmthFor(scoring.KeyOf("0"), now); w != 1 {
		t.Errorf("newest key: warmth %v, want 1", w)
	}
	if w := n.WarmthFor(scoring.KeyOf(model.CacheKey(fmt.Sprint(scoring.KeysHeld))), now); w != 0 {
		t.Errorf("key pushed out by %d later ones: warmth %v, want 0", scoring.KeysHeld, w)
	}
}

// TestUsed: however uses come in, the list is by last use and bounded.
func TestUsed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var uses []scoring.Use
		last := map[scoring.Key]time.Time{}
		for i := range rapid.IntRange(0, 100).Draw(t, "uses") {
			u := use(fmt.Sprint("k", rapid.IntRange(0, 60).Draw(t, "key")), -time.Duration(i)*time.Second, i+1)
			uses = scoring.Used(uses, u)
			last[u.Key] = u.Last
		}
		if want := min(len(last), model.MaxWarmKeys); len(uses) != want {
			t.Fatalf("%d uses kept, want %d", len(uses), want)
		}
		if !slices.IsSortedFunc(uses, func(a, b scoring.Use) int { return b.Last.Compare(a.Last) }) {
			t.Fatalf("not by last use: %v", uses)
		}
		for _, u := range uses {
			if !u.Last.Equal(last[u.Key]) {
				t.Fatalf("%v is not the last use, which was at %v", u, last[u.Key])
			}
		}
	})
}

// TestMissed: what a node is missed for halves with every other copy, and
// taking copies back leaves nothing.
func TestMissed(t *testing.T) {
	keys := scoring.NewKeys(time.Minute)
	a, b := node("a", 0, "x", "y"), node("b", 0, "x")
	alone := scoring.NewStock([]scoring.Node{a}, now)
	missed := func(s scoring.Stock, except string) float64 {
		return s.Missed(a, scoring.KeyOf(model.CacheKey(except)), keys, now)
	}
	both := scoring.NewStock([]scoring.Node{a}, now)
	counted := both.Add(b, now)
	x, y := missed(alone, "y"), missed(alone, "x")
	if x <= 0 || x != y || math.Abs(missed(alone, "z")-x-y) > 1e-12 {
		t.Errorf("x is missed for %v, y for %v and both for %v", x, y, missed(alone, "z"))
	}
	if got := missed(both, "y"); got != x/2 {
		t.Errorf("beside another copy x is missed for %v, want half of %v", got, x)
	}
	both.Remove(counted)
	if got := missed(both, "y"); got != x {
		t.Errorf("when the other copy has gone, x is missed for %v, want %v", got, x)
	}
}

func TestRankParked(t *testing.T) {
	a, b, c := parked("a", time.Hour, "x"), parked("b", time.Minute, "x", "y"), parked("c", time.Hour)
	waiting := func(keys ...string) map[scoring.Key]int {
		out := map[scoring.Key]int{}
		for _, k := range keys {
			out[scoring.KeyOf(model.CacheKey(k))]++
		}
		return out
	}
	for _, tc := range []struct {
		name    string
		waiting map[scoring.Key]int
		slots   int
		want    []model.InstanceID
		warmth  float64 // of the first
	}{
		{"the copy that others miss least", waiting("x"), 1, []model.InstanceID{"a", "c", "b"}, 0.9715},
		{"two jobs, two copies", waiting("x", "x"), 1, []model.InstanceID{"b", "a", "c"}, 0.9995},
		{"the job with one copy has it", waiting("x", "y"), 1, []model.InstanceID{"b", "a", "c"}, 0.9995},
		{"one node serves two jobs", waiting("x", "y"), 2, []model.InstanceID{"b", "c", "a"}, 1.999},
		{"an unknown key takes the least valuable", waiting("z"), 1, []model.InstanceID{"c", "a", "b"}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ranked, warmth := scoring.RankParked([]scoring.Node{a, b, c}, tc.waiting, tc.slots, 1, scoring.NewKeys(time.Minute), now)
			if diff := cmp.Diff(tc.want, ranked); diff != "" {
				t.Error(diff)
			}
			if math.Abs(warmth-tc.warmth) > 0.001 {
				t.Errorf("the first node adds %v, want %v", warmth, tc.warmth)
			}
		})
	}
}

func TestRankParkedProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var nodes []scoring.Node
		for _, n := range randomFleet(t) {
			if n.Parked {
				nodes = append(nodes, n)
			}
		}
		waiting := map[scoring.Key]int{}
		for range rapid.IntRange(0, 10).Draw(t, "jobs") {
			waiting[scoring.KeyOf(model.CacheKey(fmt.Sprint("k", rapid.IntRange(0, 45).Draw(t, "job"))))]++
		}
		slots, most := rapid.IntRange(1, 3).Draw(t, "slots"), rapid.IntRange(0, 10).Draw(t, "most")
		ranked, warmth := scoring.RankParked(nodes, waiting, slots, most, scoring.NewKeys(time.Minute), now)
		if len(ranked) != len(nodes) || len(ranked) != len(slices.Compact(slices.Sorted(slices.Values(ranked)))) {
			t.Fatalf("%d nodes ranked as %v", len(nodes), ranked)
		}
		jobs := 0
		for _, n := range waiting {
			jobs += n
		}
		if warmth < 0 || warmth > float64(min(jobs, slots*most))+1e-9 {
			t.Fatalf("%d nodes add %v to %d jobs", most, warmth, jobs)
		}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		random.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		again, _ := scoring.RankParked(nodes, waiting, slots, most, scoring.NewKeys(time.Minute), now)
		if diff := cmp.Diff(ranked, again); diff != "" {
			t.Fatalf("the order of the input matters: %s", diff)
		}
	})
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
