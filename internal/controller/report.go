package controller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

const (
	// reportEvery is how often a RunnerNode whose phase did not change is
	// written at most.
	reportEvery = 5 * time.Minute
	// unreadyProtected is how long a NotReady node keeps its protection:
	// longer would keep cluster-autoscaler from removing dead nodes.
	unreadyProtected = 5 * time.Minute
)

// report is what was last written of an instance.
type report struct {
	record model.NodeRecord
	at     time.Time
}

// sameState says whether nothing changed that is worth a write now.
func (r report) sameState(n model.NodeRecord) bool {
	a, b := r.record, n
	return a.Phase == b.Phase && a.Desired == b.Desired && a.Decision == b.Decision && a.Node == b.Node && a.Hidden == b.Hidden &&
		slices.Equal(a.Conditions, b.Conditions)
}

// reportNodes writes the RunnerNodes of a group: at once when the phase or the
// decision changed, else now and then.
func (o *owner) reportNodes(g *nodegroups.Group, now time.Time) {
	id := g.Spec().ID
	reported := o.reported[id]
	if reported == nil {
		reported = map[model.InstanceID]report{}
		o.reported[id] = reported
	}
	for _, n := range g.Nodes() {
		before, known := reported[n.ID]
		r := model.NodeRecord{
			ID: n.ID, Group: id, Node: n.Node.Name, Desired: n.Desired, Phase: n.Phase, Hidden: n.Hidden,
			Since: now, Score: n.Verdict.Score, Decision: n.Verdict.Decision, Reason: words(n.Verdict.Reasons),
		}
		if known && before.record.Phase == r.Phase {
			r.Since = before.record.Since
		}
		if known && r.Decision == "" && r.Phase != model.PhaseReady {
			// The plan is about Ready nodes; of the others the decision that
			// brought them here is worth keeping.
			r.Score, r.Decision, r.Reason = before.record.Score, before.record.Decision, before.record.Reason
		}
		if why := o.ended[n.ID]; why != "" && r.Desired == model.DesiredGone {
			r.Decision, r.Reason = model.DecisionRelease, why
		}
		o.describeEngine(&r)
		if known && before.sameState(r) && now.Sub(before.at) < reportEvery {
			continue
		}
		r.Warmth = o.history.warmth(n.ID, now)
		if known && before.record.Decision != r.Decision && r.Decision != "" {
			o.log.Info("decision", "nodegroup", id, "node", n.Node.Name, "decision", r.Decision, "score", fmt.Sprintf("%.2f", r.Score), "reason", r.Reason)
			o.decided(r, now)
		}
		reported[n.ID] = report{r, now}
		o.records.saveNode(r)
	}
	changed := false
	for instance := range reported {
		if !g.Has(instance) {
			delete(o.ended, instance)
			delete(reported, instance)
			delete(o.marking, instance)
			delete(o.releasedAt, instance)
			delete(o.wantedAt, instance)
			o.records.dropNode(instance)
			o.release(instance)
			changed = true
		}
	}
	summary := o.summary(g)
	if last, ok := o.summaries[id]; changed || !ok || !sameSummary(last, summary) {
		o.summaries[id] = summary
		o.records.later(id, g.Record(), summary)
	}
	o.gauge(g, summary)
}

// words joins reasons to one sentence.
func words(reasons []model.Reason) string {
	texts := make([]string, 0, len(reasons))
	for _, r := range reasons {
		texts = append(texts, r.Text)
	}
	return strings.Join(texts, "; ")
}

func sameSummary(a, b model.GroupSummary) bool {
	return a.Min == b.Min && a.Max == b.Max && a.Ready == b.Ready && a.Parked == b.Parked && a.Warm == b.Warm &&
		maps.Equal(a.Phases, b.Phases) && slices.EqualFunc(a.Conditions, b.Conditions, func(x, y model.Condition) bool {
		return x.Type == y.Type && x.True == y.True && x.Reason == y.Reason && x.Message == y.Message
	})
}

// summary is what people see of a group beside its record.
func (o *owner) summary(g *nodegroups.Group) model.GroupSummary {
	spec := g.Spec()
	s := model.GroupSummary{Min: spec.Min, Max: spec.Max, Phases: map[model.Phase]int{}}
	for _, n := range g.Nodes() {
		s.Phases[n.Phase]++
		if n.Phase == model.PhaseReady && !n.Busy && n.Verdict.Decision == model.DecisionKeep {
			s.Warm++
		}
	}
	s.Ready, s.Parked = s.Phases[model.PhaseReady], s.Phases[model.PhaseParked]
	s.Conditions = []model.Condition{
		condition("AnnotationsValid", len(o.problems[spec.ID]) == 0, "Valid", "Invalid", join(o.problems[spec.ID])),
		condition("BackendHealthy", o.cloudErrors[spec.ID] == "", "Healthy", "Failing", o.cloudErrors[spec.ID]),
	}
	return s
}

func condition(kind string, ok bool, good, bad, message string) model.Condition {
	c := model.Condition{Type: kind, True: ok, Reason: bad, Message: message}
	if ok {
		c.Reason, c.Message = good, ""
	}
	return c
}

func join(problems []nodegroups.AnnotationError) string {
	texts := make([]string, 0, len(problems))
	for _, p := range problems {
		texts = append(texts, p.Error())
	}
	return strings.Join(texts, "; ")
}

// gauge sets the group's gauges.
func (o *owner) gauge(g *nodegroups.Group, s model.GroupSummary) {
	id := string(g.Spec().ID)
	for _, phase := range model.Phases() {
		o.cfg.Metrics.Nodes.WithLabelValues(id, string(phase)).Set(float64(s.Phases[phase]))
	}
	var bytes, clients float64
	for _, n := range g.Nodes() {
		bytes += float64(o.engines.caches[n.ID].bytes)
		clients += float64(o.engines.uses[n.ID].Clients)
	}
	o.cfg.Metrics.EngineCacheBytes.WithLabelValues(id).Set(bytes)
	o.cfg.Metrics.EngineClients.WithLabelValues(id).Set(clients)
	r := g.Record()
	o.cfg.Metrics.TargetSize.WithLabelValues(id).Set(float64(r.Target))
	o.cfg.Metrics.HiddenNodes.WithLabelValues(id).Set(float64(r.Hidden))
}

// say counts and tells what happened.
func (o *owner) say(g *nodegroups.Group, notes []nodegroups.Note) {
	id := g.Spec().ID
	for _, n := range notes {
		o.cfg.Metrics.ScaleEvents.WithLabelValues(string(id), n.Action, n.Reason).Add(float64(n.Count))
		r := g.Record()
		o.log.Info(n.Action, "nodegroup", id, "reason", n.Reason, "count", n.Count, "instance", n.Instance, "target", r.Target, "hidden", r.Hidden)
		text := fmt.Sprintf("%s (%s)", n.Action, n.Reason)
		severity := model.SeverityNormal
		todo, warn := advice[n.Reason]
		if warn || n.Action == "lost" || n.Reason == "launch-failed" || n.Reason == "resume-failed" {
			severity = model.SeverityWarning
		}
		for _, more := range []string{n.Detail, todo} {
			if more != "" {
				text += "; " + more
			}
		}
		o.happened(id, n, text, severity)
		if n.Action == "terminate" {
			o.ended[n.Instance] = text
		}
		if node, ok := o.nodeOf(n.Instance); ok {
			o.cfg.Events.Node(node, severity, camel(n.Action), text)
		} else {
			o.cfg.Events.Group(id, severity, camel(n.Action), fmt.Sprintf("%s: %d, target size %d", text, n.Count, r.Target))
		}
	}
}

// advice is what people can do about what went wrong with an engine, by the
// reason of a note.
//
//nolint:gochecknoglobals // a constant, if it could be one
var advice = map[string]string{
	"unclean-stop": "its cache is lost; an engine that needs longer to end has to be given a longer terminationGracePeriodSeconds",
	"engine-tolerates-taint": "the engine's pods tolerate every taint, so that the node cannot be parked: " +
		"let them tolerate only the taints that the nodes have, by key",
	"several-engines":   "one engine a node is what its cache is for: check which DaemonSets run engines here",
	"waits":             "nothing new starts on it, and it goes when they have gone, or after a day",
	"job-came-late":     "a pod was bound to the node after it was tainted; it is given some minutes",
	"stopped-elsewhere": "stop instances by parking them, so that their engines end first",
	"sessions-stayed":   "sessions that are no CI job's were connected to the engine",
	"stop-failed":       "the cloud did not stop the instance in time",
}

// nodeOf returns the registered node of an instance.
func (o *owner) nodeOf(id model.InstanceID) (model.Node, bool) {
	g := o.fleet[o.groupOf[id]]
	if id == "" || g == nil {
		return model.Node{}, false
	}
	n := g.Node(id)
	return n, n.Name != ""
}

// camel turns "take-back" into "TakeBack", as event reasons are written.
func camel(word string) string {
	var b strings.Builder
	for part := range strings.SplitSeq(word, "-") {
		if part != "" {
			b.WriteString(strings.ToUpper(part[:1]) + part[1:])
		}
	}
	return b.String()
}

// marking is what was last asked to be written on a node.
type marking struct {
	decision  model.Decision
	protected bool
	underway  bool
	again     time.Time // when it may be asked again if the watch does not show it
	relabel   time.Time // when its labels may change again
}

// mark keeps our annotations on the nodes as the plan says, and their labels as
// warm as they are, one call at a time for each node. A change of the labels
// alone waits until they may change; whenever something is written they come
// along.
func (o *owner) mark(g *nodegroups.Group, now time.Time) {
	group := g.Spec().ID
	for _, n := range g.Nodes() {
		node := n.Node
		want, ours := marks(g.Settings(), n, now)
		if g.Settings().Runner() {
			want.Warm = o.history.warmKeys(n.ID, now)
		}
		if !ours || node.Name == "" {
			continue
		}
		have := node.Marks
		protected := have.Protected == want.Protected || have.Protected && !have.ProtectedByUs
		asked := o.marking[n.ID]
		relabel := want.Warm != have.Warm && !now.Before(asked.relabel)
		// On most clouds a kubelet knows nothing of groups.
		bare := node.Labels[model.Prefix+"/node-group"] == "" && !now.Before(asked.again)
		marked := have.Decision == want.Decision && protected ||
			asked.decision == want.Decision && asked.protected == want.Protected && now.Before(asked.again)
		if marked && !relabel && !bare || asked.underway {
			continue
		}
		next := marking{decision: want.Decision, protected: want.Protected, underway: true, relabel: asked.relabel}
		if want.Warm != have.Warm {
			next.relabel = now.Add(relabelEvery)
		}
		o.marking[n.ID] = next
		o.beside(o.clusters, func(ctx context.Context) {
			err := error(nil)
			if bare {
				err = o.cfg.Nodes.Label(ctx, node.Name, node.UID, group)
			}
			if err == nil && (!marked || relabel) {
				err = o.cfg.Nodes.Mark(ctx, node.Name, node.UID, want)
			}
			if err != nil && o.ctx.Err() == nil {
				o.log.Error("annotating failed; it will be tried again", "node", node.Name, "err", err)
			}
			select {
			case o.marked <- n.ID:
			case <-o.ctx.Done():
			}
		})
		if have.Decision != "" && want.Decision != "" && have.Decision != want.Decision {
			o.cfg.Events.Node(node, model.SeverityNormal, "Decision"+camel(string(want.Decision)), fmt.Sprintf("%s: %s", want.Decision, want.Reason))
		}
	}
}

// markingEnded takes in the end of a call, good or bad. By now the node may
// have to be marked otherwise.
func (o *owner) markingEnded(id model.InstanceID) {
	if asked, ok := o.marking[id]; ok {
		asked.underway, asked.again = false, time.Now().Add(5*time.Second)
		o.marking[id] = asked
		o.dirty[o.groupOf[id]] = true
	}
}

// marks returns what our annotations on a node are to be, false when they may
// stay as they are. In a runner group everything is protected from
// cluster-autoscaler but what the plan releases and what is dead; in a plain
// one nothing is marked.
func marks(s nodegroups.Settings, n nodegroups.NodeStatus, now time.Time) (want model.Marks, ours bool) {
	if !s.Runner() {
		return model.Marks{}, true
	}
	if n.Phase != model.PhaseReady && n.Phase != model.PhaseLaunching && n.Phase != model.PhaseResuming {
		return model.Marks{}, false // on its way out
	}
	decision := n.Verdict.Decision
	if decision == "" {
		decision = model.DecisionKeep
	}
	dead := n.Phase == model.PhaseReady && !n.Node.Ready && now.Sub(n.Node.ReadyChanged) >= unreadyProtected
	return model.Marks{
		Decision: decision, Reason: words(n.Verdict.Reasons), Protected: decision == model.DecisionKeep && !dead,
	}, true
}
