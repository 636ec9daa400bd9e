package controller

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// engines is what is known of the engines on nodes: their pods, by the watch,
// and what their metrics say. It is owned by the fleet's goroutine.
type engines struct {
	// pods are the engine pods of each instance, sorted by UID; homes is whose
	// a pod is, by its UID, as long as it exists: its Node may go before it.
	// homeless are those on nodes that are no instance's.
	pods     map[model.InstanceID][]model.Pod
	homes    map[string]model.InstanceID
	homeless map[model.NodeName][]model.Pod
	uses     map[model.InstanceID]model.EngineUse
	// silent are the instances whose engine does not say what it does.
	silent map[model.InstanceID]silence
	caches map[model.InstanceID]cache
	// letGo is when an orphan's finalizer was last taken off.
	letGo map[string]time.Time
	// warned are the groups of whose short grace periods people were told.
	warned map[model.GroupID]bool
}

// cache is what is known of the cache on an instance's disk.
type cache struct {
	bytes int64  // as last measured, zero when it never was
	pod   string // of the engine that said so in this life of its node
	// unverified: the node has come back, and its engine has not said yet what
	// it found.
	unverified bool
	// emptySince is since when another engine than that says that there is
	// nothing; zero when it does not.
	emptySince time.Time
	// lostAt is when a cache was last lost there, why a CamelCase word and a
	// sentence.
	lostAt      time.Time
	lost, story string
}

// silence is why an engine's activity is not known, and since when that is told.
type silence struct {
	reason string
	since  time.Time
}

const (
	// silenceFor is how long one reason is told: the next may differ in a port.
	silenceFor = 5 * time.Minute
	// emptyFor is how long an engine that has just started may say that its
	// cache is empty: it counts what is on its disk every five minutes.
	emptyFor = 6 * time.Minute
	// usualGrace is what Dagger's chart gives an engine to stop.
	usualGrace = 5 * time.Minute
)

// RunnerNode conditions. EngineKnown is false, with the reason, while the
// engine's metrics do not say what it does. CacheLost says when and why a cache was last lost; it
// outlives a restart, since jobs that began before say nothing about what is on
// the disk. CacheVerified is false while a resumed node's engine has not said
// what it found: until then it is warm by its history alone.
const (
	conditionEngineKnown   = "EngineKnown"
	conditionCacheLost     = "CacheLost"
	conditionCacheVerified = "CacheVerified"
)

func newEngines() engines {
	return engines{
		pods:     map[model.InstanceID][]model.Pod{},
		homes:    map[string]model.InstanceID{},
		homeless: map[model.NodeName][]model.Pod{},
		uses:     map[model.InstanceID]model.EngineUse{},
		silent:   map[model.InstanceID]silence{},
		caches:   map[model.InstanceID]cache{},
		letGo:    map[string]time.Time{},
		warned:   map[model.GroupID]bool{},
	}
}

// restore takes over what an earlier life remembered of an instance.
func (e *engines) restore(r model.NodeRecord) {
	c := cache{bytes: r.CacheBytes, unverified: r.CacheBytes > 0 && r.Node == ""}
	for _, condition := range r.Conditions {
		switch condition.Type {
		case conditionCacheLost:
			c.lostAt, c.lost, c.story = condition.Since, condition.Reason, condition.Message
		case conditionCacheVerified:
			c.unverified = !condition.True
		}
	}
	if c != (cache{}) {
		e.caches[r.ID] = c
	}
}

// forget drops an instance that is gone.
func (e *engines) forget(id model.InstanceID) {
	delete(e.uses, id)
	delete(e.caches, id)
	delete(e.silent, id)
}

// put replaces a pod in a list sorted by UID, or takes it out.
func put(pods []model.Pod, p model.Pod, gone bool) []model.Pod {
	out := slices.DeleteFunc(slices.Clone(pods), func(o model.Pod) bool { return o.UID == p.UID })
	if !gone {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b model.Pod) int { return cmp.Compare(a.UID, b.UID) })
	return out
}

// seeEngine takes in the state of an engine's pod.
func (o *owner) seeEngine(c podChange, now time.Time) {
	p, e := c.pod, &o.engines
	if c.gone {
		defer delete(e.letGo, p.UID)
	}
	home := e.homes[p.UID]
	if home == "" {
		home = o.names[p.Node]
	}
	if home == "" {
		if p.Node == "" {
			return // nobody's yet
		}
		if e.homeless[p.Node] = put(e.homeless[p.Node], p, c.gone); len(e.homeless[p.Node]) == 0 {
			delete(e.homeless, p.Node)
		}
		return
	}
	before, known := model.Pod{}, false
	if at := slices.IndexFunc(e.pods[home], func(o model.Pod) bool { return o.UID == p.UID }); at >= 0 {
		before, known = e.pods[home][at], true
	}
	// An exit code may be told together with the end of the pod.
	e.homes[p.UID], e.pods[home] = home, put(e.pods[home], p, false)
	o.tellEngine(home)
	if c.gone {
		delete(e.homes, p.UID)
		if e.pods[home] = put(e.pods[home], p, true); len(e.pods[home]) == 0 {
			delete(e.pods, home)
		}
		o.tellEngine(home)
	}
	o.warnOfGrace(home, p)
	exit, ended := nodegroups.EngineExit(p)
	switch clean := ended && exit.Clean(); {
	case e.uses[home].CacheBytes > 0: // the metrics will tell
	case known && !c.gone && p.EngineState.Restarts > before.EngineState.Restarts && p.EngineState.LastExit != 0:
		o.loseCache(home, "EngineRestarted", fmt.Sprintf("the engine ended with exit code %d and was started again", p.EngineState.LastExit), now)
	case c.gone && !clean && o.names[p.Node] == home:
		o.loseCache(home, "EngineReplaced", "the engine's pod went, and was not seen to end cleanly", now)
	}
}

// tellEngine tells the fleet which engine pods are on an instance.
func (o *owner) tellEngine(id model.InstanceID) {
	o.applyTo(id, nodegroups.ObserveEngine{Instance: id, Pods: o.engines.pods[id]})
}

// engineHomes gives the engine pods on a node to the instance that it is of.
func (o *owner) engineHomes(name model.NodeName, id model.InstanceID) {
	e := &o.engines
	for _, p := range e.homeless[name] {
		e.homes[p.UID], e.pods[id] = id, put(e.pods[id], p, false)
	}
	if len(e.homeless[name]) > 0 {
		delete(e.homeless, name)
		o.tellEngine(id)
	}
}

// seeUse takes in what the metrics of an engine say.
func (o *owner) seeUse(u model.EngineUse, now time.Time) {
	id, ok := o.names[u.Node]
	if !ok {
		return
	}
	e := &o.engines
	e.uses[id] = u
	o.hearEngine(id, u, now)
	o.tellUse(id)
	known := e.caches[id]
	if !u.Empty || u.Pod == known.pod || known.bytes == 0 {
		known.emptySince = time.Time{}
	} else if known.emptySince.IsZero() {
		known.emptySince = now
	}
	if known != (cache{}) {
		e.caches[id] = known
	}
	switch {
	case !known.emptySince.IsZero() && now.Sub(known.emptySince) >= emptyFor:
		o.loseCache(id, "CacheNotFound", fmt.Sprintf("the engine says that its cache is empty, %d MiB were left to it", known.bytes>>20), now)
	case u.Wiped:
		o.loseCache(id, "CacheWiped", "the engine's cache has shrunk at once", now)
	case u.CacheBytes > 0 && u.Pod != known.pod && u.CacheBytes < known.bytes/2:
		// Another engine, after a stop of the node or not: it should have found
		// what the last one left.
		o.loseCache(id, "CacheNotFound", fmt.Sprintf("the engine holds %d MiB, %d MiB were left to it", u.CacheBytes>>20, known.bytes>>20), now)
	}
	if u.CacheBytes > 0 {
		c := e.caches[id]
		c.bytes, c.pod, c.unverified = u.CacheBytes, u.Pod, false
		e.caches[id] = c
	}
}

// tellUse tells the fleet what an engine does. One whose cache was measured has
// metrics, so that not to know is no sign of quiet.
func (o *owner) tellUse(id model.InstanceID) {
	u := o.engines.uses[id]
	o.applyTo(id, nodegroups.ObserveUse{
		Instance: id, Activity: u.Activity, At: u.At,
		Metrics: u.Activity != model.ActivityUnknown || o.engines.caches[id].bytes > 0,
	})
}

// hearEngine notes, and tells people, when an engine does not say what it does,
// and when it does again.
func (o *owner) hearEngine(id model.InstanceID, u model.EngineUse, now time.Time) {
	before, was := o.engines.silent[id]
	switch {
	case u.Activity != model.ActivityUnknown:
		if was {
			delete(o.engines.silent, id)
			o.dirty[o.groupOf[id]] = true
			o.log.Info("what an engine does is known", "nodegroup", o.groupOf[id], "node", u.Node, "activity", u.Activity)
		}
	case !was || before.reason != u.Reason && now.Sub(before.since) >= silenceFor:
		o.engines.silent[id] = silence{u.Reason, now}
		o.dirty[o.groupOf[id]] = true
		o.log.Info("what an engine does is not known", "nodegroup", o.groupOf[id], "node", u.Node, "reason", u.Reason)
	}
}

// warnOfGrace tells people, once a group and life, of engines that may be killed
// before they have written what they hold.
func (o *owner) warnOfGrace(id model.InstanceID, p model.Pod) {
	group := o.groupOf[id]
	g := o.fleet[group]
	if g == nil || !g.Settings().Runner() || p.Engine == nil || p.Engine.Grace >= usualGrace || o.engines.warned[group] {
		return
	}
	o.engines.warned[group] = true
	text := fmt.Sprintf("engine pods such as %s/%s have %s to stop; one that needs longer loses its cache: set terminationGracePeriodSeconds to %d or more",
		p.Namespace, p.Name, p.Engine.Grace, int(usualGrace.Seconds()))
	o.log.Warn("engines have little time to stop", "nodegroup", group, "detail", text)
	o.cfg.Events.Group(group, model.SeverityWarning, "ShortGracePeriod", text)
}

// engineUnused forgets the samples of an engine whose node is gone. The next
// engine there has to show that it found the cache.
func (o *owner) engineUnused(id model.InstanceID) {
	delete(o.engines.uses, id)
	delete(o.engines.silent, id)
	if c, ok := o.engines.caches[id]; ok {
		c.pod, c.unverified, c.emptySince = "", c.bytes > 0, time.Time{}
		o.engines.caches[id] = c
	}
	o.tellUse(id)
}

// loseCache makes an instance cold: what its disk held is lost.
func (o *owner) loseCache(id model.InstanceID, reason, story string, now time.Time) {
	if g := o.fleet[o.groupOf[id]]; g == nil || !g.Settings().Runner() {
		return
	}
	o.history.forget(id)
	c := o.engines.caches[id]
	c.bytes, c.unverified, c.emptySince = 0, false, time.Time{}
	c.lostAt, c.lost, c.story = now.Truncate(time.Second), reason, story
	o.engines.caches[id] = c
	o.dirty[o.groupOf[id]] = true
	o.log.Warn("an engine's cache is lost", "nodegroup", o.groupOf[id], "instance", id, "reason", reason, "detail", story)
	if node, ok := o.nodeOf(id); ok {
		o.cfg.Events.Node(node, model.SeverityWarning, "CacheLost", story)
	}
}

// afterLoss returns the pod without its key when its job began before the
// instance's cache was lost: it says nothing about what is there now.
func (o *owner) afterLoss(p model.Pod) model.Pod {
	if at := o.engines.caches[o.names[p.Node]].lostAt; !p.Started.IsZero() && p.Started.Before(at) {
		p.Key = ""
	}
	return p
}

// describeEngine fills in what a RunnerNode says of its engine.
func (o *owner) describeEngine(r *model.NodeRecord) {
	c := o.engines.caches[r.ID]
	r.CacheBytes = c.bytes
	if r.Node != "" {
		r.ConnectedClients = o.engines.uses[r.ID].Clients
	}
	if s, silent := o.engines.silent[r.ID]; silent && r.Phase == model.PhaseReady {
		r.Conditions = append(r.Conditions, model.Condition{
			Type: conditionEngineKnown, Reason: "NotMeasured", Message: s.reason, Since: s.since.Truncate(time.Second),
		})
	}
	if !c.lostAt.IsZero() {
		r.Conditions = append(r.Conditions, model.Condition{
			Type: conditionCacheLost, True: true, Reason: c.lost, Message: c.story, Since: c.lostAt,
		})
	}
	if c.unverified && r.Phase == model.PhaseReady {
		r.Conditions = append(r.Conditions, model.Condition{
			Type: conditionCacheVerified, Reason: "NotMeasuredYet", Since: r.Since.Truncate(time.Second),
			Message: fmt.Sprintf("%d MiB were left to the engine; it has not said what it found", c.bytes>>20),
		})
	}
}

// releaseOrphans lets go of engine pods that are no group's any more: their
// node went while nobody looked, or their group is not declared now. A group
// does that itself for its own.
func (o *owner) releaseOrphans(now time.Time) {
	release := func(p model.Pod) {
		// A call lasts a minute at most: there is never another for the same pod,
		// and none waits for a place.
		if !p.EngineState.Guarded || now.Sub(o.engines.letGo[p.UID]) < 90*time.Second || len(o.clusters) == cap(o.clusters) {
			return
		}
		o.engines.letGo[p.UID] = now
		o.beside(o.clusters, func(ctx context.Context) {
			if err := o.cfg.Engines.ReleaseEngine(ctx, p); err != nil && o.ctx.Err() == nil {
				o.log.Error("taking the finalizer off an engine's pod failed; it will be tried again", "pod", p.Name, "err", err)
			}
		})
	}
	for _, pods := range o.engines.homeless {
		for _, p := range pods {
			release(p)
		}
	}
	for id, pods := range o.engines.pods {
		if o.fleet[o.groupOf[id]] != nil {
			continue
		}
		for _, p := range pods {
			release(p)
		}
	}
}
