package controller

import (
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/simulate"
)

// replay is a trace's jobs before the live controller, in virtual time: the same
// world as `hearth simulate` has, but with an autoscaler, kubelets, engines, a
// scheduler and a watch between the policy and its nodes.
type replay struct {
	*lab
	world   simulate.World
	jobs    map[string]simulate.Job // by pod
	heard   map[string]demand.Job
	started []string                       // pods of which the CI system has yet to tell
	held    map[model.InstanceID][]heldKey // what engines hold, the newest first
	outcome outcome
	waits   []float64
}

type heldKey struct {
	key  model.CacheKey
	used time.Time
}

// outcome is what simulation and live stack are compared by.
type outcome struct {
	jobs, warm      int
	waited          float64 // seconds
	p50, p95        float64
	running, parked float64 // node hours
	launches        int
}

func (o outcome) dollars(w simulate.World) float64 {
	return o.running*w.Price + o.parked*w.ParkedPrice
}

func (o outcome) warmShare() float64 { return float64(o.warm) / float64(max(o.jobs, 1)) }

func (o outcome) row(name string, w simulate.World) string {
	return fmt.Sprintf("%-9s  %6d  %6.2f %%  %9.2f  %9.1f  %9.1f  %8.1f  %7.0f  %7.0f  %8d\n", name, o.jobs, 100*o.warmShare(), o.dollars(w), o.running, o.parked,
		o.waited/float64(max(o.jobs, 1)), o.p50, o.p95, o.launches)
}

const replayHeader = "             jobs    warm      dollars  running h   parked h  mean wait  p50 s    p95 s    launches\n"

// bound has a pod's job run as long as the engine on the node makes it.
func (r *replay) bound(p *fakePod, n model.Node) {
	now, job := time.Now(), r.jobs[p.UID]
	held := slices.DeleteFunc(slices.Clone(r.held[n.ID]), func(h heldKey) bool { return now.Sub(h.used) > r.world.WarmFor })
	at := slices.IndexFunc(held, func(h heldKey) bool { return h.key == job.Key })
	p.lasts = time.Duration(job.Duration) * time.Second
	if at >= 0 {
		r.outcome.warm++
		held = slices.Delete(held, at, at+1)
	} else {
		p.lasts = time.Duration(r.world.Cold(job.Duration)) * time.Second
	}
	held = slices.Insert(held, 0, heldKey{job.Key, now.Add(p.lasts)})
	r.held[n.ID] = held[:min(len(held), r.world.KeysHeld)]
	r.started = append(r.started, p.UID)
	r.outcome.jobs++
	wait := now.Sub(p.Created).Seconds()
	r.waits = append(r.waits, wait)
	r.outcome.waited += wait
}

// choose as the scheduler does with the preferences that placement adds.
func (r *replay) choose(p *fakePod, room []model.Node) model.NodeName {
	for _, n := range room {
		if slices.Contains(n.Marks.Warm[:], p.Key) {
			return n.Name
		}
	}
	return room[0].Name
}

// meter adds up a second of the cloud's bill.
func (r *replay) meter() {
	for _, m := range r.cloud.machines(runners) {
		if m.State == model.InstanceStopped {
			r.outcome.parked += 1. / 3600
		} else {
			r.outcome.running += 1. / 3600
		}
	}
}

func (r *replay) arrive(j simulate.Job) {
	uid := r.cluster.job(j.Key, time.Hour, "")
	r.jobs[uid] = j
	heard := demand.Job{
		ID: demand.JobID("github/acme/" + uid), System: demand.GitHub, Scope: "acme/shop", Labels: []string{"linux"}, Key: j.Key,
		QueuedAt: time.Now(), State: demand.Queued, At: time.Now(),
	}
	r.heard[uid] = heard
	r.lab.world.JobObserved(heard)
}

// unfinished counts the pods that want a node, and tells of the jobs that started
// and ended.
func (r *replay) unfinished() (n int) {
	var started, ended []string
	r.cluster.locked(func() {
		started, r.started = r.started, nil
		for uid, p := range r.cluster.pods {
			if p.Finished.IsZero() {
				n++
			} else if _, told := r.heard[uid]; told {
				ended = append(ended, uid)
			}
		}
	})
	for _, uid := range started {
		j := r.heard[uid]
		j.State, j.At = demand.Running, time.Now()
		r.lab.world.JobObserved(j)
	}
	for _, uid := range ended {
		j := r.heard[uid]
		delete(r.heard, uid)
		delete(r.jobs, uid)
		j.State, j.At = demand.Ended, time.Now()
		r.lab.world.JobObserved(j)
	}
	return n
}

// live plays the trace to the live controller. Arrivals are moved to virtual time.
func live(t *testing.T, trace simulate.Trace, w simulate.World) (result outcome) {
	synctest.Test(t, func(t *testing.T) {
		g := group(runners, "runner-labels", "linux", "park", "stop", "node-price", fmt.Sprint(w.Price), "parked-price", fmt.Sprint(w.ParkedPrice), "time-value", fmt.Sprint(w.DelayPrice))
		g.Max = 500
		begin := time.Unix(trace.Jobs[0].Arrival, 0).Add(-w.Boot)
		time.Sleep(time.Until(begin))
		l := newLab(t, []model.NodeGroup{g})
		defer l.close()
		r := &replay{lab: l, world: w, jobs: map[string]simulate.Job{}, heard: map[string]demand.Job{}, held: map[model.InstanceID][]heldKey{}}
		l.cluster.locked(func() {
			l.cluster.daemons = &engineDaemons{stops: 2 * time.Second}
			l.cluster.beat, l.cluster.choose, l.cluster.bound = time.Second, r.choose, r.bound
		})
		l.cloud.tune(func(c *fakeCloud) {
			c.boot, c.resume = w.Boot-registerAfter-readyAfter, w.Resume-registerAfter-readyAfter
		})
		l.change = func(cfg *Config) { cfg.Logger = slog.New(slog.DiscardHandler) }
		l.start()
		ca, looped := &autoscaler{lab: l, group: runners}, time.Now()
		for next := trace.Jobs; len(next) > 0 || r.unfinished() > 0; time.Sleep(time.Second) {
			for ; len(next) > 0 && next[0].Arrival <= time.Now().Unix(); next = next[1:] {
				r.arrive(next[0])
			}
			if time.Since(looped) >= 10*time.Second {
				looped = time.Now()
				ca.loop(r.unfinished())
			}
			r.unfinished()
			r.meter()
		}
		slices.Sort(r.waits)
		rank := func(p int) float64 { return r.waits[max(0, (len(r.waits)*p+99)/100-1)] }
		r.outcome.p50, r.outcome.p95, r.outcome.launches = rank(50), rank(95), l.cloud.launches()
		result = r.outcome
	})
	return result
}

// predicted is what `hearth simulate` says of the trace.
func predicted(t *testing.T, name string, trace simulate.Trace, w simulate.World) outcome {
	policy, err := simulate.FindPolicy(name)
	if err != nil {
		t.Fatal(err)
	}
	r, err := simulate.Run(trace, w, policy, simulate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return outcome{
		jobs: r.Jobs, warm: r.Warm, waited: float64(r.Waited), p50: float64(r.WaitP50), p95: float64(r.WaitP95),
		running: r.RunningNodeHours(), parked: r.ParkedNodeHours(), launches: r.Launches,
	}
}

// TestReplay: the live stack does what the simulator predicts. HEARTH_REPLAY is
// the file of a trace, HEARTH_REPLAY_DAYS how much of it; else a generated day. The
// bounds are what was measured, and a little more: see docs/policy.md.
func TestReplay(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	days := 1
	var trace simulate.Trace
	var err error
	if file := os.Getenv("HEARTH_REPLAY"); file != "" {
		f, openErr := os.Open(file)
		if openErr != nil {
			t.Fatal(openErr)
		}
		defer f.Close()
		trace, err = simulate.Read(filepath.Base(filepath.Dir(file)), f)
	} else {
		g := simulate.DefaultGenerated()
		g.Jobs, g.Weeks = 2000, 1
		trace, err = simulate.Generate(g, rand.New(rand.NewPCG(1, 0)))
	}
	if err != nil {
		t.Fatal(err)
	}
	if n, convErr := strconv.Atoi(os.Getenv("HEARTH_REPLAY_DAYS")); convErr == nil {
		days = n
	}
	last := trace.Jobs[0].Arrival + int64(days)*24*3600
	trace.Jobs = slices.DeleteFunc(trace.Jobs, func(j simulate.Job) bool { return j.Arrival >= last })
	w := simulate.DefaultWorld()
	want, got := predicted(t, "hearth-no-wait", trace, w), live(t, trace, w)
	t.Logf("%s, %d days\n%s%s%s%s", trace.Name, days, replayHeader, predicted(t, "hearth", trace, w).row("hearth", w), want.row("no-wait", w), got.row("live", w))
	if got.jobs != want.jobs {
		t.Errorf("%d jobs ran, of %d", got.jobs, want.jobs)
	}
	if d := 100 * (want.warmShare() - got.warmShare()); d > 14 {
		t.Errorf("%.1f points fewer warm hits than simulated", d)
	}
	for _, c := range []struct {
		what       string
		want, got  float64
		percentage float64
	}{
		{"money", want.dollars(w), got.dollars(w), 8},
		{"waiting", want.waited, got.waited, 8},
	} {
		if d := 100 * math.Abs(c.got/c.want-1); d > c.percentage {
			t.Errorf("%s: %.2f, simulated %.2f: %.1f %% apart", c.what, c.got, c.want, d)
		}
	}
}
