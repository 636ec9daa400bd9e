package aws

import (
	"context"
	"fmt"
	"slices"
	"strings"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	astypes "github.com/aws/aws-sdk-go-v2/service/autoscaling/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Finding is something that a person should know of, and mostly mend.
type Finding struct {
	Group model.GroupID // empty when it is about all
	// Bad: it keeps Hearth from working as configured; else it is advice.
	Bad  bool
	Text string
}

// Check looks for what will not work: credentials, permissions, groups that
// cannot be found or served, settings that get in the way. It changes nothing:
// permissions are tried by dry runs and by calls that cannot succeed. The groups
// that it returns are those that Discover declares.
func (b *Backend) Check(ctx context.Context) ([]model.NodeGroup, []Finding) {
	var out []Finding
	bad := func(id model.GroupID, format string, args ...any) {
		out = append(out, Finding{id, true, fmt.Sprintf(format, args...)})
	}
	asgs, err := b.listAll(ctx)
	if err != nil {
		bad("", "Auto Scaling groups cannot be read: %v", err)
		return nil, out
	}
	if len(asgs) == 0 {
		bad("", "no Auto Scaling group has the tags %s, and nodeGroups names none that exists", strings.Join(b.cfg.Tags, " and "))
		return nil, out
	}
	for _, g := range b.named() {
		if !slices.ContainsFunc(asgs, func(a astypes.AutoScalingGroup) bool { return awssdk.ToString(a.AutoScalingGroupName) == string(g.ID) }) {
			bad(g.ID, "there is no Auto Scaling group of this name")
		}
	}
	groups, err := b.Discover(ctx)
	if err != nil {
		bad("", "%v", err)
		return nil, out
	}
	for _, asg := range asgs {
		id := model.GroupID(awssdk.ToString(asg.AutoScalingGroupName))
		at := slices.IndexFunc(groups, func(g model.NodeGroup) bool { return g.ID == id })
		if at < 0 {
			_, err := b.template(ctx, asg)
			bad(id, "it is left out, because what a node looks like is not known: %v", err)
			continue
		}
		out = append(out, b.checkGroup(ctx, asg, groups[at])...)
	}
	return groups, append(out, b.checkPermissions(ctx, asgs)...)
}

func (b *Backend) checkGroup(ctx context.Context, asg astypes.AutoScalingGroup, g model.NodeGroup) (out []Finding) {
	tell := func(bad bool, format string, args ...any) {
		out = append(out, Finding{g.ID, bad, fmt.Sprintf(format, args...)})
	}
	if weighted(asg) {
		tell(true, "it counts its capacity in weights, not instances: not supported")
	}
	rebalances := len(asg.AvailabilityZones) > 1
	for _, p := range asg.SuspendedProcesses {
		switch name := awssdk.ToString(p.ProcessName); name {
		case "Launch", "Terminate":
			tell(true, "its process %s is suspended: it cannot scale", name)
		case "AZRebalance":
			rebalances = false
		}
	}
	if rebalances {
		tell(false, "its process AZRebalance is not suspended: it launches instances that nobody asked for; those of runner groups are protected from being ended by it")
	}
	if said := b.templates.assumed[g.ID]; said != "" {
		tell(false, "%s", said)
	}
	out = append(out, b.checkRoom(ctx, asg)...)
	runner, parks := g.Annotations[model.Prefix+"/role"] == "runner", g.Annotations[model.Prefix+"/park"] == "stop"
	if !runner {
		return out
	}
	if parks {
		if tagsOf(asg)["eks:nodegroup-name"] != "" {
			tell(true, "park: stop is not done in EKS managed node groups: instances are terminated")
		}
		if spotOnly(asg) {
			tell(true, "park: stop cannot be done with spot instances: they are terminated")
		}
		if info, ok := b.templates.types[g.Template.InstanceType]; ok && awssdk.ToBool(info.InstanceStorageSupported) {
			tell(false, "%s has an instance store, which is lost when an instance stops: park only if the engine's cache is on EBS", g.Template.InstanceType)
		}
	}
	answer, err := b.cfg.AutoScaling.DescribeInstanceRefreshes(ctx, &autoscaling.DescribeInstanceRefreshesInput{
		AutoScalingGroupName: asg.AutoScalingGroupName, MaxRecords: awssdk.Int32(1),
	})
	if err != nil {
		tell(true, "its instance refreshes cannot be read: %v", err)
		return out
	}
	for _, r := range answer.InstanceRefreshes {
		p := r.Preferences
		if p == nil {
			p = &astypes.RefreshPreferences{}
		}
		if p.ScaleInProtectedInstances == "" || p.ScaleInProtectedInstances == astypes.ScaleInProtectedInstancesWait {
			tell(false, "its last instance refresh waits for instances that are protected from scale in, as Hearth protects all: set ScaleInProtectedInstances to Refresh or Ignore")
		}
		if parks && (p.StandbyInstances == "" || p.StandbyInstances == astypes.StandbyInstancesWait) {
			tell(false, "its last instance refresh waits for instances in standby, which parked ones are: set StandbyInstances to Terminate or Ignore")
		}
	}
	return out
}

// checkRoom compares the free addresses of the group's subnets with the
// instances that it may still launch. Those in standby, as parked ones are, do
// not count towards its maximum and keep their addresses. Pods may need more.
func (b *Backend) checkRoom(ctx context.Context, asg astypes.AutoScalingGroup) []Finding {
	id := model.GroupID(awssdk.ToString(asg.AutoScalingGroupName))
	var subnets []string
	for s := range strings.SplitSeq(awssdk.ToString(asg.VPCZoneIdentifier), ",") {
		if s = strings.TrimSpace(s); s != "" {
			subnets = append(subnets, s)
		}
	}
	if len(subnets) == 0 {
		return nil
	}
	answer, err := b.cfg.EC2.DescribeSubnets(ctx, &ec2.DescribeSubnetsInput{SubnetIds: subnets})
	if err != nil {
		return []Finding{{id, true, fmt.Sprintf("its subnets cannot be read: %v", err)}}
	}
	free, wanted := 0, int(awssdk.ToInt32(asg.MaxSize))
	for _, s := range answer.Subnets {
		free += int(awssdk.ToInt32(s.AvailableIpAddressCount))
	}
	for _, i := range asg.Instances {
		if i.LifecycleState != astypes.LifecycleStateStandby {
			wanted--
		}
	}
	if free >= wanted {
		return nil
	}
	return []Finding{{id, false, fmt.Sprintf("its subnets (%s) have %d free addresses, and it may launch %d more instances: add a subnet or lower its maximum size",
		strings.Join(subnets, ", "), free, wanted)}}
}

// nobody is an instance that does not exist.
const nobody = "i-00000000000000000"

// checkPermissions tries each call that changes something.
func (b *Backend) checkPermissions(ctx context.Context, asgs []astypes.AutoScalingGroup) (out []Finding) {
	asg := asgs[0]
	group, ids, yes := asg.AutoScalingGroupName, []string{nobody}, awssdk.Bool(true)
	for _, g := range asgs {
		if len(g.Instances) > 0 {
			ids = []string{awssdk.ToString(g.Instances[0].InstanceId)} // of dry runs
			break
		}
	}
	tries := []struct {
		action string
		call   func() error
	}{
		{"autoscaling:SetDesiredCapacity", func() error { // far above the maximum: refused
			_, err := b.cfg.AutoScaling.SetDesiredCapacity(ctx, &autoscaling.SetDesiredCapacityInput{AutoScalingGroupName: group, DesiredCapacity: awssdk.Int32(awssdk.ToInt32(asg.MaxSize) + 100000)})
			return err
		}},
		{"autoscaling:SetInstanceProtection", func() error {
			_, err := b.cfg.AutoScaling.SetInstanceProtection(ctx, &autoscaling.SetInstanceProtectionInput{AutoScalingGroupName: group, InstanceIds: []string{nobody}, ProtectedFromScaleIn: yes})
			return err
		}},
		{"autoscaling:EnterStandby", func() error {
			_, err := b.cfg.AutoScaling.EnterStandby(ctx, &autoscaling.EnterStandbyInput{AutoScalingGroupName: group, InstanceIds: []string{nobody}, ShouldDecrementDesiredCapacity: yes})
			return err
		}},
		{"autoscaling:ExitStandby", func() error {
			_, err := b.cfg.AutoScaling.ExitStandby(ctx, &autoscaling.ExitStandbyInput{AutoScalingGroupName: group, InstanceIds: []string{nobody}})
			return err
		}},
		{"autoscaling:TerminateInstanceInAutoScalingGroup", func() error {
			_, err := b.cfg.AutoScaling.TerminateInstanceInAutoScalingGroup(ctx, &autoscaling.TerminateInstanceInAutoScalingGroupInput{AutoScalingGroupName: group, InstanceIds: []string{nobody, nobody}, ShouldDecrementDesiredCapacity: yes})
			return err
		}},
		{"ec2:StopInstances", func() error {
			_, err := b.cfg.EC2.StopInstances(ctx, &ec2.StopInstancesInput{InstanceIds: ids, DryRun: yes})
			return err
		}},
		{"ec2:StartInstances", func() error {
			_, err := b.cfg.EC2.StartInstances(ctx, &ec2.StartInstancesInput{InstanceIds: ids, DryRun: yes})
			return err
		}},
		{"ec2:CreateTags", func() error {
			_, err := b.cfg.EC2.CreateTags(ctx, &ec2.CreateTagsInput{Resources: ids, DryRun: yes, Tags: []ec2types.Tag{
				{Key: awssdk.String(markerTag), Value: awssdk.String(parking)}, {Key: awssdk.String(sinceTag), Value: awssdk.String("")},
			}})
			return err
		}},
	}
	for _, try := range tries {
		if strings.HasPrefix(try.action, "ec2:") && ids[0] == nobody {
			out = append(out, Finding{Text: try.action + " was not tried: there is no instance"})
			continue
		}
		if err := try.call(); denied(err) {
			out = append(out, Finding{Bad: true, Text: fmt.Sprintf("%s is not permitted: %v", try.action, err)})
		} else if err != nil && !isCode(err, "ValidationError", "DryRunOperation", "ScalingActivityInProgress", "ResourceContention") {
			out = append(out, Finding{Text: fmt.Sprintf("%s could not be tried: %v", try.action, err)})
		}
	}
	return out
}

// denied says whether a call failed for lack of a permission or credentials.
func denied(err error) bool {
	return isCode(err, "AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "ExpiredToken", "InvalidClientTokenId", "UnrecognizedClientException")
}
