package simulate_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

func mustRun(t rapid.TB, trace simulate.Trace, w simulate.World, policy string) simulate.Result {
	t.Helper()
	named, err := simulate.FindPolicy(policy)
	if err != nil {
		t.Fatal(err)
	}
	r, err := simulate.Run(trace, w, named, simulate.Options{Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestPodLagDelaysThoseThatDoNotHear: whoever hears of a job by its pod does what
// would be done for a job that is queued that much later, and each job waits as much
// longer.
func TestPodLagDelaysThoseThatDoNotHear(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		trace, world := drawTrace(t), drawWorld(t)
		lag := rapid.Int64Range(0, 90).Draw(t, "pod-lag")
		policy := rapid.SampledFrom([]string{"ca-default", "karpenter-empty", "simple-park-1m"}).Draw(t, "policy")
		later := simulate.Trace{Name: trace.Name}
		for _, j := range trace.Jobs {
			j.Arrival += lag
			later.Jobs = append(later.Jobs, j)
		}
		want := mustRun(t, later, world, policy)
		want.Begin -= lag // it begins before the first job is queued
		want.Waited += lag * int64(want.Jobs)
		want.WaitP50, want.WaitP95, want.WaitP99 = want.WaitP50+lag, want.WaitP95+lag, want.WaitP99+lag
		world.PodLag = time.Duration(lag) * time.Second
		got := mustRun(t, trace, world, policy)
		got.Delay = want.Delay // follows from Waited
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

// TestPodLagIsALead: a policy that hears of a job when it is queued has its node
// ready by the time that there is a pod, or that much sooner.
func TestPodLagIsALead(t *testing.T) {
	trace := simulate.Trace{Name: "one", Jobs: []simulate.Job{{ID: "1", Arrival: t0, Duration: 60, Key: "k", Group: "g"}}}
	for _, tc := range []struct {
		lag           time.Duration
		hears, hears2 int64 // waits of hearth and hearth-no-prescale, in seconds
		boots         int
	}{
		{0, 120, 120, 1},
		{30 * time.Second, 120, 150, 1},
		{120 * time.Second, 120, 240, 0},
		{5 * time.Minute, 300, 420, 0},
	} {
		world := simulate.DefaultWorld()
		world.PodLag = tc.lag
		with, without := mustRun(t, trace, world, "hearth"), mustRun(t, trace, world, "hearth-no-prescale")
		if with.Waited != tc.hears || without.Waited != tc.hears2 || with.AfterBoot != tc.boots || without.AfterBoot != 1 {
			t.Errorf("pod after %s: waits %d s (%d for a boot) and %d s, want %d s (%d) and %d s", tc.lag, with.Waited, with.AfterBoot, without.Waited, tc.hears, tc.boots, tc.hears2)
		}
	}
}

// TestNoJobRunsBeforeItsPod holds for every policy, in every world.
func TestNoJobRunsBeforeItsPod(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		trace, world := drawTrace(t), drawWorld(t)
		world.PodLag = time.Duration(rapid.IntRange(0, 90).Draw(t, "pod-lag")) * time.Second
		for _, p := range simulate.Policies() {
			if r := mustRun(t, trace, world, p.Name); r.Waited < int64(world.PodLag/time.Second)*int64(r.Jobs) || r.Jobs != len(trace.Jobs) {
				t.Errorf("%s: %d jobs waited %d s, with pods %s after they are queued", p.Name, r.Jobs, r.Waited, world.PodLag)
			}
		}
	})
}
