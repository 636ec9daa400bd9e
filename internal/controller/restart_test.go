package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

func contains(s, part string) bool { return strings.Contains(s, part) }

// autoscaler is the least of cluster-autoscaler that closes the loop: it wants
// a number of nodes, orders those that are neither there nor upcoming, and
// deletes idle ones that it may, one at a time.
type autoscaler struct {
	*lab
	group model.GroupID
}

// loop is one scan. Errors end it, as they do there.
func (a *autoscaler) loop(want int) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if a.ctl == nil || a.ctl.Refresh(ctx) != nil {
		return
	}
	v := a.view(a.group)
	if v == nil {
		return
	}
	usable, listed := 0, 0
	var idle []model.Node
	for _, n := range a.ready() {
		if n.Draining || !n.CATaintSince.IsZero() {
			continue
		}
		usable++
		if !v.Owns(n.ID) {
			continue
		}
		listed++
		if !n.Marks.Protected && a.cluster.jobs(n.Name) == 0 {
			idle = append(idle, n)
		}
	}
	upcoming := max(v.Target-listed, 0)
	if missing := want - usable - upcoming; missing > 0 {
		_ = a.increase(a.group, missing)
		return
	}
	for _, n := range idle[:min(len(idle), max(usable-want, 0))] {
		a.cluster.edit(n.Name, func(n *model.Node) { n.CATaintSince = time.Now() })
		if a.remove(a.group, n) != nil {
			if _, ok := a.cluster.node(n.Name); ok {
				a.cluster.edit(n.Name, func(n *model.Node) { n.CATaintSince = time.Time{} })
			}
		}
	}
}

// kill says when a life ends and how long it takes until the next begins.
type kill struct{ at, down time.Duration }

// scaleUpAndDown brings a group from nothing to three nodes and back, under a
// provider that is killed again and again, and returns what is wrong in the
// end. The autoscaler goes on all the time.
func scaleUpAndDown(l *lab, kills []kill) error {
	const up = 2 * time.Minute
	began := time.Now()
	ca := &autoscaler{lab: l, group: runners}
	l.begin()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	lives := make(chan func()) // run by the autoscaler's goroutine, which alone uses the lab's present life
	go func() {
		defer close(ended)
		scan := time.NewTicker(10 * time.Second)
		defer scan.Stop()
		for {
			want := 3
			if time.Since(began) > up {
				want = 0
			}
			select {
			case f := <-lives:
				f()
			case <-scan.C:
				ca.loop(want)
			case <-ctx.Done():
				return
			}
		}
	}()
	for _, k := range kills {
		time.Sleep(k.at)
		// The life ends in the middle of whatever the autoscaler asks.
		l.stop()
		lives <- func() {
			_ = l.kill()
			time.Sleep(k.down)
			l.begin()
		}
	}
	var problem error
	done := func() error {
		switch r := l.store.record(runners); {
		case time.Since(began) < up+time.Minute:
			return errors.New("not over yet")
		case len(l.cloud.machines(runners)) > 0:
			return fmt.Errorf("leaked machines %v", l.cloud.machines(runners))
		case len(l.cluster.all()) > 0:
			return fmt.Errorf("leaked Nodes %v", l.cluster.all())
		case l.cloud.desired(runners) != 0:
			return fmt.Errorf("the cloud still desires %d", l.cloud.desired(runners))
		case r.Target != 0 || r.Hidden != 0 || len(r.Intents) > 0:
			return fmt.Errorf("the record is %+v", r)
		case len(l.store.nodeRecords()) > 0:
			return fmt.Errorf("leaked RunnerNodes %v", l.store.nodeRecords())
		}
		return nil
	}
	for end := time.Now().Add(30 * time.Minute); time.Now().Before(end); time.Sleep(time.Second) {
		if problem = done(); problem == nil {
			break
		}
	}
	cancel()
	<-ended
	if problem == nil && l.cloud.launches() != 3 {
		problem = fmt.Errorf("%d machines launched, want 3: %v", l.cloud.launches(), l.cloud.lives)
	}
	return problem
}

func survives(t *testing.T, kills []kill) (err error) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, []model.NodeGroup{group(runners, "max-idle", "1m")})
		defer l.close()
		if err = scaleUpAndDown(l, kills); err != nil {
			err = fmt.Errorf("%w\n%s\nlog:\n%s", err, l.state(), l.log.tail(60))
		}
	})
	return err
}

// A life that ends at any moment of a scale-up or a scale-down costs nothing:
// no machine is leaked, none launched twice, every drain ends.
func TestKilledAtEveryStep(t *testing.T) {
	step := 250 * time.Millisecond
	if testing.Short() {
		step *= 8
	}
	for _, window := range []struct{ from, to time.Duration }{
		{9 * time.Second, 14 * time.Second},    // the order is recorded and carried out
		{30 * time.Second, 40 * time.Second},   // nodes register and become Ready
		{119 * time.Second, 145 * time.Second}, // they are released and drained
		{175 * time.Second, 200 * time.Second}, // the next round
	} {
		for at := window.from; at < window.to; at += step {
			if err := survives(t, []kill{{at, time.Second}}); err != nil {
				t.Fatalf("killed after %s: %v", at, err)
			}
		}
	}
}

func TestKilledAgainAndAgain(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var kills []kill
		for range rapid.IntRange(1, 6).Draw(rt, "kills") {
			kills = append(kills, kill{
				at:   time.Duration(rapid.IntRange(0, 60_000).Draw(rt, "lived ms")) * time.Millisecond,
				down: time.Duration(rapid.SampledFrom([]int{0, 100, 2_000, 30_000}).Draw(rt, "down ms")) * time.Millisecond,
			})
		}
		if err := survives(t, kills); err != nil {
			rt.Fatal(err)
		}
	})
}
