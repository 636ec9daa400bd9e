package scoring

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"time"
)

const (
	// MaxKeys bounds the keys that are remembered; when there are twice as many
	// the rarest are forgotten.
	MaxKeys = 4096
	// enough jobs, warm and cold, say what a cache saves; until then the
	// group's cold penalty does.
	enough = 3
	// mostSaved bounds what a cache is believed to save, in seconds: jobs that
	// idle on purpose must not keep nodes for days.
	mostSaved = 3600
	// recently bounds how many jobs a mean duration goes back.
	recently = 20
	// strangers is the share that a key gets of which nothing was learnt:
	// enough to order nodes by.
	strangers = 1e-3
)

// Keys learns how often each cache key is asked for and what its cache saves.
// It is not safe for concurrent use.
type Keys struct {
	penalty time.Duration // what a cold job loses until any key's is known
	// learnt sums up the keys whose own saving is known, in seconds, each by its
	// weight: a key that is asked for a few times must not speak for all.
	learnt struct{ weight, seconds float64 }
	began  time.Time
	total  float64
	known  map[Key]*keyStats
}

type keyStats struct {
	// weight of the arrivals; later ones weigh more, by the same factor for
	// all keys, instead of earlier ones less.
	weight     float64
	warm, cold mean
}

// mean is a running mean of durations, in seconds.
type mean struct {
	n     int
	value float64
}

func (m *mean) add(d time.Duration) {
	m.n = min(m.n+1, recently)
	m.value += (d.Seconds() - m.value) / float64(m.n)
}

// NewKeys returns what is known before anything was learnt: that a cold job
// loses penalty.
func NewKeys(penalty time.Duration) *Keys {
	return &Keys{penalty: penalty, known: map[Key]*keyStats{}}
}

// SetPenalty changes what a cold job loses until that is known.
func (k *Keys) SetPenalty(penalty time.Duration) { k.penalty = penalty }

// Len is how many keys are remembered.
func (k *Keys) Len() int { return len(k.known) }

// Arrived takes in the arrival of a job.
func (k *Keys) Arrived(key Key, at time.Time) {
	if k.began.IsZero() {
		k.began = at
	}
	weight := math.Exp2(at.Sub(k.began).Hours() / fades.Hours())
	k.total += weight
	s := k.stats(key)
	k.count(s, -1)
	s.weight += weight
	k.count(s, +1)
	if k.total > 1e100 { // after decades
		k.rescale()
	}
}

func (k *Keys) rescale() {
	for _, s := range k.known {
		s.weight /= k.total
	}
	k.learnt.weight /= k.total
	k.learnt.seconds /= k.total
	k.began = k.began.Add(time.Duration(math.Log2(k.total) * float64(fades)))
	k.total = 1
}

// Finished takes in how long a job ran on a node that was warm or cold for it.
func (k *Keys) Finished(key Key, warm bool, took time.Duration) {
	s := k.stats(key)
	k.count(s, -1)
	if warm {
		s.warm.add(took)
	} else {
		s.cold.add(took)
	}
	k.count(s, +1)
}

// count adds what is known of a key to the group's sum, or takes it away.
func (k *Keys) count(s *keyStats, by float64) {
	if saves, known := s.saves(); known {
		k.learnt.weight += by * s.weight
		k.learnt.seconds += by * s.weight * saves
	}
}

// saves is what a warm cache of this key saves, in seconds, once it is known.
func (s *keyStats) saves() (seconds float64, known bool) {
	return min(max(s.cold.value-s.warm.value, 0), mostSaved), s.warm.n >= enough && s.cold.n >= enough
}

func (k *Keys) stats(key Key) *keyStats {
	s := k.known[key]
	if s == nil {
		if len(k.known) >= 2*MaxKeys {
			k.prune()
		}
		s = &keyStats{}
		k.known[key] = s
	}
	return s
}

// prune forgets the rarer half.
func (k *Keys) prune() {
	byWeight := slices.SortedFunc(maps.Keys(k.known), func(a, b Key) int {
		return cmp.Or(cmp.Compare(k.known[a].weight, k.known[b].weight), cmp.Compare(a.Value(), b.Value()))
	})
	for _, key := range byWeight[:len(byWeight)-MaxKeys] {
		k.total -= k.known[key].weight
		k.count(k.known[key], -1)
		delete(k.known, key)
	}
}

// Of returns the share of the jobs that ask for the key, 0 to 1, lately counting
// more; and what a warm cache saves one of them, in seconds: learnt from its
// finished jobs; until there were enough the group's average; until there is
// one, the cold penalty.
func (k *Keys) Of(key Key) (share, saves float64) {
	share, saves = strangers, k.penalty.Seconds()
	if k.learnt.weight > 1e-9*k.total { // what is less is what rounding has left
		saves = k.learnt.seconds / k.learnt.weight
	}
	s := k.known[key]
	if s == nil {
		return share, saves
	}
	if k.total > 0 {
		share += s.weight / k.total
	}
	if own, known := s.saves(); known {
		saves = own
	}
	return share, saves
}

// Worth is what a warm cache of the key saves the next job, whichever that is,
// in seconds.
func (k *Keys) Worth(key Key) float64 {
	share, saves := k.Of(key)
	return share * saves
}
