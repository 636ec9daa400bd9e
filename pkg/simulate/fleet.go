package simulate

import (
	"cmp"
	"slices"

	"github.com/hearth-ci/hearth/pkg/model"
)

// State is where a simulated node is in its life.
type State uint8

// States. All but Parked cost the running price; Gone costs nothing.
const (
	Booting  State = iota // launched, not ready
	Resuming              // was parked, not ready
	Idle                  // ready, runs no job
	Busy                  // runs at least one job
	Stopping              // released, not yet parked or gone
	Parked                // stopped, its cache intact
	Gone
	states // how many there are
)

func (s State) String() string {
	return [...]string{"booting", "resuming", "idle", "busy", "stopping", "parked", "gone"}[s]
}

// Node is one simulated instance.
type Node struct {
	// ID counts launches from 1; it is never reused.
	ID    int
	State State
	// Launched is when the boot began. Ready is when the last boot or resume
	// ended or will end. Since is when the node became idle, or was told to
	// park. All in epoch seconds.
	Launched, Ready, Since int64
	// Jobs run here now.
	Jobs int
	// Uses are the cache keys whose jobs ended here, the last used first, as
	// far as anyone remembers them.
	Uses []Use

	resumed  bool   // the last start was a resume
	ending   bool   // Stopping: goes instead of parking
	stopped  int64  // Stopping: when that ends
	promised []*Pod // the jobs that wait for it, oldest first
	held     []Use  // what the engine's cache really holds
	change   int    // counts changes of state: an older event is void
}

// Use is one cache key that a node's engine has met.
type Use struct {
	Key   Key
	Last  int64 // end of the last job of this key
	Count int   // jobs of this key that ended here
}

// Key is a cache key of the trace, as a small number.
type Key int32

// Pod is a job as the scheduler sees it.
type Pod struct {
	ID      string
	Arrival int64 // epoch seconds
	// Key is what is known of the job's cache key before it runs.
	Key Key
	// Node is where the job runs or ran; nil while it waits.
	Node *Node
	// Promise is the node that was started for it, while it waits.
	Promise *Node
	// Started and Took say when it started and how long it ran, in seconds.
	Started, Took int64
	// Warm says whether its node was believed to be warm for its key when it
	// started.
	Warm bool

	job   *Job
	holds Key // what it really uses
}

// Fleet is what a policy sees: the nodes, the jobs that wait, and the world.
// It is valid during the call that it was passed to.
type Fleet struct {
	World World
	// Now is the time in epoch seconds.
	Now int64
	// All nodes that are not gone, by id. Idle and Resumable ones by Since,
	// then id; those on their way by Ready, then id. A node is Resumable as
	// soon as it was told to park.
	All, Idle, Resumable, OnTheWay []*Node
	// Partial are the nodes that run jobs and have slots free, by id. There
	// are none where a node has one slot.
	Partial []*Node
	// Waiting are the jobs that wait, oldest first.
	Waiting []*Pod

	keys    []model.CacheKey
	holders [][]*Node // by key: the nodes that have it among their Uses
	count   [states]int
	busy    int // jobs that run
	lastID  int
}

// Live is how many nodes run or are about to.
func (f *Fleet) Live() int {
	return f.count[Booting] + f.count[Resuming] + f.count[Idle] + f.count[Busy]
}

// Busy is how many jobs run.
func (f *Fleet) Busy() int { return f.busy }

// CanStart says whether another node may be launched or, parked as it is,
// resumed.
func (f *Fleet) CanStart() bool {
	return f.World.MaxNodes == 0 || f.Live()+f.count[Stopping] < f.World.MaxNodes
}

// CanResume says whether the node can be resumed now. One that still stops is
// counted as running already.
func (f *Fleet) CanResume(n *Node) bool {
	return n.State == Parked && f.CanStart() || n.State == Stopping && !n.ending
}

// Name returns the cache key behind the number.
func (f *Fleet) Name(k Key) model.CacheKey { return f.keys[k] }

// Warm says whether the node's cache is believed to be warm for a key, and
// when it was last used there.
func (f *Fleet) Warm(n *Node, k Key) (last int64, warm bool) {
	return f.warm(n.Uses, k)
}

func (f *Fleet) warm(uses []Use, k Key) (last int64, warm bool) {
	for i := range uses[:min(len(uses), f.World.KeysHeld)] {
		if uses[i].Key == k {
			return uses[i].Last, f.Now-uses[i].Last <= seconds(f.World.WarmFor)
		}
	}
	return 0, false
}

// Warmest returns the node that used the key last, among those that are
// believed to be warm for it and that pass; ties break by id. It is nil when
// there is none.
func (f *Fleet) Warmest(k Key, pass func(*Node) bool) *Node {
	var best *Node
	var bestLast int64
	for _, n := range f.holders[k] {
		last, warm := f.Warm(n, k)
		if !warm || best != nil && (last < bestLast || last == bestLast && n.ID > best.ID) || !pass(n) {
			continue
		}
		best, bestLast = n, last
	}
	return best
}

// Free says whether the node has a slot that is promised to nobody but p.
func (f *Fleet) Free(n *Node, p *Pod) bool {
	if n.State != Idle && n.State != Busy {
		return false
	}
	others := len(n.promised)
	if p.Promise == n {
		others--
	}
	return n.Jobs+others < f.World.Slots
}

// Unpromised says whether the node is on its way and has a slot that is
// promised to nobody.
func (f *Fleet) Unpromised(n *Node) bool {
	return (n.State == Booting || n.State == Resuming) && len(n.promised) < f.World.Slots
}

// use notes that a job of the key has ended at now, in a list that is kept to
// most entries, the last used first. It returns what fell off the end.
func use(uses []Use, k Key, now int64, most int) (kept []Use, dropped Key, fell bool) {
	if most == 0 {
		return uses, 0, false
	}
	u := Use{Key: k}
	i := slices.IndexFunc(uses, func(u Use) bool { return u.Key == k })
	switch {
	case i >= 0:
		u = uses[i]
	case len(uses) < most:
		uses = append(uses, Use{})
		i = len(uses) - 1
	default:
		i = len(uses) - 1
		dropped, fell = uses[i].Key, true
	}
	copy(uses[1:i+1], uses[:i])
	u.Last, u.Count = now, u.Count+1
	uses[0] = u
	return uses, dropped, fell
}

// Lists of nodes are ordered by a time that does not change while a node is in
// them, then by id, so that they can be searched.

func bySince(n *Node) int64 { return n.Since }
func byReady(n *Node) int64 { return n.Ready }
func byID(n *Node) int64    { return int64(n.ID) }

func findNode(list []*Node, n *Node, by func(*Node) int64) (int, bool) {
	return slices.BinarySearchFunc(list, n, func(a, b *Node) int {
		return cmp.Or(cmp.Compare(by(a), by(b)), cmp.Compare(a.ID, b.ID))
	})
}

func insertNode(list []*Node, n *Node, by func(*Node) int64) []*Node {
	i, _ := findNode(list, n, by)
	return slices.Insert(list, i, n)
}

// removeNode leaves a list alone that does not have the node.
func removeNode(list []*Node, n *Node, by func(*Node) int64) []*Node {
	i, found := findNode(list, n, by)
	if !found {
		return list
	}
	return slices.Delete(list, i, i+1)
}
