package simulate

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// hearth drives pkg/scoring as the live controller does. It plans when its last
// plan said that it would change, when a node that became idle may have been
// idle for long enough, and when the forecast pays for more nodes than run.
type hearth struct {
	costs  scoring.Costs
	bounds scoring.Bounds
	noWait bool
	memory *scoring.Memory
	keys   []scoring.Key // by the fleet's number
	nodes  map[*Node]*hearthNode
	// stock are the copies on nodes that a job could take; it is counted anew
	// every hour, since copies age.
	stock   scoring.Stock
	counted int64
	// The plans for idle and for parked nodes were made at, and do not change
	// before next, but for nodes that became idle since.
	idle, parked struct{ at, next int64 }
	arrived      bool
}

// hearthNode is a node as the policy sees it, and what the stock counts of it.
type hearthNode struct {
	scoring.Node
	sim     *Node
	counted []scoring.Key
	atHand  bool
}

// Knobs are what a person may set of the live policy by annotations.
type Knobs struct {
	// TimeValue is what an hour of waiting is taken to be worth, in dollars;
	// zero means the world's price.
	TimeValue float64
	// Trust in the forecast; zero means the default.
	Trust float64
	// NoPark, NoPrewarm: nodes are never parked, or never started ahead.
	NoPark, NoPrewarm bool
	// NoPrescale: jobs are not heard of before they have a pod.
	NoPrescale bool
	// NoWait: a job takes a cold node that has room rather than wait for a warm
	// one, as Kubernetes' scheduler does with preferences.
	NoWait bool
}

// defaultPenalty is the default of the annotation cold-penalty.
const defaultPenalty = 3 * time.Minute

func newHearth(w World, k Knobs) *hearth {
	if k.TimeValue == 0 {
		k.TimeValue = w.DelayPrice
	}
	costs := scoring.Costs{
		Running: w.Price, Parked: w.ParkedPrice, TimeValue: k.TimeValue,
		Boot: w.Boot, Resume: w.Resume, ColdPenalty: defaultPenalty, Trust: k.Trust,
	}
	return &hearth{
		costs:  costs,
		bounds: scoring.Bounds{MaxWarm: 1 << 30, Park: !k.NoPark, Prewarm: !k.NoPrewarm},
		noWait: k.NoWait,
		memory: scoring.NewMemory(costs),
		nodes:  map[*Node]*hearthNode{},
	}
}

func (h *hearth) key(f *Fleet, k Key) scoring.Key {
	for len(h.keys) < len(f.keys) {
		h.keys = append(h.keys, scoring.KeyOf(f.keys[len(h.keys)]))
	}
	return h.keys[k]
}

func (h *hearth) node(n *Node) *hearthNode {
	s := h.nodes[n]
	if s == nil {
		s = &hearthNode{sim: n}
		s.Instance = model.InstanceID("sim:///" + strconv.Itoa(n.ID))
		h.nodes[n] = s
	}
	return s
}

// put counts a node among those at hand, or no longer.
func (h *hearth) put(f *Fleet, n *Node, atHand bool) {
	s := h.node(n)
	if s.atHand == atHand {
		return
	}
	s.atHand = atHand
	if atHand {
		s.counted = h.stock.Add(s.Node, time.Unix(f.Now, 0))
	} else {
		h.stock.Remove(s.counted)
	}
}

// recount counts the stock anew once an hour.
func (h *hearth) recount(f *Fleet) {
	if f.Now-h.counted < hour && h.counted != 0 {
		return
	}
	h.counted = f.Now
	now := time.Unix(f.Now, 0)
	h.stock = scoring.NewStock(nil, now)
	for _, n := range f.All {
		s := h.node(n)
		if s.atHand {
			s.counted = h.stock.Add(s.Node, now)
		}
	}
}

func (h *hearth) Arrived(f *Fleet, p *Pod) {
	h.look(f)
	h.memory.JobArrived(h.key(f, p.Key), nodesFor(f.Busy()+len(f.Waiting), f.World), f.World.Slots, time.Unix(f.Now, 0))
	h.arrived = true
}

// look tells the ledger of the nodes as they are.
func (h *hearth) look(f *Fleet) {
	h.memory.Ledger.Nodes(f.count[Busy], f.count[Idle], time.Unix(f.Now, 0))
}

func (h *hearth) Finished(f *Fleet, p *Pod) {
	h.look(f)
	n := p.Node
	s := h.node(n)
	h.put(f, n, false)
	s.Uses = scoring.Used(s.Uses, scoring.Use{Key: h.key(f, p.Key), Last: time.Unix(f.Now, 0), Count: n.Uses[0].Count})
	h.put(f, n, true)
	h.memory.Keys.Finished(h.key(f, p.Key), p.Warm, time.Duration(p.Took)*time.Second)
}

// tick is how often the policy plans at most, in seconds; the live controller
// does every 5.
const tick = 20

// parkedTick is how often it plans for parked nodes at most, which cost next to
// nothing meanwhile.
const parkedTick = 300

// nextTick is the tick at t, or the next one.
func nextTick(t int64) int64 { return (t + tick - 1) / tick * tick }

func (h *hearth) Place(f *Fleet, p *Pod) Choice {
	c := h.choose(f, p)
	switch c.verb {
	case choiceTake:
		h.look(f)
		h.memory.JobStarted(p.Promise != nil)
		h.put(f, c.node, c.node.Jobs+1 < f.World.Slots)
	case choiceAwait:
		h.put(f, c.node, len(c.node.promised)+1 < f.World.Slots)
	}
	return c
}

// choose takes the node that is warm for the job and that others miss least: a
// free one, else one that is parked or on its way, which the job then waits
// for. Only when no node is warm for it does it take one that is cold, again
// that which others miss least.
func (h *hearth) choose(f *Fleet, p *Pod) Choice {
	h.recount(f)
	free := func(n *Node) bool { return f.Free(n, p) }
	warm := func(pass func(*Node) bool) *Node {
		return h.leastMissed(f, p, f.holders[p.Key], func(n *Node) bool {
			_, warm := f.Warm(n, p.Key)
			return warm && pass(n)
		})
	}
	if n := warm(free); n != nil {
		return Take(n)
	}
	cold := func() *Node {
		for _, list := range [][]*Node{f.Idle, f.Partial} {
			if n := h.leastMissed(f, p, list, free); n != nil {
				return n
			}
		}
		return nil
	}
	if h.noWait {
		if n := cold(); n != nil {
			return Take(n)
		}
	}
	if n := p.Promise; n != nil {
		if _, warm := f.Warm(n, p.Key); warm {
			return Wait()
		}
	} else if n := warm(func(n *Node) bool { return f.Unpromised(n) || f.CanResume(n) }); n != nil {
		return Await(n)
	}
	if n := cold(); n != nil {
		return Take(n)
	}
	if p.Promise != nil {
		return Wait()
	}
	for _, n := range f.OnTheWay {
		if f.Unpromised(n) {
			return Await(n)
		}
	}
	if n := h.leastMissed(f, p, f.Resumable, f.CanResume); n != nil {
		return Await(n)
	}
	return Launch()
}

func (h *hearth) leastMissed(f *Fleet, p *Pod, list []*Node, pass func(*Node) bool) (best *Node) {
	now, key := time.Unix(f.Now, 0), h.key(f, p.Key)
	least := 0.0
	for _, n := range list {
		if !pass(n) {
			continue
		}
		missed := h.stock.Missed(h.node(n).Node, key, h.memory.Keys, now)
		if best == nil || missed < least || missed == least && n.ID < best.ID {
			best, least = n, missed
		}
	}
	return best
}

func (h *hearth) Plan(f *Fleet) Plan {
	h.look(f)
	request := scoring.Request{Bounds: h.bounds, Costs: h.costs, Memory: h.memory, Now: time.Unix(f.Now, 0), Terse: true}
	request.Bounds.Busy = f.count[Busy]
	for _, n := range f.OnTheWay {
		if f.Unpromised(n) {
			request.Bounds.Coming++
		}
	}
	var plan Plan
	ahead := 0
	switch {
	case f.Now >= h.idle.next || f.Now%tick == 0 && h.settled(f):
		request.Nodes = h.seen(f.Idle)
		var answer scoring.Answer
		answer, ahead = scoring.DecideIdle(request, len(f.Resumable))
		h.carryOut(f, &plan, f.Idle, answer)
		h.idle.at, h.idle.next = f.Now, nextTick(max(answer.Next.Unix(), f.Now+1))
	case h.arrived:
		ahead = scoring.Ahead(request, len(f.Idle), len(f.Resumable))
	}
	h.arrived = false
	if !f.CanStart() {
		ahead = 0
	}
	if f.Now >= h.parked.next || ahead > 0 {
		stock := scoring.NewStock(h.seen(f.Idle), request.Now)
		request.Nodes = h.seen(f.Resumable)
		request.Bounds.Busy += len(f.Idle)
		answer := scoring.DecideParked(request, stock, ahead)
		h.carryOut(f, &plan, f.Resumable, answer)
		h.parked.next = nextTick(max(answer.Next.Unix(), f.Now+parkedTick))
	}
	plan.Next = min(h.idle.next, h.parked.next)
	if settle := h.settle(); len(f.Idle) > 0 {
		// Whatever else is true a node stays for a while once it is idle.
		i, _ := slices.BinarySearchFunc(f.Idle, f.Now-settle+1, func(n *Node, t int64) int { return cmp.Compare(n.Since, t) })
		if i < len(f.Idle) {
			plan.Next = min(plan.Next, nextTick(f.Idle[i].Since+settle))
		}
	}
	return plan
}

func (h *hearth) settle() int64 { return seconds(scoring.Settle(h.costs, h.bounds.Park)) }

// settled says whether a node has become idle, and has stayed so for as long as
// any does, since the last plan.
func (h *hearth) settled(f *Fleet) bool {
	settle := h.settle()
	i, _ := slices.BinarySearchFunc(f.Idle, h.idle.at-settle+1, func(n *Node, t int64) int { return cmp.Compare(n.Since, t) })
	return i < len(f.Idle) && f.Idle[i].Since+settle <= f.Now
}

// seen are nodes as the policy sees them.
func (h *hearth) seen(nodes []*Node) []scoring.Node {
	out := make([]scoring.Node, len(nodes))
	for i, n := range nodes {
		s := h.node(n)
		s.Parked, s.IdleSince = n.State != Idle, time.Unix(n.Since, 0)
		if s.Parked && len(s.Uses) > 0 {
			s.IdleSince = s.Uses[0].Last
		}
		out[i] = s.Node
	}
	return out
}

func (h *hearth) carryOut(f *Fleet, plan *Plan, nodes []*Node, answer scoring.Answer) {
	h.memory.Decided(answer.Verdicts)
	byID := make(map[model.InstanceID]*Node, len(nodes))
	for _, n := range nodes {
		byID[h.node(n).Instance] = n
	}
	for _, v := range answer.Verdicts {
		n := byID[v.Instance]
		switch v.Decision {
		case model.DecisionPark:
			plan.Park = append(plan.Park, n)
		case model.DecisionRelease:
			plan.Release = append(plan.Release, n)
			h.put(f, n, false)
			delete(h.nodes, n)
		}
	}
	for _, id := range answer.Resume {
		if n := byID[id]; f.CanResume(n) {
			plan.Resume = append(plan.Resume, n)
		}
	}
}
