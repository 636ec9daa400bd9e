package controller

import (
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// usual are the costs of a group without annotations.
func usual() scoring.Costs {
	return scoring.Costs{Running: unknownPrice, Parked: parkedShare * unknownPrice, TimeValue: 30, Boot: usualBoot, Resume: usualResume}
}

// kept is what the memory that was last kept holds.
func (l *lab) kept() *scoring.Memory {
	l.t.Helper()
	m, _, err := scoring.Load(l.memories.of(runners), usual(), time.Now())
	l.must(err)
	return m
}

// arrivals are the jobs that were learnt of in less than a day.
func arrivals(m *scoring.Memory) (n float64) {
	for _, u := range m.Forecast.Uses() {
		n += u * 24
	}
	return math.Round(n)
}

// TestForecastSurvives: two weeks of an earlier life are enough to start nodes
// ahead; without them it takes a week.
func TestForecastSurvives(t *testing.T) {
	for _, remembers := range []bool{true, false} {
		t.Run(fmt.Sprint(remembers), func(t *testing.T) {
			experiment(t, []model.NodeGroup{group(runners, "park", "stop", "max-idle", "1m")}, func(t *testing.T, l *lab) {
				l.start()
				l.fleet(2)
				ca := &autoscaler{lab: l, group: runners}
				l.within(20*time.Minute, "two parked nodes", func() bool {
					ca.loop(0)
					time.Sleep(10 * time.Second)
					return l.cloud.stopped(runners) == 2
				})
				l.restart(func() {
					if remembers {
						data, err := twoWeeks(time.Now()).Save(time.Now())
						l.must(err)
						l.memories.put(runners, data)
					}
					l.groups = []model.NodeGroup{group(runners, "park", "stop")}
				})
				if remembers {
					l.within(5*time.Minute, "nodes started ahead", func() bool { return l.cloud.stopped(runners) == 0 })
				} else {
					l.always(time.Hour, "nothing is started ahead", func() bool { return l.cloud.stopped(runners) == 2 })
				}
			})
		})
	}
}

// twoWeeks are of two jobs at once, four times an hour.
func twoWeeks(until time.Time) *scoring.Memory {
	m := scoring.NewMemory(usual())
	for at := until.Add(-14 * 24 * time.Hour); !at.After(until); at = at.Add(15 * time.Minute) {
		m.Ledger.Nodes(0, 2, at)
		for i := range 2 {
			m.JobArrived(scoring.KeyOf(model.CacheKey(fmt.Sprint(i))), i+1, 1, at)
			m.Ledger.Job(false)
		}
		m.Ledger.Nodes(2, 0, at)
		m.Ledger.Nodes(0, 2, at.Add(5*time.Minute))
	}
	return m
}

// TestJobsAreLearntOnce: the next leader goes on where the one before has
// stopped; a job that it sees again counts once.
func TestJobsAreLearntOnce(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		if l.memories.of(runners) != nil {
			t.Error("something was kept before anything was learnt")
		}
		l.cluster.job("a", 4*time.Minute, "")
		time.Sleep(time.Minute)
		l.restart(func() { time.Sleep(10 * time.Second) })
		if got := arrivals(l.kept()); got != 1 {
			t.Errorf("%v jobs were learnt of, want 1", got)
		}
		if n := l.log.count("what was learnt is remembered"); n != 1 {
			t.Errorf("remembered %d times", n)
		}
		time.Sleep(time.Minute)
		l.restart()
		if n := l.memories.count("save-learnt"); n != 1 {
			t.Errorf("kept %d times although nothing was learnt since", n)
		}
		l.cluster.job("b", time.Minute, "")
		time.Sleep(4 * time.Minute)
		l.must(l.kill())
		if got := arrivals(l.kept()); got != 2 {
			t.Errorf("%v jobs were learnt of, want 2", got)
		}
	})
}

func TestMemoriesAreKeptNowAndThen(t *testing.T) {
	groups := []model.NodeGroup{group(runners), group("idle")}
	experiment(t, groups, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		jobs := func(span time.Duration) {
			for end := time.Now().Add(span); time.Now().Before(end); time.Sleep(time.Minute) {
				l.cluster.job("a", 30*time.Second, "")
			}
		}
		jobs(35 * time.Minute)
		if n := l.memories.count("save-learnt"); n != 3 {
			t.Errorf("kept %d times in 35 minutes, want 3", n)
		}
		if l.memories.of("idle") != nil {
			t.Error("a group that learnt nothing was kept")
		}
		// A store that refuses, or hangs, holds up nothing; it is said once.
		for _, kind := range []fault{failBefore, hangBefore} {
			l.memories.always(kind)
			jobs(25 * time.Minute)
			l.refresh()
		}
		if n := l.log.count("keeping what was learnt failed"); n != 1 {
			t.Errorf("failures were logged %d times, want once", n)
		}
		before := arrivals(l.kept())
		l.memories.heal()
		jobs(15 * time.Minute)
		if after := arrivals(l.kept()); after < before+50 {
			t.Errorf("%v jobs in the memory after the store came back, %v before", after, before)
		}
		// One that hangs at the end holds it up for a moment only.
		l.memories.always(hangAfter)
		l.cluster.job("a", 30*time.Second, "")
		time.Sleep(time.Minute)
		began := time.Now()
		l.must(l.kill())
		if took := time.Since(began); took > 2*lastWrites {
			t.Errorf("the end took %s", took)
		}
	})
}

func TestWhatCannotBeRememberedIsLearntAnew(t *testing.T) {
	for name, spoil := range map[string]func(l *lab){
		"corrupt":        func(l *lab) { l.memories.put(runners, []byte("no memory")) },
		"of the future":  func(l *lab) { l.memories.put(runners, l.saved(time.Now().Add(time.Hour))) },
		"refused":        func(l *lab) { l.memories.only(failBefore, "load-learnt") },
		"hangs":          func(l *lab) { l.memories.only(hangBefore, "load-learnt") },
		"only of others": func(l *lab) { l.memories.put("another", []byte("no memory")) },
	} {
		t.Run(name, func(t *testing.T) {
			experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
				spoil(l)
				l.start()
				l.fleet(1)
				if n := l.log.count("learnt anew"); (n == 1) == (name == "only of others") {
					t.Errorf("it was said %d times", n)
				}
				l.cluster.job("a", time.Minute, "")
				time.Sleep(time.Minute)
				l.must(l.kill())
				if got := arrivals(l.kept()); got != 1 {
					t.Errorf("%v jobs were learnt of, want 1", got)
				}
			})
		})
	}
}

func (l *lab) saved(at time.Time) []byte {
	data, err := twoWeeks(at).Save(at)
	l.must(err)
	return data
}

// TestOneFaultForgetsNothing: what was kept is read again at once.
func TestOneFaultForgetsNothing(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.memories.put(runners, l.saved(time.Now()))
		first := true
		l.memories.set(func(string) fault {
			defer func() { first = false }()
			if first {
				return failBefore
			}
			return healthy
		})
		l.start()
		l.within(10*time.Second, "memory", func() bool { return l.log.count("what was learnt is remembered") == 1 })
	})
}

// TestWhoIsSupersededKeepsNothing: the other's memory is the newer one.
func TestWhoIsSupersededKeepsNothing(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		l.cluster.job("a", time.Minute, "")
		time.Sleep(30 * time.Second)
		l.store.edit(func(s *fakeStore) {
			r := s.records[runners]
			r.Sequence += 100
			s.records[runners] = r
		})
		_ = l.increase(runners, 1)
		if err := <-l.done; !errors.Is(err, model.ErrSuperseded) {
			t.Fatalf("Run returned %v", err)
		}
		l.stop()
		l.ctl = nil
		if l.memories.of(runners) != nil {
			t.Error("it was kept all the same")
		}
	})
}
