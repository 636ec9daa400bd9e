package simulate

import "math/rand/v2"

// deaf is a policy's part that learns nothing.
type deaf struct{}

func (deaf) Arrived(*Fleet, *Pod)  {}
func (deaf) Finished(*Fleet, *Pod) {}

// leastAllocated places jobs as kube-scheduler does by default: on whichever
// node has most room, at random among equals. What a node has cached plays no
// part, neither there nor in which parked node comes back.
type leastAllocated struct{ random *rand.Rand }

func (l leastAllocated) Place(f *Fleet, p *Pod) Choice {
	if n := l.free(f); n != nil {
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
	if len(f.Resumable) > 0 {
		return Await(f.Resumable[l.random.IntN(len(f.Resumable))])
	}
	return Launch()
}

func (l leastAllocated) free(f *Fleet) *Node {
	if len(f.Idle) > 0 {
		return f.Idle[l.random.IntN(len(f.Idle))]
	}
	var best *Node
	equals := 0
	for _, n := range f.Partial {
		if best == nil || n.Jobs < best.Jobs {
			best, equals = n, 0
		}
		if n.Jobs == best.Jobs {
			if equals++; l.random.IntN(equals) == 0 {
				best = n
			}
		}
	}
	return best
}

// warmestFirst places a job on the warmest node: a free one, else one that is
// parked or on its way, which the job then waits for. Only when no node is warm
// for it does it take any free one, the one that was idle longest. A node that
// was resumed for a job is kept free for it.
type warmestFirst struct{}

func (warmestFirst) Place(f *Fleet, p *Pod) Choice {
	free := func(n *Node) bool { return f.Free(n, p) }
	if n := f.Warmest(p.Key, free); n != nil {
		return Take(n)
	}
	if n := p.Promise; n != nil {
		if _, warm := f.Warm(n, p.Key); warm {
			return Wait()
		}
	} else if n := f.Warmest(p.Key, func(n *Node) bool { return f.Unpromised(n) || f.CanResume(n) }); n != nil {
		return Await(n)
	}
	for _, list := range [][]*Node{f.Idle, f.Partial} {
		for _, n := range list {
			if free(n) {
				return Take(n)
			}
		}
	}
	if p.Promise != nil {
		return Wait()
	}
	for _, n := range f.OnTheWay {
		if f.Unpromised(n) {
			return Await(n)
		}
	}
	if len(f.Resumable) > 0 {
		return Await(f.Resumable[0])
	}
	return Launch()
}
