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
	caches   map[model.InstanceID]cache
	// letGo is when an orphan's finalizer was last taken off.
	letGo map[string]time.Time
}

// cache is what is known of the cache on an instance's disk.
type cache struct {
	bytes int64  // as last measured, zero when it never was
	pod   string // of the engine that said so in this life of its node
	// unverified: the node has come back, and its engine has not said yet what
	// it found.
	unverified bool
	// lostAt is when a cache was last lost there, why a CamelCase word and a
	// sentence.
	lostAt      time.Time
	lost, story string
}

// RunnerNode conditions. CacheLost says when and why a cache was last lost; it
// outlives a restart, since jobs that began before say nothing about what is on
// the disk. CacheVerified is false while a resumed node's engine has not said
// what it found: until then it is warm by its history alone.
const (
	conditionCacheLost     = "CacheLost"
	conditionCacheVerified = "CacheVerified"
)

func newEngines() engines {
	return engines{
		pods:     map[model.InstanceID][]model.Pod{},
		homes:    map[string]model.InstanceID{},
		homeless: map[model.NodeName][]model.Pod{},
		uses:     map[model.InstanceID]model.EngineUse{},
		caches:   map[model.InstanceID]cache{},
		letGo:    map[string]time.Time{},
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
	code, ended := nodegroups.EngineExit(p)
	switch clean := ended && code == 0; {
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
	o.applyTo(id, nodegroups.ObserveUse{Instance: id, Activity: u.Activity, At: u.At})
	known := e.caches[id]
	switch {
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

// engineUnused forgets the samples of an engine whose node is gone. The next
// engine there has to show that it found the cache.
func (o *owner) engineUnused(id model.InstanceID) {
	delete(o.engines.uses, id)
	if c, ok := o.engines.caches[id]; ok {
		c.pod, c.unverified = "", c.bytes > 0
		o.engines.caches[id] = c
	}
	o.applyTo(id, nodegroups.ObserveUse{Instance: id})
}

// loseCache makes an instance cold: what its disk held is lost.
func (o *owner) loseCache(id model.InstanceID, reason, story string, now time.Time) {
	if g := o.fleet[o.groupOf[id]]; g == nil || !g.Settings().Runner() {
		return
	}
	o.history.forget(id)
	c := o.engines.caches[id]
	c.bytes, c.unverified = 0, false
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
		if !p.EngineState.Guarded || now.Sub(o.engines.letGo[p.UID]) < 30*time.Second {
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
