package refautoscaler

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"

	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// quick are options by which a node goes after 10 s.
func quick() *pb.NodeGroupAutoscalingOptionsResponse {
	return &pb.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold: 0.5,
		ScaleDownUnneededDuration:     durationpb.New(10 * time.Second),
		ScaleDownUnreadyDuration:      durationpb.New(time.Minute),
		MaxNodeProvisionDuration:      durationpb.New(15 * time.Minute),
		IgnoreDaemonSetsUtilization:   true,
	}}
}

// settle lets deletions that were started come to their end.
func settle() {
	time.Sleep(6 * time.Second)
	synctest.Wait()
}

func TestEmptyNodeGoes(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 1)
		b.pod("engine", "3", "i-01", ofDaemonSet)
		b.loops(1)
		if got := b.tainted(deletionCandidateTaint); !slices.Equal(got, []string{"i-01"}) {
			t.Errorf("soft taint on %v", got)
		}
		b.loops(1) // 10 s are not more than 10 s
		b.wrote()
		b.loops(1)
		if got := b.tainted(toBeDeletedTaint); !slices.Equal(got, []string{"i-01"}) || !b.node("i-01").Spec.Unschedulable {
			t.Errorf("taint on %v, cordoned: %v", got, b.node("i-01").Spec.Unschedulable)
		}
		b.wrote() // only 5 s after the taint
		settle()
		b.wrote("delete a [i-01]")
		b.saw(ScaleDown, "")
		if _, err := b.kube.CoreV1().Pods("ci").Get(b.ctx, "engine", getOptions); err != nil {
			t.Errorf("pod of a DaemonSet was evicted from an empty node: %v", err)
		}
		// The provider lists nothing and does not claim the node any more; CA leaves the
		// Node object and its taint alone.
		b.loops(2)
		b.wrote()
		if got := b.tainted(toBeDeletedTaint); len(got) != 1 {
			t.Errorf("taint on %v", got)
		}
	})
}

func TestUnneededTimeIsTheGroups(t *testing.T) {
	for _, test := range []struct {
		name    string
		gen     Generation
		options *pb.NodeGroupAutoscalingOptionsResponse
		loops   int // until the taint
	}{
		{"CA's default", Generation136, nil, 62},
		{"no message: default", Generation136, &pb.NodeGroupAutoscalingOptionsResponse{}, 62},
		{"the group's", Generation136, quick(), 3},
		{"unset is zero", Generation136, &pb.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: &pb.NodeGroupAutoscalingOptions{}}, 1},
		{"old field is nothing to 1.35", Generation135, &pb.NodeGroupAutoscalingOptionsResponse{
			NodeGroupAutoscalingOptions: &pb.NodeGroupAutoscalingOptions{ScaleDownUnneededTime: &pb.LegacyDuration{Duration: int64(time.Hour)}}}, 1},
		{"old field, 1.33", Generation133, &pb.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: &pb.NodeGroupAutoscalingOptions{
			ScaleDownUnneededTime: &pb.LegacyDuration{Duration: int64(10 * time.Second)}, ScaleDownUnneededDuration: durationpb.New(time.Hour)}}, 3},
		{"new field first, 1.34", Generation134, &pb.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: &pb.NodeGroupAutoscalingOptions{
			ScaleDownUnneededTime: &pb.LegacyDuration{Duration: int64(time.Hour)}, ScaleDownUnneededDuration: durationpb.New(10 * time.Second)}}, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.use(test.gen)
				b.cloud.group("a").options = test.options
				b.addReady("a", 1)
				b.loops(test.loops - 1)
				if got := b.tainted(toBeDeletedTaint); len(got) != 0 {
					t.Fatalf("too early: %v", got)
				}
				b.loops(1)
				if got := b.tainted(toBeDeletedTaint); len(got) != 1 {
					t.Error("not yet")
				}
			})
		})
	}
}

func TestUnreadyNodeHasAThresholdOfItsOwn(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 1)
		n := b.node("i-01")
		n.Status.Conditions = condition(false)
		b.update(n)
		b.loops(7) // a minute after the first loop
		if got := b.tainted(toBeDeletedTaint); len(got) != 0 {
			t.Fatalf("too early: %v", got)
		}
		b.loops(1)
		if got := b.tainted(toBeDeletedTaint); len(got) != 1 {
			t.Error("not yet")
		}
	})
}

func TestNodesThatStay(t *testing.T) {
	for name, set := range map[string]func(*bench){
		"annotation": func(b *bench) {
			n := b.node("i-01")
			n.Annotations = map[string]string{scaleDownDisabled: "true"}
			b.update(n)
		},
		"min size": func(b *bench) { b.cloud.group("a").min = 1 },
		"utilization": func(b *bench) {
			b.pod("p", "3", "i-01", annotated(safeToEvict, "true"))
			n := b.node(b.addReady("a", 1)[0]) // would take the pod
			n.Annotations = map[string]string{scaleDownDisabled: "true"}
			b.update(n)
		},
		"not safe to evict":  func(b *bench) { b.pod("p", "1", "i-01", annotated(safeToEvict, "false")) },
		"safe on completion": func(b *bench) { b.pod("p", "1", "i-01", annotated(safeToEvict, "on-completion")) },
		"nobody's pod":       func(b *bench) { b.pod("p", "1", "i-01", func(p *corev1.Pod) { p.OwnerReferences = nil }) },
		"unknown controller": func(b *bench) {
			b.pod("p", "1", "i-01", func(p *corev1.Pod) { p.OwnerReferences[0].Kind = "EphemeralRunner" })
		},
		"system pod":            func(b *bench) { b.pod("p", "1", "i-01", func(p *corev1.Pod) { p.Namespace = "kube-system" }) },
		"local storage":         func(b *bench) { b.pod("p", "1", "i-01", withEmptyDir) },
		"no place for its pod":  func(b *bench) { b.pod("p", "1", "i-01") },
		"options cannot be had": func(b *bench) { b.cloud.fail["NodeGroupGetOptions"] = errRefused },
		"not the provider's":    func(b *bench) { delete(b.cloud.nodes, "i-01") },
		"group cannot be had":   func(b *bench) { b.cloud.fail["NodeGroupForNode"] = errRefused },
		"being deleted, says a run before": func(b *bench) {
			b.start()
			b.a.cleaned = true
			if err := b.a.taint(b.ctx, "i-01", toBeDeletedTaint, corev1.TaintEffectNoSchedule, false); err != nil {
				b.Fatal(err)
			}
		},
		"scale-up a moment ago": func(b *bench) { b.start(); b.a.lastScaleUp = time.Now() },
		"pods that are all new": func(b *bench) {
			b.pod("p", "9", "", func(p *corev1.Pod) { p.CreationTimestamp.Time = time.Now().Add(time.Hour) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.cloud.group("a").options = quick()
				b.addReady("a", 1)
				set(b)
				b.loops(5)
				b.wrote()
				if b.a.actuator.snapshot().has("i-01") {
					t.Error("node is being deleted")
				}
			})
		})
	}
}

func withEmptyDir(p *corev1.Pod) {
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
}

func TestPodsThatDoNotBlock(t *testing.T) {
	for name, change := range map[string]func(*corev1.Pod){
		"safe to evict, nobody's": func(p *corev1.Pod) { p.OwnerReferences = nil; annotated(safeToEvict, "true")(p) },
		"ended":                   func(p *corev1.Pod) { p.OwnerReferences = nil; p.Status.Phase = corev1.PodSucceeded },
		"harmless volume":         func(p *corev1.Pod) { withEmptyDir(p); annotated(safeToEvictLocalVolumes, "v")(p) },
		"of a static file":        func(p *corev1.Pod) { annotated(corev1.MirrorPodAnnotationKey, "x")(p) },
	} {
		t.Run(name, func(t *testing.T) {
			p := &corev1.Pod{ObjectMeta: ownedByJob(), Status: corev1.PodStatus{Phase: corev1.PodRunning}}
			change(p)
			f := Generation136.Flags()
			if d := f.departureOf(&simulated{pods: []*corev1.Pod{p}}, time.Now()); d.blocked != nil && p.Status.Phase == corev1.PodRunning {
				t.Errorf("blocked: %v", d.blocked)
			}
		})
	}
}

// A node that a pod keeps is not looked at again for five minutes, even if the pod
// ends at once. An annotation is looked at in every loop.
func TestUnremovableNodeIsSkippedForAWhile(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 1)
		b.pod("p", "1", "i-01", annotated(safeToEvict, "false"))
		b.loops(1)
		b.removePod("p")
		b.loops(29)
		if got := b.tainted(toBeDeletedTaint); len(got) != 0 {
			t.Fatalf("too early: %v", got)
		}
		b.loops(4)
		if got := b.tainted(toBeDeletedTaint); len(got) != 1 {
			t.Error("not yet")
		}
	})
}

func TestVeto(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 1)
		b.cloud.fail["NodeGroupDeleteNodes"] = errRefused
		b.loops(3)
		settle()
		b.saw(ScaleDownFailed, "")
		if got := b.tainted(toBeDeletedTaint); len(got) != 0 || b.node("i-01").Spec.Unschedulable {
			t.Errorf("taint on %v, cordoned: %v", got, b.node("i-01").Spec.Unschedulable)
		}
		delete(b.cloud.fail, "NodeGroupDeleteNodes")
		b.forgetEvents()
		b.loops(3)
		settle()
		b.wrote("delete a [i-01]")
		b.saw(ScaleDown, "")
	})
}

func TestNodeThatIsNotOursAnyMoreIsGivenBack(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cfg.Flags.ScanInterval = 4 * time.Second
		b.cloud.group("a").options = quick()
		b.addReady("a", 1)
		b.loops(4)
		delete(b.cloud.nodes, "i-01")
		b.loops(1) // a Refresh between taint and DeleteNodes
		settle()
		b.saw(ScaleDownFailed, "node is of no group any more")
		b.wrote()
	})
}

func TestBatch(t *testing.T) {
	for name, refuse := range map[string]bool{"accepted": false, "refused as a whole": true} {
		t.Run(name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.cfg.Flags.NodeDeletionBatcherInterval = 2 * time.Second
				b.cloud.group("a").options = quick()
				b.addReady("a", 3)
				if refuse {
					b.cloud.fail["NodeGroupDeleteNodes"] = errRefused
				}
				b.loops(3)
				settle()
				time.Sleep(2 * time.Second)
				synctest.Wait()
				if refuse {
					if got := b.tainted(toBeDeletedTaint); len(got) != 0 {
						t.Errorf("taint on %v", got)
					}
					return
				}
				b.wrote("delete a [i-01 i-02 i-03]")
			})
		})
	}
	t.Run("none by default", func(t *testing.T) {
		inBench(t, func(b *bench) {
			b.cloud.group("a").options = quick()
			b.addReady("a", 3)
			b.loops(3)
			settle()
			b.cloud.mu.Lock()
			slices.Sort(b.cloud.writes)
			b.cloud.mu.Unlock()
			b.wrote("delete a [i-01]", "delete a [i-02]", "delete a [i-03]")
		})
	})
}

func TestParallelismAndMinimum(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cfg.Flags.MaxScaleDownParallelism = 2
		b.cloud.group("a").options = quick()
		b.cloud.group("a").min = 1
		b.addReady("a", 4)
		b.loops(3)
		if got := b.tainted(toBeDeletedTaint); len(got) != 2 {
			t.Errorf("%v at a time, want 2", got)
		}
		settle()
		b.loops(5)
		settle()
		if now := b.cloud.group("a").now; now != 1 {
			t.Errorf("%d nodes left, want the minimum, 1", now)
		}
	})
}

func TestPodOnANodeThatHasJustBeenTaintedSavesIt(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 1)
		b.loops(3)
		b.pod("p", "1", "i-01")
		settle()
		b.saw(ScaleDownFailed, "new pods scheduled on an empty node")
		if got := b.tainted(toBeDeletedTaint); len(got) != 0 {
			t.Errorf("taint on %v", got)
		}
		b.wrote()
	})
}

func TestOccupiedNodeIsDrained(t *testing.T) {
	for name, evictsDaemons := range map[string]bool{"with its DaemonSet pods": true, "without them": false} {
		t.Run(name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.cfg.Flags.DaemonSetEvictionForOccupiedNodes = evictsDaemons
				b.cloud.group("a").options = quick()
				b.addReady("a", 2)
				for _, n := range []string{"i-01", "i-02"} {
					b.pod("work-"+n, "1", n)
					b.pod("engine-"+n, "1", n, ofDaemonSet)
				}
				b.loops(3)
				settle()
				b.wrote("delete a [i-01]") // one drain at a time, and the other node has to take the pod
				if _, err := b.kube.CoreV1().Pods("ci").Get(b.ctx, "work-i-01", getOptions); err == nil {
					t.Error("pod was not evicted")
				}
				if _, err := b.kube.CoreV1().Pods("ci").Get(b.ctx, "engine-i-01", getOptions); (err != nil) != evictsDaemons {
					t.Errorf("pod of a DaemonSet: %v", err)
				}
			})
		})
	}
}

func TestNewRunRemovesTaintsOfTheLastBeforeItsFirstRefresh(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 2)
		ctx, kill := context.WithCancel(b.ctx)
		live := b.ctx
		b.ctx = ctx
		b.loops(3)
		kill() // between the taints and DeleteNodes
		b.a.Wait()
		b.ctx = live
		if got := b.tainted(toBeDeletedTaint); len(got) != 2 {
			t.Fatalf("a killed CA left taints on %v", got)
		}
		delete(b.cloud.nodes, "i-02") // on its way out, says the provider
		b.cloud.fail["Refresh"] = errRefused
		b.start()
		if err := b.loop(); err == nil {
			t.Error("loop is good without Refresh")
		}
		b.saw(TaintsCleaned, "")
		if got := b.tainted(toBeDeletedTaint); !slices.Equal(got, []string{"i-02"}) || b.node("i-01").Spec.Unschedulable {
			t.Errorf("taints on %v", got)
		}
	})
}

func TestEmptyAndPreviousCandidatesGoFirst(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").options = quick()
		b.addReady("a", 3)
		b.pod("p", "1", "i-01")
		b.loops(1)
		var order []string
		for _, c := range b.a.candidates(b.ctx, b.world(), nil, time.Now()) {
			order = append(order, c.node.Name)
		}
		if !slices.Equal(order, []string{"i-02", "i-03", "i-01"}) {
			t.Errorf("order %v", order)
		}
		b.a.unneeded = slices.DeleteFunc(b.a.unneeded, func(u unneeded) bool { return u.node.Name == "i-02" })
		if first := b.a.candidates(b.ctx, b.world(), nil, time.Now())[0].node.Name; first != "i-03" {
			t.Errorf("first is %s, want the one that was a candidate before", first)
		}
	})
}
