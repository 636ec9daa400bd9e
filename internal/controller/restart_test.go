package controller

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

func contains(s, part string) bool { return strings.Contains(s, part) }

// autoscaler is the least of cluster-autoscaler that closes the loop: it wants
// a number of nodes, orders those that are neither there nor upcoming, and
// deletes idle ones that it may, one at a time.
type autoscaler struct {
	*lab
	group model.GroupID
	// wire, when set, is what it calls Hearth through.
	wire *wire
}

// provider is what it asks Hearth, within the present loop.
type provider interface {
	begin() error
	target() int
	owns(model.InstanceID) bool
	increase(n int) error
	remove(model.Node) error
}

// direct calls the present controller's methods.
type direct struct {
	*autoscaler
	view *nodegroups.View
}

func (d *direct) begin() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if d.ctl == nil {
		return errors.New("Hearth is not there")
	}
	if err := d.ctl.Refresh(ctx); err != nil {
		return err
	}
	if d.view = d.lab.view(d.group); d.view == nil {
		return errors.New("Hearth has no view")
	}
	return nil
}

func (d *direct) target() int                   { return d.view.Target }
func (d *direct) owns(id model.InstanceID) bool { return d.view.Owns(id) }
func (d *direct) increase(n int) error          { return d.lab.increase(d.group, n) }
func (d *direct) remove(n model.Node) error     { return d.lab.remove(d.group, n) }

// loop is one scan. Errors end it, as they do there.
func (a *autoscaler) loop(want int) {
	var hearth provider = &direct{autoscaler: a}
	if a.wire != nil {
		hearth = a.wire
	}
	if hearth.begin() != nil {
		return
	}
	usable, listed := 0, 0
	var idle []model.Node
	for _, n := range a.ready() {
		if n.Draining || !n.CATaintSince.IsZero() {
			continue
		}
		usable++
		if !hearth.owns(n.ID) {
			continue
		}
		listed++
		if !n.Marks.Protected && a.cluster.jobs(n.Name) == 0 {
			idle = append(idle, n)
		}
	}
	upcoming := max(hearth.target()-listed, 0)
	if missing := want - usable - upcoming; missing > 0 {
		_ = hearth.increase(missing)
		return
	}
	for _, n := range idle[:min(len(idle), max(usable-want, 0))] {
		a.cluster.edit(n.Name, func(n *model.Node) { n.CATaintSince = time.Now() })
		if hearth.remove(n) != nil {
			if _, ok := a.cluster.node(n.Name); ok {
				a.cluster.edit(n.Name, func(n *model.Node) { n.CATaintSince = time.Time{} })
			}
		}
	}
}

// ordeal is what a provider has to live through.
type ordeal struct {
	kills                 []kill
	park                  bool
	forgetful             bool // snapshots leave instances out
	cloud, cluster, store trouble
}

// kill says after which time a life ends, and how long it takes until the next
// begins.
type kill struct{ lived, down time.Duration }

// trouble lets one call in so many go wrong; zero: none.
type trouble struct {
	oneIn int
	kind  fault
	seed  uint64
}

func (r trouble) inflict(f *faults) {
	if r.oneIn == 0 {
		return
	}
	dice := rand.New(rand.NewPCG(r.seed, 0))
	f.set(func(string) fault {
		if dice.IntN(r.oneIn) == 0 {
			return r.kind
		}
		return healthy
	})
}

// scaleUpAndDown brings a group from nothing to three nodes and back, under a
// provider that is killed again and again, and returns what is wrong in the
// end. The autoscaler goes on all the time.
func scaleUpAndDown(l *lab, o ordeal) error {
	const up = 2 * time.Minute
	began := time.Now()
	if o.forgetful {
		l.cloud.forgetful = 5
	}
	o.cloud.inflict(&l.cloud.faults)
	o.cluster.inflict(&l.cluster.faults)
	o.store.inflict(&l.store.faults)
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
			if time.Since(began) > up && l.cloud.launches() >= want {
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
	for _, k := range o.kills {
		time.Sleep(k.lived)
		l.stop() // in the middle of whatever the autoscaler asks
		begun := make(chan struct{})
		lives <- func() {
			_ = l.kill()
			time.Sleep(k.down)
			l.begin()
			close(begun)
		}
		<-begun
	}
	var problem error
	for end := time.Now().Add(40 * time.Minute); time.Now().Before(end); time.Sleep(time.Second) {
		if problem = atRest(l, o.park); problem == nil && time.Since(began) > up+time.Minute && l.cloud.launches() > 0 {
			break
		}
	}
	cancel()
	<-ended
	for id, engine := range l.cluster.killed() {
		// Where the API server answers too seldom, an engine may be given up;
		// but then its machine is not parked.
		if problem == nil && (o.cluster.oneIn == 0 || strings.Contains(l.cloud.lives[id], "stopped")) {
			problem = fmt.Errorf("%s was killed with its machine %s, %s", engine, id, l.cloud.lives[id])
		}
	}
	if problem == nil && l.cloud.launches() != 3 {
		problem = fmt.Errorf("%d machines launched, want 3: %v", l.cloud.launches(), l.cloud.lives)
	}
	return problem
}

// atRest says what is left of a group that was to be scaled to nothing.
func atRest(l *lab, park bool) error {
	r, machines, records := l.store.record(runners), l.cloud.machines(runners), l.store.nodeRecords()
	for id, m := range machines {
		if !park || m.State != model.InstanceStopped || r.Intents[id].Desired != model.DesiredParked {
			return fmt.Errorf("leaked machine %s: %s, recorded as %+v", id, m.State, r.Intents[id])
		}
	}
	switch {
	case l.cluster.guarded() > 0:
		return fmt.Errorf("%d engine pods still have our finalizer", l.cluster.guarded())
	case len(l.cluster.all()) > 0:
		return fmt.Errorf("leaked Nodes %v", l.cluster.all())
	case l.cloud.desired(runners) != 0:
		return fmt.Errorf("the cloud still desires %d", l.cloud.desired(runners))
	case r.Target != 0 || r.Hidden != 0 || len(r.Intents) != len(machines):
		return fmt.Errorf("the record is %+v", r)
	case len(records) != len(machines):
		return fmt.Errorf("%d RunnerNodes for %d machines", len(records), len(machines))
	}
	return nil
}

func survives(t *testing.T, o ordeal) (err error) {
	synctest.Test(t, func(t *testing.T) {
		g := group(runners, "max-idle", "1m")
		if o.park {
			g = group(runners, "max-idle", "1m", "park", "stop")
		}
		l := newLab(t, []model.NodeGroup{g})
		defer l.close()
		l.cluster.daemons = &engineDaemons{stops: 2 * time.Second}
		if err = scaleUpAndDown(l, o); err != nil {
			err = fmt.Errorf("%w\n%s\nlog:\n%s", err, l.state(), l.log.tail(60))
		}
	})
	return err
}

// A life that ends at any moment of a scale-up or a scale-down costs nothing:
// no machine is leaked, none launched twice, every drain ends.
func TestKilledAtEveryStep(t *testing.T) {
	step := 550 * time.Millisecond
	if testing.Short() {
		step *= 4
	}
	for _, window := range []struct{ from, to time.Duration }{
		{9 * time.Second, 14 * time.Second},    // the order is recorded and carried out
		{30 * time.Second, 40 * time.Second},   // nodes register and become Ready
		{119 * time.Second, 145 * time.Second}, // they are released and drained
		{175 * time.Second, 200 * time.Second}, // the next round
	} {
		for at := window.from; at < window.to; at += step {
			if err := survives(t, ordeal{kills: []kill{{at, time.Second}}}); err != nil {
				t.Fatalf("killed after %s: %v", at, err)
			}
		}
	}
}

func TestSurvivesAnything(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var o ordeal
		for range rapid.IntRange(0, 6).Draw(rt, "kills") {
			o.kills = append(o.kills, kill{
				lived: time.Duration(rapid.IntRange(0, 60_000).Draw(rt, "lived ms")) * time.Millisecond,
				down:  time.Duration(rapid.SampledFrom([]int{0, 100, 2_000, 30_000}).Draw(rt, "down ms")) * time.Millisecond,
			})
		}
		o.park = rapid.Bool().Draw(rt, "park")
		o.forgetful = rapid.Bool().Draw(rt, "forgetful")
		draw := func(name string) trouble {
			return trouble{
				oneIn: rapid.SampledFrom([]int{0, 2, 3, 7}).Draw(rt, name+" fails one call in"),
				kind:  rapid.SampledFrom([]fault{failBefore, failAfter, hangBefore, hangAfter}).Draw(rt, name+" fails"),
				seed:  rapid.Uint64().Draw(rt, name+" seed"),
			}
		}
		o.cloud, o.cluster, o.store = draw("cloud"), draw("cluster"), draw("store")
		if err := survives(t, o); err != nil {
			rt.Fatal(err)
		}
	})
}
