package controller

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

const (
	// gather is how long messages about jobs are gathered before nodes are
	// started for them: a workflow queues many jobs at once.
	gather = 25 * time.Millisecond
	// saidWithin is how long after its start it is waited for a message that says
	// which job a runner has taken.
	saidWithin = 30 * time.Second
	// podsFor is how long a pod without a node is a reason to start one. Later
	// it is one that cluster-autoscaler cannot help either.
	podsFor = 10 * time.Minute
	// mostUnmatched bounds the sets of labels that people were told of.
	mostUnmatched = 100
)

// wanted is what is known of jobs that have no node yet.
type wanted struct {
	book *demand.Book
	// timer is when nodes are to be started for what was heard.
	timer *time.Timer
	// taken are the free slots that jobs will take, keys the queued jobs by
	// cache key, for each group.
	taken map[model.GroupID]int
	keys  map[model.GroupID]map[scoring.Key]int
	// coming are the runners without a pod that ask for a group, with when they
	// were created.
	coming map[model.GroupID][]time.Time
	// unmatched are the labels of jobs that no group may run and that people
	// were told of.
	unmatched map[string]bool
	// unsaid are the runner pods, by UID, that run and of which no message said
	// what they do, with when it is guessed; zero when it was.
	unsaid    map[string]time.Time
	forgotten int // of book.Forgotten, told
	refused   int
}

func newWanted() wanted {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return wanted{
		book: demand.NewBook(), timer: timer,
		taken: map[model.GroupID]int{}, keys: map[model.GroupID]map[scoring.Key]int{}, unmatched: map[string]bool{}, unsaid: map[string]time.Time{},
	}
}

// hear takes in what CI systems told.
func (o *owner) hear(jobs []demand.Job, listings []demand.Listing) {
	now, changed := time.Now(), false
	for _, j := range jobs {
		changed = o.demand.book.Observe(j, now) || changed
	}
	for _, l := range listings {
		changed = o.demand.book.Reconcile(l, now) || changed
	}
	if changed {
		o.demand.timer.Reset(gather)
	}
}

// expect takes in which runners are to have a pod soon.
func (o *owner) expect(coming map[model.GroupID][]time.Time) {
	for id, since := range coming {
		if len(since) > len(o.demand.coming[id]) {
			o.demand.timer.Reset(gather)
		}
	}
	o.demand.coming = coming
}

// seeDemand takes in what a runner pod says of jobs.
func (o *owner) seeDemand(before, p model.Pod, gone bool, now time.Time) {
	if gone || !p.Finished.IsZero() {
		delete(o.demand.unsaid, p.UID)
	} else if _, known := o.demand.unsaid[p.UID]; !known && p.Node != "" && !p.Waiting {
		o.demand.unsaid[p.UID] = now.Add(saidWithin)
	}
	switch {
	case gone:
	case p.Job != "" && before.Job != p.Job:
		if o.demand.book.PickedUp(p.Name, p.Job, now) {
			o.demand.timer.Reset(gather)
		}
	case before.UID == "" && p.Node == "" && p.Group != "":
		o.demand.timer.Reset(gather)
	}
}

// meetDemand starts nodes for the jobs that wait, beyond what is there for them
// and on its way.
func (o *owner) meetDemand(now time.Time) {
	if !o.started {
		return
	}
	o.guess(now)
	jobs := o.demand.book.Queued(now)
	groups, pods := o.supply(now)
	want := demand.Plan(jobs, groups, o.bestGroup)
	o.demand.taken = want.Taken
	o.demand.keys = map[model.GroupID]map[scoring.Key]int{}
	known := o.keysUnder(jobs)
	for _, j := range jobs {
		for _, g := range groups {
			if j.Key == "" || !demand.Matches(j, g.Labels) {
				continue
			}
			if o.demand.keys[g.ID] == nil {
				o.demand.keys[g.ID] = map[scoring.Key]int{}
			}
			o.demand.keys[g.ID][scoring.KeyOf(j.Key)]++
			for _, key := range known[j.Key] {
				o.demand.keys[g.ID][key]++
			}
		}
	}
	o.gaugeDemand(want, groups, pods)
	for _, id := range slices.Sorted(maps.Keys(want.Nodes)) {
		g := o.fleet[id]
		o.prescale(g, nodegroups.Prescale{Want: g.Coming() + want.Nodes[id], Reason: "queued-jobs", Prefer: o.preferred(g, now)}, now)
	}
}

// guess takes it that runner pods which have been up for a while, and of which no
// message said what they do, have taken the jobs that have waited longest: what
// runs is certain, and messages are lost.
func (o *owner) guess(now time.Time) {
	for uid, at := range o.demand.unsaid {
		if at.IsZero() || now.Before(at) {
			continue
		}
		o.demand.unsaid[uid] = time.Time{}
		p := o.history.pods[uid].Pod
		if g := o.fleet[o.groupOf[o.names[p.Node]]]; g != nil && p.Job == "" {
			o.demand.book.Took(p.Name, g.Settings().RunnerLabels, p.Created, now)
		}
	}
}

// serving counts the runner pods of each group of which no message has said yet
// what they do: each will have one of the queued jobs.
func (o *owner) serving() map[model.GroupID]int {
	n := map[model.GroupID]int{}
	for uid, at := range o.demand.unsaid {
		p := o.history.pods[uid].Pod
		if !at.IsZero() && p.Job == "" && !o.demand.book.Runs(p.Name) {
			n[o.groupOf[o.names[p.Node]]]++
		}
	}
	return n
}

// keysUnder returns, for every key of jobs, those of its pipelines that nodes
// know: GitHub's events tell a job's repository, and not its workflow.
func (o *owner) keysUnder(jobs []demand.Job) map[model.CacheKey][]scoring.Key {
	under := map[model.CacheKey][]scoring.Key{}
	for _, j := range jobs {
		under[j.Key] = nil
	}
	if len(under) == 0 {
		return under
	}
	for key := range o.history.holders {
		name := string(key.Value())
		for at, r := range name {
			if r != '/' {
				continue
			}
			if above := model.CacheKey(name[:at]); at > 0 {
				if _, asked := under[above]; asked {
					under[above] = append(under[above], key)
				}
			}
		}
	}
	return under
}

// supply is what the groups have for jobs, and how many pods that ask for them
// have no node.
func (o *owner) supply(now time.Time) (groups []demand.Group, pods map[model.GroupID]int) {
	pods, recent := map[model.GroupID]int{}, map[model.GroupID]int{}
	for _, p := range o.history.pods {
		if p.Node == "" && p.Finished.IsZero() && p.Group != "" {
			pods[p.Group]++
			if now.Sub(p.Created) < podsFor {
				recent[p.Group]++
			}
		}
	}
	for id, since := range o.demand.coming {
		for _, at := range since {
			if now.Sub(at) < podsFor {
				recent[id]++
			}
		}
	}
	serving := o.serving()
	for _, id := range slices.Sorted(maps.Keys(o.fleet)) {
		g := o.fleet[id]
		s := g.Settings()
		if !s.Runner() || !g.Synced() {
			continue
		}
		d := demand.Group{ID: id, Labels: s.RunnerLabels, Slots: s.JobsPerNode, Pods: recent[id], Held: serving[id]}
		if record := g.Record(); s.Prescale {
			d.Room = max(min(g.Spec().Max-record.Target-record.Hidden, s.PrescaleMax-record.Hidden), 0)
		}
		revealed, hidden := g.Unborn()
		d.Coming = (revealed + hidden) * s.JobsPerNode
		for _, n := range g.Nodes() {
			switch stateOf(n) {
			case "starting":
				d.Coming += s.JobsPerNode
			case "idle", "busy":
				if n.Node.Unschedulable || n.Node.Draining || !n.Node.CATaintSince.IsZero() {
					continue
				}
				held := o.history.held[n.Node.Name]
				d.Held += held
				d.Free += max(s.JobsPerNode-held-o.history.perNode[n.Node.Name], 0)
			}
		}
		groups = append(groups, d)
	}
	return groups, pods
}

// bestGroup is the group in which a node is started for a job, by the same
// ranking as cluster-autoscaler is told.
func (o *owner) bestGroup(key model.CacheKey, among []model.GroupID) model.GroupID {
	options := make([]Option, 0, len(among))
	for _, id := range among {
		options = append(options, Option{Group: id, Nodes: 1, Jobs: map[model.CacheKey]int{key: 1}})
	}
	return o.BestOption(options)
}

// gaugeDemand sets the gauges, and tells people of jobs that nobody can run.
func (o *owner) gaugeDemand(want demand.Want, groups []demand.Group, pods map[model.GroupID]int) {
	gauge := o.cfg.Metrics.JobsPending
	for _, g := range groups {
		for _, system := range []demand.System{demand.GitHub, demand.GitLab, demand.Buildkite} {
			gauge.WithLabelValues(string(g.ID), string(system)).Set(float64(want.Jobs[g.ID][system]))
		}
		gauge.WithLabelValues(string(g.ID), "pod").Set(float64(pods[g.ID]))
	}
	for _, system := range []demand.System{demand.GitHub, demand.GitLab, demand.Buildkite} {
		gauge.WithLabelValues("", string(system)).Set(float64(want.UnmatchedBy[system]))
	}
	for _, j := range want.Unmatched {
		labels := strings.Join(slices.Sorted(slices.Values(j.Labels)), ", ")
		if len(o.demand.unmatched) < mostUnmatched && !o.demand.unmatched[labels] {
			o.demand.unmatched[labels] = true
			o.log.Warn("a CI job is queued that no node group may run; hearth.dev/runner-labels says which jobs a group runs",
				"system", j.System, "scope", j.Scope, "labels", labels)
		}
	}
	if b := o.demand.book; b.Forgotten > o.demand.forgotten || b.Refused > o.demand.refused {
		o.log.Warn("queued CI jobs were given up", "unheard", b.Forgotten-o.demand.forgotten, "beyond_memory", b.Refused-o.demand.refused)
		o.demand.forgotten, o.demand.refused = b.Forgotten, b.Refused
	}
}

// waiting counts the jobs that wait by key: pods without a node, and queued
// jobs.
func (o *owner) waiting(group model.GroupID) map[scoring.Key]int {
	all := o.history.waiting(group)
	for key, n := range o.demand.keys[group] {
		all[key] += n
	}
	return all
}

// reserved is how many idle nodes of a group jobs will take.
func (w *wanted) reserved(g *nodegroups.Group) int {
	slots := max(g.Settings().JobsPerNode, 1)
	return (w.taken[g.Spec().ID] + slots - 1) / slots
}

// reserve keeps so many of the idle nodes at least, those of most value.
func reserve(verdicts []model.Verdict, parked map[model.InstanceID]bool, nodes int) {
	var going []*model.Verdict
	for i := range verdicts {
		switch v := &verdicts[i]; {
		case parked[v.Instance]:
		case v.Decision == model.DecisionKeep:
			nodes--
		default:
			going = append(going, v)
		}
	}
	slices.SortFunc(going, func(a, b *model.Verdict) int { return cmp.Compare(b.Score, a.Score) })
	for _, v := range going[:max(min(nodes, len(going)), 0)] {
		v.Decision = model.DecisionKeep
		v.Reasons = append([]model.Reason{{Code: "queued", Text: "a CI job is queued for it"}}, v.Reasons...)
	}
}
