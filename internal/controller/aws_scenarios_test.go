package controller

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
)

// living counts the instances that exist, terminated those that do no more.
func (l awsLab) living() (living, terminated int) {
	for _, i := range l.aws.All() {
		if i.State == "terminated" || i.State == "shutting-down" {
			terminated++
		} else {
			living++
		}
	}
	return living, terminated
}

// TestAWSForeignHands: what others do to a group behind Hearth's back is seen
// and survived; in the end cloud, record and cluster agree, and no instance has
// gone that nobody ended.
func TestAWSForeignHands(t *testing.T) {
	for _, tc := range []struct {
		name        string
		annotations []string
		hands       func(l awsLab)
		serving     int // in the end, of a fleet of two
		parked      int
		terminated  int
	}{
		{"desired capacity raised", nil, func(l awsLab) {
			l.aws.Edit("runners", func(g *awsfake.Group) { g.Desired = 4 })
		}, 4, 0, 0},
		{"desired capacity lowered", nil, func(l awsLab) {
			l.aws.Edit("runners", func(g *awsfake.Group) { g.Desired = 0 })
		}, 2, 0, 0},
		{"minimum raised", nil, func(l awsLab) {
			l.aws.Edit("runners", func(g *awsfake.Group) { g.Min, g.Desired = 3, 3 })
		}, 3, 0, 0},
		{"availability zones rebalanced", nil, func(l awsLab) { l.aws.Rebalance("runners") }, 2, 0, 0},
		{"an instance terminated in the console", nil, func(l awsLab) { l.aws.Terminate(l.aws.All()[0].ID) }, 2, 0, 1},
		{"a spot interruption of all", nil, func(l awsLab) {
			for _, i := range l.aws.All() {
				l.aws.Terminate(i.ID)
			}
		}, 2, 0, 2},
		{"an instance refresh without regard to protection", nil, func(l awsLab) {
			for _, i := range l.aws.All() {
				l.aws.Terminate(i.ID)
				time.Sleep(4 * time.Minute)
			}
		}, 2, 0, 2},
		{"a lifecycle hook that waits", nil, func(l awsLab) {
			l.aws.Edit("runners", func(g *awsfake.Group) { g.HookWait = 5 * time.Minute })
			l.refresh()
			l.must(l.increase(runners, 1))
			l.within(2*time.Minute, "instance that waits", func() bool { return l.has("Pending:Wait", "running") == 1 })
			time.Sleep(7 * time.Minute)
		}, 3, 0, 0},
		{"launches suspended for a while", nil, func(l awsLab) {
			l.aws.Edit("runners", func(g *awsfake.Group) { g.Suspended = []string{"Launch"} })
			l.refresh()
			l.must(l.increase(runners, 1))
			l.within(time.Minute, "failure told", func() bool { l.refresh(); return l.failed(runners) == 1 })
			l.aws.Edit("runners", func(g *awsfake.Group) { g.Suspended = nil })
		}, 3, 0, 0},
		{"a parked instance started by a person", []string{"park", "stop", "max-idle", "1m"}, func(l awsLab) {
			l.parkOne()
			l.aws.EditInstance(l.stopped()[0], func(i *awsfake.Instance) { i.State = "running" })
		}, 1, 1, 0},
		{"a parked instance terminated in the console", []string{"park", "stop", "max-idle", "1m"}, func(l awsLab) {
			l.parkOne()
			l.aws.Terminate(l.stopped()[0])
		}, 1, 0, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			annotations := append([]string{"min-warm", "0"}, tc.annotations...)
			awsExperiment(t, []model.NodeGroup{group(runners, annotations...)}, func(l awsLab) {
				l = l.attended()
				l.start()
				l.fleet(2)
				time.Sleep(time.Minute) // protected by now
				tc.hands(l)
				l.settlesAt(tc.serving, tc.parked)
				if _, gone := l.living(); gone != tc.terminated {
					t.Errorf("%d instances are gone, want %d", gone, tc.terminated)
				}
			})
		})
	}
}

// parkOne has one of the released nodes parked.
func (l awsLab) parkOne() {
	l.t.Helper()
	l.within(30*time.Minute, "release", func() bool { return len(l.unprotected()) > 0 })
	n, _ := l.cluster.node(l.unprotected()[0])
	l.must(l.remove(runners, n))
	l.within(5*time.Minute, "parked node", func() bool { return len(l.stopped()) == 1 })
}

func (l awsLab) stopped() (ids []string) {
	for _, i := range l.aws.All() {
		if i.Lifecycle == "Standby" && i.State == "stopped" {
			ids = append(ids, i.ID)
		}
	}
	return ids
}

// failed counts what cluster-autoscaler is told of instances that cannot be
// launched.
func (l awsLab) failed(id model.GroupID) (n int) {
	for _, i := range l.view(id).Instances {
		if i.Failure != nil {
			n++
		}
	}
	return n
}

// TestAWSDrift: a parked instance of an old launch template version stays parked
// while a current one can be launched in its stead, and comes back when none can.
func TestAWSDrift(t *testing.T) {
	awsExperiment(t, []model.NodeGroup{group(runners, "park", "stop", "max-idle", "1m")}, func(l awsLab) {
		l = l.attended()
		l.aws.Edit("runners", func(g *awsfake.Group) { g.Version = "$Latest" })
		l.start()
		l.fleet(2)
		l.parkOne()
		l.aws.EditTemplate("lt", func(t *awsfake.LaunchTemplate) {
			t.Versions = append(slices.Clone(t.Versions), awsfake.TemplateVersion{InstanceType: "m5.large"})
		})
		time.Sleep(15 * time.Minute)
		l.refresh()
		l.must(l.increase(runners, 1))
		l.settlesAt(2, 1)
		if n := len(l.aws.All()); n != 3 {
			t.Errorf("%d instances were launched, want 3", n)
		}
		l.aws.Edit("runners", func(g *awsfake.Group) { g.Capacity, g.Refusal = 2, "We currently do not have sufficient capacity." })
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(time.Minute, "failure told", func() bool { l.refresh(); return l.failed(runners) == 1 })
		l.must(l.increase(runners, 1))
		l.within(5*time.Minute, "return of the old one", func() bool { return l.has("InService", "running") == 3 })
	})
}

// TestAWSMaximumLowered: a maximum below what runs takes no instance, and is no
// reason to ask over and over.
func TestAWSMaximumLowered(t *testing.T) {
	awsExperiment(t, []model.NodeGroup{group(runners)}, func(l awsLab) {
		l = l.attended()
		l.start()
		l.fleet(3)
		time.Sleep(time.Minute)
		l.aws.Edit("runners", func(g *awsfake.Group) { g.Max, g.Desired = 1, 1 })
		l.aws.ResetCounts()
		time.Sleep(30 * time.Minute)
		if living, gone := l.living(); living != 3 || gone != 0 {
			t.Errorf("%d instances live, %d are gone, want 3 and 0", living, gone)
		}
		if n := l.aws.Count(""); n > 500 {
			t.Errorf("%d calls in half an hour: %v", n, l.aws.Counts())
		}
		l.aws.Edit("runners", func(g *awsfake.Group) { g.Max = 10 })
		l.settlesAt(3, 0)
	})
}

// TestAWSFailures: what AWS says of launches that fail becomes an error of the
// right class, and goes when its cause does.
func TestAWSFailures(t *testing.T) {
	for message, class := range map[string]model.FailureClass{
		"We currently do not have sufficient m5.large capacity in the Availability Zone you requested (us-east-1a).":                                                                            model.FailureCapacity,
		"Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your request configuration. There is no Spot capacity available that matches your request.": model.FailureCapacity,
		"You have requested more vCPU capacity than your current vCPU limit of 32 allows.":                                                                                                      model.FailureQuota,
		"Max spot instance count exceeded":                                                                       model.FailureQuota,
		"The specified launch template, with template ID lt-1, does not exist.":                                  model.FailureTemplate,
		"The image id '[ami-1]' does not exist":                                                                  model.FailureTemplate,
		"Authentication Failure: not authorized to perform: iam:PassRole":                                        model.FailurePermissions,
		"Client.InternalError: Client error on launch.":                                                          model.FailurePermissions,
		"There are not enough free addresses in subnet 'subnet-1' to satisfy the requested number of instances.": model.FailureNetwork,
		"Request limit exceeded.":                                                                                model.FailureThrottled,
		"Something that nobody has seen before.":                                                                 model.FailureUnknown,
	} {
		t.Run(string(class)+" "+message[:20], func(t *testing.T) {
			awsExperiment(t, []model.NodeGroup{group(runners)}, func(l awsLab) {
				l.start()
				l.fleet(1)
				l.aws.Edit("runners", func(g *awsfake.Group) { g.Capacity, g.Refusal = 1, message })
				l.refresh()
				l.must(l.increase(runners, 2))
				began := time.Now()
				l.within(30*time.Second, "failure told", func() bool { l.refresh(); return l.failed(runners) == 2 })
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("the failure was told after %s, more than a loop", took)
				}
				for _, i := range l.view(runners).Instances {
					if i.Failure != nil && (i.Failure.Class != class || !strings.Contains(i.Failure.Message, message)) {
						t.Errorf("told is %+v, want class %s", i.Failure, class)
					}
				}
				l.aws.Edit("runners", func(g *awsfake.Group) { g.Capacity = -1 })
				l.settlesAt(3, 0)
				l.refresh()
				if n := l.failed(runners); n != 0 {
					t.Errorf("%d failures are told still", n)
				}
				// What failed then is no failure of what is asked for now.
				l.must(l.increase(runners, 1))
				l.always(15*time.Second, "no failure", func() bool { l.refresh(); return l.failed(runners) == 0 })
				l.settlesAt(4, 0)
			})
		})
	}
	t.Run("refused by the API", func(t *testing.T) {
		awsExperiment(t, []model.NodeGroup{group(runners)}, func(l awsLab) {
			l.start()
			l.fleet(1)
			l.aws.SetFault(func(c awsfake.Call) awsfake.Fault {
				if c.Operation == "SetDesiredCapacity" {
					return awsfake.AccessDenied
				}
				return awsfake.None
			})
			l.refresh()
			l.must(l.increase(runners, 1))
			l.within(30*time.Second, "failure told", func() bool { l.refresh(); return l.failed(runners) == 1 })
			l.aws.SetFault(nil)
			l.settlesAt(2, 0)
			l.refresh()
			if n := l.failed(runners); n != 0 {
				t.Errorf("%d failures are told still", n)
			}
		})
	})
}

// Where cluster-autoscaler's own AWS provider hurts, by the reports of its
// users.

// TestAWSPlaceholderRace: placeholders are taken back while the launch that had
// failed succeeds after all. The in-tree provider then lowers the capacity below
// what lives, and the group takes a node that works (kubernetes/autoscaler
// #5829 and later reports of the same).
func TestAWSPlaceholderRace(t *testing.T) {
	// In the last case the group does not list yet what it launches.
	const unlisted = 8
	for at := range unlisted + 1 {
		delay := time.Duration(at) * 5 * time.Second
		name := delay.String()
		if at == unlisted {
			delay, name = 30*time.Second, "30s, unlisted"
		}
		t.Run(name, func(t *testing.T) {
			// Nothing is protected, so that the group could take one.
			awsExperiment(t, []model.NodeGroup{group(runners, "role", "plain")}, func(l awsLab) {
				l.start()
				l.refresh()
				l.must(l.increase(runners, 2))
				l.within(2*time.Minute, "two nodes", func() bool { return len(l.ready()) == 2 })
				l.refresh()
				l.aws.Edit("runners", func(g *awsfake.Group) { g.Capacity, g.Refusal = 2, "We currently do not have sufficient capacity." })
				l.must(l.increase(runners, 3))
				l.within(time.Minute, "failure told", func() bool { l.refresh(); return l.failed(runners) == 3 })
				var placeholders []model.InstanceID
				for _, i := range l.view(runners).Instances {
					if i.Failure != nil {
						placeholders = append(placeholders, i.ID)
					}
				}
				// AWS finds machines for two just before, while or after CA
				// gives them up.
				l.aws.Edit("runners", func(g *awsfake.Group) { g.Capacity = 4 })
				time.Sleep(delay)
				hide := func(hidden bool) {
					for _, i := range l.aws.Instances("runners") {
						if i.Lifecycle == "Pending" || i.Hidden {
							l.aws.EditInstance(i.ID, func(i *awsfake.Instance) { i.Hidden = hidden })
						}
					}
				}
				hide(at == unlisted)
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				l.must(l.ctl.DeleteNodes(ctx, runners, placeholders))
				time.Sleep(10 * time.Second)
				hide(false)
				time.Sleep(5 * time.Minute)
				l.refresh()
				if taken := l.aws.Taken(); len(taken) > 0 {
					t.Errorf("the group took %v\n%s", taken, l.picture())
				}
				living, gone := l.living()
				g, _ := l.aws.Group("runners")
				if gone > 0 || g.Desired != living {
					t.Errorf("%d live, %d are gone, desired is %d", living, gone, g.Desired)
				}
			})
		})
	}
}

// TestAWSBelowMinimum: a group of which fewer nodes live than its minimum, since
// AWS has no more, still takes a scale-up, tells that it fails, and lets the
// autoscaler give that up; the in-tree provider refuses to, and hangs in a loop
// (kubernetes/autoscaler #9043). Once there are machines, it has its minimum.
func TestAWSBelowMinimum(t *testing.T) {
	awsExperiment(t, []model.NodeGroup{group(runners)}, func(l awsLab) {
		l.start()
		l.fleet(1)
		l.aws.Edit("runners", func(g *awsfake.Group) {
			g.Min, g.Desired, g.Capacity, g.Refusal = 3, 3, 1, "We currently do not have sufficient capacity."
		})
		time.Sleep(2 * time.Minute)
		for range 3 { // the autoscaler tries again when its backoff ends
			l.refresh()
			before := l.view(runners).Target
			l.must(l.increase(runners, 2))
			l.within(time.Minute, "failure told", func() bool { l.refresh(); return l.failed(runners) >= 2 })
			var placeholders []model.InstanceID
			for _, i := range l.view(runners).Instances {
				if i.Failure != nil {
					placeholders = append(placeholders, i.ID)
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			l.must(l.ctl.DeleteNodes(ctx, runners, placeholders))
			cancel()
			if after := l.view(runners).Target; after > before {
				t.Errorf("the target size is %d after it was given up, before it was %d", after, before)
			}
			time.Sleep(6 * time.Minute)
		}
		l.aws.Edit("runners", func(g *awsfake.Group) { g.Capacity = -1 })
		l.settlesAt(3, 0)
		if taken := l.aws.Taken(); len(taken) > 0 {
			t.Errorf("the group took %v", taken)
		}
	})
}

// TestAWSDecreaseSucceeds: a DecreaseTargetSize whose number counts nodes that
// have arrived meanwhile is no error, which would end the loop for all groups
// (kubernetes/autoscaler #6128).
func TestAWSDecreaseSucceeds(t *testing.T) {
	awsExperiment(t, []model.NodeGroup{group(runners)}, func(l awsLab) {
		l.start()
		l.fleet(2)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		l.must(l.ctl.DecreaseTargetSize(ctx, runners, -2))
		l.settlesAt(2, 0)
	})
}

// TestAWSBrokenGroup: one group that cannot be read, resized or even found
// leaves the others at work.
func TestAWSBrokenGroup(t *testing.T) {
	const broken = model.GroupID("broken")
	awsExperiment(t, []model.NodeGroup{group(runners), group(broken)}, func(l awsLab) {
		l.start()
		l.fleets(map[model.GroupID]int{runners: 1, broken: 1})
		l.aws.Edit(string(broken), func(g *awsfake.Group) { g.Overrides, g.Weights = []string{"m5.large"}, true })
		l.aws.SetFault(func(c awsfake.Call) awsfake.Fault {
			if c.Group == string(broken) {
				return awsfake.ServerError
			}
			return awsfake.None
		})
		l.refresh()
		l.must(l.increase(broken, 1))
		l.must(l.increase(runners, 2))
		l.within(2*time.Minute, "growth of the other group", func() bool { return l.has("InService", "running") == 4 })
		l.aws.SetFault(nil)
		l.aws.RemoveGroup(string(broken))
		time.Sleep(5 * time.Minute)
		l.refresh()
		l.must(l.increase(runners, 1))
		l.within(2*time.Minute, "growth of the other group", func() bool { l.refresh(); return l.view(runners).Target == 4 && l.has("InService", "running") == 4 })
	})
}

// TestAWSDeletesGoOn: one instance that cannot be terminated does not keep the
// others, of which one call ends up to a hundred (kubernetes/autoscaler #10186
// asks for that).
func TestAWSDeletesGoOn(t *testing.T) {
	awsExperiment(t, []model.NodeGroup{group(runners, "max-idle", "1m")}, func(l awsLab) {
		l.start()
		nodes := l.fleet(5)
		l.within(30*time.Minute, "release", func() bool { return len(l.unprotected()) == 5 })
		odd := string(nodes[0].ID)
		odd = odd[strings.LastIndexByte(odd, '/')+1:]
		l.aws.SetFault(func(c awsfake.Call) awsfake.Fault {
			if c.Operation == "TerminateInstanceInAutoScalingGroup" && slices.Contains(c.Instances, odd) {
				return awsfake.Invalid
			}
			return awsfake.None
		})
		l.must(l.remove(runners, nodes...))
		l.within(2*time.Minute, "end of the others", func() bool { return l.has("", "terminated") == 4 })
		l.aws.SetFault(nil)
		l.settlesAt(0, 0)
	})
}

// TestAWSThrottled: with every second call refused for ten minutes reads go on
// from what is known, and writes arrive (kubernetes/autoscaler #252).
func TestAWSThrottled(t *testing.T) {
	awsExperiment(t, []model.NodeGroup{group(runners)}, func(l awsLab) {
		l.start()
		l.fleet(2)
		l.aws.SetFault(func(c awsfake.Call) awsfake.Fault {
			if c.N%2 == 0 {
				return awsfake.Throttle
			}
			return awsfake.None
		})
		for range 60 {
			l.refresh()
			if l.view(runners).Target < 2 {
				t.Fatal("the view has lost nodes")
			}
			time.Sleep(10 * time.Second)
		}
		l.must(l.increase(runners, 3))
		l.within(3*time.Minute, "growth", func() bool { return l.has("InService", "running") == 5 })
		l.aws.SetFault(nil)
		l.settlesAt(5, 0)
	})
}
