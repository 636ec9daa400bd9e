package controller

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

func TestWarmKeysOfAnInstance(t *testing.T) {
	h, now := newHistory(), time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	if got := h.warmKeys("none", now); got != (model.WarmKeys{}) {
		t.Errorf("an instance that nothing is known of is warm for %q", got)
	}
	h.use("i", scoring.Use{Key: scoring.KeyOf("b"), Last: now.Add(-time.Hour), Count: 1})
	h.use("i", scoring.Use{Key: scoring.KeyOf("old"), Last: now.Add(-scoring.WarmFor - time.Minute), Count: 9})
	h.use("i", scoring.Use{Key: scoring.KeyOf("a"), Last: now, Count: 1})
	if got, want := h.warmKeys("i", now), (model.WarmKeys{"a", "b"}); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for i := range 40 { // pushes what the engine held before out of its disk
		h.use("i", scoring.Use{Key: scoring.KeyOf(model.CacheKey(fmt.Sprintf("new-%02d", i))), Last: now.Add(time.Duration(i+1) * time.Second), Count: 1})
	}
	got := h.warmKeys("i", now.Add(time.Minute))
	if got[0] != "new-20" || got[model.MaxWarmLabels-1] != "new-39" {
		t.Errorf("got %q, want the twenty newest", got)
	}
	h.forget("i")
	if got := h.warmKeys("i", now); got != (model.WarmKeys{}) {
		t.Errorf("an instance whose cache is lost is warm for %q", got)
	}
}

// Labels follow what ran; they go when it is cold, and when the engine's cache
// is known to be gone.
func TestLabelsFollowWarmth(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "time-value", "10000", "min-warm", "1")}, func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		warm := func() model.WarmKeys { n, _ := l.cluster.node(node.Name); return n.Marks.Warm }
		l.cluster.job("a", 20*time.Second, node.Name)
		l.within(10*time.Second, "label for the first key", func() bool { return warm() == model.WarmKeys{"a"} })
		time.Sleep(30 * time.Second)
		l.cluster.job("b", time.Second, node.Name)
		l.always(20*time.Second, "one change a minute", func() bool { return warm() == model.WarmKeys{"a"} })
		l.within(45*time.Second, "label for the second key", func() bool { return warm() == model.WarmKeys{"a", "b"} })
		// A person takes the labels off, or the kubelet registers anew.
		l.cluster.edit(node.Name, func(n *model.Node) { n.Marks.Warm = model.WarmKeys{} })
		l.within(2*time.Minute, "labels again", func() bool { return warm() == model.WarmKeys{"a", "b"} })
		calls := l.cluster.count("mark")
		l.always(10*time.Minute, "labels that nothing changes", func() bool { return l.cluster.count("mark") == calls })
		l.restart()
		l.always(time.Minute, "labels after a restart", func() bool { return warm() == model.WarmKeys{"a", "b"} && l.cluster.count("mark") == calls })
		l.restart(func() {
			l.store.edit(func(s *fakeStore) {
				r := s.nodes[node.ID]
				r.Warmth = slices.Clone(r.Warmth)
				for i := range r.Warmth {
					r.Warmth[i].LastUsed = time.Now().Add(2*time.Minute - scoring.WarmFor)
				}
				s.nodes[node.ID] = r
			})
		})
		l.within(5*time.Minute, "end of what is cold", func() bool { return warm() == model.WarmKeys{} })
	})
}

// What a busy hour costs the API server, for each node: jobs of three minutes
// without a pause, of as many keys as stated.
func TestLabelWritesInABusyHour(t *testing.T) {
	for _, tt := range []struct {
		keys int
		most float64 // writes to a Node in two hours
	}{
		{4, 4}, {12, 12}, {40, 40}, // beyond 20 keys a job may push one out each time
	} {
		t.Run(fmt.Sprintf("%d keys", tt.keys), func(t *testing.T) {
			experiment(t, []model.NodeGroup{group(runners, "time-value", "10000")}, func(t *testing.T, l *lab) {
				const nodes = 4
				l.start()
				fleet := l.fleet(nodes)
				r := rand.New(rand.NewPCG(1, 2))
				hour := func() (marks, records float64) {
					before, saved := l.cluster.count("mark"), l.store.count("save-node")
					for end := time.Now().Add(time.Hour); time.Now().Before(end); time.Sleep(3 * time.Minute) {
						for _, n := range fleet {
							l.cluster.job(model.CacheKey(fmt.Sprintf("repo-%d", r.IntN(tt.keys))), 170*time.Second, n.Name)
						}
					}
					return float64(l.cluster.count("mark")-before) / nodes, float64(l.store.count("save-node")-saved) / nodes
				}
				var all float64
				for range 2 {
					marks, records := hour()
					t.Logf("%d keys, 20 jobs a node and hour: %.1f writes to a Node, %.1f to its RunnerNode", tt.keys, marks, records)
					all += marks
				}
				if all > tt.most {
					t.Errorf("%.1f writes to a Node, want at most %.0f", all, tt.most)
				}
			})
		})
	}
}

// The job that a runner has picked up is known by a key of its own, beside that
// of its scale set; each start of it counts once, in a later life too.
func TestJobsThatRunnersPickUp(t *testing.T) {
	h, now := newHistory(), time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	key := scoring.KeyOf("github/acme/shop")
	p := model.Pod{UID: "p", Kind: model.PodRunner, Node: "n", Key: "arc/linux", Created: now}
	want := func(what string, count int, last time.Time) {
		t.Helper()
		if u := h.last("i", key); u.Count != count || !u.Last.Equal(last) {
			t.Errorf("%s: %d jobs, the last at %s; want %d at %s", what, u.Count, u.Last, count, last)
		}
	}
	see := func(p model.Pod, instance model.InstanceID) { h.see(p, instance, now); h.seeJob(p, instance) }
	see(p, "i")
	p.Started = now
	see(p, "i")
	want("not picked up", 0, time.Time{})
	p.Job = key.Value()
	see(p, "")
	want("instance not known", 0, time.Time{})
	see(p, "i")
	see(p, "i")
	want("runs", 1, now)
	p.Finished = now.Add(time.Minute)
	see(p, "i")
	see(p, "i")
	want("ended", 1, p.Finished)
	if got, want := h.warmKeys("i", p.Finished), (model.WarmKeys{"arc/linux", "github/acme/shop"}); got != want {
		t.Errorf("labels %q, want %q", got, want)
	}
	next := newHistory()
	next.restore(model.NodeRecord{ID: "i", Warmth: h.warmth("i", now)})
	h = next
	see(p, "i")
	want("seen by a later life", 1, p.Finished)
	again := p
	again.UID, again.Started, again.Finished = "p2", now.Add(time.Hour), time.Time{}
	see(again, "i")
	want("another", 2, again.Started)
}

// A node whose engine has lost its cache invites nobody any more.
func TestLabelsGoWithTheCache(t *testing.T) {
	experiment(t, parking("max-idle", "240h"), func(t *testing.T, l *lab) {
		withEngines(l)
		l.start()
		node := l.fleet(1)[0]
		warm := func() model.WarmKeys { n, _ := l.cluster.node(node.Name); return n.Marks.Warm }
		l.cluster.job("a", 20*time.Second, node.Name)
		l.within(2*time.Minute, "a label", func() bool { return warm() == model.WarmKeys{"a"} })
		l.cluster.editEngines(node.Name, func(e *model.EngineState) { e.Restarts, e.LastExit = e.Restarts+1, 1 })
		l.within(relabelEvery+10*time.Second, "no label", func() bool { return warm() == model.WarmKeys{} })
		l.always(10*time.Minute, "no label", func() bool { return warm() == model.WarmKeys{} })
	})
}

// How long a job waits for a warm node is what the way out takes.
func TestPatience(t *testing.T) {
	w := NewWorld([]model.NodeGroup{group("parks", "park", "stop"), group("ends")})
	if w.SetGroups([]model.NodeGroup{group("parks", "park", "stop", "jobs-per-node", "3"), group("ends"), group("CI runners", "jobs-per-node", "2")}); w.JobsPerNode("parks") != 3 || w.JobsPerNode(model.GroupID(model.GroupLabel("CI runners"))) != 2 {
		t.Error("slots by id or label are not known")
	}
	if got := w.Patience("parks"); got != usualResume {
		t.Errorf("a group that parks: %s", got)
	}
	if got := w.Patience("ends"); got != usualBoot {
		t.Errorf("a group that does not: %s", got)
	}
	w.AnnotationsChanged("ends", annotation("park", "stop"))
	if got := w.Patience("ends"); got != usualResume {
		t.Errorf("a group that parks now: %s", got)
	}
}
