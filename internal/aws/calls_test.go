package aws_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
)

const nodesEach = 50

// inTree counts the calls of cluster-autoscaler's own AWS provider by its rules
// for refreshing: all groups are listed once a minute and again after each
// deletion, 100 a page; the launch template of each is read every 20 minutes;
// the scaling activities of each under-filled group at each refresh; an instance
// is terminated in a call of its own.
type inTree struct{ refreshes, templates, activities, sets, terminates int }

func (c inTree) total(groups int) int {
	pages := (groups + 99) / 100
	return c.refreshes*pages + c.templates + c.activities + c.sets + c.terminates
}

// drive lets time pass as controller and provider do: groups are declared every
// 30 s, snapshots taken every 5 s.
func (a *account) drive(d time.Duration) {
	a.t.Helper()
	for n, end := 0, time.Now().Add(d); time.Now().Before(end); n++ {
		if n%6 == 0 {
			a.discover()
		}
		a.snapshot()
		time.Sleep(5 * time.Second)
		a.Advance(time.Now())
	}
}

func (a *account) report(what string, theirs int) (ours int) {
	counts := a.Counts()
	for _, operation := range slices.Sorted(maps.Keys(counts)) {
		ours += counts[operation]
	}
	a.t.Logf("%s: %d calls %v; cluster-autoscaler's own provider by its rules: %d", what, ours, counts, theirs)
	a.ResetCounts()
	return ours
}

// TestCalls counts calls with groups of 50 nodes: no more than
// cluster-autoscaler's own provider at rest, no more than half of it in a
// storm. There are 20 groups, or as many as HEARTH_AWS_GROUPS says: 300 are what
// docs/aws.md shows.
func TestCalls(t *testing.T) {
	manyGroups := 20
	if v := os.Getenv("HEARTH_AWS_GROUPS"); v != "" {
		var err error
		if manyGroups, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	in(t, nil, func(a *account) {
		for n := range manyGroups {
			lt := fmt.Sprintf("lt-%03d", n)
			a.AddTemplate(awsfake.LaunchTemplate{ID: lt, Default: 1, Versions: []awsfake.TemplateVersion{{InstanceType: "m5.2xlarge"}}})
			a.add(awsfake.Group{Name: fmt.Sprintf("g%03d", n), LaunchTemplate: lt, Version: "$Latest", Desired: nodesEach, Max: 300})
		}
		a.pass(time.Minute)
		a.drive(2 * time.Minute)
		a.report("start", 0)

		a.drive(time.Hour)
		// Discovery by two tags is one filter, not a list of all tags of the
		// account (kubernetes/autoscaler #3877).
		if n := a.Count("DescribeTags"); n > 0 {
			t.Errorf("%d calls of DescribeTags", n)
		}
		rest := inTree{refreshes: 60, templates: manyGroups * 3}.total(manyGroups)
		if ours := a.report("an hour at rest", rest); ours > rest {
			t.Errorf("more calls at rest than %d", rest)
		}

		// The storm: every group grows by ten within a minute, and loses them
		// again ten minutes later.
		ctx := context.Background()
		for n := range manyGroups {
			a.must(a.Resize(ctx, model.GroupID(fmt.Sprintf("g%03d", n)), nodesEach+10))
		}
		a.drive(10 * time.Minute)
		for n := range manyGroups {
			id := fmt.Sprintf("g%03d", n)
			a.must(a.Backend.Terminate(ctx, model.GroupID(id), a.ids(id)[:10]))
		}
		a.drive(10 * time.Minute)
		removed := manyGroups * 10
		storm := inTree{
			refreshes: 20 + removed, templates: manyGroups, activities: manyGroups, sets: manyGroups, terminates: removed,
		}.total(manyGroups)
		if ours := a.report("a storm: each group ten nodes up and down in 20 min", storm); ours > storm/2 {
			t.Errorf("more calls in a storm than half of %d", storm)
		}
		for _, name := range a.Groups() {
			if g, _ := a.Group(name); g.Desired != nodesEach || len(a.Instances(name)) != nodesEach {
				t.Fatalf("%s is at %d with %d instances", name, g.Desired, len(a.Instances(name)))
			}
		}

		began := time.Now()
		a.must(a.Resize(ctx, "g000", nodesEach+200))
		for len(a.snapshot().Groups["g000"].Instances) < nodesEach+200 {
			a.drive(5 * time.Second)
		}
		t.Logf("a scale-up of 200 is listed after %s", time.Since(began))
		a.report("one scale-up of 200", inTree{refreshes: 1, sets: 1, activities: 1}.total(manyGroups))
		a.drive(time.Minute)
		a.ResetCounts()
		began = time.Now()
		a.must(a.Backend.Terminate(ctx, "g000", a.ids("g000")[:200]))
		a.pass(15 * time.Second)
		for len(a.Instances("g000")) > nodesEach {
			a.drive(5 * time.Second)
		}
		t.Logf("a removal of 200 is done after %s", time.Since(began))
		a.report("one removal of 200", inTree{refreshes: 200, terminates: 200}.total(manyGroups))
	})
}

// TestCallsThatMayHaveBeenDoneAreMadeOnce: those that change a number are not
// sent again by the SDK when their answer is lost: twice would be two instances.
func TestCallsThatMayHaveBeenDoneAreMadeOnce(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "g", Desired: 3})
		a.pass(time.Minute)
		a.discover()
		a.snapshot()
		a.ResetCounts()
		a.SetFault(func(c awsfake.Call) awsfake.Fault {
			if c.Operation == "TerminateInstanceInAutoScalingGroup" {
				return awsfake.ErrorAfter
			}
			return awsfake.None
		})
		id := a.ids("g")[0]
		_ = a.Backend.Terminate(context.Background(), "g", []model.InstanceID{id})
		if n := a.Count("TerminateInstanceInAutoScalingGroup"); n != 1 {
			t.Errorf("sent %d times, want once", n)
		}
	})
}
