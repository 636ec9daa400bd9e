package controller

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/savings"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

const (
	// mostEvents of the timeline are kept, each with mostText bytes of text.
	mostEvents = 2000
	mostText   = 600
)

// timeline is what was decided and done of late. The owner writes it, people
// read it.
type timeline struct {
	mu     sync.Mutex
	seq    uint64
	events []explain.Event // a ring once it is full; next is the oldest then
	next   int
}

func (t *timeline) add(e explain.Event) {
	e.Text = strings.ToValidUTF8(e.Text[:min(len(e.Text), mostText)], "")
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seq++
	e.Seq = t.seq
	if len(t.events) < mostEvents {
		t.events = append(t.events, e)
		return
	}
	t.events[t.next] = e
	t.next = (t.next + 1) % mostEvents
}

// Events returns the newest events, at most 2,000, the newest first. It answers
// from memory and is safe for concurrent use.
func (c *Controller) Events() []explain.Event {
	t := &c.timeline
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]explain.Event, 0, len(t.events))
	out = append(append(out, t.events[t.next:]...), t.events[:t.next]...)
	slices.Reverse(out)
	return out
}

// queue lists the runner pods that wait for a node, the longest waiting first.
func (o *owner) queue() explain.Queue {
	var q explain.Queue
	for _, p := range o.history.pods {
		if p.Node != "" || !p.Finished.IsZero() || p.Kind != model.PodRunner {
			continue
		}
		q.Jobs = append(q.Jobs, explain.Wait{
			Namespace: p.Namespace, Name: p.Name, Key: string(cmp.Or(p.Job, p.Key)), Group: string(p.Group), Since: p.Created,
		})
	}
	q.Waiting = len(q.Jobs)
	slices.SortFunc(q.Jobs, func(a, b explain.Wait) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	q.Jobs = slices.Clip(q.Jobs[:min(len(q.Jobs), explain.MaxQueue)])
	return q
}

// decided puts a decision that changed into the timeline.
func (o *owner) decided(r model.NodeRecord, now time.Time) {
	o.timeline.add(explain.Event{
		At: now, Kind: explain.KindDecision, Group: string(r.Group), Node: string(r.Node), Instance: string(r.ID),
		Action: string(r.Decision), Text: r.Reason, Count: 1,
	})
}

// happened puts what was done into the timeline.
func (o *owner) happened(id model.GroupID, n nodegroups.Note, text string, severity model.Severity) {
	e := explain.Event{
		At: time.Now(), Kind: explain.KindScale, Group: string(id), Instance: string(n.Instance), Action: n.Action,
		Text: text, Count: n.Count, Warning: severity == model.SeverityWarning,
	}
	if node, ok := o.nodeOf(n.Instance); ok {
		e.Node = string(node.Name)
	}
	o.timeline.add(e)
}

// Savings compares what was spent and waited since this process began to lead
// with what cluster-autoscaler's default would have cost. It computes on the
// caller's goroutine, beside the owner, and is safe for concurrent use.
func (c *Controller) Savings(now time.Time) *savings.Report {
	return c.tape.Compare(now, c.cfg.DryRun)
}

// account takes in for the savings how many nodes of a group are paid for.
func (o *owner) account(g *nodegroups.Group, e explain.Group, costs scoring.Costs, saves float64, now time.Time) {
	running, parked := o.tape.Nodes(g.Spec().ID, len(e.Nodes)-e.Parked, e.Parked, savings.Terms{
		Running: costs.Running, Parked: costs.Parked, TimeValue: costs.TimeValue, Boot: costs.Boot, Resume: costs.Resume,
		Saves: time.Duration(saves * float64(time.Second)), Slots: g.Settings().JobsPerNode, MaxNodes: g.Spec().Max,
	}, now)
	o.cfg.Metrics.Spent.WithLabelValues(e.ID, "running").Add(running)
	o.cfg.Metrics.Spent.WithLabelValues(e.ID, "parked").Add(parked)
}

// taped takes in for the savings a job that has ended well.
func (o *owner) taped(g *nodegroups.Group, p model.Pod, news *job, now time.Time) {
	if news.ended && g.Settings().Runner() {
		if _, saves := o.learntOf(g).memory.Keys.Of(scoring.KeyOf(p.Key)); news.warm {
			o.cfg.Metrics.Saved.WithLabelValues(string(g.Spec().ID)).Add(max(0, saves))
		}
		o.tape.Ended(g.Spec().ID, savings.Job{Key: p.Key, Created: p.Created, Started: p.Started, Finished: p.Finished, Warm: news.warm}, now)
	}
}
