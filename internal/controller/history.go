package controller

import (
	"cmp"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// history is what ran on each instance and when: the source of warmth. It is
// owned by the fleet's goroutine.
type history struct {
	uses map[model.InstanceID][]scoring.Use
	// pods are the runner pods that exist, finished ones too: they are told of
	// more than once.
	pods map[string]seenPod
	// restored is when a key was last used on an instance as far as an earlier
	// life recorded it: jobs that began before are contained in uses.
	restored map[model.InstanceID]map[scoring.Key]time.Time
	// perNode counts the unfinished runner pods bound to each node.
	perNode map[model.NodeName]int
	// idleSince is when the node last became idle.
	idleSince map[model.NodeName]time.Time
}

// seenPod is a pod as last seen.
type seenPod struct {
	model.Pod
	fresh   bool // it was seen before it started, so its job is not in a record
	counted bool // its job is in uses
	// told: its start was told; then warm says whether its node was warm for its
	// key. ended: its end was told too.
	told, warm, ended bool
	// group whose jobs it is counted among.
	group model.GroupID
}

func newHistory() *history {
	return &history{
		uses:      map[model.InstanceID][]scoring.Use{},
		pods:      map[string]seenPod{},
		restored:  map[model.InstanceID]map[scoring.Key]time.Time{},
		perNode:   map[model.NodeName]int{},
		idleSince: map[model.NodeName]time.Time{},
	}
}

// restore takes over what an earlier life remembered of an instance.
func (h *history) restore(r model.NodeRecord) {
	last := make(map[scoring.Key]time.Time, len(r.Warmth))
	for _, w := range r.Warmth {
		key := scoring.KeyOf(w.Key)
		h.use(r.ID, scoring.Use{Key: key, Last: w.LastUsed, Count: w.Uses})
		last[key] = w.LastUsed
	}
	if len(last) > 0 {
		h.restored[r.ID] = last
	}
}

// forget drops an instance that is gone.
func (h *history) forget(id model.InstanceID) {
	delete(h.uses, id)
	delete(h.restored, id)
}

// job is what a sighting of a pod told of its job for the first time.
type job struct {
	key     scoring.Key
	started bool
	warm    bool          // its node was warm for its key when it started
	wait    time.Duration // until it started
	ended   bool
	took    time.Duration // from its start to its end
}

// see takes in the present state of a runner pod on an instance, which is
// empty while it is not known. It returns what was not known before: that the
// job has started, or ended.
func (h *history) see(p model.Pod, instance model.InstanceID, now time.Time) (news *job) {
	before := h.pods[p.UID]
	h.count(before.Pod, -1, now)
	h.count(p, +1, now)
	seen := before
	seen.Pod, seen.fresh = p, before.fresh || p.Started.IsZero()
	defer func() { h.pods[p.UID] = seen }()
	if instance == "" || p.Key == "" || p.Started.IsZero() {
		return nil
	}
	j := job{key: scoring.KeyOf(p.Key)}
	u := h.last(instance, j.key)
	// A restart sees running and finished pods again: the times tell.
	if !seen.counted && (seen.fresh || h.restored[instance][j.key].Before(p.Started)) {
		n := scoring.Node{Uses: h.uses[instance]}
		j.started, j.warm, j.wait = true, n.WarmthFor(j.key, now) > 0, p.Started.Sub(p.Created)
		seen.told, seen.warm = true, j.warm
		u.Count++
	}
	seen.counted = true
	for _, at := range []time.Time{p.Started, p.Finished} {
		if at.After(u.Last) {
			u.Last = at
		}
	}
	h.use(instance, u)
	if !p.Finished.IsZero() && seen.told && !seen.ended {
		// How long a failed job ran says nothing about its cache.
		j.ended, j.warm, j.took = !p.Failed, seen.warm, p.Finished.Sub(p.Started)
		seen.ended = true
	}
	if !j.started && !j.ended {
		return nil
	}
	return &j
}

// last is the use of a key on an instance as far as it is known.
func (h *history) last(id model.InstanceID, key scoring.Key) scoring.Use {
	for _, u := range h.uses[id] {
		if u.Key == key {
			return u
		}
	}
	return scoring.Use{Key: key}
}

// gone takes in that a pod, last seen as p, was deleted. Its job has ended then
// at the latest.
func (h *history) gone(p model.Pod, instance model.InstanceID, now time.Time) (news *job) {
	if p.Finished.IsZero() {
		p.Finished, p.Failed = now, true // it may have been cut short
	}
	news = h.see(p, instance, now)
	delete(h.pods, p.UID)
	return news
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

func (h *history) use(id model.InstanceID, u scoring.Use) {
	// A published list must not change: it is read beside the owner.
	h.uses[id] = scoring.Used(slices.Clone(h.uses[id]), u)
}

// busy says whether a runner pod is bound to the node.
func (h *history) busy(node model.NodeName) bool { return h.perNode[node] > 0 }

// waiting counts the pending jobs per key that may run in the group: those
// that ask for it, and those that do not say.
func (h *history) waiting(group model.GroupID) map[scoring.Key]int {
	out := map[scoring.Key]int{}
	for _, p := range h.pods {
		if p.Node == "" && p.Key != "" && p.Finished.IsZero() && (p.Group == "" || p.Group == group) {
			out[scoring.KeyOf(p.Key)]++
		}
	}
	return out
}

// warmth returns what is known of an instance's keys, the warmest first.
func (h *history) warmth(id model.InstanceID, now time.Time) []model.KeyWarmth {
	n := scoring.Node{Uses: h.uses[id]}
	var out []model.KeyWarmth
	for _, u := range n.Uses {
		out = append(out, model.KeyWarmth{Key: u.Key.Value(), Warmth: n.WarmthFor(u.Key, now), LastUsed: u.Last, Uses: u.Count})
	}
	slices.SortFunc(out, func(a, b model.KeyWarmth) int {
		return cmp.Or(cmp.Compare(b.Warmth, a.Warmth), b.LastUsed.Compare(a.LastUsed), cmp.Compare(a.Key, b.Key))
	})
	return out
}
