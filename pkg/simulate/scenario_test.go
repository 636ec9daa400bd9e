package simulate_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

// The stories begin on Monday, 5 January 2026, 09:00 UTC.
const t0 = 1767603600

// TestScenarios plays tiny traces. A running node costs $1 a second, a parked
// one 10 cents, delay $1 a second; "run policy=NAME [world=value…]" takes jobs
// "id arrival duration key [group]", arrivals from the beginning of the story
// on, and prints every change of a node and what it came to.
func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata/scenarios", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd != "run" {
				d.Fatalf(t, "unknown command %q", d.Cmd)
			}
			return runScenario(t, d)
		})
	})
}

func runScenario(t *testing.T, d *datadriven.TestData) string {
	w := simulate.DefaultWorld()
	w.Price, w.ParkedPrice, w.DelayPrice = 3600, 360, 3600
	var name string
	var o simulate.Options
	for _, arg := range d.CmdArgs {
		value := ""
		if len(arg.Vals) > 0 {
			value = arg.Vals[0]
		}
		number := func() int {
			n, err := strconv.Atoi(value)
			if err != nil {
				d.Fatalf(t, "%s: %v", arg.Key, err)
			}
			return n
		}
		switch arg.Key {
		case "policy":
			name = value
		case "slots":
			w.Slots = number()
		case "keys-held":
			w.KeysHeld = number()
		case "max-nodes":
			w.MaxNodes = number()
		case "warm-for":
			w.WarmFor = time.Duration(number()) * time.Second
		case "group-only":
			o.GroupOnly = true
		default:
			d.Fatalf(t, "unknown argument %q", arg.Key)
		}
	}
	var b strings.Builder
	o.Watch = func(at int64, n *simulate.Node) {
		fmt.Fprintf(&b, "%6d node %d %s\n", at-t0, n.ID, n.State)
	}
	p, err := simulate.FindPolicy(name)
	if err != nil {
		d.Fatalf(t, "%v", err)
	}
	r, err := simulate.Run(scenarioTrace(t, d), w, p, o)
	if err != nil {
		return err.Error() + "\n"
	}
	fmt.Fprintf(&b, "%d of %d warm, waited for boot %d resume %d job %d, waits %d/%d/%d, %d launches, %d resumes\n",
		r.Warm, r.Jobs, r.AfterBoot, r.AfterResume, r.AfterJob, r.WaitP50, r.WaitP95, r.WaitP99, r.Launches, r.Resumes)
	fmt.Fprintf(&b, "running %.0f s, parked %.0f s; infrastructure $%.1f, waited $%d, slowed $%d, total $%.1f\n",
		r.RunningNodeHours()*3600, r.ParkedNodeHours()*3600, r.Infrastructure, r.Waited, r.Slowed, r.Total())
	return b.String()
}

func scenarioTrace(t *testing.T, d *datadriven.TestData) simulate.Trace {
	var trace simulate.Trace
	for _, line := range strings.Split(d.Input, "\n") {
		j := simulate.Job{}
		fields := strings.Fields(line)
		if len(fields) < 4 {
			d.Fatalf(t, "want id arrival duration key [group]: %q", line)
		}
		if _, err := fmt.Sscan(strings.Join(fields[:4], " "), &j.ID, &j.Arrival, &j.Duration, &j.Key); err != nil {
			d.Fatalf(t, "%q: %v", line, err)
		}
		if len(fields) > 4 {
			j.Group = fields[4]
		}
		j.Arrival += t0
		trace.Jobs = append(trace.Jobs, j)
	}
	trace.Sort()
	return trace
}
