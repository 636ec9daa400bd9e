package refautoscaler

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var getOptions = metav1.GetOptions{}

func ownedByJob() metav1.ObjectMeta {
	yes := true
	return metav1.ObjectMeta{OwnerReferences: []metav1.OwnerReference{{Kind: "Job", Controller: &yes}}}
}

// world is the cluster as the next loop would see it.
func (b *bench) world() snapshot {
	b.Helper()
	nodes, pods, _, err := b.a.list(b.ctx)
	if err != nil {
		b.Fatal(err)
	}
	return newSnapshot(nodes, pods)
}

func TestProviderCaches(t *testing.T) {
	inBench(t, func(b *bench) {
		b.start()
		p, ours, foreign := b.a.provider, instanceAsNode("i-01"), instanceAsNode("x")
		b.cloud.grow("a", 1)
		ask := func() {
			for range 3 {
				g := p.nodeGroups(b.ctx)[0]
				if _, err := p.templateOf(b.ctx, g); err != nil {
					t.Fatal(err)
				}
				for _, n := range []*corev1.Node{ours, foreign} {
					if _, err := p.groupOf(b.ctx, n); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := p.targetSize(b.ctx, "a"); err != nil {
					t.Fatal(err)
				}
				if _, err := p.options(b.ctx, "a"); err != nil {
					t.Fatal(err)
				}
			}
		}
		want := func(calls map[string]int) {
			t.Helper()
			for method, n := range calls {
				if b.cloud.calls[method] != n {
					t.Errorf("%s called %d times, want %d", method, b.cloud.calls[method], n)
				}
			}
		}
		ask()
		want(map[string]int{
			"NodeGroups": 1, "NodeGroupTemplateNodeInfo": 1, "NodeGroupForNode": 1 + 3,
			"NodeGroupTargetSize": 3, "NodeGroupGetOptions": 3,
		})
		b.cloud.fail["Refresh"] = errRefused
		if err := p.refresh(b.ctx); err == nil { // the caches are dropped all the same
			t.Error("Refresh did not fail")
		}
		ask()
		want(map[string]int{"NodeGroups": 2, "NodeGroupTemplateNodeInfo": 2, "NodeGroupForNode": 2 * (1 + 3)})

		delete(b.cloud.fail, "Refresh")
		b.cloud.fail["NodeGroups"] = errRefused
		if err := p.refresh(b.ctx); err != nil {
			t.Fatal(err)
		}
		if got := p.nodeGroups(b.ctx); len(got) != 0 {
			t.Errorf("groups %v", got)
		}
		delete(b.cloud.fail, "NodeGroups")
		if got := p.nodeGroups(b.ctx); len(got) != 1 {
			t.Errorf("an error was cached: %v", got)
		}
	})
}

func TestEveryCallHasCAsDeadline(t *testing.T) {
	inBench(t, func(b *bench) {
		b.start()
		b.cloud.slow["Refresh"] = time.Minute
		start := time.Now()
		err := b.a.provider.refresh(b.ctx)
		if status.Code(err) != codes.DeadlineExceeded || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestWireOfEachGeneration(t *testing.T) {
	for gen, form := range map[Generation]struct{ old, new bool }{
		Generation136: {new: true}, Generation135: {new: true}, Generation134: {old: true, new: true}, Generation133: {old: true},
	} {
		inBench(t, func(b *bench) {
			b.use(gen)
			b.cloud.group("a").options = &pb.NodeGroupAutoscalingOptionsResponse{}
			b.start()
			if _, err := b.a.provider.options(b.ctx, "a"); err != nil {
				t.Fatal(err)
			}
			d := b.cloud.defaults
			if (d.GetScaleDownUnneededTime().GetDuration() == int64(10*time.Minute)) != form.old ||
				(d.GetMaxNodeProvisionDuration().AsDuration() == 15*time.Minute) != form.new {
				t.Errorf("generation %d sends %v", gen, d)
			}
			b.a.updateTemplates(b.ctx, nil, nil, time.Now())
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}}
			req, err := b.a.expanderRequest([]option{{group: &nodeGroup{id: "a"}, nodes: 1, pods: []*corev1.Pod{p}}})
			if err != nil {
				t.Fatal(err)
			}
			if (len(req.GetNodeMap()) == 1) != form.old || (len(req.GetNodeBytesMap()) == 1) != form.new ||
				(len(req.GetOptions()[0].GetPod()) == 1) != form.old || (len(req.GetOptions()[0].GetPodBytes()) == 1) != form.new {
				t.Errorf("generation %d asks the expander with %v", gen, req)
			}
		})
	}
}

func TestErrorsThatEndTheLoop(t *testing.T) {
	for _, method := range []string{"Refresh", "NodeGroupTargetSize"} {
		inBench(t, func(b *bench) {
			b.cloud.group("a").options = quick()
			b.addReady("a", 1)
			b.loops(1)
			b.cloud.fail[method] = errRefused
			if err := b.loop(); status.Code(errors.Unwrap(err)) != codes.Unavailable {
				t.Errorf("%s: %v", method, err)
			}
		})
	}
}

// running starts Run and returns a function that ends it and returns what it said.
func (b *bench) running() (stop func() error) {
	b.Helper()
	b.start()
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() { done <- b.a.Run(ctx) }()
	return func() error { cancel(); return <-done }
}

func TestRunIsKilledWhenNoLoopIsGood(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cfg.Flags.MaxFailingTime = 2 * time.Minute
		b.start()
		time.AfterFunc(65*time.Second, func() {
			b.cloud.mu.Lock()
			defer b.cloud.mu.Unlock()
			b.cloud.fail["Refresh"] = errRefused
		})
		start := time.Now()
		if err := b.a.Run(b.ctx); !errors.Is(err, ErrFailing) {
			t.Errorf("Run: %v", err)
		}
		if took := time.Since(start).Round(10 * time.Second); took != 3*time.Minute {
			t.Errorf("killed after %v", took)
		}
		b.saw(LoopFailed, "")
	})
	inBench(t, func(b *bench) { // the first good loop has more time
		b.cloud.fail["Refresh"] = errRefused
		b.cfg.Flags.MaxFailingTime = 2 * time.Minute
		b.start()
		start := time.Now()
		if err := b.a.Run(b.ctx); !errors.Is(err, ErrFailing) || time.Since(start) != 20*time.Minute {
			t.Errorf("Run: %v after %v", err, time.Since(start))
		}
	})
}

// A connection that swallows everything looks like this to CA.
func TestRunIsKilledWhenAnswersStopComing(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cfg.Flags.MaxFailingTime = time.Minute
		b.cfg.Flags.MaxStartupTime = time.Minute
		b.cloud.slow["Refresh"] = time.Hour
		b.start()
		if err := b.a.Run(b.ctx); !errors.Is(err, ErrFailing) {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestLoopsFollowAtOnce(t *testing.T) {
	for name, test := range map[string]struct {
		frequent bool
		want     []time.Duration // between the first Refreshes
	}{
		"since 1.35":              {true, []time.Duration{0, 0, 10 * time.Second}},
		"not as a default before": {false, []time.Duration{10 * time.Second, 10 * time.Second, 10 * time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.cfg.Flags.FrequentLoopsEnabled = test.frequent
				b.cloud.slow["Refresh"] = time.Millisecond // loops take time
				b.pod("p", "4", "", func(p *corev1.Pod) { p.CreationTimestamp.Time = time.Now().Add(-time.Hour) })
				// A pod that has been unschedulable for long wakes nobody up.
				list, err := b.kube.CoreV1().Pods("ci").List(b.ctx, metav1.ListOptions{})
				if err != nil {
					t.Fatal(err)
				}
				list.Items[0].Status.Conditions[0].LastTransitionTime.Time = time.Now().Add(-time.Hour)
				if _, err := b.kube.CoreV1().Pods("ci").UpdateStatus(b.ctx, &list.Items[0], metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
				var at []time.Time
				b.kube.PrependReactor("list", "nodes", noteTime(&at))
				stop := b.running()
				time.Sleep(45 * time.Second)
				if err := stop(); err != nil {
					t.Error(err)
				}
				var got []time.Duration
				for i := range test.want {
					got = append(got, at[i+1].Sub(at[i]).Round(time.Second))
				}
				if !slices.Equal(got, test.want) {
					t.Errorf("between loops %v, want %v", got, test.want)
				}
				b.wrote("increase a +1")
			})
		})
	}
}

func TestUnschedulablePodStartsALoop(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cfg.Flags.ScanInterval = time.Hour
		b.cloud.slow["Refresh"] = time.Millisecond // loops take time
		stop := b.running()
		synctest.Wait()
		if err := b.kube.Tracker().Add(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Name: "p"},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{}}},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled,
				Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable, LastTransitionTime: metav1.Now()}}},
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := stop(); err != nil {
			t.Error(err)
		}
		b.wrote("increase a +1")
	})
}

func TestCleanupTellsTheProvider(t *testing.T) {
	inBench(t, func(b *bench) {
		b.start()
		if err := b.a.Cleanup(b.ctx); err != nil || b.cloud.calls["Cleanup"] != 1 {
			t.Errorf("%v, %d calls", err, b.cloud.calls["Cleanup"])
		}
	})
}

func TestConfig(t *testing.T) {
	inBench(t, func(b *bench) {
		for name, spoil := range map[string]func(*Config){
			"no cluster":  func(c *Config) { c.Kube = nil },
			"no provider": func(c *Config) { c.Provider = nil },
			"generation":  func(c *Config) { c.Generation = 7 },
			"zero flags":  func(c *Config) { c.Flags = Flags{} },
		} {
			c := b.cfg
			spoil(&c)
			if _, err := New(c); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
	})
}

func TestArgs(t *testing.T) {
	f := Generation136.Flags()
	f.ScanInterval, f.ScaleDownUnneededTime = time.Second, 10*time.Second
	args := f.Args(Generation136)
	for _, want := range []string{
		"--scan-interval=1s", "--scale-down-unneeded-time=10s", "--frequent-loops-enabled=true", "--max-startup-time=20m0s",
		"--max-graceful-termination-sec=600", "--max-total-unready-percentage=45", "--cordon-node-before-terminating=true",
	} {
		if !slices.Contains(args, want) {
			t.Errorf("%s is not among %v", want, args)
		}
	}
	old := Generation133.Flags().Args(Generation133)
	if slices.ContainsFunc(old, func(s string) bool { return s == "--max-startup-time=0s" }) || !slices.Contains(old, "--cordon-node-before-terminating=false") {
		t.Errorf("1.33: %v", old)
	}
}
