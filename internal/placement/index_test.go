package placement

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/pkg/model"
)

// book is what an Index should know, worked out anew each time from all that
// happened.
type book struct {
	nodes map[model.NodeName]model.Node
	pods  map[string]model.Pod
	// seen is when a job of a key was seen to start on a node, fullSince since
	// when a node has no room.
	seen      map[model.NodeName]map[string]time.Time
	fullSince map[model.NodeName]time.Time
}

const bookSlots = 2

func (b *book) load(name model.NodeName) (n int) {
	for _, p := range b.pods {
		if p.Node == name && p.Finished.IsZero() {
			n++
		}
	}
	return n
}

// settle notes which nodes are full.
func (b *book) settle(now time.Time) {
	for name := range b.nodes {
		if b.load(name) < bookSlots {
			delete(b.fullSince, name)
		} else if b.fullSince[name].IsZero() {
			b.fullSince[name] = now
		}
	}
}

// keys are the labels of a node and of what was seen on it of late.
func (b *book) keys(name model.NodeName, now time.Time) map[string]bool {
	keys := map[string]bool{}
	for _, label := range kube.WarmLabels(b.nodes[name].Labels) {
		keys[label] = true
	}
	for label, at := range b.seen[name] {
		if now.Sub(at) < seenFor {
			keys[label] = true
		}
	}
	return keys
}

func (b *book) choose(label string, now time.Time) (c choice) {
	c.late = true
	free := func(name model.NodeName) bool {
		n := b.nodes[name]
		return n.Ready && !n.Draining && b.load(name) < bookSlots
	}
	for name, n := range b.nodes {
		if !n.Ready || n.Draining || !b.keys(name, now)[label] {
			continue
		}
		c.warm++
		if !free(name) {
			c.late = c.late && now.Sub(b.fullSince[name]) >= 45*time.Second
			continue
		}
		c.free++
		missed := 0.0
		for other := range b.keys(name, now) {
			copies := 0
			for n := range b.nodes {
				if free(n) && b.keys(n, now)[other] {
					copies++
				}
			}
			if other != label {
				missed += math.Ldexp(1, 1-copies)
			}
		}
		c.best = append(c.best, candidate{name, n.Labels[label] == "warm", missed})
	}
	slices.SortFunc(c.best, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.missed, b.missed), cmp.Compare(a.name, b.name))
	})
	c.best = c.best[:min(len(c.best), most)]
	c.late = c.late && c.warm > 0 && c.free == 0
	return c
}

func TestIndexAgainstTheBook(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
		x, err := NewIndex(IndexConfig{
			Label: kube.WarmLabel, WarmLabels: kube.WarmLabels,
			Group: func(map[string]string) model.GroupID { return group }, Slots: func(model.GroupID) int { return bookSlots },
			Patience: 45 * time.Second, Now: func() time.Time { return now },
		})
		if err != nil {
			t.Fatal(err)
		}
		b := &book{
			nodes: map[model.NodeName]model.Node{}, pods: map[string]model.Pod{},
			seen: map[model.NodeName]map[string]time.Time{}, fullSince: map[model.NodeName]time.Time{},
		}
		name := rapid.Custom(func(t *rapid.T) model.NodeName {
			return model.NodeName(fmt.Sprintf("n%d", rapid.IntRange(0, 5).Draw(t, "node")))
		})
		key := rapid.Custom(func(t *rapid.T) model.CacheKey {
			return model.CacheKey(fmt.Sprintf("k%d", rapid.IntRange(0, 4).Draw(t, "key")))
		})
		pods := 0
		t.Repeat(map[string]func(*rapid.T){
			"node": func(t *rapid.T) {
				n := model.Node{
					Name: name.Draw(t, "name"), UID: rapid.SampledFrom([]string{"u1", "u1", "u1", "u2"}).Draw(t, "uid"),
					Ready: rapid.IntRange(0, 3).Draw(t, "ready") > 0, Draining: rapid.IntRange(0, 5).Draw(t, "draining") == 0, Labels: map[string]string{},
				}
				for _, k := range rapid.SliceOfN(key, 0, 4).Draw(t, "labels") {
					n.Labels[kube.WarmLabel(k)] = "warm"
				}
				before := b.nodes[n.Name]
				if before.UID != n.UID {
					delete(b.seen, n.Name)
					delete(b.fullSince, n.Name)
				} else if len(kube.WarmLabels(n.Labels)) < len(kube.WarmLabels(before.Labels)) {
					delete(b.seen, n.Name)
				}
				b.nodes[n.Name] = n
				x.NodeChanged(n)
			},
			"node gone": func(t *rapid.T) {
				n := name.Draw(t, "name")
				delete(b.nodes, n)
				delete(b.seen, n)
				delete(b.fullSince, n)
				x.NodeGone(model.Node{Name: n})
			},
			"job": func(t *rapid.T) {
				pods++
				p := model.Pod{UID: fmt.Sprint(pods), Kind: model.PodRunner, Node: name.Draw(t, "name"), Key: key.Draw(t, "key")}
				b.pods[p.UID] = p
				if _, known := b.nodes[p.Node]; known {
					if b.seen[p.Node] == nil {
						b.seen[p.Node] = map[string]time.Time{}
					}
					b.seen[p.Node][kube.WarmLabel(p.Key)] = now
				}
				x.PodChanged(p)
			},
			"end": func(t *rapid.T) {
				if len(b.pods) == 0 {
					t.Skip("none")
				}
				p := b.pods[rapid.SampledFrom(slices.Sorted(maps.Keys(b.pods))).Draw(t, "pod")]
				if rapid.Bool().Draw(t, "deleted") {
					delete(b.pods, p.UID)
					x.PodGone(p)
					return
				}
				p.Finished = now
				b.pods[p.UID] = p
				x.PodChanged(p)
			},
			"time": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 50).Draw(t, "seconds")) * time.Second)
			},
			"": func(t *rapid.T) {
				b.settle(now)
				for k := range 5 {
					label := kube.WarmLabel(model.CacheKey(fmt.Sprintf("k%d", k)))
					got, want := x.choose(label, group), b.choose(label, now)
					// What was seen and is over is forgotten when its node next changes:
					// until then it may still count among what others miss.
					for i := range got.best {
						got.best[i].missed = 0
					}
					for i := range want.best {
						want.best[i].missed = 0
					}
					byName := cmpopts.SortSlices(func(a, b candidate) bool { return a.name < b.name })
					if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(choice{}, candidate{}), byName, cmpopts.EquateEmpty()); diff != "" {
						t.Fatalf("%s (-want +got):\n%s", label, diff)
					}
				}
			},
		})
		// With everything fresh the order is the book's as well.
		for _, n := range b.nodes {
			x.NodeChanged(n)
		}
		for k := range 5 {
			label := kube.WarmLabel(model.CacheKey(fmt.Sprintf("k%d", k)))
			got, want := x.choose(label, group), b.choose(label, now)
			for i, c := range want.best {
				if i >= len(got.best) || got.best[i].name != c.name {
					t.Fatalf("%s: got %+v, want %+v", label, got.best, want.best)
				}
			}
		}
		// Nothing is kept of what is gone.
		for n := range b.nodes {
			x.NodeGone(model.Node{Name: n})
		}
		for _, p := range b.pods {
			x.PodGone(p)
		}
		if len(x.nodes)+len(x.warm)+len(x.pods)+len(x.perNode) > 0 {
			t.Fatalf("kept %d nodes, %d labels, %d pods, %d counts", len(x.nodes), len(x.warm), len(x.pods), len(x.perNode))
		}
	})
}

// It is told and asked at the same time.
func TestIndexConcurrently(t *testing.T) {
	d := newDesk(t)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 300 {
				name := fmt.Sprintf("n%d", (i+j)%7)
				n := model.Node{Name: model.NodeName(name), UID: "u", Ready: true, Labels: map[string]string{kube.WarmLabel("a"): "warm"}}
				p := model.Pod{UID: fmt.Sprintf("%d-%d", i, j), Kind: model.PodRunner, Node: n.Name, Key: "b"}
				d.index.NodeChanged(n)
				d.index.PodChanged(p)
				d.post(review(t, runner("a")))
				d.index.PodGone(p)
				if j%10 == 0 {
					d.index.NodeGone(n)
				}
			}
		})
	}
	wg.Wait()
	if len(d.index.pods) > 0 {
		t.Errorf("%d pods are kept", len(d.index.pods))
	}
}
