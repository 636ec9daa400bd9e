package kwok

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestCloud plays the stories in testdata. Every command answers with the time,
// the number worked towards, the instances and the last failure.
func TestCloud(t *testing.T) {
	datadriven.Walk(t, "testdata/cloud", func(t *testing.T, path string) {
		var born int
		newID := func(model.GroupID) (model.InstanceID, string) {
			born++
			return model.InstanceID(fmt.Sprintf("i%d", born)), fmt.Sprintf("n%d", born)
		}
		begin := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
		now := begin
		c := &cloud{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			var out strings.Builder
			var ids []model.InstanceID
			for _, arg := range d.CmdArgs {
				ids = append(ids, model.InstanceID(arg.Key))
			}
			switch d.Cmd {
			case "resize":
				var n int
				d.ScanArgs(t, "to", &n)
				c.resize(n)
			case "terminate":
				c.terminate(ids, now)
			case "stop":
				c.stop(ids, now)
			case "start":
				for _, id := range c.start(ids, now, 5*time.Second) {
					fmt.Fprintf(&out, "still stopping: %s\n", id)
				}
			case "faults":
				c.faults = Faults{}
				if err := json.Unmarshal([]byte(d.Input), &c.faults); err != nil {
					t.Fatal(err)
				}
			case "wait":
				wait, err := time.ParseDuration(d.CmdArgs[0].Key)
				if err != nil {
					t.Fatal(err)
				}
				for end := now.Add(wait); now.Before(end); {
					now = now.Add(tick)
					for _, n := range c.step(now, 20*time.Second, newID) {
						fmt.Fprintln(&out, strings.TrimSpace(fmt.Sprintf("%v: %s %s", now.Sub(begin), n.what, n.instance)))
					}
				}
			default:
				t.Fatalf("unknown command %q", d.Cmd)
			}
			if living := c.living(); c.Desired < living {
				t.Errorf("works towards %d while %d live", c.Desired, living)
			}
			s := c.snapshot(now)
			fmt.Fprintf(&out, "%v: desired %d", now.Sub(begin), s.Desired)
			for _, i := range s.Instances {
				fmt.Fprintf(&out, ", %s %s", i.ID, i.State)
			}
			if s.Failure != nil {
				fmt.Fprintf(&out, ", failed %s at %v", s.Failure.Activity, s.Failure.At.Sub(begin))
			}
			return out.String() + "\n"
		})
	})
}
