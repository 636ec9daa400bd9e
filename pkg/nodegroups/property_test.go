package nodegroups

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestAnythingMayHappen drives a group through everything that can happen to
// it, in any order, and then lets the faults end.
func TestAnythingMayHappen(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSim(t)
		s.run(rapid.IntRange(1, 150).Draw(t, "steps"))
		s.converge()
	})
}

// TestDrainsAndParking looks closer at what ends and brings back nodes: little
// else happens, so that it happens often and close together.
func TestDrainsAndParking(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSim(t)
		s.run(6, "all is well")
		s.run(rapid.IntRange(1, 100).Draw(t, "steps"),
			"scale down", "scale down again", "delete", "increase", "job starts", "job ends",
			"call lands", "call ends", "call fails", "cluster is observed", "cluster is observed, more than once",
			"read is answered", "read is delivered", "time passes briefly", "time passes briefly, again",
			"instances move", "kubelet acts", "all boots", "refresh", "provider restarts",
			"engine exits", "engine exits, another", "engine is meddled with", "session starts", "sessions end", "engines start",
			"all is well", "all is quick")
		s.converge()
	})
}

// TestNodesAreObservedInAnyOrder: what is seen of different nodes commutes,
// whatever state the group is in.
func TestNodesAreObservedInAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSim(t)
		s.run(rapid.IntRange(1, 100).Draw(t, "steps"))
		ids := map[model.InstanceID]bool{"i-unknown": true}
		for _, m := range []map[model.InstanceID]bool{
			keys(s.w.instances), keys(s.w.nodes), keys(s.g.members), keys(s.g.tombstones), keys(s.g.record.Intents),
		} {
			maps.Copy(ids, m)
		}
		var events []Event
		for _, id := range slices.Sorted(maps.Keys(ids)) {
			switch rapid.IntRange(0, 5).Draw(t, "event") {
			case 0:
				events = append(events, ObserveNodeGone{id})
			case 1:
				events = append(events, ObserveBusy{id, rapid.Bool().Draw(t, "busy")})
			case 2:
				events = append(events, ObserveUse{id, rapid.SampledFrom([]model.Activity{"", "idle", "busy"}).Draw(t, "activity"), s.w.now})
			case 3:
				events = append(events, ObserveEngine{id, s.w.engines[id]})
			default:
				n := model.Node{Name: model.NodeName("node-" + id), UID: "uid-x", ID: id, Created: s.w.now, ReadyChanged: s.w.now}
				n.Ready, n.Draining = rapid.Bool().Draw(t, "ready"), rapid.Bool().Draw(t, "draining")
				events = append(events, ObserveNode{n})
			}
		}
		apply := func() (string, Commit) {
			g, level := s.g.Clone(), CommitNone
			for _, e := range events {
				out, err := g.Step(e, s.w.now)
				if err != nil {
					t.Fatalf("%+v was refused: %v", e, err)
				}
				level = max(level, out.Commit)
			}
			return dump(g), level
		}
		one, oneLevel := apply()
		seed := rapid.Uint64().Draw(t, "order")
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
		if other, level := apply(); other != one || level != oneLevel {
			t.Fatalf("in another order, %+v:\n%s\n%s", events, one, other)
		}
	})
}

func keys[V any](m map[model.InstanceID]V) map[model.InstanceID]bool {
	set := make(map[model.InstanceID]bool, len(m))
	for id := range m {
		set[id] = true
	}
	return set
}

// TestUnknownEvent: an event that is none is refused.
func TestUnknownEvent(t *testing.T) {
	g := NewGroup(ofTen, Defaults(ofTen), Record{})
	before := dump(g)
	if _, err := g.Step(nil, newWorld().now); KindOf(err) != KindInvalid || dump(g) != before {
		t.Errorf("nil was answered with %v", err)
	}
}

// TestNothingBeforeTheFirstReading: a group that has not seen the cloud shows
// no view, has no effects, and survives what cluster-autoscaler may ask.
func TestNothingBeforeTheFirstReading(t *testing.T) {
	w := newWorld()
	settings := Defaults(ofTen)
	settings.Role = model.RoleRunner
	g := NewGroup(ofTen, settings, Record{Sequence: 7, Target: 3, Hidden: 1})
	for _, e := range []Event{Refresh{}, Forget{}, Prescale{Want: 3}, DecreaseTargetSize{-1}} {
		if _, err := g.Step(e, w.now); err != nil {
			t.Errorf("%T: %v", e, err)
		}
		if out, effects := g.Ready(w.now); out.Commit != CommitNone || len(effects) > 0 || g.View() != nil || g.Synced() {
			t.Errorf("after %T: %+v, effects %v, view %v", e, out, effects, g.View())
		}
	}
}
