package refautoscaler

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-ci/hearth/protos/expander"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

var errRefused = status.Error(codes.Unavailable, "not now")

func TestScaleUpFromZeroByTemplateHappensOnce(t *testing.T) {
	inBench(t, func(b *bench) {
		for i := range 5 {
			b.pod(fmt.Sprint("p", i), "2", "") // two on a node
		}
		b.loops(3)
		b.wrote("increase a +3") // the later loops count the three as upcoming
		b.saw(ScaleUp, "")

		b.register("i-01", true)
		b.register("i-02", false)
		b.loops(1)
		b.wrote()
	})
}

func TestScaleUpOfPodsThatAreAllNewWaits(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cfg.Flags.ScanInterval = time.Second
		b.pod("p", "2", "")
		b.loops(1)
		b.wrote()
		b.loops(1)
		b.wrote("increase a +1")
	})
}

func TestScaleUpRespectsSelectorTaintAndMax(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").template.Spec.Taints = []corev1.Taint{{Key: "ci", Effect: corev1.TaintEffectNoSchedule}}
		b.pod("intolerant", "2", "")
		b.pod("elsewhere", "2", "", func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
			p.Spec.NodeSelector = map[string]string{"group": "b"}
		})
		b.pod("too-large", "5", "", func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
		})
		b.loops(1)
		b.wrote()
		b.saw(NoScaleUp, "no group takes them")

		b.addGroup("b", 0, 2)
		for i := range 8 {
			b.pod(fmt.Sprint("p", i), "2", "")
		}
		b.loops(1)
		b.wrote("increase b +2")
		b.loops(1)
		b.wrote()
		b.saw(GroupSkipped, skippedAtMax)
	})
}

// A template of the provider's has no pods: CA adds those of DaemonSets.
func TestTemplateLeavesRoomForDaemonSets(t *testing.T) {
	inBench(t, func(b *bench) {
		b.daemonSet("1")
		b.pod("p1", "2", "")
		b.pod("p2", "2", "")
		b.loops(1)
		b.wrote("increase a +2")
	})
}

// The template of an emptied group is a copy of its last node, for good: a taint that
// CA does not know stays in it, one of CA's own or with the status prefix does not.
func TestLiveNodeBecomesTemplateWithoutKnownTaints(t *testing.T) {
	for taint, scales := range map[string]bool{
		"status-taint.cluster-autoscaler.kubernetes.io/draining": true,
		toBeDeletedTaint:         true,
		corev1.TaintNodeNotReady: true,
		"hearth.dev/draining":    false,
	} {
		t.Run(taint, func(t *testing.T) {
			inBench(t, func(b *bench) {
				name := b.addReady("a", 1)[0]
				time.Sleep(2 * time.Minute) // too fresh before
				n := b.node(name)
				if taint != toBeDeletedTaint && taint != corev1.TaintNodeNotReady { // such nodes are no models
					n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: taint, Effect: corev1.TaintEffectNoSchedule})
				}
				b.update(n)
				b.loops(1)
				n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: taint, Effect: corev1.TaintEffectNoSchedule})
				b.update(n)
				b.pod("p", "1", "")
				b.loops(1)
				if scales {
					b.wrote("increase a +1")
				} else {
					b.wrote()
				}
			})
		})
	}
}

func TestSizeRaisedBehindTheBack(t *testing.T) {
	for _, test := range []struct {
		name    string
		gen     Generation
		raised  int32
		ready   int32
		want    []string
		skipped string
	}{
		// Upcoming nodes without a request do not count, and the group lacks too many.
		{"1.36 six of six", Generation136, 6, 0, nil, skippedUnhealthy},
		// Healthy all the same: the nodes are ordered a second time.
		{"1.36 two of twelve", Generation136, 2, 7, []string{"increase a +1"}, ""},
		// Before 1.36 they count.
		{"1.35 six of six", Generation135, 6, 0, nil, ""},
		{"1.33 six of six", Generation133, 6, 0, nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.use(test.gen)
				for i, n := range b.addReady("a", test.ready) {
					b.pod(fmt.Sprint("r", i), "4", n)
				}
				b.cloud.grow("a", test.raised)
				b.pod("p", "4", "")
				b.loops(2)
				b.wrote(test.want...)
				if test.skipped != "" {
					b.saw(GroupSkipped, test.skipped)
					b.saw(UpcomingSkipped, skippedNoRequest)
				}
			})
		})
	}
}

func TestScaleUpRequestEnds(t *testing.T) {
	t.Run("with its nodes", func(t *testing.T) {
		inBench(t, func(b *bench) {
			b.pod("p", "4", "")
			b.loops(1)
			b.wrote("increase a +1")
			b.register("i-01", true)
			b.loops(1)
			if len(b.a.state.requests) != 0 {
				t.Error("request is still there")
			}
		})
	})
	t.Run("when NodeGroups fails after a good Refresh", func(t *testing.T) {
		inBench(t, func(b *bench) {
			b.pod("p", "4", "")
			b.loops(1)
			b.cloud.fail["NodeGroups"] = errRefused
			b.loops(1) // no error: the list is empty
			if len(b.a.state.requests) != 0 {
				t.Error("request is still there")
			}
			delete(b.cloud.fail, "NodeGroups")
			b.wrote("increase a +1")
			b.loops(1)
			b.wrote() // neither request nor, in the cached list, an instance: the group is unhealthy
		})
	})
	for gen, want := range map[Generation][]string{
		Generation136: {"decrease a -2"}, // the whole request, although one node has come
		Generation135: nil,
	} {
		t.Run(fmt.Sprint("by its deadline, generation ", gen), func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.use(gen)
				b.cloud.group("a").stillborn = true
				b.pod("p1", "4", "")
				b.pod("p2", "4", "")
				b.loops(1)
				b.wrote("increase a +2")
				b.cloud.nodes["i-x"] = "a"
				b.register("i-x", true)
				time.Sleep(15 * time.Minute)
				b.loops(1)
				b.saw(ScaleUpTimedOut, "")
				if gen == Generation136 { // before, the missing nodes go on counting as upcoming
					b.saw(GroupSkipped, "backed off: scale-up timed out")
				}
				b.wrote(want...)
			})
		})
	}
	t.Run("later when it grows", func(t *testing.T) {
		inBench(t, func(b *bench) {
			b.pod("p1", "4", "")
			b.loops(1)
			time.Sleep(10 * time.Minute)
			b.pod("p2", "4", "")
			b.loops(1)
			b.wrote("increase a +1", "increase a +1")
			time.Sleep(6 * time.Minute)
			b.loops(1)
			if r := b.a.state.requests["a"]; r == nil || r.increase != 2 {
				t.Errorf("request is %+v", r)
			}
		})
	})
}

func TestFailedIncreaseSizeBacksOff(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.fail["NodeGroupIncreaseSize"] = errRefused
		b.pod("p", "4", "")
		b.loops(1) // the loop goes on since 1.34
		b.saw(ScaleUpFailed, "")
		delete(b.cloud.fail, "NodeGroupIncreaseSize")
		b.addGroup("b", 0, 1)
		b.loops(1)
		b.wrote("increase b +1")

		b.pod("p2", "4", "")
		time.Sleep(4 * time.Minute)
		b.loops(1)
		b.saw(GroupSkipped, "backed off: IncreaseSize failed")
		b.wrote()
		time.Sleep(time.Minute)
		b.loops(1)
		b.wrote("increase a +1")
	})
	inBench(t, func(b *bench) {
		b.use(Generation133)
		b.cloud.fail["NodeGroupIncreaseSize"] = errRefused
		b.pod("p", "4", "")
		if err := b.loop(); status.Code(errors.Unwrap(err)) != codes.Unavailable {
			t.Errorf("1.33: loop ends with %v", err)
		}
	})
}

func TestBackoffDoublesAndIsForgotten(t *testing.T) {
	inBench(t, func(b *bench) {
		b.loops(1)
		s, now := b.a.state, time.Now()
		for _, test := range []struct{ after, want time.Duration }{
			{0, 5 * time.Minute},
			{time.Minute, 5 * time.Minute}, // failing while backed off does not double
			{6 * time.Minute, 10 * time.Minute},
			{11 * time.Minute, 20 * time.Minute},
			{21 * time.Minute, 30 * time.Minute},
			{31 * time.Minute, 30 * time.Minute},
		} {
			now = now.Add(test.after)
			s.backOff("a", "x", now)
			if got := s.backoffs["a"].duration; got != test.want {
				t.Errorf("after %v: %v, want %v", test.after, got, test.want)
			}
		}
		s.updateRequests(b.ctx, now.Add(3*time.Hour+time.Second))
		if len(s.backoffs) != 0 {
			t.Error("not forgotten")
		}
	})
}

func TestInstancesWithErrors(t *testing.T) {
	inBench(t, func(b *bench) {
		b.addGroup("b", 0, 10)
		b.cloud.group("a").template.Status.Capacity = resources("4")
		b.pod("p1", "4", "")
		b.pod("p2", "4", "")
		b.loops(1)
		b.wrote("increase a +2")
		for _, i := range b.cloud.group("a").instances {
			i.Status.ErrorInfo = &pb.InstanceErrorInfo{ErrorCode: "NoCapacity", ErrorMessage: "none left", InstanceErrorClass: 1}
		}
		b.loops(1) // within the same loop: backed off, deleted, the pods go to the other group
		b.saw(InstancesFailed, "NoCapacity: none left")
		b.wrote("delete a [i-01 i-02]", "increase b +2")
		b.loops(1)
		b.wrote()
	})
}

// Without a scale-up of CA's own, failing instances are deleted but back nothing off.
func TestInstancesWithErrorsOutsideScaleUp(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.grow("a", 1)
		b.cloud.group("a").instances[0].Status.ErrorInfo = &pb.InstanceErrorInfo{ErrorCode: "NoCapacity"}
		b.cloud.fail["NodeGroupDeleteNodes"] = errRefused
		b.loops(1)
		delete(b.cloud.fail, "NodeGroupDeleteNodes")
		b.loops(1) // again in every loop
		b.wrote("delete a [i-01]")
		if len(b.a.state.backoffs) != 0 {
			t.Error("group is backed off")
		}
	})
}

func TestNotReadyNode(t *testing.T) {
	options := &pb.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: &pb.NodeGroupAutoscalingOptions{
		MaxNodeProvisionDuration: durationpb.New(15 * time.Minute),
		MaxNodeProvisionTime:     &pb.LegacyDuration{Duration: int64(15 * time.Minute)},
	}}
	for _, test := range []struct {
		name    string
		gen     Generation
		options *pb.NodeGroupAutoscalingOptionsResponse
		want    []string
	}{
		{"counts as upcoming", Generation136, nil, nil},
		{"an answer without options too", Generation136, &pb.NodeGroupAutoscalingOptionsResponse{}, nil},
		// A group with options of its own gives its nodes no time to start.
		{"but not with options", Generation136, options, []string{"increase a +1"}},
		{"nor in 1.35", Generation135, options, []string{"increase a +1"}},
		{"1.34 has a constant", Generation134, options, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.use(test.gen)
				b.cloud.group("a").options = test.options
				b.pod("p", "4", "")
				b.loops(1)
				b.wrote("increase a +1")
				b.register("i-01", false)
				b.loops(1)
				b.wrote(test.want...)
			})
		})
	}
}

func TestClusterWithTooManyUnreadyNodesIsLeftAlone(t *testing.T) {
	inBench(t, func(b *bench) {
		b.addGroup("b", 0, 10)
		for _, name := range b.addReady("a", 4) {
			n := b.node(name)
			n.Status.Conditions = condition(false)
			b.update(n)
		}
		b.pod("p", "4", "", func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"group": "b"} })
		time.Sleep(15 * time.Minute) // until then they are not started
		b.loops(1)
		b.saw(ClusterUnhealthy, "")
		b.wrote()

		n := b.node("i-01") // three are tolerated
		n.Status.Conditions = condition(true)
		b.update(n)
		b.loops(1)
		b.wrote("increase b +1")
	})
}

func TestInstancesAreCached(t *testing.T) {
	inBench(t, func(b *bench) {
		b.loops(12) // 2 min
		if n := b.cloud.calls["NodeGroupNodes"]; n != 1 {
			t.Errorf("asked %d times in two minutes, want 1", n)
		}
		b.loops(1)
		if n := b.cloud.calls["NodeGroupNodes"]; n != 2 {
			t.Errorf("asked %d times after two minutes, want 2", n)
		}
		b.pod("p", "4", "")
		b.loops(1)
		b.loops(3) // while scaling up, in every loop
		if n := b.cloud.calls["NodeGroupNodes"]; n != 5 {
			t.Errorf("asked %d times, want 5", n)
		}
		// An error is one of the loop where an answer is needed.
		b.cloud.fail["NodeGroupNodes"] = errRefused
		if err := b.loop(); err == nil {
			t.Error("loop is good without instances")
		}
	})
	inBench(t, func(b *bench) { // and nobody's in the regular refresh
		b.cloud.fail["NodeGroupNodes"] = errRefused
		b.loops(1)
	})
}

func TestUnregisteredInstancesAreDeleted(t *testing.T) {
	inBench(t, func(b *bench) {
		b.cloud.group("a").min = 1
		b.cloud.grow("a", 2)
		b.loops(1)
		time.Sleep(15 * time.Minute)
		b.loops(1)
		b.saw(UnregisteredRemoved, "")
		b.cloud.mu.Lock()
		writes := len(b.cloud.writes)
		b.cloud.mu.Unlock()
		if now := b.cloud.group("a").now; now != 1 || writes != 1 { // down to min, which of the two is left to chance
			t.Errorf("target is %d after %d writes", now, writes)
		}
	})
}

func TestSizeIsFixed(t *testing.T) {
	inBench(t, func(b *bench) {
		b.addReady("a", 1)
		b.cloud.group("a").stillborn = true
		b.cloud.grow("a", 2)
		b.loops(1)
		time.Sleep(15 * time.Minute)
		b.pod("p", "4", "")
		b.loops(1)
		b.saw(SizeFixed, "")
		b.wrote("decrease a -2") // and nothing else in this loop
	})
	inBench(t, func(b *bench) { // its error ends the loop
		b.addReady("a", 1)
		b.cloud.group("a").stillborn = true
		b.cloud.grow("a", 2)
		b.loops(1)
		time.Sleep(15 * time.Minute)
		b.cloud.fail["NodeGroupDecreaseTargetSize"] = errRefused
		if err := b.loop(); err == nil {
			t.Error("loop is good")
		}
	})
}

func TestExpander(t *testing.T) {
	answer := func(ids ...string) (*expander.BestOptionsResponse, error) {
		resp := &expander.BestOptionsResponse{}
		for _, id := range ids {
			resp.Options = append(resp.Options, &expander.Option{NodeGroupId: id, NodeCount: 99})
		}
		return resp, nil
	}
	for _, test := range []struct {
		name   string
		choose func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error)
		want   []string
	}{
		{"chooses, its count ignored", func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error) { return answer("b") }, []string{"increase b +1"}},
		{"two left: least waste", func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error) { return answer("b", "c") }, []string{"increase c +1"}},
		{"unknown ids filter nothing", func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error) { return answer("x") }, []string{"increase c +1"}},
		{"an error filters nothing", func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error) { return nil, errRefused }, []string{"increase c +1"}},
		{"an empty answer leaves none", func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error) { return answer() }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBench(t, func(b *bench) {
				b.cfg.Expander = b.cfg.Provider
				b.cloud.choose = test.choose
				b.addGroup("b", 0, 10)
				b.addGroup("c", 0, 10).template.Status = corev1.NodeStatus{Capacity: resources("2"), Allocatable: resources("2")}
				b.pod("p", "1", "")
				b.loops(1)
				b.wrote(test.want...)
				if o := b.cloud.asked.GetOptions(); len(o) != 3 || o[0].GetNodeGroupId() != "a" || o[0].GetNodeCount() != 1 || len(o[0].GetPodBytes()) != 1 {
					t.Errorf("asked with %v", o)
				}
				if len(test.want) == 0 {
					b.saw(NoScaleUp, "the expander left no option")
				}
			})
		})
	}
}
