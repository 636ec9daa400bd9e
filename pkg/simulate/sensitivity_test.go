package simulate_test

import (
	"errors"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

// narrowWorld is one in which every value matters.
func narrowWorld() simulate.World {
	w := simulate.DefaultWorld()
	w.Slots, w.KeysHeld, w.WarmFor = 2, 3, 12*time.Hour
	return w
}

func sensitivityCase(t *testing.T) (simulate.Trace, []simulate.NamedPolicy) {
	t.Helper()
	trace, err := simulate.Generate(simulate.Generated{Jobs: 200, Weeks: 1, Keys: 12, Burst: 4, Typical: 300}, rand.New(rand.NewPCG(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	policies := []simulate.NamedPolicy{standIn(t)}
	for _, name := range []string{"ca-default", "simple-park-1m"} {
		p, err := simulate.FindPolicy(name)
		if err != nil {
			t.Fatal(err)
		}
		policies = append(policies, p)
	}
	return trace, policies
}

// TestVariations: each changes one value, and what the policies cost.
func TestVariations(t *testing.T) {
	w := narrowWorld()
	trace, policies := sensitivityCase(t)
	all, err := simulate.Sensitivity(trace, w, policies, simulate.Options{Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, s := range all {
		got = append(got, strings.TrimSpace(s.Parameter+" "+s.Value+" "+s.Change))
		var changed []string
		was, is := reflect.ValueOf(w), reflect.ValueOf(s.World)
		for f := range was.NumField() {
			if !was.Field(f).Equal(is.Field(f)) {
				changed = append(changed, was.Type().Field(f).Name)
			}
		}
		if s.World == w {
			continue // as given, or a parked price that is the default
		}
		name := strings.ReplaceAll(s.Parameter, " ", "")
		if len(changed) != 1 || !strings.EqualFold(changed[0], name) {
			t.Errorf("%s %s changes %v", s.Parameter, s.Change, changed)
		}
		if cmp.Equal(all[0].Outcomes, s.Outcomes) {
			t.Errorf("%s %s changes nothing that policies cost (%d)", s.Parameter, s.Change, i)
		}
	}
	want := []string{
		"", "boot 60 s halved", "boot 240 s doubled", "resume 23 s halved", "resume 90 s doubled",
		"release lag 10 s halved", "release lag 40 s doubled", "price $0.20/h halved", "price $0.80/h doubled",
		"parked price $0.006/h halved", "parked price $0.024/h doubled", "parked price $0.012/h 3 % of the price",
		"parked price $0.028/h 7 % of the price", "parked price $0.056/h 14 % of the price", "parked price $0.088/h 22 % of the price",
		"slots 1 halved", "slots 4 doubled", "cold factor 0.3 halved", "cold factor 1.2 doubled", "keys held 1 halved", "keys held 6 doubled",
		"warm for 6 h halved", "warm for 24 h doubled", "delay price $15/h halved", "delay price $60/h doubled",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestVariationsLeaveOut what would change nothing, or be no world.
func TestVariationsLeaveOut(t *testing.T) {
	w := simulate.DefaultWorld()
	w.Boot, w.KeysHeld, w.WarmFor, w.ColdFactor = 0, 1, 365*24*time.Hour, 0
	var got []string
	for _, v := range simulate.Variations(w) {
		switch v.Parameter {
		case "boot", "slots", "keys held", "warm for", "cold factor":
			got = append(got, v.Parameter+" "+v.Value)
		}
	}
	if diff := cmp.Diff([]string{"slots 2", "keys held 2", "warm for 4380 h"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestSensitivityIsDeterministic(t *testing.T) {
	trace, policies := sensitivityCase(t)
	run := func(processors int) []simulate.Sensitive {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(processors))
		all, err := simulate.Sensitivity(trace, narrowWorld(), policies, simulate.Options{Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	first := run(1)
	if diff := cmp.Diff(first, run(4)); diff != "" {
		t.Errorf("the number of processors shows:\n%s", diff)
	}
	for i, s := range first {
		if s.Hearth != s.Outcomes[0] {
			t.Errorf("%d: hearth is %v", i, s.Hearth)
		}
		best, rank := s.Outcomes[1], 1
		for _, o := range s.Outcomes[1:] {
			if o.Total() < best.Total() {
				best = o
			}
			if o.Total() < s.Hearth.Total() {
				rank++
			}
		}
		if s.Best != best || s.Rank != rank || s.Ratio() != s.Hearth.Total()/best.Total() {
			t.Errorf("%d: best %v, rank %d, ratio %v; want %v, %d", i, s.Best, s.Rank, s.Ratio(), best, rank)
		}
		r, err := simulate.Run(trace, s.World, policies[0], simulate.Options{Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		if r.Infrastructure != s.Hearth.Infrastructure || r.Delay != s.Hearth.Delay {
			t.Errorf("%d: %+v, alone %+v", i, s.Hearth, r.Summary)
		}
	}
}

func TestSensitivityProgress(t *testing.T) {
	trace, policies := sensitivityCase(t)
	want := len(simulate.Variations(narrowWorld())) * len(policies) * len(trace.Jobs)
	last := 0
	o := simulate.Options{Progress: func(arrived int) error {
		if arrived < last {
			t.Errorf("%d jobs after %d", arrived, last)
		}
		last = arrived
		return nil
	}}
	if _, err := simulate.Sensitivity(trace, narrowWorld(), policies, o); err != nil || last != want {
		t.Errorf("%d jobs, want %d; error %v", last, want, err)
	}
	enough := errors.New("enough")
	calls := 0
	o.Progress = func(int) error { calls++; return enough }
	if _, err := simulate.Sensitivity(trace, narrowWorld(), policies, o); !errors.Is(err, enough) || calls != 1 {
		t.Errorf("error %v after %d calls", err, calls)
	}
}

func TestSensitivityWantsTwo(t *testing.T) {
	trace, policies := sensitivityCase(t)
	for _, some := range [][]simulate.NamedPolicy{nil, policies[:1], policies[1:]} {
		if _, err := simulate.Sensitivity(trace, narrowWorld(), some, simulate.Options{}); err == nil || !strings.Contains(err.Error(), "one of hearth's policies") {
			t.Errorf("%d policies: error %v", len(some), err)
		}
	}
	broken := append(slices.Clone(policies), simulate.NamedPolicy{Name: "broken", New: func(simulate.Trace, simulate.World, *rand.Rand) simulate.Policy { return waits{} }})
	if _, err := simulate.Sensitivity(trace, narrowWorld(), broken, simulate.Options{}); err == nil || !strings.Contains(err.Error(), `simulating "broken"`) {
		t.Errorf("a policy that never places a job: error %v", err)
	}
}

// waits never places a job.
type waits struct{}

func (waits) Arrived(*simulate.Fleet, *simulate.Pod)               {}
func (waits) Finished(*simulate.Fleet, *simulate.Pod)              {}
func (waits) Place(*simulate.Fleet, *simulate.Pod) simulate.Choice { return simulate.Wait() }
func (waits) Plan(*simulate.Fleet) simulate.Plan                   { return simulate.Plan{} }
