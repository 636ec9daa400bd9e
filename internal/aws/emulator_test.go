package aws_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	astypes "github.com/aws/aws-sdk-go-v2/service/autoscaling/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/internal/aws"
	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
)

// life takes a group through growing, removing, parking and unparking, as the
// core does, and tells what comes of each step.
func life(t *testing.T, b *aws.Backend, id model.GroupID, pass func()) (told []string) {
	t.Helper()
	ctx := context.Background()
	tell := func(what string) { told = append(told, what) }
	groups, err := b.Discover(ctx)
	if err != nil || len(groups) != 1 {
		t.Fatalf("%d groups were found: %v", len(groups), err)
	}
	g := groups[0]
	tell(fmt.Sprintf("group %s from %d to %d of %s with %s CPU", g.ID, g.Min, g.Max, g.Template.InstanceType, g.Template.Capacity["cpu"]))
	state := func() (s model.GroupSnapshot, text string) {
		t.Helper()
		all, err := b.Snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := all.Errors[id]; err != nil {
			t.Fatal(err)
		}
		s = all.Groups[id]
		n := map[model.InstanceState]int{}
		for _, i := range s.Instances {
			n[i.State]++
		}
		return s, fmt.Sprintf("desired %d, running %d, stopped %d", s.Desired, n[model.InstanceRunning], n[model.InstanceStopped])
	}
	// until repeats an act as the core does, until the state is as wanted.
	until := func(what, want string, act func() error) {
		t.Helper()
		last := ""
		for range 100 {
			if err := act(); err != nil && !errors.Is(err, model.ErrUnderWay) {
				t.Fatalf("%s: %v", what, err)
			}
			pass()
			s, text := state()
			if text == want {
				tell(what + ": " + text)
				return
			}
			if len(s.Instances) > 0 { // a group at rest is left out
				last = text
			}
		}
		t.Fatalf("%s: %s, want %s", what, last, want)
	}
	until("grown to 3", "desired 3, running 3, stopped 0", func() error { return b.Resize(ctx, id, 3) })
	s, _ := state()
	for range 100 { // a snapshot that has them all
		if len(s.Instances) == 3 {
			break
		}
		pass()
		s, _ = state()
	}
	var ids []model.InstanceID
	for _, i := range s.Instances {
		ids = append(ids, i.ID)
	}
	slices.Sort(ids)
	until("one removed", "desired 2, running 2, stopped 0", func() error { return b.Terminate(ctx, id, ids[:1]) })
	until("one parked", "desired 1, running 1, stopped 1", func() error { return b.Stop(ctx, id, ids[1:2]) })
	until("unparked", "desired 2, running 2, stopped 0", func() error { return b.Start(ctx, id, ids[1:2]) })
	// One by one: not every emulator knows that a call takes several.
	until("another removed", "desired 1, running 1, stopped 0", func() error { return b.Terminate(ctx, id, ids[1:2]) })
	until("the last removed", "desired 0, running 0, stopped 0", func() error { return b.Terminate(ctx, id, ids[2:]) })
	return told
}

// TestOutcomesOfAnEmulator: what our stand-in answers is what another emulator
// of AWS does, if AWS_ENDPOINT_URL names one. Whether or not, our own goes
// through the same.
func TestOutcomesOfAnEmulator(t *testing.T) {
	var ours []string
	in(t, nil, func(a *account) {
		a.add(awsfake.Group{Name: "runners", Max: 5, Zones: []string{"us-east-1a"}})
		ours = life(t, a.Backend, "runners", func() { a.pass(10 * time.Second) })
	})
	t.Logf("%q", ours)
	if len(ours) != 7 {
		t.Errorf("%d steps", len(ours))
	}
	endpoint := os.Getenv("AWS_ENDPOINT_URL")
	if endpoint == "" {
		return
	}
	clients, err := aws.Connect(t.Context(), "us-east-1", endpoint)
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("hearth-%d", time.Now().UnixNano())
	images, err := clients.EC2.DescribeImages(t.Context(), &ec2.DescribeImagesInput{})
	if err != nil || len(images.Images) == 0 {
		t.Fatalf("the emulator has %v images: %v", images, err)
	}
	template, err := clients.EC2.CreateLaunchTemplate(t.Context(), &ec2.CreateLaunchTemplateInput{
		LaunchTemplateName: &name, LaunchTemplateData: &ec2types.RequestLaunchTemplateData{ImageId: images.Images[0].ImageId, InstanceType: "m5.2xlarge"},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = clients.AutoScaling.CreateAutoScalingGroup(t.Context(), &autoscaling.CreateAutoScalingGroupInput{
		AutoScalingGroupName: &name, MinSize: awssdk.Int32(0), MaxSize: awssdk.Int32(5), DesiredCapacity: awssdk.Int32(0), AvailabilityZones: []string{"us-east-1a"},
		LaunchTemplate: &astypes.LaunchTemplateSpecification{LaunchTemplateId: template.LaunchTemplate.LaunchTemplateId, Version: awssdk.String("$Default")},
		Tags:           []astypes.Tag{{Key: awssdk.String("hearth-test"), Value: &name, ResourceId: &name, ResourceType: awssdk.String("auto-scaling-group"), PropagateAtLaunch: awssdk.Bool(false)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, err := clients.AutoScaling.DeleteAutoScalingGroup(context.Background(), &autoscaling.DeleteAutoScalingGroupInput{AutoScalingGroupName: &name, ForceDelete: awssdk.Bool(true)})
		if err != nil {
			t.Error(err)
		}
	})
	b, err := aws.New(aws.Config{
		AutoScaling: clients.AutoScaling, EC2: clients.EC2, EKS: clients.EKS, Region: "us-east-1",
		Tags: []string{"hearth-test=" + name}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	theirs := life(t, b, model.GroupID(name), func() { time.Sleep(2500 * time.Millisecond) }) // it keeps real time
	theirs[0] = "group runners" + theirs[0][len("group ")+len(name):]
	if diff := cmp.Diff(theirs, ours); diff != "" {
		t.Errorf("-theirs +ours:\n%s", diff)
	}
}
