package controller

import (
	"slices"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// relabelEvery is how often the labels of a node that say what it is warm for
// change at most: every change of a Node is told to all who watch Nodes.
const relabelEvery = time.Minute

// warmKeys are the keys whose caches the instance's engine is believed to
// hold, as the labels of its Node are to say.
func (h *history) warmKeys(id model.InstanceID, now time.Time) (keys model.WarmKeys) {
	uses := h.uses[id]
	n := 0
	for _, u := range uses[:min(len(uses), scoring.KeysHeld, len(keys))] {
		if u.Warmth(now) > 0 {
			keys[n] = u.Key.Value()
			n++
		}
	}
	slices.Sort(keys[:n])
	return keys
}

// seeJob takes in the job that a pod's runner has picked up, whose key the pod
// itself does not bear. That it began after the key's last use tells it from
// one that is known already, after a restart too.
func (h *history) seeJob(p model.Pod, instance model.InstanceID) {
	if instance == "" || p.Job == "" || p.Started.IsZero() {
		return
	}
	u := h.last(instance, scoring.KeyOf(p.Job))
	before := u
	if u.Last.Before(p.Started) {
		u.Count++
		u.Last = p.Started
	}
	if p.Finished.After(u.Last) {
		u.Last = p.Finished
	}
	if u != before {
		h.use(instance, u)
	}
}
