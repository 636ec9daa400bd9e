package simulate

import "slices"

// Result is what one policy made of a trace.
type Result struct {
	Name string
	// Begin and End of the run in epoch seconds.
	Begin, End int64
	Summary
	// First and Second are the halves of the trace by time, when asked for: a
	// policy that learns has nothing but the first to learn from.
	First, Second *Summary
	// Samples are what the fleet looked like, when asked for.
	Samples []Sample
}

// Summary adds up a stretch of a trace: the jobs that arrived in it, and what
// the nodes did and cost in it.
type Summary struct {
	// Jobs, and how many of them ran warm.
	Jobs, Warm int
	// AfterBoot, AfterResume and AfterJob are the jobs that waited: until
	// their node had booted, had resumed, or until another job had ended. The
	// others started as soon as they had a pod.
	AfterBoot, AfterResume, AfterJob int
	// WaitP50, WaitP95 and WaitP99 are percentiles of all jobs' waiting, in
	// seconds (nearest rank).
	WaitP50, WaitP95, WaitP99 int64
	// Waited is how long jobs waited, Slowed how much longer they ran for
	// being cold, in seconds and added up.
	Waited, Slowed int64
	// NodeSeconds are how long nodes were in each State, added up.
	NodeSeconds [states]int64
	// Launches and Resumes of nodes, for a job or ahead of one.
	Launches, Resumes int
	// Dollars for nodes, and for developers' time.
	Infrastructure, Delay float64
}

// WarmHitRate is the share of the jobs that ran warm, 0 to 1.
func (s Summary) WarmHitRate() float64 { return share(s.Warm, s.Jobs) }

// BootShare is the share of the jobs that waited for a boot.
func (s Summary) BootShare() float64 { return share(s.AfterBoot, s.Jobs) }

// ResumeShare is the share of the jobs that waited for a resume.
func (s Summary) ResumeShare() float64 { return share(s.AfterResume, s.Jobs) }

// QueueShare is the share of the jobs that waited for another job to end.
func (s Summary) QueueShare() float64 { return share(s.AfterJob, s.Jobs) }

// RunningNodeHours are the hours that were paid in full.
func (s Summary) RunningNodeHours() float64 {
	var sum int64
	for state, n := range s.NodeSeconds {
		if State(state) != Parked {
			sum += n
		}
	}
	return float64(sum) / 3600
}

// ParkedNodeHours are the hours that were paid at the parked price.
func (s Summary) ParkedNodeHours() float64 { return float64(s.NodeSeconds[Parked]) / 3600 }

// Total dollars.
func (s Summary) Total() float64 { return s.Infrastructure + s.Delay }

func share(part, whole int) float64 {
	if whole == 0 {
		return 0
	}
	return float64(part) / float64(whole)
}

// Sample is the fleet between its time and the next sample's, on average.
type Sample struct {
	At    int64 // epoch seconds
	Nodes [states]float64
	// Waiting jobs.
	Waiting float64
}

// meter reads what a run costs. Everything is counted in whole seconds, so
// that no sum depends on its order.
type meter struct {
	begin, middle int64
	halves        bool

	nodeSeconds       [states]int64
	launches, resumes int
	atMiddle          *Summary // nodes until the middle

	jobs  [2]jobMeter
	width int64 // of a sample, in seconds
	sums  []sampleSum
}

type jobMeter struct {
	Summary
	waits []int64
}

type sampleSum struct {
	nodes   [states]int64
	waiting int64
}

// newMeter measures from begin; last is when the last job arrives.
func newMeter(begin, last int64, o Options) *meter {
	m := &meter{begin: begin, halves: o.Halves, middle: begin + (last-begin)/2}
	if o.Samples > 0 {
		m.width = max(1, (last-begin+int64(o.Samples)-1)/int64(o.Samples))
	}
	return m
}

// advance adds the time from one instant to the next, in which nothing
// changes.
func (m *meter) advance(from, to int64, nodes [states]int, waiting int) {
	if from <= m.middle && to > m.middle {
		m.add(from, m.middle, nodes, waiting)
		m.atMiddle = &Summary{NodeSeconds: m.nodeSeconds, Launches: m.launches, Resumes: m.resumes}
		from = m.middle
	}
	m.add(from, to, nodes, waiting)
}

func (m *meter) add(from, to int64, nodes [states]int, waiting int) {
	for s, n := range nodes[:Gone] {
		m.nodeSeconds[s] += int64(n) * (to - from)
	}
	for m.width > 0 && from < to {
		i := int((from - m.begin) / m.width)
		until := min(to, m.begin+int64(i+1)*m.width)
		for len(m.sums) <= i {
			m.sums = append(m.sums, sampleSum{})
		}
		sum := &m.sums[i]
		for s, n := range nodes[:Gone] {
			sum.nodes[s] += int64(n) * (until - from)
		}
		sum.waiting += int64(waiting) * (until - from)
		from = until
	}
}

// started counts a job at its start; waited says whether it waited for more than
// its pod. A node that became ready at that very instant is what it waited for.
func (m *meter) started(p *Pod, warm, waited bool) {
	half := 0
	if p.Arrival >= m.middle {
		half = 1
	}
	s := &m.jobs[half]
	wait := p.Started - p.job.Arrival
	s.Jobs++
	s.Waited += wait
	s.Slowed += p.Took - p.job.Duration
	s.waits = append(s.waits, wait)
	if warm {
		s.Warm++
	}
	switch {
	case !waited:
	case p.Node.Ready != p.Started:
		s.AfterJob++
	case p.Node.resumed:
		s.AfterResume++
	default:
		s.AfterBoot++
	}
}

func (m *meter) result(name string, w World, now int64) Result {
	nodes := Summary{NodeSeconds: m.nodeSeconds, Launches: m.launches, Resumes: m.resumes}
	r := Result{Name: name, Begin: m.begin, End: now, Summary: summarize(w, nodes, m.jobs[0], m.jobs[1])}
	if m.halves {
		first := nodes
		if m.atMiddle != nil {
			first = *m.atMiddle
		}
		second := nodes
		for s := range second.NodeSeconds {
			second.NodeSeconds[s] -= first.NodeSeconds[s]
		}
		second.Launches -= first.Launches
		second.Resumes -= first.Resumes
		a, b := summarize(w, first, m.jobs[0]), summarize(w, second, m.jobs[1])
		r.First, r.Second = &a, &b
	}
	for i, sum := range m.sums {
		at := m.begin + int64(i)*m.width
		width := float64(min(m.width, now-at))
		s := Sample{At: at, Waiting: float64(sum.waiting) / width}
		for state, n := range sum.nodes {
			s.Nodes[state] = float64(n) / width
		}
		r.Samples = append(r.Samples, s)
	}
	return r
}

// summarize puts what the nodes did and what became of the jobs together.
func summarize(w World, s Summary, jobs ...jobMeter) Summary {
	var waits []int64
	for _, j := range jobs {
		s.Jobs += j.Jobs
		s.Warm += j.Warm
		s.AfterBoot += j.AfterBoot
		s.AfterResume += j.AfterResume
		s.AfterJob += j.AfterJob
		s.Waited += j.Waited
		s.Slowed += j.Slowed
		waits = append(waits, j.waits...)
	}
	slices.Sort(waits)
	s.WaitP50, s.WaitP95, s.WaitP99 = percentile(waits, 50), percentile(waits, 95), percentile(waits, 99)
	s.Infrastructure = s.RunningNodeHours()*w.Price + s.ParkedNodeHours()*w.ParkedPrice
	s.Delay = float64(s.Waited+s.Slowed) / 3600 * w.DelayPrice
	return s
}

// percentile by nearest rank of a sorted list.
func percentile(sorted []int64, p int) int64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}
