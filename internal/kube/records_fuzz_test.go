package kube

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// resuming returns n intents of nodes that are being brought back.
func resuming(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf(`{"instanceID":"i-%d","desired":"Running","stage":"Starting","since":"2026-01-05T08:59:00Z"}`, i+10)
	}
	return out
}

// FuzzRecords: whatever somebody has written into a RunnerNodeGroup's or a
// RunnerNode's status, the next life begins with it, answers, and acts on no
// instance that the cloud does not list in the group.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"target":2,"hidden":1,"sequence":7,"intents":[{"instanceID":"i-1","desired":"Parked","stage":"Draining","since":"2026-01-05T08:00:00Z"}]}`))
	f.Add([]byte(`{"target":-5,"hidden":-7,"intents":[{"instanceID":"i-9","desired":"Gone","stage":"Stopping","since":null},{"instanceID":"i-1","desired":"","stage":"?"}]}`))
	// Resuming nodes beyond the maximum that turn out not to exist.
	f.Add([]byte(`{"target":11,"intents":[` + strings.Join(resuming(11), ",") + `]}`))
	// A node that is on its way out takes a place of the maximum.
	f.Add([]byte(`{"target":10,"intents":[{"instanceID":"i-1","desired":"Gone","stage":"StoppingEngine"}]}`))
	f.Add([]byte(`{"target":9000000000000000000,"hidden":9000000000000000000,"min":-1,"max":1,"phases":{"":-1}}`))
	f.Add([]byte(`{"phase":"Ready","score":"NaN","cacheBytes":"-1","warmth":[{"key":"a","warmth":"x","lastUsed":null}],"conditions":[{"type":"CacheLost","status":"True"}]}`))
	at := time.Date(2026, 1, 5, 9, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text []byte) {
		var status v1alpha1.RunnerNodeGroupStatus
		if json.Unmarshal(text, &status) == nil {
			spec := model.NodeGroup{ID: "g", Max: 10, Annotations: map[string]string{model.Prefix + "/role": "runner"}}
			settings, _ := nodegroups.Interpret(spec, nil)
			g := nodegroups.NewGroup(spec, settings, recordFrom(status))
			cloud := model.GroupSnapshot{TakenAt: at, Desired: 1, Instances: []model.Instance{{ID: "i-1", State: model.InstanceRunning, LaunchedAt: at}}}
			for i := range 5 {
				now := at.Add(time.Duration(i) * time.Minute)
				cloud.TakenAt = now
				for _, e := range []nodegroups.Event{nodegroups.ObserveCloud{Snapshot: cloud}, nodegroups.Refresh{}} {
					if _, err := g.Step(e, now); err != nil {
						t.Fatal(err)
					}
				}
				_, effects := g.Ready(now)
				for _, e := range effects {
					if e.Desired > spec.Max {
						t.Fatalf("the cloud is asked for %d of %d at most", e.Desired, spec.Max)
					}
					for _, id := range e.Instances {
						if id != "i-1" {
							t.Fatalf("%s of %q, which is not there", e.Verb, id)
						}
					}
				}
			}
			_ = groupStatus(g.Record(), model.GroupSummary{})
		}
		var node v1alpha1.RunnerNode
		if json.Unmarshal(text, &node.Status) == nil {
			_ = nodeStatus(nodeRecordFrom(node))
		}
	})
}
