package controller

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// at is a time of the tests' day, in whole seconds as in the API.
func at(seconds int) time.Time {
	return time.Date(2026, 1, 1, 0, 0, seconds, 0, time.UTC)
}

// sighting is one thing that the history is told, at second now.
type sighting struct {
	now      int
	pod      string
	node     model.NodeName // empty: pending
	on       model.InstanceID
	key      model.CacheKey
	from, to int // started and finished, zero: not
	gone     bool
	counts   string // "cold" or "warm" when this is told to be the start of a job
}

func (s sighting) tell(h *history) *job {
	p := model.Pod{UID: s.pod, Node: s.node, Key: s.key, Kind: model.PodRunner, Created: at(1)}
	if s.from > 0 {
		p.Started = at(s.from)
	}
	if s.to > 0 {
		p.Finished = at(s.to)
	}
	if s.gone {
		return h.gone(p, s.on, at(s.now))
	}
	return h.see(p, s.on, at(s.now))
}

func TestHistory(t *testing.T) {
	restored := []model.KeyWarmth{{Key: "k", LastUsed: at(100), Uses: 3}}
	tests := []struct {
		name     string
		restored []model.KeyWarmth // of instance i1
		told     []sighting
		busy     map[model.NodeName]bool
		uses     []scoring.Use // of i1, the last used first
	}{
		{
			name: "one job from pending to gone",
			told: []sighting{
				{now: 1, pod: "p", key: "k"},
				{now: 2, pod: "p", key: "k", node: "n", on: "i1"},
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 4, pod: "p", key: "k", node: "n", on: "i1", from: 3},
				{now: 60, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 60},
				{now: 61, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 60},
				{now: 70, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 60, gone: true},
			},
			busy: map[model.NodeName]bool{"n": false},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(60), Count: 1}},
		},
		{
			name: "the second of a key is warm",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 9, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 9},
				{now: 20, pod: "q", key: "k", node: "n", on: "i1", from: 20, counts: "warm"},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(20), Count: 2}},
		},
		{
			name: "jobs back to back, in the same second of the API's clock",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 9, pod: "q", key: "k", node: "n", on: "i1"},
				{now: 9, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 9},
				{now: 9, pod: "q", key: "k", node: "n", on: "i1", from: 9, counts: "warm"},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(9), Count: 2}},
		},
		{
			name: "jobs of one key that start together on a node with several slots",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 3, pod: "q", key: "k", node: "n", on: "i1", from: 3, counts: "warm"},
				{now: 3, pod: "r", key: "k", node: "n", on: "i1", from: 3, counts: "warm"},
				{now: 9, pod: "r", key: "k", node: "n", on: "i1", from: 3, to: 9},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(9), Count: 3}},
		},
		{
			name: "a finished pod told again is not another job",
			told: []sighting{
				{now: 9, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 9, counts: "cold"},
				{now: 50, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 9},
			},
			busy: map[model.NodeName]bool{"n": false},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(9), Count: 1}},
		},
		{
			name: "a job that is gone before it was told to have ended has ended",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 500, pod: "p", key: "k", node: "n", on: "i1", from: 3, gone: true},
			},
			busy: map[model.NodeName]bool{"n": false},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(500), Count: 1}},
		},
		{
			name: "a job of which only the end was told",
			told: []sighting{
				{now: 20, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 19, gone: true, counts: "cold"},
			},
			busy: map[model.NodeName]bool{"n": false},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(19), Count: 1}},
		},
		{
			name: "a pod that never started leaves nothing",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1"},
				{now: 9, pod: "p", key: "k", node: "n", on: "i1", gone: true},
			},
			busy: map[model.NodeName]bool{"n": false},
			uses: nil,
		},
		{
			name: "the node is told of after its pod",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", from: 3},
				{now: 5, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(3), Count: 1}},
		},
		{
			name: "a job without a key keeps the node busy and warms nothing",
			told: []sighting{{now: 3, pod: "p", node: "n", on: "i1", from: 3}},
			busy: map[model.NodeName]bool{"n": true, "m": false},
			uses: nil,
		},
		{
			name: "two pods, one ends",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 3, pod: "q", key: "l", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 9, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 9},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(9), Count: 1}, {Key: scoring.KeyOf("l"), Last: at(3), Count: 1}},
		},
		{
			name:     "after a restart, running and finished pods are told again",
			restored: restored,
			told: []sighting{
				{now: 200, pod: "p", key: "k", node: "n", on: "i1", from: 50, to: 100},
				{now: 200, pod: "q", key: "k", node: "n", on: "i1", from: 100},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(100), Count: 3}},
		},
		{
			name:     "after a restart, what began meanwhile is news",
			restored: restored,
			told: []sighting{
				{now: 200, pod: "p", key: "k", node: "n", on: "i1", from: 150, counts: "warm"},
				{now: 200, pod: "q", key: "k", node: "n", on: "i1", from: 150, to: 160, counts: "warm"},
				{now: 200, pod: "r", key: "k", node: "n", on: "i1", from: 120, to: 125, counts: "warm"},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(160), Count: 6}},
		},
		{
			name: "the name is given to another instance",
			told: []sighting{
				{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3, counts: "cold"},
				{now: 9, pod: "p", key: "k", node: "n", on: "i1", from: 3, to: 9},
				{now: 99, pod: "q", key: "k", node: "n", on: "i2", from: 99, counts: "cold"},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(9), Count: 1}},
		},
		{
			name: "gone without having been told of, or started",
			told: []sighting{
				{now: 5, pod: "r", key: "k", node: "n", on: "i1"},
				{now: 6, pod: "q", key: "k", node: "n", on: "i1", gone: true},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: nil,
		},
		{
			name:     "after a restart, the node is told of after its pods",
			restored: restored,
			told: []sighting{
				{now: 200, pod: "p", key: "k", node: "n", from: 100},
				{now: 201, pod: "p", key: "k", node: "n", on: "i1", from: 100},
			},
			busy: map[model.NodeName]bool{"n": true},
			uses: []scoring.Use{{Key: scoring.KeyOf("k"), Last: at(100), Count: 3}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := newHistory()
			h.restore(model.NodeRecord{ID: "i1", Warmth: tt.restored})
			for i, s := range tt.told {
				got := ""
				if j := s.tell(h); j != nil && j.started {
					got = map[bool]string{true: "warm", false: "cold"}[j.warm]
				}
				if got != s.counts {
					t.Errorf("step %d told of a %q job, want %q", i, got, s.counts)
				}
			}
			for node, want := range tt.busy {
				if h.busy(node) != want {
					t.Errorf("node %q busy: %v", node, !want)
				}
			}
			if got := h.uses["i1"]; !slices.Equal(got, tt.uses) {
				t.Errorf("uses %v, want %v", got, tt.uses)
			}
			for node, n := range h.perNode {
				if n <= 0 {
					t.Errorf("%d pods on %q", n, node)
				}
			}
		})
	}
}

func TestHistoryKeepsTheNewestKeys(t *testing.T) {
	h := newHistory()
	for i := range 3 * model.MaxWarmKeys {
		s := sighting{now: i + 1, pod: fmt.Sprint(i), key: model.CacheKey(fmt.Sprintf("k%03d", i)), node: "n", on: "i1", from: i + 1, to: i + 2}
		s.tell(h)
	}
	uses := h.uses["i1"]
	if len(uses) != model.MaxWarmKeys {
		t.Fatalf("%d keys kept, want %d", len(uses), model.MaxWarmKeys)
	}
	for i, u := range uses {
		if want := scoring.KeyOf(model.CacheKey(fmt.Sprintf("k%03d", 3*model.MaxWarmKeys-1-i))); u.Key != want {
			t.Errorf("use %d is of key %v, want %v", i, u.Key, want)
		}
	}
	warmth := h.warmth("i1", at(500))
	if len(warmth) != model.MaxWarmKeys || warmth[0].Key != "k095" || warmth[0].Uses != 1 || warmth[0].Warmth < 0.9 {
		t.Errorf("the warmest are %+v", warmth[:1])
	}
}

func TestHistoryWaiting(t *testing.T) {
	h := newHistory()
	for _, p := range []model.Pod{
		{UID: "1", Key: "a"},
		{UID: "2", Key: "a", Group: runners},
		{UID: "3", Key: "b", Group: "other"},
		{UID: "4", Key: "b", Node: "n"},
		{UID: "5"},
		{UID: "6", Key: "c", Finished: at(9)}, // gave up before it was bound
	} {
		h.see(p, "", at(9))
	}
	if got, want := h.waiting(runners), (map[scoring.Key]int{scoring.KeyOf("a"): 2}); !maps.Equal(got, want) {
		t.Errorf("waiting %v, want %v", got, want)
	}
	h.gone(model.Pod{UID: "1", Key: "a"}, "", at(10))
	if got, want := h.waiting("other"), (map[scoring.Key]int{scoring.KeyOf("b"): 1}); !maps.Equal(got, want) {
		t.Errorf("waiting %v, want %v", got, want)
	}
}

func TestHistoryForgets(t *testing.T) {
	h := newHistory()
	sighting{now: 3, pod: "p", key: "k", node: "n", on: "i1", from: 3}.tell(h)
	h.forget("i1")
	if len(h.uses) != 0 {
		t.Errorf("kept %v", h.uses)
	}
}
