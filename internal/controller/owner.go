package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// owner is the state of the one goroutine that owns the fleet.
type owner struct {
	*Controller
	ctx  context.Context //nolint:containedctx // the owner lives exactly as long as Run
	stop context.CancelCauseFunc
	work *sync.WaitGroup

	fleet       map[model.GroupID]*nodegroups.Group
	declared    map[model.GroupID]model.NodeGroup
	releasedAt  map[model.InstanceID]time.Time      // since when the plan lets a node go
	wantedAt    map[model.InstanceID]time.Time      // since when the forecast pays for a node
	promised    map[model.GroupID]nodegroups.Record // of groups that are not declared now
	annotations map[model.GroupID]map[string]string // of the RunnerNodeGroup objects
	problems    map[model.GroupID][]nodegroups.AnnotationError
	cloudErrors map[model.GroupID]string
	registered  map[model.InstanceID]model.Node // Node objects that have a providerID
	names       map[model.NodeName]model.InstanceID
	groupOf     map[model.InstanceID]model.GroupID
	engines     engines
	ended       map[model.InstanceID]string // why the cloud is to end it, where the plan had meant to keep it
	dirty       map[model.GroupID]bool
	unsettled   map[model.GroupID]bool // groups in which the cloud is expected to change
	history     *history
	placements  placements
	demand      wanted
	learnt      map[model.GroupID]*learnt
	memories    memories
	marking     map[model.InstanceID]marking
	reported    map[model.GroupID]map[model.InstanceID]report
	summaries   map[model.GroupID]model.GroupSummary
	// clouds and clusters bound the calls under way, apart from each other: an
	// API server that hangs must not hold up the cloud.
	clouds, clusters chan struct{}
	// recordAfter is when records are written again, but for an RPC: that of
	// one group, after the store refused it, or under the empty id those of
	// all, after it did not answer.
	recordAfter map[model.GroupID]time.Time
	started     bool
	readAt      time.Time // of the newest good reading of the cloud
	planned     time.Time
}

// newOwner returns an owner that knows nothing yet.
func (c *Controller) newOwner(ctx context.Context, stop context.CancelCauseFunc, work *sync.WaitGroup) *owner {
	return &owner{
		Controller: c, ctx: ctx, stop: stop, work: work,
		fleet:       map[model.GroupID]*nodegroups.Group{},
		declared:    map[model.GroupID]model.NodeGroup{},
		releasedAt:  map[model.InstanceID]time.Time{},
		wantedAt:    map[model.InstanceID]time.Time{},
		annotations: map[model.GroupID]map[string]string{},
		problems:    map[model.GroupID][]nodegroups.AnnotationError{},
		registered:  map[model.InstanceID]model.Node{},
		names:       map[model.NodeName]model.InstanceID{},
		unsettled:   map[model.GroupID]bool{},
		groupOf:     map[model.InstanceID]model.GroupID{},
		engines:     newEngines(),
		ended:       map[model.InstanceID]string{},
		dirty:       map[model.GroupID]bool{},
		history:     newHistory(),
		placements:  placements{of: map[string]*explain.Placement{}},
		demand:      newWanted(),
		learnt:      map[model.GroupID]*learnt{},
		marking:     map[model.InstanceID]marking{},
		reported:    map[model.GroupID]map[model.InstanceID]report{},
		summaries:   map[model.GroupID]model.GroupSummary{},
		cloudErrors: map[model.GroupID]string{},
		recordAfter: map[model.GroupID]time.Time{},
		clouds:      make(chan struct{}, 32),
		clusters:    make(chan struct{}, 32),
	}
}

// begin builds the fleet from the declaration and from what an earlier life
// recorded; false when that cannot be read.
func (o *owner) begin(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	records, annotations, nodes, err := o.cfg.Store.Load(ctx)
	if err != nil {
		o.log.Error("reading what an earlier life recorded failed; trying again", "err", err)
		return false
	}
	for _, r := range nodes {
		o.history.restore(r)
		o.engines.restore(r)
		o.groupOf[r.ID] = r.Group
		if o.reported[r.Group] == nil {
			o.reported[r.Group] = map[model.InstanceID]report{}
		}
		o.reported[r.Group][r.ID] = report{record: r}
	}
	// Annotations must be known before the groups are, so that the first view
	// is already the right one.
	changedNodes, pods, newer := o.cfg.World.take()
	maps.Copy(o.annotations, annotations)
	maps.Copy(o.annotations, newer)
	specs := o.cfg.Groups
	select {
	case specs = <-o.groups: // the file was reloaded while another replica led
	default:
	}
	o.promised = records
	o.memories.kept = o.loadMemories(ctx)
	for _, spec := range specs {
		o.declare(spec)
	}
	for _, r := range nodes {
		o.applyTo(r.ID, nodegroups.Known{Instance: r.ID})
		o.tellUse(r.ID)
	}
	o.observe(changedNodes, pods, nil)
	return true
}

// declare adds a group or changes its declaration.
func (o *owner) declare(spec model.NodeGroup) {
	o.declared[spec.ID] = spec
	settings, problems := nodegroups.Interpret(spec, o.annotations[spec.ID])
	o.sayProblems(spec.ID, problems)
	if g := o.fleet[spec.ID]; g != nil {
		o.apply(g, nodegroups.Configure{Group: spec, Settings: settings})
		o.planned = time.Time{} // what is kept may be another now
		return
	}
	record := o.promised[spec.ID]
	delete(o.promised, spec.ID)
	o.fleet[spec.ID] = nodegroups.NewGroup(spec, settings, record)
	for id, intent := range record.Intents {
		o.groupOf[id] = spec.ID
		if intent.Engine != "" && intent.Exit == "" {
			o.engines.homes[intent.Engine] = id // its Node may be gone
		}
		o.tellEngine(id)
	}
	for id := range o.registered {
		if o.groupOf[id] == spec.ID {
			o.handOver(o.fleet[spec.ID], id)
		}
	}
	o.dirty[spec.ID] = true
}

// sayProblems reports annotations that could not be used, each once.
func (o *owner) sayProblems(group model.GroupID, problems []nodegroups.AnnotationError) {
	for _, p := range problems {
		if !slices.Contains(o.problems[group], p) {
			o.log.Warn("annotation cannot be used", "nodegroup", group, "err", p)
			o.cfg.Events.Group(group, model.SeverityWarning, "InvalidAnnotation", p.Error())
		}
	}
	o.problems[group] = problems
	o.cfg.Metrics.AnnotationErrors.WithLabelValues(string(group)).Set(float64(len(problems)))
}

func (o *owner) loop() {
	tick := time.NewTicker(o.cfg.Tick)
	defer tick.Stop()
	defer o.demand.timer.Stop()
	for {
		select {
		case <-o.ctx.Done():
			return
		case cmd := <-o.commands:
			o.command(cmd)
		case <-o.cfg.World.wake:
			o.observe(o.cfg.World.take())
			o.sampled(o.cfg.World.takeUses())
			o.hear(o.cfg.World.takeJobs())
			o.expect(o.cfg.World.runnersComing())
		case <-o.demand.timer.C:
			o.meetDemand(time.Now())
		case r := <-o.results:
			o.finished(r)
		case id := <-o.marked:
			o.markingEnded(id)
		case r := <-o.readings:
			o.read(r)
		case groups := <-o.groups:
			o.redeclare(groups)
		case k := <-o.kept:
			o.keptMemory(k)
		case <-tick.C:
			for id := range o.unsettled {
				o.dirty[id] = true
			}
			if o.started {
				o.cfg.Metrics.SnapshotAge.Set(time.Since(o.readAt).Seconds())
				o.releaseOrphans(time.Now())
			}
			if o.started && time.Since(o.planned) >= o.cfg.PlanEvery {
				o.plan()
			}
			o.keepMemories(time.Now())
		}
		o.advance()
	}
}

// redeclare takes a new config file. Groups that are no longer declared are
// left as they are, to whoever manages them now.
func (o *owner) redeclare(groups []model.NodeGroup) {
	kept := map[model.GroupID]bool{}
	for _, spec := range groups {
		kept[spec.ID] = true
		o.declare(spec)
	}
	for id := range o.fleet {
		if !kept[id] {
			o.log.Info("node group is no longer declared; its nodes are left as they are", "nodegroup", id)
			o.promised[id] = o.fleet[id].Record() // it may be declared again
			delete(o.fleet, id)
			delete(o.declared, id)
			delete(o.dirty, id)
			delete(o.unsettled, id)
			delete(o.reported, id)
			delete(o.summaries, id)
			delete(o.recordAfter, id)
			delete(o.learnt, id)
			o.tape.Forget(id)
			o.cfg.Metrics.ForgetGroup(string(id))
		}
	}
	o.pollNow()
}

// observe takes in what the watches saw.
func (o *owner) observe(nodes []nodeChange, pods []podChange, annotations map[model.GroupID]map[string]string) {
	now := time.Now()
	for group, a := range annotations {
		o.annotations[group] = a
		if spec, ok := o.declared[group]; ok {
			o.declare(spec)
		}
	}
	for _, n := range nodes {
		o.observeNode(n)
	}
	for _, p := range pods {
		switch p.pod.Kind {
		case model.PodRunner:
			o.seePod(p, now)
			o.observeBusy(p.pod.Node)
		case model.PodEngine:
			o.seeEngine(p, now)
		}
	}
}

// sampled takes in what the metrics of engines say.
func (o *owner) sampled(uses map[model.NodeName]model.EngineUse) {
	now := time.Now()
	for _, name := range slices.Sorted(maps.Keys(uses)) {
		o.seeUse(uses[name], now)
	}
}

func (o *owner) seePod(c podChange, now time.Time) {
	p := o.afterLoss(c.pod)
	instance := o.names[p.Node]
	see := o.history.see
	if c.gone {
		see = o.history.gone
	}
	before := o.history.pods[p.UID]
	o.placed(before.Pod, p, c.gone, now)
	news := see(p, instance, now)
	o.history.seeJob(p, instance)
	group := o.groupOf[instance]
	if group == "" {
		group = p.Group
	}
	o.arrived(before, p, group, c.gone, now)
	o.seeDemand(before.Pod, p, c.gone, now)
	g := o.fleet[group]
	if news == nil || g == nil {
		return
	}
	o.learntOf(g).told(p, news, g.Node(instance).ReadyChanged)
	o.taped(g, p, news, now)
	if !news.started {
		return
	}
	temperature := "cold"
	if news.warm {
		temperature = "warm"
	}
	o.cfg.Metrics.Jobs.WithLabelValues(string(group), temperature).Inc()
	o.cfg.Metrics.JobWait.WithLabelValues(string(group)).Observe(max(news.wait, 0).Seconds())
	o.log.Info("CI job started", "nodegroup", group, "node", p.Node, "key", p.Key, "temperature", temperature, "waited", news.wait)
}

func (o *owner) observeNode(c nodeChange) {
	name, id := c.node.Name, c.node.ID
	if before, known := o.names[name]; known && (c.gone || before != id) && o.registered[before].Name != name {
		// The instance has registered under another name meanwhile.
		delete(o.names, name)
		delete(o.history.idleSince, name)
	} else if known && (c.gone || before != id) {
		// Deleted, or the name was given to another instance.
		delete(o.names, name)
		delete(o.registered, before)
		delete(o.history.idleSince, name)
		o.applyTo(before, nodegroups.ObserveNodeGone{Instance: before})
		o.applyTo(before, nodegroups.ObserveBusy{Instance: before}) // its jobs went with it
		o.engineUnused(before)
		o.release(before)
	}
	if c.gone || id == "" {
		return
	}
	if other, known := o.registered[id]; known && other.Name != name && other.Created.After(c.node.Created) {
		return // left over from before the instance registered anew
	}
	o.names[name], o.registered[id] = id, c.node
	if group := o.labelled(c.node.Labels[model.Prefix+"/node-group"]); group != "" && o.groupOf[id] == "" {
		o.groupOf[id] = group
	}
	o.applyTo(id, nodegroups.ObserveNode{Node: c.node})
	o.observeBusy(name)
	o.engineHomes(name, id)
}

// labelled returns the group that a node's label names.
func (o *owner) labelled(label string) model.GroupID {
	if _, ok := o.declared[model.GroupID(label)]; ok || label == "" {
		return model.GroupID(label)
	}
	for id := range o.declared {
		if model.GroupLabel(id) == label {
			return id
		}
	}
	return model.GroupID(label)
}

// release forgets whose an instance was, once neither it nor its Node exists.
func (o *owner) release(id model.InstanceID) {
	if _, registered := o.registered[id]; registered {
		return
	}
	if g := o.fleet[o.groupOf[id]]; g == nil || !g.Has(id) {
		delete(o.groupOf, id)
		o.history.forget(id)
		o.engines.forget(id)
	}
}

// observeBusy tells the fleet whether runner pods are on a node.
func (o *owner) observeBusy(name model.NodeName) {
	id, ok := o.names[name]
	if !ok {
		delete(o.history.idleSince, name)
		return
	}
	o.applyTo(id, nodegroups.ObserveBusy{Instance: id, Busy: o.history.busy(name)})
}

// applyTo applies an observation to the group of an instance, if it is ours.
func (o *owner) applyTo(id model.InstanceID, event nodegroups.Event) {
	if g := o.fleet[o.groupOf[id]]; g != nil {
		o.apply(g, event)
	}
}

// apply applies an event that neither commits before an answer nor is refused:
// an observation, a decision or the end of an effect.
func (o *owner) apply(g *nodegroups.Group, event nodegroups.Event) {
	out, err := g.Step(event, time.Now())
	if err != nil {
		o.log.Error("event refused", "nodegroup", g.Spec().ID, "event", fmt.Sprintf("%T", event), "err", err)
		return
	}
	o.committed(g, out)
	o.dirty[g.Spec().ID] = true
}

// committed passes on what a step came to.
func (o *owner) committed(g *nodegroups.Group, out nodegroups.Outcome) {
	if out.Commit == nodegroups.CommitSoon {
		o.records.later(g.Spec().ID, g.Record(), o.summary(g))
	}
	o.say(g, out.Notes)
	for _, n := range out.Notes {
		// Its engine was not seen to end.
		adopted := n.Action == "adopt" && n.Reason == "stopped" && o.reported[g.Spec().ID][n.Instance].record.Desired != model.DesiredParked
		if adopted || n.Reason == "stopped-elsewhere" {
			o.loseCache(n.Instance, "StoppedElsewhere", "somebody else stopped the instance, and its engine with it", time.Now())
		}
	}
}

// read takes in one reading of the cloud.
func (o *owner) read(r reading) {
	if r.err != nil {
		o.log.Error("reading the cloud failed; the last snapshot goes on serving", "err", r.err)
		return
	}
	for id, err := range r.snapshot.Errors {
		if o.cloudErrors[id] != err.Error() {
			o.log.Error("reading a node group failed; its last snapshot goes on serving", "nodegroup", id, "err", err)
			o.cloudErrors[id] = err.Error()
		}
	}
	for id, s := range r.snapshot.Groups {
		g := o.fleet[id]
		if g == nil {
			continue
		}
		delete(o.cloudErrors, id)
		s.TakenAt = r.at
		for _, i := range s.Instances {
			if before := o.groupOf[i.ID]; before != id {
				// Its Node's label said otherwise; the cloud is right.
				o.applyTo(i.ID, nodegroups.ObserveNodeGone{Instance: i.ID})
				o.applyTo(i.ID, nodegroups.ObserveBusy{Instance: i.ID})
				o.groupOf[i.ID] = id
				o.handOver(g, i.ID)
			}
		}
		o.apply(g, nodegroups.ObserveCloud{Snapshot: s})
	}
	if len(r.snapshot.Groups) > 0 || len(o.fleet) == 0 {
		o.readAt = r.at
	}
	o.start()
}

// handOver tells a group what was observed of an instance before it was known
// to be the group's.
func (o *owner) handOver(g *nodegroups.Group, id model.InstanceID) {
	if node, ok := o.registered[id]; ok {
		o.apply(g, nodegroups.ObserveNode{Node: node})
		o.apply(g, nodegroups.ObserveBusy{Instance: id, Busy: o.history.busy(node.Name)})
	}
	o.tellEngine(id)
	o.tellUse(id)
}

// start publishes the first view, once every group that can be read has been.
func (o *owner) start() {
	if o.started {
		return
	}
	for id, g := range o.fleet {
		// One that cannot be read must not hold up the others: it joins them
		// at the first Refresh after it could be.
		if !g.Synced() && o.cloudErrors[id] == "" {
			o.log.Warn("waiting for the first snapshot of a node group", "nodegroup", id)
			return
		}
	}
	o.started = true
	o.plan()
	o.publish()
	o.log.Info("serving", "nodegroups", len(o.fleet))
	o.cfg.OnSynced()
}

// publish makes every group's view the one that is read.
func (o *owner) publish() {
	views := make([]*nodegroups.View, 0, len(o.fleet))
	for _, g := range o.fleet {
		if v := g.View(); v != nil {
			views = append(views, v)
		}
	}
	o.view.Store(nodegroups.NewFleetView(views))
	o.publishSpare()
}

// advance lets every group that may have something to do go on.
func (o *owner) advance() {
	if !o.started {
		return
	}
	for _, id := range slices.Sorted(maps.Keys(o.dirty)) {
		o.serveWaiting()
		now := time.Now()
		g := o.fleet[id]
		if g == nil || !g.Synced() {
			delete(o.dirty, id)
			continue
		}
		next := g.Clone()
		out, effects := next.Ready(now)
		if out.Commit == nodegroups.CommitFirst {
			if !o.mayRecord(id, now) {
				continue // stays dirty
			}
			if err := o.recordUnasked(next); err != nil {
				o.log.Error("recording failed; trying again", "nodegroup", id, "err", err)
				continue
			}
		}
		delete(o.dirty, id)
		o.fleet[id] = next
		o.committed(next, out)
		for _, e := range effects {
			o.perform(e)
		}
		o.mark(next, now)
		o.reportNodes(next, now)
		if next.Settled() {
			delete(o.unsettled, id)
		} else {
			o.unsettled[id] = true
		}
	}
	o.fast.Store(len(o.unsettled) > 0)
}

// serveWaiting carries out the request that waits, if one does: between two
// groups, so that a slow store holds up each record and not all that follow.
func (o *owner) serveWaiting() {
	select {
	case cmd := <-o.commands:
		o.command(cmd)
	default:
	}
}

// record writes a group's record before anything rests on it. When that fails
// the state in memory stays in force, and is written later: what failed may
// have been written all the same.
func (o *owner) record(ctx context.Context, g *nodegroups.Group) error {
	id := g.Spec().ID
	err := o.records.now(ctx, id, g.Record(), o.summary(g))
	switch {
	case errors.Is(err, model.ErrSuperseded):
		o.stop(err)
	case err != nil:
		scope := id
		if ctx.Err() != nil {
			scope = "" // each try would hold up all groups
		}
		o.recordAfter[scope] = time.Now().Add(o.cfg.RecordWithin)
		before := o.fleet[id]
		o.records.later(id, before.Record(), o.summary(before))
	}
	return err
}

// mayRecord says whether a group's record is worth a try.
func (o *owner) mayRecord(id model.GroupID, now time.Time) bool {
	return !now.Before(o.recordAfter[""]) && !now.Before(o.recordAfter[id])
}

// recordUnasked is record when no request waits for it. It takes half of the
// time at most, so that a request which comes meanwhile has the other half.
func (o *owner) recordUnasked(g *nodegroups.Group) error {
	ctx, cancel := context.WithTimeout(o.ctx, o.cfg.RecordWithin/2)
	defer cancel()
	return o.record(ctx, g)
}

// result is the end of an effect.
type result struct {
	effect nodegroups.Effect
	err    error
	at     time.Time
	finding
}

// finding is what a call found out.
type finding struct {
	idle    bool        // Confirm: no runner pods are on the node
	engines []model.Pod // Confirm
	gone    bool        // StopEngine
	node    model.Node  // Look; zero: there is none
}

// beside makes a call beside the loop, once there is a place for it.
func (o *owner) beside(places chan struct{}, call func(ctx context.Context)) {
	o.work.Go(func() {
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
		case <-o.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(o.ctx, time.Minute)
		defer cancel()
		call(ctx)
	})
}

// perform carries out an effect beside the loop.
func (o *owner) perform(e nodegroups.Effect) {
	places := o.clusters
	if e.Verb.Cloud() {
		places = o.clouds
	}
	o.beside(places, func(ctx context.Context) {
		found, err := o.act(ctx, e)
		select {
		case o.results <- result{e, err, time.Now(), found}:
		case <-o.ctx.Done():
		}
	})
}

// act calls the port that an effect belongs to.
func (c *Controller) act(ctx context.Context, e nodegroups.Effect) (found finding, err error) {
	began := time.Now()
	switch e.Verb {
	case nodegroups.Resize:
		err = c.cfg.Backend.Resize(ctx, e.Group, e.Desired)
	case nodegroups.Terminate:
		err = c.cfg.Backend.Terminate(ctx, e.Group, e.Instances)
	case nodegroups.Stop:
		err = c.cfg.Backend.Stop(ctx, e.Group, e.Instances)
	case nodegroups.Start:
		err = c.cfg.Backend.Start(ctx, e.Group, e.Instances)
	case nodegroups.Taint:
		err = c.cfg.Nodes.Taint(ctx, e.Node.Name, e.Node.UID)
	case nodegroups.Untaint:
		err = c.cfg.Nodes.Untaint(ctx, e.Node.Name, e.Node.UID)
	case nodegroups.ClearAutoscalerTaint:
		err = c.cfg.Nodes.ClearCATaint(ctx, e.Node.Name, e.Node.UID)
	case nodegroups.DeleteNode:
		err = c.cfg.Nodes.Delete(ctx, e.Node.Name, e.Node.UID)
	case nodegroups.Confirm:
		var pods []model.Pod
		pods, err = c.cfg.Pods.PodsOn(ctx, e.Node.Name)
		found.engines = slices.DeleteFunc(slices.Clone(pods), func(p model.Pod) bool { return p.Kind != model.PodEngine })
		found.idle = err == nil && len(found.engines) == len(pods)
	case nodegroups.Look:
		found.node, err = c.cfg.Pods.NodeOf(ctx, e.Node.ID)
	case nodegroups.StopEngine:
		found.gone, err = c.cfg.Engines.StopEngine(ctx, e.Engine)
	case nodegroups.ReleaseEngine:
		err = c.cfg.Engines.ReleaseEngine(ctx, e.Engine)
	default:
		err = fmt.Errorf("unknown effect %q", e.Verb)
	}
	if e.Verb.Cloud() {
		c.observeCall(string(e.Verb), began, err)
	}
	return found, err
}

// finished takes in the end of an effect.
func (o *owner) finished(r result) {
	g := o.fleet[r.effect.Group]
	if g == nil {
		return
	}
	switch {
	case errors.Is(r.err, model.ErrUnderWay) || errors.Is(r.err, model.ErrDryRun):
		o.log.Debug("acting goes on", "nodegroup", r.effect.Group, "action", r.effect.Verb, "instances", len(r.effect.Instances), "waits for", r.err)
	case r.err != nil:
		o.log.Error("acting failed; it will be tried again", "nodegroup", r.effect.Group, "action", r.effect.Verb,
			"node", r.effect.Node.Name, "instances", len(r.effect.Instances), "err", r.err)
	}
	o.apply(g, nodegroups.Done{Effect: r.effect, Err: r.err, At: r.at})
	switch {
	case r.err != nil:
	case r.effect.Verb == nodegroups.Confirm:
		o.apply(g, nodegroups.Confirmed{Instance: r.effect.Node.ID, Idle: r.idle, Engines: r.engines})
	case r.effect.Verb == nodegroups.Look:
		if r.node.Name != "" {
			o.observeNode(nodeChange{node: r.node})
		}
		o.apply(g, nodegroups.Looked{Instance: r.effect.Node.ID})
	case r.effect.Verb == nodegroups.StopEngine && r.gone:
		o.apply(g, nodegroups.EngineGone{Instance: r.effect.Node.ID, UID: r.effect.Engine.UID})
	}
	if r.effect.Verb.Cloud() {
		o.pollNow()
	}
}
