package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
)

// Chaos: the controller, its fleet, demand and engines' stopping, whole days of
// them, in virtual time, against a cloud and a cluster that fail in every way that
// a seed thinks of. See docs/adr/0010.

const (
	// chaosSpan is how long jobs arrive and things go wrong; what is left must
	// then settle within chaosSettle.
	chaosSpan   = 6 * time.Hour
	chaosSettle = 90 * time.Minute
	chaosMax    = 6 // nodes
)

// mishap is one thing that goes wrong for a while.
type mishap struct {
	at, lasts time.Duration
	what      string
	oneIn     int // of calls
	kind      fault
}

func (m mishap) String() string {
	return fmt.Sprintf("%s at %s for %s (one in %d, kind %d)", m.what, m.at.Round(time.Second), m.lasts.Round(time.Second), m.oneIn, m.kind)
}

// mishaps are all that a seed can think of, but for "two lead for a moment". One
// more in this list makes other plans of all seeds.
func mishaps() []string {
	return []string{
		"cloud calls fail", "cluster calls fail", "record writes fail", "what was learnt cannot be written", "the watch is cut", "the watch lags",
		"snapshots are stale", "snapshots omit instances", "no capacity", "Hearth is killed", "Hearth is killed and away", "an instance is lost",
		"somebody raises the desired capacity", "CI events are lost", "CI events come twice", "the autoscaler restarts", "the autoscaler is away",
		"engines take long to stop", "engines fail to stop", "a node is deleted by hand", "a taint is taken off by hand",
	}
}

// plan is what goes wrong with a seed: the same for the same seed.
func plan(seed uint64) []mishap {
	dice := rand.New(rand.NewPCG(seed, 1))
	var all []mishap
	for range 5 + dice.IntN(25) {
		names := mishaps()
		all = append(all, mishap{
			at: time.Duration(dice.Int64N(int64(chaosSpan))), lasts: time.Duration(dice.ExpFloat64() * float64(5*time.Minute)),
			what: names[dice.IntN(len(names))], oneIn: 1 + dice.IntN(4), kind: []fault{failBefore, failAfter, hangBefore, hangAfter, deaf}[dice.IntN(5)],
		})
	}
	for dice = rand.New(rand.NewPCG(seed, 3)); dice.IntN(2) == 0; {
		all = append(all, mishap{at: time.Duration(dice.Int64N(int64(chaosSpan))), lasts: time.Duration(dice.Int64N(int64(5 * time.Second))), what: "two lead for a moment"})
	}
	slices.SortFunc(all, func(a, b mishap) int { return int(a.at - b.at) })
	return all
}

// chaos is one run. The goroutine of drive alone uses it, but for violate.
type chaos struct {
	*lab
	dice   *rand.Rand
	plan   []mishap
	active []mishap
	ca     *autoscaler
	jobs   map[string]demand.Job // by pod
	lost   map[model.InstanceID]bool
	bad    chan error // the first violation
	// planted is a violation that the run commits by itself, to show that it is
	// noticed.
	planted string
	last    time.Time      // of the autoscaler's loop
	away    bool           // the autoscaler
	others  []func() error // end lives that overlap with the present one
	calls   int
}

// violate notes that an invariant, by its name, does not hold.
func (c *chaos) violate(invariant, format string, args ...any) {
	select {
	case c.bad <- fmt.Errorf("%s: %s", invariant, fmt.Sprintf(format, args...)):
	default:
	}
}

// watched is the cloud, with eyes on what Hearth asks of it.
type watched struct {
	Backend
	c *chaos
}

func (w watched) Resize(ctx context.Context, group model.GroupID, desired int) error {
	if desired > max(chaosMax, w.c.cloud.desired(group)) {
		w.c.violate("within the maximum", "the cloud is asked for %d of %d", desired, chaosMax)
	}
	return w.Backend.Resize(ctx, group, desired)
}

func (w watched) Terminate(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	w.c.ends(group, ids, "terminate")
	return w.Backend.Terminate(ctx, group, ids)
}

func (w watched) Stop(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	w.c.ends(group, ids, "stop")
	return w.Backend.Stop(ctx, group, ids)
}

// ends looks at what runs on machines that are about to end.
func (c *chaos) ends(group model.GroupID, ids []model.InstanceID, verb string) {
	c.calls++
	record, machines := c.store.record(group), c.cloud.machines(group)
	for _, id := range ids {
		if !strings.HasPrefix(string(id), "fake:///"+string(group)+"/") {
			c.violate("no instance of another group", "%s of %s in group %s", verb, id, group)
			continue
		}
		m, there := machines[id]
		if !there || m.State != model.InstanceRunning {
			continue
		}
		c.cluster.locked(func() {
			node, registered := c.cluster.nodes[m.node]
			if !registered || node.ID != id || !node.Ready {
				return
			}
			if n := c.cluster.load(m.node); n > 0 && !c.lost[id] {
				c.violate("no busy node ended", "%s of %s with %d jobs", verb, id, n)
			}
			for _, e := range c.cluster.engines {
				if e.machine == id && !e.exited() && record.Intents[id].Exit == "" {
					c.violate("no engine ended before its exit", "%s of %s, whose engine %s runs", verb, id, e.UID)
				}
			}
		})
		if i, has := record.Intents[id]; !has || i.Desired == model.DesiredRunning {
			c.violate("every end is recorded", "%s of %s, of which is recorded: %+v", verb, id, i)
		}
	}
}

// begin one mishap, or end it.
func (c *chaos) inflict(m mishap, on bool) {
	sometimes := func(f *faults) {
		if !on {
			f.heal()
			return
		}
		dice := rand.New(rand.NewPCG(uint64(m.at), 2))
		f.set(func(string) fault {
			if dice.IntN(m.oneIn) == 0 {
				return m.kind
			}
			return healthy
		})
	}
	value := func(yes, no time.Duration) time.Duration {
		if on {
			return yes
		}
		return no
	}
	switch m.what {
	case "cloud calls fail":
		sometimes(&c.cloud.faults)
	case "cluster calls fail":
		sometimes(&c.cluster.faults)
	case "record writes fail":
		sometimes(&c.store.faults)
	case "what was learnt cannot be written":
		sometimes(&c.memories.faults)
	case "the watch is cut":
		c.cluster.setCut(on)
	case "the watch lags":
		c.cluster.locked(func() { c.cluster.lag = value(5*time.Second, 100*time.Millisecond) })
	case "snapshots are stale":
		c.cloud.tune(func(f *fakeCloud) { f.stale = value(8*time.Second, 0) })
	case "snapshots omit instances":
		c.cloud.tune(func(f *fakeCloud) { f.forgetful = map[bool]int{true: 5}[on] })
	case "no capacity":
		c.cloud.edit(runners, func(g *fakeGroup) { g.capacity = map[bool]int{true: 1, false: -1}[on] })
	case "engines take long to stop":
		c.cluster.locked(func() { c.cluster.daemons.stops = value(4*time.Minute, 2*time.Second) })
	case "engines fail to stop":
		c.cluster.locked(func() { c.cluster.daemons.exit = map[bool]int{true: 137}[on] })
	case "the autoscaler is away":
		c.away = on
	default:
		if on {
			c.strike(m)
		}
	}
}

// strike is what happens in a moment.
func (c *chaos) strike(m mishap) {
	nodes := c.cluster.all()
	switch m.what {
	case "Hearth is killed":
		c.rise(0)
	case "Hearth is killed and away":
		c.rise(min(m.lasts, 10*time.Minute))
	case "two lead for a moment":
		c.supersede(m.lasts)
	case "the autoscaler restarts":
		if c.ca.wire != nil {
			c.ca.wire.connect(c.t)
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = c.ctl.Forget(ctx)
	case "somebody raises the desired capacity":
		c.cloud.edit(runners, func(g *fakeGroup) { g.desired = min(g.desired+1, chaosMax) })
	case "an instance is lost":
		machines := c.cloud.machines(runners)
		ids := slices.Sorted(maps.Keys(machines))
		if len(ids) == 0 {
			return
		}
		id := ids[c.dice.IntN(len(ids))]
		c.lost[id] = true
		c.cloud.edit(runners, func(g *fakeGroup) {
			if x := g.machines[id]; x != nil && living(x.State) {
				x.State, x.due = model.InstanceTerminating, time.Now().Add(3*time.Second)
			}
		})
	case "a node is deleted by hand":
		if len(nodes) > 0 {
			n := nodes[c.dice.IntN(len(nodes))]
			c.removeWithPods(n)
		}
	case "a taint is taken off by hand":
		for _, n := range nodes {
			if n.Draining {
				c.cluster.edit(n.Name, func(n *model.Node) { n.Draining = false })
			}
		}
	}
}

// removeWithPods deletes a Node, and the garbage collector its pods.
func (c *chaos) removeWithPods(n model.Node) {
	c.lost[n.ID] = true
	c.cluster.removeNode(n.Name)
	c.orphans()
}

// orphans are pods whose Node is gone: they are deleted, and their jobs queued anew.
func (c *chaos) orphans() {
	var gone []string
	c.cluster.locked(func() {
		for uid, p := range c.cluster.pods {
			if _, there := c.cluster.nodes[p.Node]; p.Node != "" && !there && p.Finished.IsZero() {
				gone = append(gone, uid)
			}
		}
	})
	slices.Sort(gone)
	for _, uid := range gone {
		c.cluster.deletePod(uid)
	}
}

// rise ends the present life of Hearth and begins the next.
func (c *chaos) rise(down time.Duration) {
	if c.ca.wire != nil {
		c.ca.wire.lives.now.Store(nil)
	}
	_ = c.kill()
	time.Sleep(down)
	c.enter()
}

// supersede begins the next life while the present one has yet to notice: a
// process that was frozen for longer than its lease.
func (c *chaos) supersede(overlap time.Duration) {
	stop, done := c.stop, c.done
	c.enter()
	late := time.AfterFunc(overlap, stop)
	c.others = append(c.others, func() error { late.Stop(); stop(); return <-done })
}

// enter begins a life.
func (c *chaos) enter() {
	c.begin()
	if c.ca.wire != nil {
		c.ca.wire.lives.now.Store(c.ctl)
	}
}

// hear has the CI system tell of a job, as far as messages come.
func (c *chaos) hear(uid string, state demand.State) {
	j := c.jobs[uid]
	j.State, j.At = state, time.Now()
	times := 1
	for _, m := range c.active {
		switch m.what {
		case "CI events are lost":
			times = 0
		case "CI events come twice":
			times = 2
		}
	}
	for range times {
		c.world.JobObserved(j)
	}
}

// arrive has a job queued, and its pod come.
func (c *chaos) arrive() {
	key := model.CacheKey(fmt.Sprint("github/acme/", c.dice.IntN(4)))
	uid := c.cluster.job(key, time.Minute+time.Duration(c.dice.ExpFloat64()*float64(6*time.Minute)), "")
	c.jobs[uid] = demand.Job{
		ID: demand.JobID("github/acme/" + uid), System: demand.GitHub, Scope: "acme/shop", Labels: []string{"linux"}, Key: key, QueuedAt: time.Now(),
	}
	c.hear(uid, demand.Queued)
}

// tick is one second of the world.
func (c *chaos) tick(now, began time.Time) {
	since := now.Sub(began)
	for len(c.plan) > 0 && since >= c.plan[0].at {
		m := c.plan[0]
		c.plan = c.plan[1:]
		c.active = append(c.active, m)
		c.inflict(m, true)
	}
	for i := 0; i < len(c.active); i++ {
		if m := c.active[i]; since >= m.at+m.lasts {
			c.active = slices.Delete(c.active, i, i+1)
			i--
			c.inflict(m, false)
			for _, other := range c.active { // of the same kind, which goes on
				if other.what == m.what {
					c.inflict(other, true)
				}
			}
		}
	}
	select {
	case err := <-c.done: // it ends when it is superseded, and is started again
		c.ctl, c.done = nil, nil
		if err == nil {
			err = errors.New("without an error")
		}
		c.log.lines = append(c.log.lines, fmt.Appendf(nil, "chaos: Hearth ended by itself: %v\n", err))
		c.enter()
	default:
	}
	c.orphans()
	// Quiet and busy times, as in an office.
	if since < chaosSpan {
		if rate := []float64{1, 12, 30, 6}[int(since/(20*time.Minute))%4]; c.dice.Float64() < rate/3600 {
			for range 1 + c.dice.IntN(3) {
				c.arrive()
			}
		}
	}
	if now.Sub(c.last) >= 10*time.Second && !c.away {
		c.last = now
		c.ca.loop(c.demand())
	}
	c.check()
}

// demand is how many nodes the pods need, as cluster-autoscaler would count.
func (c *chaos) demand() (n int) {
	c.cluster.locked(func() {
		for uid, p := range c.cluster.pods {
			j, ours := c.jobs[uid]
			switch {
			case !p.Finished.IsZero():
				if ours {
					delete(c.jobs, uid)
					j.State, j.At = demand.Ended, time.Now()
					c.world.JobObserved(j)
				}
			default:
				n++
			}
		}
	})
	return min(n, chaosMax)
}

// check holds what must hold at any time.
func (c *chaos) check() {
	if v := c.view(runners); v != nil && (v.Target < 0 || v.Target > chaosMax) {
		c.violate("within the maximum", "cluster-autoscaler is told of %d nodes of %d", v.Target, chaosMax)
	}
	living := 0
	for _, m := range c.cloud.machines(runners) {
		if m.State == model.InstancePending || m.State == model.InstanceRunning {
			living++
		}
	}
	if living > chaosMax {
		c.violate("within the maximum", "%d instances live, of %d", living, chaosMax)
	}
	if n := len(c.store.record(runners).Intents); n > 4*chaosMax+20 {
		c.violate("bounded", "%d intents are recorded", n)
	}
}

// commit does what is planted.
func (c *chaos) commit() {
	cloud := watched{c.cloud, c}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var node model.Node
	busy := c.planted != "no engine ended before its exit"
	for _, n := range c.ready() {
		if c.cluster.jobs(n.Name) > 0 == busy && len(c.cluster.enginesOn(n.Name)) > 0 {
			node = n
		}
	}
	if node.Name == "" {
		return // later
	}
	switch c.planted {
	case "no busy node ended", "no engine ended before its exit":
		_ = cloud.Terminate(ctx, runners, []model.InstanceID{node.ID})
	case "no instance of another group":
		c.cloud.add("others")
		_ = cloud.Terminate(ctx, "others", []model.InstanceID{node.ID})
	case "every end is recorded":
		c.cluster.removeNode(node.Name)
		_ = cloud.Terminate(ctx, runners, []model.InstanceID{node.ID})
	case "within the maximum":
		_ = cloud.Resize(ctx, runners, chaosMax+1)
	case "everything settles":
		c.cloud.edit(runners, func(g *fakeGroup) {
			g.machines["fake:///runners/stray"] = &machine{Instance: model.Instance{ID: "fake:///runners/stray", State: model.InstanceRunning}, deadBoot: true}
		})
	}
	c.planted = ""
}

// drive runs the whole and returns the first violation.
func (c *chaos) drive() error {
	began := time.Now()
	c.enter()
	for now := began; now.Sub(began) < chaosSpan+time.Minute; now = time.Now() {
		if c.planted != "" && now.Sub(began) > 10*time.Minute {
			c.commit()
		}
		c.tick(now, began)
		if len(c.bad) > 0 {
			return <-c.bad
		}
		time.Sleep(time.Second)
	}
	// Nothing goes wrong any more.
	for _, m := range c.active {
		c.inflict(m, false)
	}
	c.active, c.plan, c.away = nil, nil, false
	var left error
	for end := time.Now().Add(chaosSettle); time.Now().Before(end); time.Sleep(time.Second) {
		c.tick(time.Now(), began)
		if len(c.bad) > 0 {
			return <-c.bad
		}
		if left = atRest(c.lab, true); left == nil && c.demand() == 0 {
			return nil
		}
	}
	return fmt.Errorf("everything settles: %w", left)
}

// wreak runs one seed, with a plan that may be a part of its own.
func wreak(t *testing.T, seed uint64, plan []mishap, planted string) (err error) {
	synctest.Test(t, func(t *testing.T) {
		g := group(runners, "runner-labels", "linux", "park", "stop", "max-idle", "5m", "max-parked-age", "2h")
		g.Max = chaosMax
		l := newLab(t, []model.NodeGroup{g})
		defer l.close()
		l.cluster.daemons = &engineDaemons{stops: 2 * time.Second}
		c := &chaos{
			lab: l, dice: rand.New(rand.NewPCG(seed, 0)), plan: plan, ca: &autoscaler{lab: l, group: runners}, planted: planted,
			jobs: map[string]demand.Job{}, lost: map[model.InstanceID]bool{}, bad: make(chan error, 1),
		}
		if seed%5 == 0 {
			c.ca.wire = newWire(t, runners)
		}
		l.change = func(cfg *Config) { cfg.Backend = watched{cfg.Backend, c} }
		err = c.drive()
		for _, end := range c.others {
			_ = end() // that it was superseded, perhaps
		}
		if err != nil {
			err = fmt.Errorf("%w\n%s\nlog:\n%s", err, l.state(), l.log.tail(60))
		}
	})
	return err
}

// shrink leaves out what the failure does not need. Goroutines are not scheduled
// the same each time, so that a part counts as harmless only if three runs are.
func shrink(t *testing.T, seed uint64, all []mishap) []mishap {
	for i := 0; i < len(all); {
		without := slices.Delete(slices.Clone(all), i, i+1)
		fails := false
		for range 3 {
			fails = fails || wreak(t, seed, without, "") != nil
		}
		if fails {
			all = without
		} else {
			i++
		}
	}
	return all
}

// regressions are the seeds that once failed (docs/adr/0010), and some that did not.
var regressions = []uint64{1, 2, 3, 4, 7, 8, 11, 55, 66, 76}

// seeds are those from HEARTH_CHAOS_START on, HEARTH_CHAOS_SEEDS of them, as `make
// chaos` says, else the regressions.
func seeds() []uint64 {
	if n, err := strconv.ParseUint(os.Getenv("HEARTH_CHAOS_SEEDS"), 10, 64); err == nil {
		start, _ := strconv.ParseUint(os.Getenv("HEARTH_CHAOS_START"), 10, 64)
		all := make([]uint64, n)
		for i := range all {
			all[i] = max(start, 1) + uint64(i)
		}
		return all
	}
	if testing.Short() {
		return regressions[:2]
	}
	return regressions
}

// TestChaos runs whole days. With HEARTH_CHAOS_SHRINK it says which mishaps a
// failure needs.
func TestChaos(t *testing.T) {
	for _, seed := range seeds() {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			t.Parallel()
			all := plan(seed)
			err := wreak(t, seed, all, "")
			if err == nil {
				return
			}
			if os.Getenv("HEARTH_CHAOS_SHRINK") != "" {
				all = shrink(t, seed, all)
			}
			text := fmt.Sprintf("seed %d: %v\nof", seed, err)
			for _, m := range all {
				text += "\n  " + m.String()
			}
			t.Error(text)
		})
	}
}

// TestChaosNotices: each invariant is seen to be broken when it is.
func TestChaosNotices(t *testing.T) {
	for _, planted := range []string{
		"no busy node ended", "no engine ended before its exit", "every end is recorded", "no instance of another group", "within the maximum",
		"everything settles",
	} {
		t.Run(planted, func(t *testing.T) {
			t.Parallel()
			if err := wreak(t, 1, nil, planted); err == nil || !strings.HasPrefix(err.Error(), planted) {
				t.Errorf("%s: %.300v", planted, err)
			}
		})
	}
}
