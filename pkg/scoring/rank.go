package scoring

import (
	"cmp"
	"container/heap"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// RankParked orders parked nodes for the jobs that wait: first those that are
// warm for one, each taken for the job that finds fewest others and such that
// the other keys lose least; then the rest, the least missed first, so that
// caches worth keeping stay parked. waiting counts jobs per key, jobsPerNode
// how many a node takes. The second result is the warmth that the first most
// nodes add (0 to the number of jobs).
func RankParked(parked []Node, waiting map[Key]int, jobsPerNode, most int, keys *Keys, now time.Time) ([]model.InstanceID, float64) {
	r := ranking{
		keys: keys, now: now, slots: max(jobsPerNode, 1), nodes: parked, taken: make([]bool, len(parked)),
		left: maps.Clone(waiting), stock: Stock{map[Key]int{}}, counted: make([][]Key, len(parked)), holders: map[Key][]int{},
	}
	for i, n := range parked {
		r.counted[i] = r.stock.Add(n, now)
		for _, k := range r.counted[i] {
			if waiting[k] > 0 {
				r.holders[k] = append(r.holders[k], i)
			}
		}
	}
	type served struct {
		node int
		gain float64
	}
	var first []served
	for _, key := range r.scarcestFirst() {
		holders := r.byMissed(key)
		for r.left[key] > 0 && len(holders.list) > 0 {
			// What a node is missed for only grows while others are taken, so
			// one that is still the least is the least.
			least := &holders.list[0]
			if missed := r.missed(least.node, key); missed > least.missed {
				least.missed = missed
				heap.Fix(holders, 0)
				continue
			}
			i := heap.Pop(holders).(holder).node
			if !r.taken[i] {
				first = append(first, served{i, r.take(i, key)})
			}
		}
	}
	slices.SortStableFunc(first, func(a, b served) int { return cmp.Compare(b.gain, a.gain) })
	ranked := make([]model.InstanceID, 0, len(parked))
	var warmth float64
	for i, s := range first {
		if i < most {
			warmth += s.gain
		}
		ranked = append(ranked, parked[s.node].Instance)
	}
	for _, i := range r.rest() {
		ranked = append(ranked, parked[i].Instance)
	}
	return ranked, warmth
}

// ranking is the state of one RankParked.
type ranking struct {
	keys    *Keys
	now     time.Time
	slots   int
	nodes   []Node
	taken   []bool
	left    map[Key]int // jobs that no node was found for
	stock   Stock       // of the nodes not taken
	counted [][]Key     // by node: what the stock counted of it
	holders map[Key][]int
}

func (r *ranking) scarcestFirst() []Key {
	return slices.SortedFunc(maps.Keys(r.holders), func(a, b Key) int {
		return cmp.Or(cmp.Compare(len(r.holders[a]), len(r.holders[b])), cmp.Compare(a.Value(), b.Value()))
	})
}

func (r *ranking) missed(node int, key Key) float64 {
	return r.stock.Missed(r.nodes[node], key, r.keys, r.now)
}

// holder is a node that is warm for a key, and what others would miss it for.
type holder struct {
	node   int
	missed float64
}

// byMissed are the holders of a key that are not taken, the least missed first.
func (r *ranking) byMissed(key Key) *holders {
	h := &holders{nodes: r.nodes}
	for _, i := range r.holders[key] {
		if !r.taken[i] {
			h.list = append(h.list, holder{i, r.missed(i, key)})
		}
	}
	heap.Init(h)
	return h
}

// holders is a heap.
type holders struct {
	nodes []Node
	list  []holder
}

func (h *holders) Len() int      { return len(h.list) }
func (h *holders) Swap(i, j int) { h.list[i], h.list[j] = h.list[j], h.list[i] }
func (h *holders) Push(x any)    { h.list = append(h.list, x.(holder)) }

func (h *holders) Less(i, j int) bool {
	a, b := h.list[i], h.list[j]
	return a.missed < b.missed || a.missed == b.missed && h.nodes[a.node].Instance < h.nodes[b.node].Instance
}

func (h *holders) Pop() any {
	last := h.list[len(h.list)-1]
	h.list = h.list[:len(h.list)-1]
	return last
}

// take gives a node to the jobs of a key, and what slots are left to those of
// its other keys. It returns the warmth that they find.
func (r *ranking) take(i int, key Key) (gain float64) {
	n, slots := r.nodes[i], r.slots
	r.taken[i] = true
	r.stock.Remove(r.counted[i])
	serve := func(k Key) {
		jobs := min(slots, r.left[k])
		slots -= jobs
		r.left[k] -= jobs
		gain += float64(jobs) * n.WarmthFor(k, r.now)
	}
	serve(key)
	for _, k := range r.counted[i] {
		serve(k)
	}
	return gain
}

// rest are the nodes not taken, the least missed first.
func (r *ranking) rest() []int {
	var rest []int
	missed := make([]float64, len(r.nodes))
	for i := range r.nodes {
		if !r.taken[i] {
			rest = append(rest, i)
			missed[i] = r.stock.Missed(r.nodes[i], Key{}, r.keys, r.now)
		}
	}
	slices.SortFunc(rest, func(a, b int) int {
		return cmp.Or(cmp.Compare(missed[a], missed[b]), cmp.Compare(r.nodes[a].Instance, r.nodes[b].Instance))
	})
	return rest
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
