package controller

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// writes are the requests that must be recorded before they are answered. Each
// is made to a group with one Ready node that is released and one on its way.
var writes = map[string]func(l *lab, released model.Node) error{
	"IncreaseSize": func(l *lab, _ model.Node) error { return l.increase(runners, 2) },
	"DeleteNodes":  func(l *lab, n model.Node) error { return l.remove(runners, n) },
	"DecreaseTargetSize": func(l *lab, _ model.Node) error {
		return l.ctl.DecreaseTargetSize(context.Background(), runners, -1)
	},
	"Prescale": func(l *lab, _ model.Node) error {
		return l.ctl.Prescale(context.Background(), runners, 3, "test")
	},
}

// halfUp brings the group to the state that writes are made in.
func (l *lab) halfUp() model.Node {
	l.t.Helper()
	l.cloud.edit(runners, func(g *fakeGroup) { g.capacity = 1 })
	l.start()
	node := l.fleet(1)[0]
	l.must(l.increase(runners, 1))
	l.released(3*time.Minute, node.Name)
	l.refresh()
	return node
}

func TestRecordedBeforeAnswered(t *testing.T) {
	for _, kind := range []fault{failBefore, failAfter, hangBefore, hangAfter} {
		for name, write := range writes {
			t.Run(fmt.Sprintf("%s %d", name, kind), func(t *testing.T) {
				experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
					node := l.halfUp()
					before, resizes := l.answer(), l.cloud.count("resize")
					l.store.always(kind)
					began := time.Now()
					l.wantKind(write(l, node), nodegroups.KindUnavailable)
					if took := time.Since(began); took > 3*time.Second {
						t.Errorf("the answer took %s", took)
					}
					l.always(20*time.Second, "nothing changes or is done", func() bool {
						n, ok := l.cluster.node(node.Name)
						return cmp.Equal(before, l.answer()) && ok && !n.Draining && l.cloud.count("resize") == resizes &&
							l.cloud.desired(runners) == 2
					})
					// What the store has, once it works again, is what is in force.
					l.store.heal()
					l.within(20*time.Second, "a record of what is in force", func() bool {
						r := l.store.record(runners)
						return r.Target == 2 && r.Hidden == 0 && len(r.Intents) == 0
					})
					// Asked again it works, and works once.
					l.must(write(l, node))
					l.cloud.edit(runners, func(g *fakeGroup) { g.capacity = -1 })
					want := map[string]int{"IncreaseSize": 4, "DeleteNodes": 1, "DecreaseTargetSize": 1, "Prescale": 5}[name]
					l.within(2*time.Minute, "the outcome", func() bool {
						return len(l.ready()) == want && l.cloud.desired(runners) == want && len(l.cloud.machines(runners)) == want
					})
				})
			})
		}
	}
}

// What is recorded is done, whether or not the life that recorded it had the
// time to begin, and without being asked again.
func TestRecordIsCarriedOutByTheNextLife(t *testing.T) {
	for lived := time.Duration(0); lived < 3*time.Second; lived += 150 * time.Millisecond {
		t.Run(lived.String(), func(t *testing.T) {
			experiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(t *testing.T, l *lab) {
				l.start()
				l.refresh()
				l.must(l.increase(runners, 2))
				time.Sleep(lived)
				l.restart()
				l.within(time.Minute, "two nodes", func() bool { return len(l.ready()) == 2 })
				l.within(5*time.Minute, "release", func() bool { return len(l.unprotected()) == 1 })
				n, _ := l.cluster.node(l.unprotected()[0])
				l.within(time.Minute, "accepted removal", func() bool { l.refresh(); time.Sleep(10 * time.Second); return l.remove(runners, n) == nil })
				time.Sleep(lived)
				l.restart()
				l.within(time.Minute, "end of the node", func() bool { return len(l.cluster.all()) == 1 && len(l.cloud.machines(runners)) == 1 })
				if want := []string{"taint " + string(n.Name), "delete " + string(n.Name)}; !cmp.Equal(want, l.cluster.happened()) {
					t.Errorf("what happened to nodes: %q, want %q", l.cluster.happened(), want)
				}
				if got := l.cloud.launches(); got != 2 {
					t.Errorf("%d launches", got)
				}
			})
		})
	}
}

// A life that ends after its record may have been written, and before it
// answered: asking again is answered from what was recorded.
func TestKilledAfterAmbiguousRecord(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		l.store.only(hangAfter, "save-group")
		l.wantKind(l.increase(runners, 2), nodegroups.KindUnavailable)
		l.restart(l.store.heal)
		l.refresh()
		if v := l.view(runners); v.Target != 0 {
			t.Errorf("target %d, want 0: cluster-autoscaler was told that it failed", v.Target)
		}
		l.must(l.increase(runners, 2))
		l.within(time.Minute, "two nodes", func() bool { return len(l.ready()) == 2 })
		l.always(time.Minute, "two launches", func() bool { return l.cloud.launches() == 2 })
	})
}

// The record is in force and cluster-autoscaler has given up waiting for the
// answer: it believes that it failed, so the nodes are hidden until it asks
// again.
func TestAnswerLost(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		l.store.only(deaf, "save-group")
		l.wantKind(l.increase(runners, 2), nodegroups.KindUnavailable)
		l.store.heal()
		l.within(10*time.Second, "launch of what is recorded", func() bool { return l.cloud.launches() == 3 })
		l.refresh()
		if v := l.view(runners); v.Target != 1 {
			t.Errorf("target %d, want 1", v.Target)
		}
		l.must(l.increase(runners, 2))
		l.within(time.Minute, "three nodes", func() bool { return len(l.ready()) == 3 })
		l.refresh()
		if v := l.view(runners); v.Target != 3 || l.cloud.launches() != 3 {
			t.Errorf("target %d and %d launches, want 3 and 3", v.Target, l.cloud.launches())
		}
	})
}

// A caller that has gone away before its turn changes nothing.
func TestCallerGone(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		l.wantKind(l.ctl.IncreaseSize(ctx, runners, 2), nodegroups.KindUnavailable)
		l.always(30*time.Second, "nothing is launched", func() bool { return l.cloud.launches() == 0 && l.view(runners).Target == 0 })
	})
}

// The API server is away: it refuses, or says nothing. Reads and Refresh go
// on, writes are refused in time, and afterwards everything goes on.
func TestLostAPIServer(t *testing.T) {
	for name, kind := range map[string]fault{"refuses": failBefore, "hangs": hangBefore} {
		t.Run(name, func(t *testing.T) {
			groups := []model.NodeGroup{group(runners, "max-idle", "1m", "min-warm", "1"), group("other", "min-warm", "3"), group("third", "max-idle", "1m")}
			experiment(t, groups, func(t *testing.T, l *lab) {
				l.start()
				l.fleets(map[model.GroupID]int{runners: 3, "third": 3})
				l.within(5*time.Minute, "release", func() bool { return len(l.unprotected()) >= 2 })
				// Drains and launches are under way.
				for _, name := range l.unprotected() {
					n, _ := l.cluster.node(name)
					l.must(l.remove(model.GroupID(n.Labels[model.Prefix+"/node-group"]), n))
				}
				l.store.always(kind)
				l.cluster.always(kind)
				l.cluster.setCut(true)
				more := group("other", "min-warm", "5")
				more.Min = 5
				l.ctl.SetGroups([]model.NodeGroup{groups[0], more, groups[2]})
				writes := l.store.count("save-group")
				for began := time.Now(); time.Since(began) < 30*time.Second; time.Sleep(370 * time.Millisecond) {
					asked := time.Now()
					l.refresh()
					if took := time.Since(asked); took > 2*time.Second {
						t.Errorf("a Refresh took %s", took)
					}
					if v := l.view(runners); v == nil || v.Group.ID != runners {
						t.Fatalf("view %+v", v)
					}
				}
				if tried := l.store.count("save-group") - writes; tried > 90 {
					t.Errorf("%d attempts to write records in 30 s", tried)
				}
				asked := time.Now()
				l.wantKind(l.increase(runners, 1), nodegroups.KindUnavailable)
				if took := time.Since(asked); took > 3*time.Second {
					t.Errorf("the refusal took %s", took)
				}
				l.refresh()
				l.store.heal()
				l.cluster.heal()
				l.cluster.setCut(false)
				l.within(2*time.Minute, "end of the drains", func() bool {
					for _, n := range l.cluster.all() {
						if n.Draining {
							return false
						}
					}
					return true
				})
				l.must(l.increase(runners, 2))
				l.within(2*time.Minute, "more nodes", func() bool { return l.cloud.desired(runners) >= 3 })
			})
		})
	}
}

// A store that answers slowly holds up each request, not all that follow.
func TestSlowStore(t *testing.T) {
	var groups []model.NodeGroup
	for i := range 12 {
		groups = append(groups, group(model.GroupID(fmt.Sprintf("g%02d", i)), "max-idle", "1m"))
	}
	experiment(t, groups, func(t *testing.T, l *lab) {
		l.start()
		sizes := map[model.GroupID]int{}
		for _, g := range groups {
			sizes[g.ID] = 1
		}
		l.fleets(sizes)
		l.within(5*time.Minute, "release", func() bool { return len(l.unprotected()) == len(groups) })
		for _, n := range l.ready() {
			l.must(l.remove(model.GroupID(n.Labels[model.Prefix+"/node-group"]), n))
		}
		l.store.setLatency(1200 * time.Millisecond)
		for i := range groups { // each launches a node, at once
			groups[i] = group(groups[i].ID, "max-idle", "1m", "min-warm", "1")
		}
		l.ctl.SetGroups(groups)
		for began := time.Now(); time.Since(began) < 30*time.Second; time.Sleep(90 * time.Millisecond) {
			l.refresh()
		}
		l.within(3*time.Minute, "end of all drains, and the new nodes", func() bool {
			nodes := l.ready()
			return len(nodes) == len(groups) && nodes[0].Name == "n-013"
		})
	})
}

func TestSuperseded(t *testing.T) {
	for name, provoke := range map[string]func(l *lab){
		"by a request": func(l *lab) { _ = l.increase(runners, 1) },
		"by a later write": func(l *lab) {
			l.cloud.edit(runners, func(g *fakeGroup) { g.desired++ }) // is adopted
		},
	} {
		t.Run(name, func(t *testing.T) {
			experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
				l.start()
				l.fleet(1)
				l.settle()
				l.store.edit(func(s *fakeStore) {
					r := s.records[runners]
					r.Sequence += 1000
					s.records[runners] = r
				})
				provoke(l)
				var err error
				l.within(time.Minute, "end of Run", func() bool {
					select {
					case err = <-l.done:
						return true
					default:
						return false
					}
				})
				l.done <- nil // for kill
				if !errors.Is(err, model.ErrSuperseded) {
					t.Errorf("Run ended with %v, want ErrSuperseded", err)
				}
				if l.ctl.View() != nil {
					t.Error("a view although another process leads")
				}
				l.wantKind(l.increase(runners, 1), nodegroups.KindUnavailable)
				launches := l.cloud.launches()
				l.always(time.Minute, "nothing is done any more", func() bool { return l.cloud.launches() == launches })
			})
		})
	}
}

// Two processes that lead at once: the one that finds the other's record stops.
func TestTwoLeaders(t *testing.T) {
	experiment(t, []model.NodeGroup{group(runners)}, func(t *testing.T, l *lab) {
		l.start()
		l.fleet(1)
		first, stop, done := l.ctl, l.stop, l.done
		defer stop()
		l.start() // a second one
		l.must(l.increase(runners, 1))
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		l.wantKind(first.IncreaseSize(ctx, runners, 1), nodegroups.KindUnavailable)
		if err := <-done; !errors.Is(err, model.ErrSuperseded) {
			t.Errorf("the first leader ended with %v", err)
		}
		l.within(time.Minute, "two nodes", func() bool { return len(l.ready()) == 2 })
		l.always(time.Minute, "two launches", func() bool { return l.cloud.launches() == 2 })
	})
}
