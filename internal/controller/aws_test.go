package controller

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-ci/hearth/internal/aws"
	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
)

const awsBoot = 20 * time.Second

// awsMachines makes Nodes of the instances of an AWS.
type awsMachines struct{ cloud *awsfake.Cloud }

func (a awsMachines) step(now time.Time) { a.cloud.Advance(now) }

func (a awsMachines) ids() (ids []model.GroupID) {
	for _, name := range a.cloud.Groups() {
		ids = append(ids, model.GroupID(name))
	}
	return ids
}

func (a awsMachines) machines(group model.GroupID) map[model.InstanceID]machine {
	out := map[model.InstanceID]machine{}
	for _, i := range a.cloud.Instances(string(group)) {
		if i.State == "running" {
			id := model.InstanceID("aws:///" + i.Zone + "/" + i.ID)
			out[id] = machine{
				Instance: model.Instance{ID: id, State: model.InstanceRunning},
				due:      i.LaunchedAt.Add(awsBoot), node: model.NodeName("ip-" + i.ID),
			}
		}
	}
	return out
}

// awsLab is a lab whose cloud is AWS, behind the real backend.
type awsLab struct {
	*lab
	aws *awsfake.Cloud
}

// attended has the backend look after its groups as the provider has it do: it
// keeps their instances protected from scale in.
func (l awsLab) attended() awsLab {
	before := l.change
	end := func() {}
	l.change = func(cfg *Config) {
		before(cfg)
		end()
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		end = func() { cancel(); running.Wait() }
		backend := cfg.Backend.(*aws.Backend)
		running.Go(func() { _ = backend.Run(ctx, func([]model.NodeGroup) {}) })
	}
	l.t.Cleanup(func() { end() })
	return l
}

func awsExperiment(t *testing.T, groups []model.NodeGroup, f func(l awsLab)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cloud := awsfake.New(time.Now(), awsfake.Timing{
			Boot: awsBoot, Start: 10 * time.Second, Stop: 10 * time.Second, Terminate: 10 * time.Second,
			Standby: 3 * time.Second, Retry: 30 * time.Second, Health: time.Minute,
		})
		cloud.AddType(awsfake.InstanceType{Name: "m5.large", VCPUs: 2, MiB: 8192, Arch: "x86_64", Interfaces: 3, Address: 10})
		cloud.AddTemplate(awsfake.LaunchTemplate{ID: "lt", Default: 1, Versions: []awsfake.TemplateVersion{{InstanceType: "m5.large"}}})
		for _, g := range groups {
			cloud.AddGroup(awsfake.Group{
				Name: string(g.ID), Min: g.Min, Max: g.Max, Capacity: -1, Tags: map[string]string{"hearth": "1"}, LaunchTemplate: "lt",
			})
		}
		l := awsLab{aws: cloud, lab: &lab{
			t: t, cloud: newFakeCloud(groups), cluster: newFakeCluster(awsMachines{cloud}), store: newFakeStore(), memories: newFakeMemories(), events: &fakeEvents{},
			groups: groups, log: &logBuffer{},
		}}
		l.cluster.unlabelled = true // a kubelet knows nothing of groups
		l.change = func(cfg *Config) {
			clients := aws.Over(cloud.Transport())
			backend, err := aws.New(aws.Config{
				AutoScaling: clients.AutoScaling, EC2: clients.EC2, Tags: []string{"hearth"},
				Protect: func(model.GroupID) bool { return true }, Logger: slog.New(slog.NewTextHandler(l.log, nil)),
			})
			if err != nil {
				t.Fatal(err)
			}
			cfg.Backend, cfg.SnapshotEvery, cfg.SnapshotFast = backend, time.Minute, 5*time.Second
		}
		ctx, cancel := context.WithCancel(context.Background())
		var physics sync.WaitGroup
		physics.Go(func() { l.cluster.run(ctx) })
		t.Cleanup(func() { cancel(); physics.Wait() })
		defer l.close()
		defer func() {
			if t.Failed() {
				t.Logf("%s", l.picture())
			}
		}()
		f(l)
	})
}

func (l awsLab) picture() string {
	var b strings.Builder
	for _, name := range l.aws.Groups() {
		g, _ := l.aws.Group(name)
		fmt.Fprintf(&b, "%s: desired %d, record %+v\n", name, g.Desired, l.store.record(model.GroupID(name)))
	}
	for _, i := range l.aws.All() {
		fmt.Fprintf(&b, "  %s %q %q protected %v tags %v\n", i.ID, i.Lifecycle, i.State, i.Protected, i.Tags)
	}
	return b.String()
}

// has counts instances by lifecycle and state.
func (l awsLab) has(lifecycle, state string) (n int) {
	for _, i := range l.aws.All() {
		if i.Lifecycle == lifecycle && i.State == state {
			n++
		}
	}
	return n
}

// settled says whether AWS has exactly so many instances in service and parked
// ones, nothing under way and nothing besides, and the fleet knows it.
func (l awsLab) settled(serving, parked int) bool {
	g, _ := l.aws.Group(string(runners))
	living := 0
	for _, i := range l.aws.All() {
		if i.State != "terminated" {
			living++
		}
	}
	v := l.view(runners)
	r := l.store.record(runners)
	return g.Desired == serving && l.has("InService", "running") == serving && l.has("Standby", "stopped") == parked &&
		living == serving+parked && len(l.ready()) == serving && v != nil && r.Target+r.Hidden == serving
}

func (l awsLab) settlesAt(serving, parked int) {
	l.t.Helper()
	for end := time.Now().Add(8 * time.Minute); !l.settled(serving, parked); time.Sleep(time.Second) {
		if time.Now().After(end) {
			l.t.Fatalf("not settled at %d serving and %d parked\n%s", serving, parked, l.picture())
		}
		l.refresh()
	}
	time.Sleep(2 * time.Minute)
	if !l.settled(serving, parked) {
		l.t.Fatalf("did not stay at %d serving and %d parked\n%s", serving, parked, l.picture())
	}
	if taken := l.aws.Taken(); len(taken) > 0 {
		l.t.Fatalf("the group took %v\n%s", taken, l.picture())
	}
}

// faultPhases are what a fleet of two does while calls go wrong; each returns
// how many serve and are parked in the end, and which instances may be gone.
func faultPhases() map[string]func(l awsLab, broken func()) (serving, parked, terminated int) {
	parkAll := func(l awsLab) {
		l.t.Helper()
		l.parked(l.ready()...)
		l.settlesAt(0, 2)
	}
	removeAll := func(l awsLab, broken func()) {
		l.t.Helper()
		nodes := l.ready()
		names := []model.NodeName{nodes[0].Name, nodes[1].Name}
		l.released(30*time.Minute, names...)
		broken()
		l.must(l.remove(runners, nodes...))
	}
	removeOne := func(l awsLab, broken func()) {
		l.t.Helper()
		l.within(30*time.Minute, "release", func() bool { return len(l.unprotected()) > 0 })
		n, _ := l.cluster.node(l.unprotected()[0])
		broken()
		l.must(l.remove(runners, n))
	}
	return map[string]func(awsLab, func()) (int, int, int){
		"grow": func(l awsLab, broken func()) (int, int, int) {
			broken()
			l.refresh()
			l.must(l.increase(runners, 3))
			return 5, 0, 0
		},
		"remove": func(l awsLab, broken func()) (int, int, int) {
			removeAll(l, broken)
			return 0, 0, 2
		},
		"park": func(l awsLab, broken func()) (int, int, int) {
			removeAll(l, broken)
			return 0, 2, 0
		},
		"remove one": func(l awsLab, broken func()) (int, int, int) {
			removeOne(l, broken)
			return 1, 0, 1
		},
		"park one": func(l awsLab, broken func()) (int, int, int) {
			removeOne(l, broken)
			return 1, 1, 0
		},
		"end a parked one": func(l awsLab, broken func()) (int, int, int) {
			removeOne(l, func() {})
			l.within(5*time.Minute, "parked node", func() bool { return l.has("Standby", "stopped") == 1 })
			broken()
			l.within(30*time.Minute, "termination", func() bool { return l.has("", "terminated") == 1 })
			return 1, 0, 1
		},
		"unpark": func(l awsLab, broken func()) (int, int, int) {
			parkAll(l)
			l.refresh()
			broken()
			l.must(l.increase(runners, 2))
			return 2, 0, 0
		},
		"grow and cancel": func(l awsLab, broken func()) (int, int, int) {
			l.aws.Edit(string(runners), func(g *awsfake.Group) {
				g.Capacity, g.Refusal = 2, "We currently do not have sufficient m5.large capacity."
			})
			l.refresh()
			l.must(l.increase(runners, 3))
			time.Sleep(time.Minute)
			l.refresh()
			broken()
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			l.must(l.ctl.DecreaseTargetSize(ctx, runners, -3))
			return 2, 0, 0
		},
	}
}

// faultRule breaks calls of one operation.
type faultRule struct {
	operation string
	kind      awsfake.Fault
	// times is how often, or within span of the first; lag is that of reads;
	// restart ends Hearth's life after the first.
	times   int
	span    time.Duration
	lag     time.Duration
	restart bool
}

func faultRules(operation string, kind awsfake.Fault) []faultRule {
	return []faultRule{
		{operation: operation, kind: kind, times: 1},
		{operation: operation, kind: kind, times: 3},
		{operation: operation, kind: kind, span: 90 * time.Second},
		{operation: operation, kind: kind, times: 2, lag: 4 * time.Second},
		{operation: operation, kind: kind, times: 1, restart: true},
	}
}

func (r faultRule) String() string {
	return fmt.Sprintf("%s/%s/times=%d,span=%s,lag=%s,restart=%v", r.operation, r.kind, r.times, r.span, r.lag, r.restart)
}

// breakBy returns what starts to break calls, and how often it has.
func (l awsLab) breakBy(r faultRule) (start func(), hits func() int) {
	var n atomic.Int32
	return func() {
		var first time.Time
		l.aws.SetLag(r.lag)
		l.aws.SetFault(func(c awsfake.Call) awsfake.Fault {
			now := time.Now()
			if c.Operation != r.operation || r.times > 0 && int(n.Load()) >= r.times || r.times == 0 && !first.IsZero() && now.Sub(first) >= r.span {
				return awsfake.None
			}
			if first.IsZero() {
				first = now
			}
			n.Add(1)
			return r.kind
		})
	}, func() int { return int(n.Load()) }
}

// faultCase runs one phase with calls that go wrong. It returns how many did,
// and which operations were called meanwhile.
func faultCase(t *testing.T, name string, rule faultRule) (hits int, called map[string]int) {
	annotations := []string{"max-idle", "1m"}
	if strings.Contains(name, "park") {
		annotations = append(annotations, "park", "stop")
	}
	if strings.Contains(name, "end") {
		annotations = append(annotations, "max-parked-age", "20m")
	}
	awsExperiment(t, []model.NodeGroup{group(runners, annotations...)}, func(l awsLab) {
		l.start()
		l.fleet(2)
		start, count := l.breakBy(rule)
		serving, parked, terminated := faultPhases()[name](l, func() { l.aws.ResetCounts(); start() })
		if rule.restart {
			for end := time.Now().Add(time.Minute); count() == 0 && time.Now().Before(end); {
				time.Sleep(100 * time.Millisecond)
			}
			l.restart()
		}
		l.settlesAt(serving, parked)
		gone := 0
		for _, i := range l.aws.All() {
			if i.State == "terminated" {
				gone++
			}
		}
		if gone != terminated {
			t.Errorf("%d instances are terminated, want %d", gone, terminated)
		}
		if got := len(l.aws.All()); got != serving+parked+terminated {
			t.Errorf("%d instances were launched, want %d", got, serving+parked+terminated)
		}
		hits, called = count(), l.aws.Counts()
	})
	return hits, called
}

// TestAWSFaults breaks calls of each kind that a phase makes, in each way,
// while the fleet grows, shrinks, parks and resumes: it must end where it
// should, with nothing leaked and nothing terminated that should have stayed.
// Unless HEARTH_AWS_FAULTS is "all" a tenth of the cases is run, another one
// each time (HEARTH_AWS_FAULTS=seed repeats one).
func TestAWSFaults(t *testing.T) {
	seed, whole := uint64(time.Now().UnixNano()), false
	switch v := os.Getenv("HEARTH_AWS_FAULTS"); v {
	case "":
	case "all":
		whole = true
	default:
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("HEARTH_AWS_FAULTS=%q: want all or a seed", v)
		}
	}
	random := rand.New(rand.NewPCG(seed, 0))
	var all, ran, hit atomic.Int32
	t.Run("cases", func(t *testing.T) {
		for _, name := range slices.Sorted(maps.Keys(faultPhases())) {
			_, called := faultCase(t, name, faultRule{times: 1})
			for _, operation := range slices.Sorted(maps.Keys(called)) {
				for _, kind := range awsfake.Faults() {
					for _, rule := range faultRules(operation, kind) {
						all.Add(1)
						if !whole && random.IntN(10) > 0 {
							continue
						}
						t.Run(fmt.Sprintf("%s/%s", name, rule), func(t *testing.T) {
							t.Parallel()
							hits, _ := faultCase(t, name, rule)
							ran.Add(1)
							if hits > 0 {
								hit.Add(1)
							}
						})
					}
				}
			}
		}
	})
	t.Logf("seed %d: %d of %d cases, a call went wrong in %d of them", seed, ran.Load(), all.Load(), hit.Load())
	if hit.Load() == 0 {
		t.Error("nothing went wrong")
	}
}
