package nodegroups

import (
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestNothingIsAskedOnAnOldReading: until the cloud has been read after a call
// ended, nothing more is asked of it: the number would be wrong by what that
// call changed.
func TestNothingIsAskedOnAnOldReading(t *testing.T) {
	at := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	spec := model.NodeGroup{ID: "g", Max: 10}
	settings, _ := Interpret(spec, nil)
	g := NewGroup(spec, settings, Record{})
	step := func(e Event, now time.Time) {
		t.Helper()
		if _, err := g.Step(e, now); err != nil {
			t.Fatal(err)
		}
	}
	ready := func(now time.Time) []Effect {
		_, effects := g.Ready(now)
		return effects
	}
	cloud := model.GroupSnapshot{TakenAt: at}
	step(ObserveCloud{Snapshot: cloud}, at)
	step(IncreaseSize{Delta: 2}, at)
	first := ready(at)
	if len(first) != 1 || first[0].Verb != Resize || first[0].Desired != 2 {
		t.Fatalf("asked for %+v, want a size of 2", first)
	}
	ended := at.Add(3 * time.Second)
	step(Done{Effect: first[0], At: ended}, ended)
	step(IncreaseSize{Delta: 1}, ended)
	if again := ready(ended.Add(time.Minute)); len(again) != 0 {
		t.Errorf("asked for %+v on a reading that is older than the last call", again)
	}
	cloud.TakenAt, cloud.Desired = ended.Add(time.Second), 2
	step(ObserveCloud{Snapshot: cloud}, cloud.TakenAt)
	if next := ready(cloud.TakenAt); len(next) != 1 || next[0].Desired != 3 {
		t.Errorf("asked for %+v on a new reading, want a size of 3", next)
	}
}

// TestRecordBeyondTheMaximum: a record that somebody has edited, or one from
// before the maximum was lowered, has no more launched than the group may have.
func TestRecordBeyondTheMaximum(t *testing.T) {
	at := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	spec := model.NodeGroup{ID: "g", Max: 10}
	settings, _ := Interpret(spec, nil)
	for _, record := range []Record{{Target: 500, Sequence: 9}, {Target: 3, Hidden: 500, Sequence: 9}} {
		g := NewGroup(spec, settings, record)
		cloud := model.GroupSnapshot{TakenAt: at, Desired: 1, Instances: []model.Instance{{ID: "i-1", State: model.InstanceRunning, LaunchedAt: at}}}
		if _, err := g.Step(ObserveCloud{Snapshot: cloud}, at); err != nil {
			t.Fatal(err)
		}
		if _, effects := g.Ready(at); len(effects) != 1 || effects[0].Desired != 10 {
			t.Errorf("of %+v: %+v, want a size of 10", record, effects)
		}
	}
}
