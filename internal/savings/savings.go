// Package savings says what a running Hearth has saved: what its nodes and its
// jobs' waiting cost against what cluster-autoscaler with its default flags
// would have cost for the same jobs, by pkg/simulate's replay of them. It owns
// the tape of finished jobs and the comparison; it keeps a bounded number of
// jobs in memory, decides nothing, and never reads a clock.
package savings

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/simulate"
)

// Baseline is the policy of pkg/simulate that Hearth is compared with, live the
// one that Hearth follows.
const (
	Baseline = "ca-default"
	live     = "hearth"
)

// mostJobs of a group are kept. When there are more, the older half is dropped
// and the comparison begins later.
const mostJobs = 10_000

// Job is one job that ended well.
type Job struct {
	Key                        model.CacheKey
	Created, Started, Finished time.Time
	Warm                       bool // its node was warm for its key
}

// Terms are what a group's comparison rests on, as they hold now.
type Terms struct {
	// Running and Parked price of a node, and TimeValue of somebody's waiting,
	// in dollars an hour.
	Running, Parked, TimeValue float64
	Boot, Resume               time.Duration
	// Saves is what a warm cache saves a job, learnt or assumed until it was.
	Saves    time.Duration
	Slots    int
	MaxNodes int
}

// Report is what Hearth saved in every group, sorted by id.
type Report struct {
	At time.Time `json:"at"`
	// Assumptions are those of the comparison, in words.
	Assumptions []string `json:"assumptions"`
	Groups      []Group  `json:"node_groups"`
}

// Group is one group's comparison, from Since to Until: from when this process
// began to lead, or its jobs no longer fit into memory, to the end of the last
// job.
type Group struct {
	ID    string    `json:"id"`
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	// Jobs that ended well, and how many of those ran on a warm node.
	Jobs     int `json:"jobs"`
	WarmHits int `json:"warm_hits"`
	// SavedMinutes are the warm hits times what a warm cache saves.
	SavedMinutes float64 `json:"saved_minutes"`
	Hearth       Cost    `json:"hearth"`
	// Baseline is nil while there is no comparison: Problem says why.
	Baseline *Cost `json:"ca_default,omitempty"`
	// DryRun is there when Hearth only watches: Hearth then is what another
	// provider spent, and this is what Hearth would have.
	DryRun  *Cost  `json:"dry_run,omitempty"`
	Problem string `json:"problem,omitempty"`
}

// Cost is what nodes and waiting cost, in dollars.
type Cost struct {
	Nodes       float64 `json:"nodes_dollars"`
	Delay       float64 `json:"delay_dollars"`
	WarmHitRate float64 `json:"warm_hit_rate"`
}

// Total dollars.
func (c Cost) Total() float64 { return c.Nodes + c.Delay }

// assumptions of the comparison.
func assumptions() []string {
	return []string{
		"The same jobs arrive at the same times, one group at a time; failed jobs are left out.",
		"cluster-autoscaler releases a node after 10 minutes without a job, and kube-scheduler places jobs on the least allocated node.",
		"A job that ran cold would have run warm in the time that a warm cache saves less; nodes boot as fast as was learnt.",
		"Both accounts end with the last job that ended. Prices are the annotations node-price, parked-price and time-value as they hold now, or their defaults.",
		"History is kept in memory: it begins when this replica began to lead.",
	}
}

// Tape records what happened. The zero value is ready; it is safe for
// concurrent use.
type Tape struct {
	mu     sync.Mutex
	groups map[model.GroupID]*tape
}

type tape struct {
	since time.Time
	begin hours // when the tape began
	now   hours
	told  hours     // at the last Nodes
	at    time.Time // until when now counts
	// running and parked nodes since at.
	running, parked int
	jobs            []entry
	terms           Terms
}

type entry struct {
	Job
	spent hours // when it ended
}

// hours that nodes were paid for.
type hours struct{ running, parked float64 }

func (t *Tape) of(id model.GroupID, now time.Time) *tape {
	if t.groups == nil {
		t.groups = map[model.GroupID]*tape{}
	}
	if t.groups[id] == nil {
		t.groups[id] = &tape{since: now, at: now}
	}
	return t.groups[id]
}

// Nodes takes in how many nodes of a group are paid for from now on. It returns
// what was spent on running and on parked ones since it was last called, in
// dollars.
func (t *Tape) Nodes(id model.GroupID, running, parked int, terms Terms, now time.Time) (onRunning, onParked float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.of(id, now)
	g.until(now)
	onRunning, onParked = (g.now.running-g.told.running)*g.terms.Running, (g.now.parked-g.told.parked)*g.terms.Parked
	g.running, g.parked, g.terms, g.told = running, parked, terms, g.now
	return onRunning, onParked
}

func (g *tape) until(now time.Time) {
	if d := now.Sub(g.at).Hours(); d > 0 {
		g.now.running += d * float64(g.running)
		g.now.parked += d * float64(g.parked)
		g.at = now
	}
}

// Ended takes in a job that ended well.
func (t *Tape) Ended(id model.GroupID, j Job, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.of(id, now)
	g.until(now)
	if len(g.jobs) == mostJobs {
		last := g.jobs[mostJobs/2-1]
		g.jobs = slices.Delete(g.jobs, 0, mostJobs/2)
		g.since, g.begin = last.Finished, last.spent
	}
	g.jobs = append(g.jobs, entry{j, g.now})
}

// Forget drops a group.
func (t *Tape) Forget(id model.GroupID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.groups, id)
}

// Compare replays every group's jobs. It takes some milliseconds for each
// thousand jobs, and holds up neither Nodes nor Ended meanwhile. With dryRun it
// says, too, what Hearth would have cost.
func (t *Tape) Compare(now time.Time, dryRun bool) *Report {
	t.mu.Lock()
	copies := map[model.GroupID]tape{}
	for id, g := range t.groups {
		c := *g
		c.jobs = slices.Clone(g.jobs)
		copies[id] = c
	}
	t.mu.Unlock()
	r := &Report{At: now, Assumptions: assumptions()}
	for id, g := range copies {
		r.Groups = append(r.Groups, g.compare(string(id), dryRun))
	}
	slices.SortFunc(r.Groups, func(a, b Group) int { return cmp.Compare(a.ID, b.ID) })
	return r
}

func (g tape) compare(id string, dryRun bool) Group {
	c := Group{ID: id, Since: g.since, Until: g.since, Jobs: len(g.jobs)}
	if len(g.jobs) == 0 {
		c.Problem = "no job has ended yet"
		return c
	}
	factor := g.coldFactor()
	var delay time.Duration
	trace := simulate.Trace{Name: id}
	for i, j := range g.jobs {
		took := j.Finished.Sub(j.Started).Seconds()
		delay += max(0, j.Started.Sub(j.Created))
		if j.Warm {
			c.WarmHits++
		} else {
			delay += time.Duration(took * factor / (1 + factor) * float64(time.Second))
			took /= 1 + factor
		}
		trace.Jobs = append(trace.Jobs, simulate.Job{
			ID: strconv.Itoa(i), Arrival: j.Created.Unix(), Duration: max(1, int64(math.Round(took))), Key: j.Key, Group: id,
		})
	}
	last := g.jobs[len(g.jobs)-1]
	c.Until = last.Finished
	c.SavedMinutes = float64(c.WarmHits) * g.terms.Saves.Minutes()
	c.Hearth = Cost{
		Nodes: (last.spent.running-g.begin.running)*g.terms.Running + (last.spent.parked-g.begin.parked)*g.terms.Parked,
		Delay: delay.Hours() * g.terms.TimeValue, WarmHitRate: float64(c.WarmHits) / float64(c.Jobs),
	}
	trace.Sort()
	var err error
	if c.Baseline, err = g.replay(trace, Baseline, factor); err == nil && dryRun {
		c.DryRun, err = g.replay(trace, live, factor)
	}
	if err != nil {
		c.Problem = err.Error()
	}
	return c
}

func (g tape) replay(trace simulate.Trace, name string, factor float64) (*Cost, error) {
	policy, err := simulate.FindPolicy(name)
	if err != nil {
		return nil, fmt.Errorf("comparing: %w", err)
	}
	w := simulate.DefaultWorld()
	w.Boot, w.Resume = g.terms.Boot.Round(time.Second), g.terms.Resume.Round(time.Second)
	w.Price, w.ParkedPrice, w.DelayPrice = g.terms.Running, g.terms.Parked, g.terms.TimeValue
	w.Slots, w.MaxNodes, w.ColdFactor = max(1, g.terms.Slots), max(1, g.terms.MaxNodes), factor
	r, err := simulate.Run(trace, w, policy, simulate.Options{Seed: 1})
	if err != nil {
		return nil, fmt.Errorf("comparing: %w", err)
	}
	return &Cost{Nodes: r.Infrastructure, Delay: r.Delay, WarmHitRate: r.WarmHitRate()}, nil
}

// coldFactor is what a cold cache adds to a job of usual length, as a share of
// its warm length.
func (g tape) coldFactor() float64 {
	var total float64
	for _, j := range g.jobs {
		took := j.Finished.Sub(j.Started).Seconds()
		if !j.Warm {
			took = max(1, took-g.terms.Saves.Seconds())
		}
		total += max(1, took)
	}
	return g.terms.Saves.Seconds() / (total / float64(len(g.jobs)))
}
