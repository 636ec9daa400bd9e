package simulate

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Options of a run.
type Options struct {
	// Seed of whatever a policy does at random.
	Seed uint64
	// GroupOnly: placement knows a job's Group and not its Key, as where a CI
	// system says late which job a runner gets.
	GroupOnly bool
	// Halves: the result also says what came of each half of the trace.
	Halves bool
	// Samples is how many times the result says what the fleet looked like.
	Samples int
	// Progress, when set, is told now and then how many jobs have arrived; an
	// error from it ends the run.
	Progress func(arrived int) error
	// Watch, when set, is told of every change of a node's state.
	Watch func(at int64, n *Node)
}

// Run replays the trace against one policy and says what it cost.
//
// Time begins one boot before the first arrival and ends when the last job
// has: nodes that are left then cost nothing more. Within one instant all that
// ends, becomes ready or arrives does so first; then jobs are placed, then the
// policy plans.
func Run(t Trace, w World, named NamedPolicy, o Options) (Result, error) {
	if err := w.Validate(); err != nil {
		return Result{}, fmt.Errorf("simulating %q: %w", named.Name, err)
	}
	if len(t.Jobs) == 0 {
		return Result{}, fmt.Errorf("simulating %q: the trace has no jobs", named.Name)
	}
	if i := slices.IndexFunc(t.Jobs, func(j Job) bool { return j.Duration < 1 }); i >= 0 {
		return Result{}, fmt.Errorf("simulating %q: job %q takes %d s", named.Name, t.Jobs[i].ID, t.Jobs[i].Duration)
	}
	if !slices.IsSortedFunc(t.Jobs, compareJobs) {
		t.Jobs = slices.Clone(t.Jobs)
		t.Sort()
	}
	e := &engine{
		options: o, jobs: t.Jobs, fleet: Fleet{World: w},
		boot: seconds(w.Boot), resume: seconds(w.Resume), lag: seconds(w.ReleaseLag), podLag: seconds(w.PodLag),
	}
	if !named.Queued {
		e.hears = e.podLag
	}
	e.internKeys(o.GroupOnly)
	begin := t.Jobs[0].Arrival - e.boot
	e.meter = newMeter(begin, t.Jobs[len(t.Jobs)-1].Arrival, o)
	e.fleet.Now = begin
	e.policy = named.New(t, w, rand.New(rand.NewPCG(o.Seed, 0)))
	if err := e.run(); err != nil {
		return Result{}, fmt.Errorf("simulating %q: %w", named.Name, err)
	}
	return e.meter.result(named.Name, w, e.fleet.Now), nil
}

// engine is one run.
type engine struct {
	options           Options
	jobs              []Job // by arrival; those that have not arrived yet begin at next
	holds, knows      []Key // of each job: what it uses, what is known of it
	next              int
	policy            Policy
	fleet             Fleet
	boot, resume, lag int64
	// podLag is how long after its arrival a job has a pod, hears how long after
	// it the policy hears of it.
	podLag, hears int64
	events        schedule
	wake          int64 // when the policy wants to plan again, 0 never
	offer         bool  // something has changed that a waiting job may use
	meter         *meter
}

// internKeys numbers the keys in their order, so that the numbers do not
// depend on the order of the jobs.
func (e *engine) internKeys(groupOnly bool) {
	number := map[model.CacheKey]Key{}
	// Keys are numbered before groups, which share the numbers.
	intern := func(keyOf func(*Job) model.CacheKey) []Key {
		var names []model.CacheKey
		for i := range e.jobs {
			name := keyOf(&e.jobs[i])
			if _, known := number[name]; !known {
				number[name] = 0
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			number[name] = Key(len(e.fleet.keys))
			e.fleet.keys = append(e.fleet.keys, name)
		}
		numbers := make([]Key, len(e.jobs))
		for i := range e.jobs {
			numbers[i] = number[keyOf(&e.jobs[i])]
		}
		return numbers
	}
	e.holds = intern(func(j *Job) model.CacheKey { return j.Key })
	e.knows = e.holds
	if groupOnly {
		e.knows = intern(func(j *Job) model.CacheKey { return model.CacheKey(j.Group) })
	}
	e.fleet.holders = make([][]*Node, len(e.fleet.keys))
}

func (e *engine) run() error {
	if err := e.plan(); err != nil {
		return err
	}
	for {
		if err := e.advance(); err != nil {
			return err
		}
		if err := e.happen(); err != nil {
			return err
		}
		if err := e.dispatch(); err != nil {
			return err
		}
		if e.next == len(e.jobs) && e.fleet.busy == 0 && len(e.fleet.Waiting) == 0 {
			return nil
		}
		if err := e.plan(); err != nil {
			return err
		}
	}
}

// advance moves the clock to the next instant at which something happens.
func (e *engine) advance() error {
	at := int64(-1)
	earliest := func(t int64) {
		if at < 0 || t < at {
			at = t
		}
	}
	if e.next < len(e.jobs) {
		earliest(e.jobs[e.next].Arrival + e.hears)
	}
	if len(e.events.list) > 0 {
		earliest(e.events.list[0].at)
	}
	if at < 0 {
		return fmt.Errorf("%d jobs wait and nothing is on its way", len(e.fleet.Waiting))
	}
	if e.wake > 0 {
		earliest(e.wake)
	}
	e.meter.advance(e.fleet.Now, at, e.fleet.count, len(e.fleet.Waiting))
	e.fleet.Now = at
	return nil
}

// happen carries out all that happens now.
func (e *engine) happen() error {
	for len(e.events.list) > 0 && e.events.list[0].at == e.fleet.Now {
		ev := heap.Pop(&e.events).(*event)
		switch {
		case ev.pod != nil:
			e.finish(ev.pod)
		case ev.change != ev.node.change: // taken back since
		case ev.node.State == Stopping:
			e.stop(ev.node)
		default:
			e.ready(ev.node)
		}
	}
	for e.next < len(e.jobs) && e.jobs[e.next].Arrival+e.hears == e.fleet.Now {
		j := &e.jobs[e.next]
		p := &Pod{ID: j.ID, Arrival: j.Arrival, Key: e.knows[e.next], job: j, holds: e.holds[e.next]}
		e.next++
		e.offer = true
		e.fleet.Waiting = append(e.fleet.Waiting, p)
		e.policy.Arrived(&e.fleet, p)
		if e.next%4096 == 0 && e.options.Progress != nil {
			if err := e.options.Progress(e.next); err != nil {
				return err
			}
		}
	}
	return nil
}

func (e *engine) finish(p *Pod) {
	f, n := &e.fleet, p.Node
	f.busy--
	n.Jobs--
	n.held, _, _ = use(n.held, p.holds, f.Now, f.World.KeysHeld)
	e.remember(n, p.Key)
	e.policy.Finished(f, p)
	e.offer = true
	switch n.Jobs {
	case 0:
		f.Partial = removeNode(f.Partial, n, byID)
		n.Since = f.Now
		e.enter(n, Idle)
		f.Idle = insertNode(f.Idle, n, bySince)
	case f.World.Slots - 1:
		f.Partial = insertNode(f.Partial, n, byID)
	}
}

// remember notes what everyone can know: that a job of that key ended here.
func (e *engine) remember(n *Node, k Key) {
	f := &e.fleet
	known := slices.ContainsFunc(n.Uses, func(u Use) bool { return u.Key == k })
	uses, dropped, fell := use(n.Uses, k, f.Now, max(f.World.KeysHeld, model.MaxWarmKeys))
	n.Uses = uses
	if !known {
		f.holders[k] = append(f.holders[k], n)
	}
	if fell {
		e.forget(n, dropped)
	}
}

func (e *engine) forget(n *Node, k Key) {
	list := e.fleet.holders[k]
	i := slices.Index(list, n)
	list[i] = list[len(list)-1]
	list[len(list)-1] = nil
	e.fleet.holders[k] = list[:len(list)-1]
}

func (e *engine) ready(n *Node) {
	f := &e.fleet
	f.OnTheWay = removeNode(f.OnTheWay, n, byReady)
	n.Since = f.Now
	e.enter(n, Idle)
	f.Idle = insertNode(f.Idle, n, bySince)
	e.offer = true
}

// stop ends a node's stopping.
func (e *engine) stop(n *Node) {
	e.offer = true // under a limit, another may start now
	if n.ending {
		e.end(n)
		return
	}
	e.enter(n, Parked)
}

func (e *engine) end(n *Node) {
	e.enter(n, Gone)
	e.fleet.All = removeNode(e.fleet.All, n, byID)
	for _, u := range n.Uses {
		e.forget(n, u.Key)
	}
}

// enter changes a node's state.
func (e *engine) enter(n *Node, s State) {
	e.fleet.count[n.State]--
	n.State = s
	n.change++
	e.fleet.count[s]++
	if e.options.Watch != nil {
		e.options.Watch(e.fleet.Now, n)
	}
}

// dispatch asks the policy for every waiting job that may have somewhere to
// go, until nothing changes any more.
func (e *engine) dispatch() error {
	f := &e.fleet
	for e.offer {
		e.offer = false
		left := f.Waiting[:0]
		for i, p := range f.Waiting {
			free := len(f.Idle)+len(f.Partial) > 0
			if !free && p.Promise == nil && !f.CanStart() && !slices.ContainsFunc(f.OnTheWay, f.Unpromised) {
				left = append(left, f.Waiting[i:]...)
				break
			}
			if free || p.Promise == nil {
				if err := e.place(p); err != nil {
					return err
				}
			}
			if p.Node == nil {
				left = append(left, p)
			}
		}
		clear(f.Waiting[len(left):])
		f.Waiting = left
	}
	return nil
}

func (e *engine) place(p *Pod) error {
	f := &e.fleet
	c := e.policy.Place(f, p)
	switch n := c.node; c.verb {
	case choiceTake:
		if n.State != Idle && n.State != Busy || n.Jobs >= f.World.Slots {
			return fmt.Errorf("job %q was placed on node %d, which is %s with %d jobs", p.ID, n.ID, n.State, n.Jobs)
		}
		e.start(p, n)
	case choiceAwait:
		switch {
		case f.Unpromised(n) || p.Promise == n:
		case f.CanResume(n):
			e.resumeNode(n)
		case n.State == Parked: // at the limit: it waits for what it was promised
			return nil
		default:
			return fmt.Errorf("job %q was promised node %d, which is %s and promised to %d jobs", p.ID, n.ID, n.State, len(n.promised))
		}
		e.promise(p, n)
	case choiceLaunch:
		if f.CanStart() {
			e.promise(p, e.launch())
		}
	}
	return nil
}

func (e *engine) promise(p *Pod, n *Node) {
	if p.Promise == n {
		return
	}
	e.withdraw(p)
	p.Promise = n
	n.promised = append(n.promised, p)
}

func (e *engine) withdraw(p *Pod) {
	if n := p.Promise; n != nil {
		p.Promise = nil
		n.promised = slices.DeleteFunc(n.promised, func(q *Pod) bool { return q == p })
	}
}

// start runs a job. When it takes a slot that was promised to another job,
// that one gets its promise in turn.
func (e *engine) start(p *Pod, n *Node) {
	f := &e.fleet
	mine := p.Promise
	e.withdraw(p)
	if n.State == Idle {
		f.Idle = removeNode(f.Idle, n, bySince)
		e.enter(n, Busy)
		if f.World.Slots > 1 {
			f.Partial = insertNode(f.Partial, n, byID)
		}
	}
	n.Jobs++
	f.busy++
	if n.Jobs == f.World.Slots {
		f.Partial = removeNode(f.Partial, n, byID)
	}
	for n.Jobs+len(n.promised) > f.World.Slots {
		other := n.promised[len(n.promised)-1]
		e.withdraw(other)
		e.offer = true
		if mine != nil && f.Unpromised(mine) {
			e.promise(other, mine)
		}
	}
	_, p.Warm = f.Warm(n, p.Key)
	_, warm := f.warm(n.held, p.holds)
	p.Node, p.Started, p.Took = n, max(f.Now, p.job.Arrival+e.podLag), p.job.Duration
	if !warm {
		p.Took = f.World.Cold(p.job.Duration)
	}
	e.events.add(event{at: p.Started + p.Took, pod: p})
	e.meter.started(p, warm, f.Now > p.job.Arrival+e.podLag)
}

func (e *engine) launch() *Node {
	f := &e.fleet
	f.lastID++
	n := &Node{ID: f.lastID, State: Gone, Launched: f.Now}
	f.count[Gone]++ // where it comes from, as it were
	e.meter.launches++
	f.All = append(f.All, n)
	e.begin(n, Booting, f.Now+e.boot)
	return n
}

func (e *engine) resumeNode(n *Node) {
	f := &e.fleet
	f.Resumable = removeNode(f.Resumable, n, bySince)
	from := f.Now
	if n.State == Stopping { // it has to stop before it can start
		from = n.stopped
	}
	n.resumed = true
	e.meter.resumes++
	e.begin(n, Resuming, from+e.resume)
}

func (e *engine) begin(n *Node, s State, ready int64) {
	n.Ready = ready
	e.enter(n, s)
	e.fleet.OnTheWay = insertNode(e.fleet.OnTheWay, n, byReady)
	e.events.add(event{at: ready, node: n, change: n.change})
}

// plan asks the policy for its plan and carries it out.
func (e *engine) plan() error {
	f := &e.fleet
	plan := e.policy.Plan(f)
	if plan.Next != 0 && plan.Next <= f.Now {
		return fmt.Errorf("the plan at %d would change at %d, which is not later", f.Now, plan.Next)
	}
	e.wake = plan.Next
	for _, n := range plan.Park {
		if n.State != Idle {
			return fmt.Errorf("node %d was to be parked and is %s", n.ID, n.State)
		}
		e.release(n, false)
	}
	for _, n := range plan.Release {
		switch n.State {
		case Idle:
			e.release(n, true)
		case Parked:
			f.Resumable = removeNode(f.Resumable, n, bySince)
			e.end(n)
		case Stopping:
			f.Resumable = removeNode(f.Resumable, n, bySince)
			n.ending = true
		default:
			return fmt.Errorf("node %d was to be released and is %s", n.ID, n.State)
		}
	}
	for _, n := range plan.Resume {
		switch {
		case f.CanResume(n):
			e.resumeNode(n)
		case n.State != Parked:
			return fmt.Errorf("node %d was to be resumed and is %s", n.ID, n.State)
		}
	}
	for range plan.Launch {
		if f.CanStart() {
			e.launch()
		}
	}
	return e.dispatch()
}

// release stops an idle node. A job that it was promised to looks elsewhere.
func (e *engine) release(n *Node, ending bool) {
	f := &e.fleet
	f.Idle = removeNode(f.Idle, n, bySince)
	for len(n.promised) > 0 {
		e.withdraw(n.promised[0])
		e.offer = true
	}
	n.ending = ending
	n.Since, n.stopped = f.Now, f.Now+e.lag
	e.enter(n, Stopping)
	if !ending {
		f.Resumable = insertNode(f.Resumable, n, bySince)
	}
	e.events.add(event{at: n.stopped, node: n, change: n.change})
}

// event is the end of a job, or of a node's booting, resuming or stopping.
type event struct {
	at     int64
	seq    int // events of one instant keep the order of their making
	pod    *Pod
	node   *Node
	change int
}

// schedule is a heap of events, the earliest first.
type schedule struct {
	list []*event
	made int
}

func (s *schedule) add(ev event) {
	s.made++
	ev.seq = s.made
	heap.Push(s, &ev)
}

// Len, Less, Swap, Push and Pop implement heap.Interface.

func (s *schedule) Len() int { return len(s.list) }

func (s *schedule) Less(i, j int) bool {
	a, b := s.list[i], s.list[j]
	return a.at < b.at || a.at == b.at && a.seq < b.seq
}

func (s *schedule) Swap(i, j int) { s.list[i], s.list[j] = s.list[j], s.list[i] }

func (s *schedule) Push(ev any) { s.list = append(s.list, ev.(*event)) }

func (s *schedule) Pop() any {
	last := len(s.list) - 1
	ev := s.list[last]
	s.list[last] = nil
	s.list = s.list[:last]
	return ev
}
