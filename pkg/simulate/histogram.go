package simulate

import (
	"math"
	"math/rand/v2"
)

// The hybrid histogram keep-alive of serverless platforms (Shahrad et al.,
// "Serverless in the Wild", ATC 2020), key by key. What a platform unloads
// comes back from its image; here that is parking, with the cache intact.
const (
	binWidth = 60  // seconds of idle time
	bins     = 240 // 4 h, the paper's range
	headAt   = 0.05
	tailAt   = 0.99
	margin   = 0.1
	// A histogram says something when its bins differ: the paper's bound on
	// their coefficient of variation.
	representative = 2.0
)

// idleTimes is one key's histogram of the time from a job's end to the next
// job's arrival.
type idleTimes struct {
	count   [bins]int
	beyond  int // longer than the range
	total   int // in range
	squares int // of count, added up
	ended   int64
	any     bool
}

func (h *idleTimes) add(idle int64) {
	bin := int(max(0, idle) / binWidth)
	if bin >= bins {
		h.beyond++
		return
	}
	h.squares += 2*h.count[bin] + 1
	h.count[bin]++
	h.total++
}

// window says when, after a job of the key, a node unloads, loads again, and
// unloads for good. Where the histogram says nothing, the node stays loaded
// for the whole range.
func (h *idleTimes) window() (load, unload int64) {
	mean := float64(h.total) / bins
	deviation := math.Sqrt(max(0, float64(h.squares)/bins-mean*mean))
	if h.total == 0 || h.beyond > h.total || deviation/mean < representative {
		return 0, bins * binWidth
	}
	head, tail := -1, -1
	sum := 0
	for bin, n := range h.count {
		sum += n
		if head < 0 && float64(sum) >= headAt*float64(h.total) {
			head = bin
		}
		if tail < 0 && float64(sum) >= tailAt*float64(h.total) {
			tail = bin + 1
		}
	}
	return int64(float64(head*binWidth) * (1 - margin)), int64(float64(tail*binWidth) * (1 + margin))
}

type histogramPolicy struct {
	warmestFirst
	keys  []idleTimes
	nodes map[*Node]window
}

// window is when a node is to be loaded.
type window struct{ from, to int64 }

func newHistogram(Trace, World, *rand.Rand) Policy {
	return &histogramPolicy{nodes: map[*Node]window{}}
}

func (h *histogramPolicy) Arrived(f *Fleet, p *Pod) {
	if h.keys == nil {
		h.keys = make([]idleTimes, len(f.keys))
	}
	if k := &h.keys[p.Key]; k.any {
		k.add(f.Now - k.ended)
	}
}

func (h *histogramPolicy) Finished(f *Fleet, p *Pod) {
	k := &h.keys[p.Key]
	k.ended, k.any = f.Now, true
	load, unload := k.window()
	// It has to be resumed that much earlier; when there is no time to park in
	// between, it stays.
	from := f.Now + load - seconds(f.World.Resume)
	if from <= f.Now+seconds(f.World.ReleaseLag) {
		from = f.Now
	}
	h.nodes[p.Node] = window{from, f.Now + unload}
}

func (h *histogramPolicy) Plan(f *Fleet) Plan {
	var plan Plan
	for _, n := range f.Idle {
		switch w, used := h.nodes[n]; {
		case len(n.promised) > 0:
		case !used: // nobody came for it: its job found another node
			plan.Release = append(plan.Release, n)
		case f.Now < w.from, f.Now >= w.to:
			plan.Park = append(plan.Park, n)
		default:
			sooner(&plan.Next, w.to)
		}
	}
	for _, n := range f.Resumable {
		w := h.nodes[n]
		switch {
		case f.Now-n.Since >= parkedFor:
			plan.Release = append(plan.Release, n)
			delete(h.nodes, n)
		case f.Now >= w.from && f.Now < w.to:
			plan.Resume = append(plan.Resume, n)
		default:
			if f.Now < w.from {
				sooner(&plan.Next, w.from)
			}
			sooner(&plan.Next, n.Since+parkedFor)
		}
	}
	return plan
}
