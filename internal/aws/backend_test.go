package aws_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/internal/aws"
	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// account is an AWS account in virtual time, with one backend on it.
type account struct {
	*awsfake.Cloud
	*aws.Backend
	t   *testing.T
	log *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

func timing() awsfake.Timing {
	return awsfake.Timing{
		Boot: 30 * time.Second, Start: 10 * time.Second, Stop: 10 * time.Second, Terminate: 10 * time.Second,
		Standby: 3 * time.Second, Retry: 30 * time.Second, Health: time.Minute,
	}
}

// in runs f with an account that has an instance type and a launch template.
func in(t *testing.T, change func(*aws.Config), f func(a *account)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cloud := awsfake.New(time.Now(), timing())
		cloud.AddType(awsfake.InstanceType{Name: "m5.2xlarge", VCPUs: 8, MiB: 32768, Arch: "x86_64", Interfaces: 4, Address: 15})
		cloud.AddTemplate(awsfake.LaunchTemplate{ID: "lt-1", Name: "runners", Default: 1, Versions: []awsfake.TemplateVersion{{InstanceType: "m5.2xlarge", Image: "ami-1", VolumeGiB: 100}}})
		a := &account{Cloud: cloud, t: t, log: &lockedBuffer{}}
		a.renew(change)
		f(a)
	})
}

// renew makes a backend as a new process would.
func (a *account) renew(change func(*aws.Config)) {
	clients := aws.Over(a.Transport())
	cfg := aws.Config{
		AutoScaling: clients.AutoScaling, EC2: clients.EC2, EKS: clients.EKS, Region: "us-east-1",
		Tags: []string{"k8s.io/cluster-autoscaler/enabled"}, Logger: slog.New(slog.NewTextHandler(a.log, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	backend, err := aws.New(cfg)
	if err != nil {
		a.t.Fatal(err)
	}
	a.Backend = backend
}

// add adds a group that is found by the default tag.
func (a *account) add(g awsfake.Group) {
	tags := map[string]string{"k8s.io/cluster-autoscaler/enabled": "true"}
	maps.Copy(tags, g.Tags)
	g.Tags = tags
	if g.LaunchTemplate == "" && g.LaunchConfig == "" && g.Name != "bare" {
		g.LaunchTemplate, g.Version = "lt-1", "$Default"
	}
	if g.Max == 0 {
		g.Max = 100
	}
	if g.Refusal == "" {
		g.Capacity = -1
	}
	a.AddGroup(g)
}

// pass lets time pass, second by second, in the cloud too.
func (a *account) pass(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(time.Second)
		a.Advance(time.Now())
	}
}

func (a *account) discover() map[model.GroupID]model.NodeGroup {
	a.t.Helper()
	groups, err := a.Discover(context.Background())
	if err != nil {
		a.t.Fatal(err)
	}
	out := map[model.GroupID]model.NodeGroup{}
	for _, g := range groups {
		out[g.ID] = g
	}
	return out
}

func (a *account) snapshot() model.Snapshot {
	a.t.Helper()
	s, err := a.Snapshot(context.Background())
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}

// full has everything read anew.
func (a *account) full() model.Snapshot {
	a.t.Helper()
	a.pass(time.Minute)
	return a.snapshot()
}

func (a *account) ids(group string) (ids []model.InstanceID) {
	for _, i := range a.Instances(group) {
		ids = append(ids, model.InstanceID("aws:///"+i.Zone+"/"+i.ID))
	}
	return ids
}

func (a *account) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

// grown has the group at n instances in service.
func (a *account) grown(group string, n int) {
	a.t.Helper()
	a.must(a.Resize(context.Background(), model.GroupID(group), n))
	a.pass(time.Minute)
	a.snapshot()
	if got := len(a.Instances(group)); got != n {
		a.t.Fatalf("%d instances, want %d", got, n)
	}
}

func names[K ~string, V any](m map[K]V) (out []string) {
	for k := range m {
		out = append(out, string(k))
	}
	slices.Sort(out)
	return out
}

func TestDiscovery(t *testing.T) {
	for _, tc := range []struct {
		name  string
		tags  []string
		named []string
		want  []string
	}{
		{"by the usual tag", []string{"k8s.io/cluster-autoscaler/enabled"}, nil, []string{"ci", "mine", "ours"}},
		{"by two tags", []string{"k8s.io/cluster-autoscaler/enabled", "k8s.io/cluster-autoscaler/prod"}, nil, []string{"ci", "ours"}},
		{"by a tag's value", []string{"team=ci"}, nil, []string{"ci"}},
		{"by name", nil, []string{"untagged"}, []string{"untagged"}},
		{"by both", []string{"team=ci"}, []string{"untagged", "ci", "no such group"}, []string{"ci", "untagged"}},
		{"nothing matches", []string{"no/such"}, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in(t, func(c *aws.Config) {
				c.Tags = tc.tags
				for _, n := range tc.named {
					c.Groups = append(c.Groups, model.NodeGroup{ID: model.GroupID(n)})
				}
			}, func(a *account) {
				a.add(awsfake.Group{Name: "ci", Tags: map[string]string{"team": "ci", "k8s.io/cluster-autoscaler/prod": "owned"}})
				a.add(awsfake.Group{Name: "ours", Tags: map[string]string{"team": "web", "k8s.io/cluster-autoscaler/prod": "owned"}})
				a.add(awsfake.Group{Name: "mine"})
				a.AddGroup(awsfake.Group{Name: "untagged", Max: 3, LaunchTemplate: "lt-1"})
				got := names(a.discover())
				if !slices.Equal(got, tc.want) {
					t.Errorf("found %v, want %v", got, tc.want)
				}
			})
		})
	}
	if _, err := aws.New(aws.Config{}); err == nil {
		t.Error("a backend without clients was made")
	}
}

func TestTemplates(t *testing.T) {
	const node = "k8s.io/cluster-autoscaler/node-template/"
	in(t, nil, func(a *account) {
		a.AddType(awsfake.InstanceType{Name: "c7g.large", VCPUs: 2, MiB: 4096, Arch: "arm64", Interfaces: 3, Address: 10})
		a.AddType(awsfake.InstanceType{Name: "g5.xlarge", VCPUs: 4, MiB: 16384, GPUs: 1, Arch: "x86_64", Interfaces: 4, Address: 15})
		a.AddNodegroup(awsfake.Nodegroup{
			Cluster: "prod", Name: "ng", Labels: map[string]string{"pool": "ci"}, Taints: [][3]string{{"ci", "yes", "NO_SCHEDULE"}}, CapacityType: "ON_DEMAND",
		})
		a.add(awsfake.Group{Name: "plain", Min: 1, Max: 9, Zones: []string{"us-east-1b", "us-east-1a"}})
		a.add(awsfake.Group{Name: "configuration", LaunchConfig: "c7g.large"})
		a.add(awsfake.Group{Name: "mixed", Overrides: []string{"g5.xlarge", "m5.2xlarge"}, LaunchTemplate: "lt-1"})
		a.add(awsfake.Group{Name: "required", Requirements: true, LaunchTemplate: "lt-1"}) // from 4 CPUs and 16000 MiB
		a.add(awsfake.Group{Name: "eks", Tags: map[string]string{"eks:cluster-name": "prod", "eks:nodegroup-name": "ng"}})
		a.add(awsfake.Group{Name: "tags", Tags: map[string]string{
			node + "label/pool": "ci", node + "taint/dedicated": "ci:NoSchedule", node + "resources/example.com/fpga": "2", node + "resources/memory": "16Gi",
			node + "autoscaling-options/scaledownunneededtime": "3m0s", "hearth.dev/min-warm": "2",
			node + "label/not a label": "x", node + "label/ok": "not a value!", node + "taint/bad": "ci", node + "taint/worse": "a:Sometimes", node + "resources/cpu": "many",
		}})
		got := a.discover()
		plain := got["plain"]
		if diff := cmp.Diff(model.NodeGroup{
			ID: "plain", Min: 1, Max: 9,
			Template: model.Template{
				// 92.5 % of 32768 MiB; less 255 + 11×58 + 100 MiB. 8 CPUs less 60 + 10 + 5 + 5 + 4 × 2.5 m.
				Capacity:    map[string]string{"cpu": "8", "memory": "30310Mi", "pods": "58", "ephemeral-storage": "100Gi"},
				Allocatable: map[string]string{"cpu": "7910m", "memory": "29317Mi", "pods": "58", "ephemeral-storage": "91136Mi"},
				Labels: map[string]string{
					"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "topology.kubernetes.io/region": "us-east-1", "topology.ebs.csi.aws.com/zone": "us-east-1a",
				},
				Zone: "us-east-1a", InstanceType: "m5.2xlarge",
			},
			Annotations: map[string]string{"hearth.dev/node-price": "0.384"},
		}, plain); diff != "" {
			t.Errorf("plain:\n%s", diff)
		}
		for group, kind := range map[model.GroupID]string{"configuration": "c7g.large", "mixed": "g5.xlarge", "required": "g5.xlarge", "tags": "m5.2xlarge"} {
			if got := got[group].Template.InstanceType; got != kind {
				t.Errorf("%s is of %q, want %q", group, got, kind)
			}
		}
		if arch := got["configuration"].Template.Labels["kubernetes.io/arch"]; arch != "arm64" {
			t.Errorf("a Graviton's arch is %q", arch)
		}
		if gpus := got["mixed"].Template.Capacity["nvidia.com/gpu"]; gpus != "1" {
			t.Errorf("a g5.xlarge has %q GPUs", gpus)
		}
		eks := got["eks"].Template
		if eks.Labels["pool"] != "ci" || eks.Labels["eks.amazonaws.com/nodegroup"] != "ng" || eks.Labels["eks.amazonaws.com/capacityType"] != "ON_DEMAND" ||
			!slices.Equal(eks.Taints, []model.Taint{{Key: "ci", Value: "yes", Effect: "NoSchedule"}}) {
			t.Errorf("managed node group: %+v", eks)
		}
		tags := got["tags"]
		if tags.Template.Labels["pool"] != "ci" || tags.Template.Capacity["example.com/fpga"] != "2" || tags.Template.Allocatable["memory"] != "16Gi" ||
			tags.Template.Capacity["cpu"] != "8" || !slices.Equal(tags.Template.Taints, []model.Taint{{Key: "dedicated", Value: "ci", Effect: "NoSchedule"}}) {
			t.Errorf("tags: %+v", tags.Template)
		}
		if tags.Annotations["hearth.dev/scale-down-unneeded-time"] != "3m0s" || tags.Annotations["hearth.dev/min-warm"] != "2" {
			t.Errorf("annotations: %v", tags.Annotations)
		}
		for _, bad := range []string{"not a label", "label/ok", "taint/bad", "taint/worse", "resources/cpu"} {
			if !strings.Contains(a.log.String(), bad) {
				t.Errorf("nothing is said of the tag %q", bad)
			}
		}
	})
}

// TestTemplatesFollow: $Latest and $Default are followed, and what cannot be
// read any more stays as it was.
func TestTemplatesFollow(t *testing.T) {
	in(t, nil, func(a *account) {
		a.AddType(awsfake.InstanceType{Name: "m7i.large", VCPUs: 2, MiB: 8192, Arch: "x86_64", Interfaces: 3, Address: 10})
		a.add(awsfake.Group{Name: "latest", LaunchTemplate: "lt-1", Version: "$Latest"})
		a.add(awsfake.Group{Name: "default", LaunchTemplate: "lt-1", Version: "$Default"})
		a.add(awsfake.Group{Name: "fixed", LaunchTemplate: "lt-1", Version: "1"})
		a.discover()
		kinds := func(latest, standard string) {
			t.Helper()
			a.pass(11 * time.Minute)
			got := a.discover()
			for group, want := range map[model.GroupID]string{"latest": latest, "default": standard, "fixed": "m5.2xlarge"} {
				if is := got[group].Template.InstanceType; is != want {
					t.Errorf("%s is of %q, want %q", group, is, want)
				}
			}
		}
		a.EditTemplate("lt-1", func(l *awsfake.LaunchTemplate) {
			l.Versions = append(slices.Clone(l.Versions), awsfake.TemplateVersion{InstanceType: "m7i.large"})
		})
		kinds("m7i.large", "m5.2xlarge")
		a.EditTemplate("lt-1", func(l *awsfake.LaunchTemplate) { l.Default = 2 })
		kinds("m7i.large", "m7i.large")
		a.EditTemplate("lt-1", func(l *awsfake.LaunchTemplate) { l.Deleted = true })
		kinds("m7i.large", "m7i.large")
	})
}

// TestBadGroups: what cannot be made sense of leaves the others alone.
func TestBadGroups(t *testing.T) {
	long := strings.Repeat("x", 255)
	in(t, nil, func(a *account) {
		a.AddTemplate(awsfake.LaunchTemplate{ID: "lt-odd", Versions: []awsfake.TemplateVersion{{InstanceType: "z9.huge"}}})
		a.AddTemplate(awsfake.LaunchTemplate{ID: "lt-gone", Deleted: true})
		a.add(awsfake.Group{Name: "good"})
		a.add(awsfake.Group{Name: "bare"})
		a.add(awsfake.Group{Name: "odd", LaunchTemplate: "lt-odd", Version: "1"})
		a.add(awsfake.Group{Name: "gone", LaunchTemplate: "lt-gone", Version: "$Latest"})
		a.add(awsfake.Group{Name: "never", LaunchTemplate: "lt-never", Version: "$Latest"})
		a.add(awsfake.Group{Name: "weights", Overrides: []string{"m5.2xlarge"}, Weights: true})
		a.add(awsfake.Group{Name: "upside down", Min: 5, Max: 2})
		a.add(awsfake.Group{Name: long})
		a.add(awsfake.Group{Name: "Läufer/组 1"})
		got := a.discover()
		if want := []string{"Läufer/组 1", "good", "upside down", "weights", long}; !slices.Equal(names(got), sorted(want)) {
			t.Errorf("declared are %q, want %q", names(got), want)
		}
		if g := got["upside down"]; g.Min != 2 || g.Max != 2 {
			t.Errorf("min %d, max %d", g.Min, g.Max)
		}
		for _, name := range []string{"bare", "odd", "gone", "never"} {
			if !strings.Contains(a.log.String(), "nodegroup="+name) {
				t.Errorf("nothing is said of %q", name)
			}
		}
		s := a.snapshot()
		if len(s.Errors) != 1 || s.Errors["weights"] == nil {
			t.Errorf("errors %v, want one of weights", s.Errors)
		}
		for _, name := range []model.GroupID{"good", model.GroupID(long), "Läufer/组 1"} {
			if _, ok := s.Groups[name]; !ok {
				t.Errorf("%q was not read", name)
			}
			a.must(a.Resize(context.Background(), name, 1))
			if g, _ := a.Group(string(name)); g.Desired != 1 {
				t.Errorf("%q was not resized", name)
			}
		}
	})
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

// TestSharedInstance: an instance that two groups claim is told of one.
func TestSharedInstance(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a"})
		a.add(awsfake.Group{Name: "b"})
		a.grown("a", 1)
		id := a.Instances("a")[0].ID
		a.SetFault(nil)
		a.Claim(id, "b")
		s := a.full()
		if len(s.Groups["a"].Instances) != 1 || s.Errors["b"] == nil || !strings.Contains(s.Errors["b"].Error(), id) {
			t.Errorf("a has %v, errors %v", s.Groups["a"].Instances, s.Errors)
		}
	})
}

// TestGroupGone: a group must be missing several times before it is believed
// to be gone; acts on it fail meanwhile and others go on.
func TestGroupGone(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a"})
		a.add(awsfake.Group{Name: "b"})
		a.grown("a", 2)
		a.RemoveGroup("a")
		for range 2 {
			s := a.full()
			if s.Errors["a"] == nil {
				t.Errorf("a group that is missing is no error: %+v", s)
			}
			if _, ok := s.Groups["b"]; !ok {
				t.Error("the other group was not read")
			}
			if err := a.Resize(context.Background(), "a", 3); err == nil {
				t.Error("a group that is gone was resized")
			}
		}
		a.full()
		if got := names(a.discover()); !slices.Equal(got, []string{"b"}) {
			t.Errorf("declared are %v", got)
		}
	})
}

// TestPaging: answers of a few items a page are read to the end.
func TestPaging(t *testing.T) {
	in(t, nil, func(a *account) {
		a.SetPage(7)
		for n := range 30 {
			a.add(awsfake.Group{Name: fmt.Sprintf("g%02d", n), Desired: 3})
		}
		a.pass(time.Minute)
		if got := len(a.discover()); got != 30 {
			t.Errorf("%d groups, want 30", got)
		}
		s := a.snapshot()
		for id, g := range s.Groups {
			if len(g.Instances) != 3 {
				t.Errorf("%s has %d instances", id, len(g.Instances))
			}
		}
		// Parked ones are looked up by id, several pages of them.
		a.must2(a.Stop(context.Background(), "g00", a.ids("g00")))
		a.pass(5 * time.Second)
		a.must2(a.Stop(context.Background(), "g00", a.ids("g00")))
		a.pass(15 * time.Second)
		for _, i := range a.snapshot().Groups["g00"].Instances {
			if i.State != model.InstanceStopped {
				t.Errorf("%s is %s", i.ID, i.State)
			}
		}
	})
}

// must2 takes errors of what takes several calls.
func (a *account) must2(err error) {
	a.t.Helper()
	if err != nil && !isUnderWay(err) {
		a.t.Fatal(err)
	}
}

// TestThrottledReads: when AWS does not answer, the error says so and nothing
// is forgotten.
func TestThrottledReads(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a"})
		a.grown("a", 2)
		for _, kind := range awsfake.Faults() {
			a.pass(time.Minute)
			a.SetFault(func(c awsfake.Call) awsfake.Fault {
				if c.Operation == "DescribeAutoScalingGroups" {
					return kind
				}
				return awsfake.None
			})
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			s, err := a.Snapshot(ctx)
			cancel()
			if err == nil {
				t.Errorf("%s: no error, but %+v", kind, s)
			}
			a.SetFault(nil)
			if s := a.snapshot(); len(s.Groups["a"].Instances) != 2 {
				t.Errorf("after %s: %+v", kind, s)
			}
		}
	})
}

// TestStaleReads: what was read before our own act does not undo it.
func TestStaleReads(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a"})
		a.grown("a", 3)
		a.SetLag(20 * time.Second)
		a.pass(time.Second)
		ids := a.ids("a")
		a.must(a.Backend.Terminate(context.Background(), "a", ids[:1]))
		for range 4 {
			a.pass(3 * time.Second)
			for _, i := range a.snapshot().Groups["a"].Instances {
				if i.ID == ids[0] && i.State != model.InstanceTerminating {
					t.Errorf("the terminated instance is %s", i.State)
				}
			}
			a.must(a.Backend.Terminate(context.Background(), "a", ids[:1]))
		}
		a.pass(time.Minute)
		if g, _ := a.Group("a"); g.Desired != 2 || a.Count("TerminateInstanceInAutoScalingGroup") != 1 {
			t.Errorf("desired %d after %d calls, want 2 after 1", g.Desired, a.Count("TerminateInstanceInAutoScalingGroup"))
		}
		// The same capacity is not set over and over while it is not read yet.
		a.ResetCounts()
		for range 3 {
			a.must2(a.Resize(context.Background(), "a", 4))
			a.pass(time.Second)
		}
		if n := a.Count("SetDesiredCapacity"); n != 1 {
			t.Errorf("the capacity was set %d times", n)
		}
	})
}

// TestCancelSpares: lowering the capacity cancels what is not born; never what
// lives, nor what is being launched and not listed yet, whatever the number
// that is asked for.
func TestCancelSpares(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a", Refusal: "We currently do not have sufficient capacity.", Capacity: 3})
		a.must(a.Resize(context.Background(), "a", 5))
		a.pass(5 * time.Second) // three are pending
		a.EditInstance(a.Instances("a")[2].ID, func(i *awsfake.Instance) { i.Hidden = true })
		a.must2(a.Resize(context.Background(), "a", 1))
		if g, _ := a.Group("a"); g.Desired != 3 {
			t.Errorf("desired is %d, want 3", g.Desired)
		}
		a.pass(time.Minute)
		if taken := a.Taken(); len(taken) > 0 || len(a.Instances("a")) != 3 {
			t.Errorf("taken %v, left %v", taken, a.Instances("a"))
		}
	})
}

// TestUnparkable: what cannot be stopped is terminated in its stead.
func TestUnparkable(t *testing.T) {
	for name, change := range map[string]func(*awsfake.Instance){
		"spot":           func(i *awsfake.Instance) { i.Spot = true },
		"instance store": func(i *awsfake.Instance) { i.InstanceStore = true },
	} {
		t.Run(name, func(t *testing.T) {
			in(t, nil, func(a *account) {
				a.add(awsfake.Group{Name: "a"})
				a.grown("a", 2)
				odd := a.Instances("a")[0].ID
				a.EditInstance(odd, change)
				a.must2(a.Stop(context.Background(), "a", a.ids("a")))
				a.pass(5 * time.Second)
				a.must2(a.Stop(context.Background(), "a", a.ids("a")))
				a.pass(time.Minute)
				if all := a.All(); all[0].State != "terminated" || all[1].State != "stopped" || len(all) != 2 {
					t.Errorf("%+v", all)
				}
				if !strings.Contains(a.log.String(), "cannot be parked") {
					t.Error("nothing is said of it")
				}
			})
		})
	}
	t.Run("managed node group", func(t *testing.T) {
		in(t, nil, func(a *account) {
			a.AddNodegroup(awsfake.Nodegroup{Cluster: "prod", Name: "ng"})
			a.add(awsfake.Group{Name: "a", Tags: map[string]string{"eks:cluster-name": "prod", "eks:nodegroup-name": "ng"}})
			a.grown("a", 1)
			a.must2(a.Stop(context.Background(), "a", a.ids("a")))
			a.pass(time.Minute)
			if all := a.All(); all[0].State != "terminated" {
				t.Errorf("%+v", all)
			}
		})
	})
}

// TestNoCapacityToStart: a parked instance that cannot be started keeps no other.
func TestNoCapacityToStart(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a"})
		a.grown("a", 3)
		ids := a.ids("a")
		for range 5 {
			a.must2(a.Stop(context.Background(), "a", ids))
			a.pass(5 * time.Second)
		}
		a.EditInstance(a.Instances("a")[1].ID, func(i *awsfake.Instance) { i.NoCapacity = true })
		var refused error
		for range 8 {
			if err := a.Start(context.Background(), "a", ids); !isUnderWay(err) {
				refused = err
			}
			a.pass(5 * time.Second)
		}
		states := map[string]int{}
		for _, i := range a.Instances("a") {
			states[i.Lifecycle+" "+i.State]++
		}
		if states["InService running"] != 2 || states["Standby stopped"] != 1 || refused == nil {
			t.Errorf("%v, %v", states, refused)
		}
	})
}

// TestDryRun: nothing is changed, and what would be is said once.
func TestDryRun(t *testing.T) {
	in(t, func(c *aws.Config) { c.DryRun = true }, func(a *account) {
		a.add(awsfake.Group{Name: "a", Desired: 2})
		a.pass(time.Minute)
		a.discover()
		a.snapshot()
		for range 3 {
			for what, err := range map[string]error{
				"resize": a.Resize(context.Background(), "a", 3), "terminate": a.Backend.Terminate(context.Background(), "a", a.ids("a")),
				"stop": a.Stop(context.Background(), "a", a.ids("a")), "start": a.Start(context.Background(), "a", a.ids("a")),
			} {
				if err == nil || !isDryRun(err) {
					t.Errorf("%s: %v", what, err)
				}
			}
		}
		for operation := range a.Counts() {
			if !strings.HasPrefix(operation, "Describe") {
				t.Errorf("%s was called", operation)
			}
		}
		if !strings.Contains(a.log.String(), "resized to 3") {
			t.Errorf("it says %s", a.log)
		}
	})
}

// TestUninstall takes protection off, but of groups that protect by themselves.
func TestUninstall(t *testing.T) {
	in(t, func(c *aws.Config) { c.Protect = func(model.GroupID) bool { return true } }, func(a *account) {
		a.add(awsfake.Group{Name: "ours"})
		a.add(awsfake.Group{Name: "theirs", ProtectNew: true})
		a.grown("ours", 2)
		a.grown("theirs", 2)
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { _ = a.Run(ctx, func([]model.NodeGroup) {}) })
		a.pass(time.Minute)
		cancel()
		running.Wait()
		protected := func() (out []string) {
			for _, i := range a.All() {
				if i.Protected {
					out = append(out, i.Group)
				}
			}
			return sorted(out)
		}
		if got := protected(); len(got) != 4 {
			t.Errorf("protected are %v", got)
		}
		a.must(a.Uninstall(context.Background()))
		if got := protected(); !slices.Equal(got, []string{"theirs", "theirs"}) {
			t.Errorf("protected are %v afterwards", got)
		}
	})
}

// TestRun: groups are declared at once, and again when they change.
func TestRun(t *testing.T) {
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "a", Max: 3})
		declared := make(chan []model.NodeGroup, 10)
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { _ = a.Run(ctx, func(g []model.NodeGroup) { declared <- g }) })
		defer func() { cancel(); running.Wait() }()
		if g := <-declared; len(g) != 1 || g[0].Max != 3 {
			t.Errorf("declared %+v", g)
		}
		a.Edit("a", func(g *awsfake.Group) { g.Max = 5 })
		a.add(awsfake.Group{Name: "b"})
		if g := <-declared; len(g) != 2 || g[0].Max != 5 {
			t.Errorf("declared %+v", g)
		}
		began := time.Now()
		a.SetGroups([]model.NodeGroup{{ID: "a", Annotations: map[string]string{"hearth.dev/role": "runner"}}})
		if g := <-declared; g[0].Annotations["hearth.dev/role"] != "runner" || time.Since(began) > 30*time.Second {
			t.Errorf("declared %+v after %s", g, time.Since(began))
		}
	})
}

// TestOverTheWire: the same over HTTP, as the SDK connects.
func TestOverTheWire(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "test")
	cloud := awsfake.New(time.Now(), awsfake.Timing{})
	cloud.AddGroup(awsfake.Group{Name: "a", Max: 2, Capacity: -1, LaunchConfig: "m5.large"})
	server := newServer(t, cloud)
	clients, err := aws.Connect(t.Context(), "eu-central-1", server)
	if err != nil {
		t.Fatal(err)
	}
	backend, err := aws.New(aws.Config{
		AutoScaling: clients.AutoScaling, EC2: clients.EC2, EKS: clients.EKS, Region: clients.Region,
		Groups: []model.NodeGroup{{ID: "a"}}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := backend.Resize(t.Context(), "a", 2); err != nil {
		t.Fatal(err)
	}
	cloud.Advance(time.Now())
	s, err := backend.Snapshot(t.Context())
	if err != nil || s.Groups["a"].Desired != 2 || len(s.Groups["a"].Instances) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	http.DefaultClient.CloseIdleConnections()
}

func isUnderWay(err error) bool { return errors.Is(err, model.ErrUnderWay) }

func isDryRun(err error) bool { return errors.Is(err, model.ErrDryRun) }

// newServer serves an AWS on loopback and returns its URL.
func newServer(t *testing.T, cloud *awsfake.Cloud) string {
	server := httptest.NewServer(cloud)
	t.Cleanup(server.Close)
	return server.URL
}
