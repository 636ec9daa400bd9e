package controller

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// history is what ran on each instance and when: the source of warmth. It is
// owned by the fleet's goroutine.
type history struct {
	keys map[model.InstanceID]map[model.CacheKey]model.KeyUse
	// pods are the runner pods that exist, finished ones too: they are told of
	// more than once.
	pods map[string]seenPod
	// restored is when a key was last used on an instance as far as an earlier
	// life recorded it: jobs that began before are contained in keys.
	restored map[model.InstanceID]map[model.CacheKey]time.Time
	// perNode counts the unfinished runner pods bound to each node.
	perNode map[model.NodeName]int
	// idleSince is when the node last became idle.
	idleSince map[model.NodeName]time.Time
}

// seenPod is a pod as last seen.
type seenPod struct {
	model.Pod
	fresh   bool // it was seen before it started, so its job is not in a record
	counted bool // its job is in keys
}

func newHistory() *history {
	return &history{
		keys:      map[model.InstanceID]map[model.CacheKey]model.KeyUse{},
		pods:      map[string]seenPod{},
		restored:  map[model.InstanceID]map[model.CacheKey]time.Time{},
		perNode:   map[model.NodeName]int{},
		idleSince: map[model.NodeName]time.Time{},
	}
}

// restore takes over what an earlier life remembered of an instance.
func (h *history) restore(r model.NodeRecord) {
	keys := make(map[model.CacheKey]model.KeyUse, len(r.Warmth))
	last := make(map[model.CacheKey]time.Time, len(r.Warmth))
	for _, w := range r.Warmth {
		keys[w.Key] = model.KeyUse{Last: w.LastUsed, Count: w.Uses}
		last[w.Key] = w.LastUsed
	}
	if len(keys) > 0 {
		h.keys[r.ID], h.restored[r.ID] = keys, last
	}
}

// forget drops an instance that is gone.
func (h *history) forget(id model.InstanceID) {
	delete(h.keys, id)
	delete(h.restored, id)
}

// job is one start of a CI job on a node, reported once.
type job struct {
	warm bool
	wait time.Duration
}

// see takes in the present state of a runner pod on an instance, which is
// empty while it is not known. It returns the job when the pod was not known to
// have started before.
func (h *history) see(p model.Pod, instance model.InstanceID, now time.Time) (started *job) {
	before := h.pods[p.UID]
	h.count(before.Pod, -1, now)
	h.count(p, +1, now)
	seen := seenPod{p, before.fresh || p.Started.IsZero(), before.counted}
	if instance != "" && p.Key != "" && !p.Started.IsZero() {
		use := h.keys[instance][p.Key]
		// A restart sees running and finished pods again: the times tell.
		if !seen.counted && (seen.fresh || h.restored[instance][p.Key].Before(p.Started)) {
			started = &job{warm: scoring.Warmth(use, now) > 0, wait: p.Started.Sub(p.Created)}
			use.Count++
		}
		seen.counted = true
		for _, at := range []time.Time{p.Started, p.Finished} {
			if at.After(use.Last) {
				use.Last = at
			}
		}
		h.set(instance, p.Key, use)
	}
	h.pods[p.UID] = seen
	return started
}

// gone takes in that a pod, last seen as p, was deleted. Its job has ended then
// at the latest.
func (h *history) gone(p model.Pod, instance model.InstanceID, now time.Time) (started *job) {
	if p.Finished.IsZero() {
		p.Finished = now
	}
	started = h.see(p, instance, now)
	delete(h.pods, p.UID)
	return started
}

// count adds a pod to those that keep its node busy, or takes it away.
func (h *history) count(p model.Pod, by int, now time.Time) {
	if p.Node == "" || !p.Finished.IsZero() {
		return
	}
	h.perNode[p.Node] += by
	if h.perNode[p.Node] <= 0 {
		delete(h.perNode, p.Node)
		h.idleSince[p.Node] = now
	}
}

func (h *history) set(id model.InstanceID, key model.CacheKey, use model.KeyUse) {
	keys := h.keys[id]
	if keys == nil {
		keys = map[model.CacheKey]model.KeyUse{}
		h.keys[id] = keys
	}
	keys[key] = use
	for len(keys) > model.MaxWarmKeys {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(keys)), func(a, b model.CacheKey) int {
			return cmp.Or(keys[a].Last.Compare(keys[b].Last), cmp.Compare(a, b))
		})
		delete(keys, oldest)
	}
}

// busy says whether a runner pod is bound to the node.
func (h *history) busy(node model.NodeName) bool { return h.perNode[node] > 0 }

// waiting counts the pending jobs per key that may run in the group: those
// that ask for it, and those that do not say.
func (h *history) waiting(group model.GroupID) map[model.CacheKey]int {
	out := map[model.CacheKey]int{}
	for _, p := range h.pods {
		if p.Node == "" && p.Key != "" && p.Finished.IsZero() && (p.Group == "" || p.Group == group) {
			out[p.Key]++
		}
	}
	return out
}

// warmth returns what is known of an instance's keys, the warmest first.
func (h *history) warmth(id model.InstanceID, now time.Time) []model.KeyWarmth {
	n := scoring.Node{Keys: h.keys[id]}
	var out []model.KeyWarmth
	for key, use := range n.Keys {
		out = append(out, model.KeyWarmth{Key: key, Warmth: n.WarmthFor(key, now), LastUsed: use.Last, Uses: use.Count})
	}
	slices.SortFunc(out, func(a, b model.KeyWarmth) int {
		return cmp.Or(cmp.Compare(b.Warmth, a.Warmth), b.LastUsed.Compare(a.LastUsed), cmp.Compare(a.Key, b.Key))
	})
	return out[:min(len(out), model.MaxWarmKeys)]
}
