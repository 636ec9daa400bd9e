package savings_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/savings"
	"github.com/hearth-ci/hearth/pkg/model"
)

var begin = time.Date(2026, 1, 5, 9, 0, 0, 0, time.UTC)

func terms() savings.Terms {
	return savings.Terms{Running: 0.4, Parked: 0.012, TimeValue: 30, Boot: 2 * time.Minute, Resume: 45 * time.Second, Saves: 3 * time.Minute, Slots: 1, MaxNodes: 10}
}

// hourly records warm jobs of five minutes, one an hour, on one node that
// always runs.
func hourly(t *savings.Tape, jobs int) (now time.Time) {
	t.Nodes("a", 1, 0, terms(), begin)
	for i := range jobs {
		created := begin.Add(time.Duration(i) * time.Hour)
		now = created.Add(5 * time.Minute)
		t.Ended("a", savings.Job{Key: "k", Created: created, Started: created, Finished: now, Warm: true}, now)
	}
	return now
}

func TestCompare(t *testing.T) {
	var tape savings.Tape
	now := hourly(&tape, 11)
	r := tape.Compare(now, false)
	if len(r.Groups) != 1 || len(r.Assumptions) == 0 {
		t.Fatalf("%+v", r)
	}
	g := r.Groups[0]
	// Ten hours and five minutes of one node at $0.40.
	if got, want := g.Hearth.Nodes, 0.4*(10+5.0/60); got < want-0.001 || got > want+0.001 {
		t.Errorf("nodes cost %.3f, want %.3f", got, want)
	}
	if g.Jobs != 11 || g.WarmHits != 11 || g.SavedMinutes != 33 || g.Hearth.Delay != 0 || g.Hearth.WarmHitRate != 1 {
		t.Errorf("%+v", g)
	}
	// cluster-autoscaler lets the node go between any two jobs: each waits for
	// a boot and runs cold.
	if g.Baseline == nil || g.Baseline.WarmHitRate != 0 || g.Baseline.Nodes >= g.Hearth.Nodes {
		t.Fatalf("baseline %+v", g.Baseline)
	}
	if got, want := g.Baseline.Delay, 11*(2+3)/60.0*30; got < want-0.1 || got > want+0.1 {
		t.Errorf("delay cost %.2f, want %.2f", got, want)
	}
}

// TestDryRun: beside another provider the report says what Hearth would have
// cost: between hourly jobs it parks its node.
func TestDryRun(t *testing.T) {
	var tape savings.Tape
	g := tape.Compare(hourly(&tape, 30), true).Groups[0]
	if g.DryRun == nil || g.Problem != "" {
		t.Fatalf("%+v", g)
	}
	if d := g.DryRun; d.WarmHitRate < 0.9 || d.Nodes >= g.Hearth.Nodes/2 || d.Nodes+d.Delay >= g.Baseline.Total() {
		t.Errorf("Hearth would have cost %+v; spent was %+v, cluster-autoscaler's default is %+v", *d, g.Hearth, *g.Baseline)
	}
	if g := tape.Compare(begin, false).Groups[0]; g.DryRun != nil {
		t.Errorf("%+v of a Hearth that acts", g.DryRun)
	}
}

func TestSpent(t *testing.T) {
	var tape savings.Tape
	near := func(got, want float64) bool { return got > want-1e-9 && got < want+1e-9 }
	if running, parked := tape.Nodes("a", 2, 5, terms(), begin); running != 0 || parked != 0 {
		t.Errorf("at first %g and %g", running, parked)
	}
	// What a job's end takes in is told once, at the price that held.
	tape.Ended("a", savings.Job{Key: "k"}, begin.Add(30*time.Minute))
	dearer := terms()
	dearer.Running = 4
	if running, parked := tape.Nodes("a", 0, 5, dearer, begin.Add(time.Hour)); !near(running, 2*0.4) || !near(parked, 5*0.012) {
		t.Errorf("in an hour %g and %g", running, parked)
	}
	if running, parked := tape.Nodes("a", 0, 0, dearer, begin.Add(2*time.Hour)); running != 0 || !near(parked, 5*0.012) {
		t.Errorf("in the next %g and %g", running, parked)
	}
}

func TestCompareBeforeAnyJob(t *testing.T) {
	var tape savings.Tape
	if r := tape.Compare(begin, false); len(r.Groups) != 0 {
		t.Errorf("%+v", r)
	}
	tape.Nodes("a", 1, 1, terms(), begin)
	if r := tape.Compare(begin, false); len(r.Groups) != 1 || r.Groups[0].Problem == "" || r.Groups[0].Baseline != nil {
		t.Errorf("%+v", r)
	}
	tape.Forget("a")
	if r := tape.Compare(begin, false); len(r.Groups) != 0 {
		t.Errorf("after Forget: %+v", r)
	}
}

func TestTapeIsBounded(t *testing.T) {
	var tape savings.Tape
	now := hourly(&tape, 10_001)
	g := tape.Compare(now, false).Groups[0]
	if g.Jobs != 5001 {
		t.Fatalf("%d jobs", g.Jobs)
	}
	if want := begin.Add(4999*time.Hour + 5*time.Minute); !g.Since.Equal(want) {
		t.Errorf("since %s, want %s", g.Since, want)
	}
	// What the dropped jobs cost is dropped too.
	if got, want := g.Hearth.Nodes, 0.4*5001; got < want-1 || got > want+1 {
		t.Errorf("nodes cost %.2f, want %.2f", got, want)
	}
}

func BenchmarkCompare(b *testing.B) {
	var tape savings.Tape
	for g := range 5 {
		id := model.GroupID(fmt.Sprint("g", g))
		tape.Nodes(id, 50, 20, terms(), begin)
		for i := range 10_000 {
			created := begin.Add(time.Duration(i) * 20 * time.Second)
			end := created.Add(time.Duration(2+i%9) * time.Minute)
			tape.Ended(id, savings.Job{Key: model.CacheKey(fmt.Sprint(i % 40)), Created: created, Started: created, Finished: end, Warm: i%3 > 0}, end)
		}
	}
	for b.Loop() {
		tape.Compare(begin, false)
	}
}
