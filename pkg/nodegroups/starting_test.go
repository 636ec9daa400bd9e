package nodegroups

import (
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestStarting follows View.Starting, frozen at each Refresh, through the start
// of a node.
func TestStarting(t *testing.T) {
	provision := 10 * time.Minute
	for _, tt := range []struct {
		name     string
		settings Options
		// after is the time since the request at which the instance is there,
		// its Node is registered, and is Ready; zero: never.
		launched, registered, ready time.Duration
		refreshes                   map[time.Duration]bool // Starting, by time since the request
	}{
		{
			"a node that starts", Options{}, 10 * time.Second, 30 * time.Second, 50 * time.Second,
			map[time.Duration]bool{
				time.Second: true, 20 * time.Second: true, 40 * time.Second: true,
				// Ready, but CA may have listed its nodes before it was.
				60 * time.Second: true, 61 * time.Second: true,
				62 * time.Second: false, 70 * time.Second: false,
			},
		},
		{
			"an instance that never registers", Options{MaxNodeProvisionTime: &provision}, 10 * time.Second, 0, 0,
			map[time.Duration]bool{time.Minute: true, 10 * time.Minute: true, 11 * time.Minute: false},
		},
		{
			"the same, in a group with CA's own time", Options{}, 10 * time.Second, 0, 0,
			map[time.Duration]bool{time.Minute: true, time.Hour: true},
		},
		{
			"an instance that is never launched", Options{MaxNodeProvisionTime: &provision}, 0, 0, 0,
			map[time.Duration]bool{time.Minute: true, 10 * time.Minute: false},
		},
		{
			"a node that is never Ready", Options{}, 10 * time.Second, 30 * time.Second, 0,
			map[time.Duration]bool{10 * time.Minute: true, 16 * time.Minute: false},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			at := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
			settings := Defaults(model.NodeGroup{ID: "a", Max: 5})
			settings.Options = tt.settings
			g := NewGroup(model.NodeGroup{ID: "a", Max: 5}, settings, Record{})
			step := func(e Event, now time.Time) {
				t.Helper()
				if _, err := g.Step(e, now); err != nil {
					t.Fatalf("%T: %v", e, err)
				}
			}
			step(ObserveCloud{model.GroupSnapshot{TakenAt: at}}, at)
			if g.View().Starting {
				t.Fatal("an empty group is starting")
			}
			step(IncreaseSize{Delta: 1}, at)
			if !g.View().Starting {
				t.Error("it is not starting once it was asked for a node")
			}
			node := model.Node{Name: "n", ID: "i", Created: at.Add(tt.registered)}
			for since := time.Duration(0); since <= 2*time.Hour; since += time.Second {
				now := at.Add(since)
				if since > 0 && since == tt.launched {
					step(ObserveCloud{model.GroupSnapshot{TakenAt: now, Desired: 1, Instances: []model.Instance{
						{ID: "i", State: model.InstanceRunning, LaunchedAt: now},
					}}}, now)
				}
				if since > 0 && since == tt.registered {
					step(ObserveNode{node}, now)
				}
				if since > 0 && since == tt.ready {
					node.Ready, node.ReadyChanged = true, now
					step(ObserveNode{node}, now)
				}
				if want, here := tt.refreshes[since]; here {
					step(Refresh{}, now)
					if got := g.View().Starting; got != want {
						t.Errorf("%s after the request: starting is %t, want %t", since, got, want)
					}
				}
			}
		})
	}
}
