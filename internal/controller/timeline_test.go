package controller

import (
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/pkg/model"
)

// TestTimeline: what happens and what is decided is there to be read, the newest
// first; and so is what it cost and saved.
func TestTimeline(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners, "prescale-max", "0", "max-idle", "5m", "node-price", "2")}, func(t *testing.T, l *lab) {
		l.start()
		began := time.Now()
		node := l.fleet(1)[0]
		for range 2 {
			l.cluster.job("repo", time.Minute, node.Name)
			time.Sleep(2 * time.Minute)
		}
		has := func(kind explain.Kind, action string) func() bool {
			return func() bool {
				for _, e := range l.ctl.Events() {
					if e.Kind == kind && e.Action == action && e.Group == string(runners) && e.Text != "" && e.Count == 1 {
						return true
					}
				}
				return false
			}
		}
		l.within(time.Second, "a launch", has(explain.KindScale, "launch"))
		l.within(10*time.Minute, "a release", has(explain.KindDecision, "release"))
		events := l.ctl.Events()
		for i, e := range events[1:] {
			if e.Seq >= events[i].Seq || e.At.After(events[i].At) {
				t.Fatalf("event %d is followed by the newer %d", events[i].Seq, e.Seq)
			}
		}

		r := l.ctl.Savings(time.Now())
		if len(r.Groups) != 1 {
			t.Fatalf("%+v", r)
		}
		g := r.Groups[0]
		if g.Jobs != 2 || g.WarmHits != 1 || g.SavedMinutes != 3 || g.Baseline == nil || g.DryRun != nil {
			t.Errorf("savings %+v", g)
		}
		spent, most := l.metric(l.metrics.Spent.WithLabelValues(string(runners), "running")), 2*time.Since(began).Hours()
		if spent > most || spent < 0.9*most {
			t.Errorf("$%.3f were spent, want nearly $%.3f", spent, most)
		}
		if saved := l.metric(l.metrics.Saved.WithLabelValues(string(runners))); saved < 60 {
			t.Errorf("%g s were saved", saved)
		}
	})
}

// TestTimelineIsBounded: the oldest events give way, and so does too long a text.
func TestTimelineIsBounded(t *testing.T) {
	var c Controller
	for range 3 * mostEvents {
		c.timeline.add(explain.Event{Text: strings.Repeat("ü", mostText)})
	}
	events := c.Events()
	if len(events) != mostEvents || events[0].Seq != 3*mostEvents || events[mostEvents-1].Seq != 2*mostEvents+1 {
		t.Errorf("%d events from %d to %d", len(events), events[0].Seq, events[len(events)-1].Seq)
	}
	if text := events[0].Text; len(text) > mostText || strings.Trim(text, "ü") != "" {
		t.Errorf("%d bytes of text: %q", len(text), text)
	}
}

// TestQueue: runner pods without a node wait, and are listed as such.
func TestQueue(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.cluster.job("repo", time.Hour, "")
		l.within(10*time.Second, "a job in the queue", func() bool {
			q := l.ctl.Report().Queue
			return q.Waiting == 1 && len(q.Jobs) == 1 && q.Jobs[0].Key == "repo" && !q.Jobs[0].Since.IsZero()
		})
	})
}
