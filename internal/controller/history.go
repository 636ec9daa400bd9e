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
	// pods are the runner pods that are not finished, and those pending.
	pods map[string]model.Pod
	// perNode counts the unfinished runner pods bound to each node.
	perNode map[model.NodeName]int
	// idleSince is when the node last became idle.
	idleSince map[model.NodeName]time.Time
}

func newHistory() *history {
	return &history{
		keys:      map[model.InstanceID]map[model.CacheKey]model.KeyUse{},
		pods:      map[string]model.Pod{},
		perNode:   map[model.NodeName]int{},
		idleSince: map[model.NodeName]time.Time{},
	}
}

// restore takes over what an earlier life remembered of an instance.
func (h *history) restore(r model.NodeRecord) {
	keys := make(map[model.CacheKey]model.KeyUse, len(r.Warmth))
	for _, w := range r.Warmth {
		keys[w.Key] = model.KeyUse{Last: w.LastUsed, Count: w.Uses}
	}
	if len(keys) > 0 {
		h.keys[r.ID] = keys
	}
}

// forget drops an instance that is gone.
func (h *history) forget(id model.InstanceID) { delete(h.keys, id) }

// job is one start of a CI job on a node, reported once.
type job struct {
	warm bool
	wait time.Duration
}

// see takes in the present state of a runner pod. It returns the job when the
// pod was not known to have started before.
func (h *history) see(p model.Pod, instance model.InstanceID, now time.Time) *job {
	before, known := h.pods[p.UID]
	finished := !p.Finished.IsZero()
	h.count(before, known, -1, now)
	if finished {
		delete(h.pods, p.UID)
	} else {
		h.pods[p.UID] = p
		h.count(p, true, +1, now)
	}
	if instance == "" || p.Key == "" || p.Started.IsZero() {
		return nil
	}
	use := h.keys[instance][p.Key]
	var started *job
	if !known || before.Started.IsZero() || before.Node == "" {
		// A restart sees running and finished pods again: the times tell.
		if use.Last.Before(p.Started.Truncate(time.Second)) {
			started = &job{warm: scoring.Warmth(use, now) > 0, wait: p.Started.Sub(p.Created)}
			use.Count++
		}
	}
	last := p.Started
	if finished {
		last = p.Finished
	}
	if last.After(use.Last) {
		use.Last = last
	}
	h.set(instance, p.Key, use)
	return started
}

// gone takes in that a pod was deleted.
func (h *history) gone(p model.Pod, now time.Time) {
	before, known := h.pods[p.UID]
	h.count(before, known, -1, now)
	delete(h.pods, p.UID)
}

func (h *history) count(p model.Pod, known bool, by int, now time.Time) {
	if !known || p.Node == "" {
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
		if p.Node == "" && p.Key != "" && (p.Group == "" || p.Group == group) {
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
