package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/protos/expander"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

func node(id model.InstanceID) *pb.ExternalGrpcNode {
	return &pb.ExternalGrpcNode{ProviderID: string(id), Name: "node", Labels: map[string]string{"a": "b"}}
}

// TestReads asks everything of a fleet of two groups with two nodes each.
func TestReads(t *testing.T) {
	fleet := newFakeFleet(2, 2)
	fleet.change("group-1", func(v *nodegroups.View) {
		v.Target = 5
		v.Settings.NodePrice = new(0.5)
		v.Instances[1].Status = nodegroups.StatusDeleting
		v.Instances = append(v.Instances,
			nodegroups.InstanceView{ID: "kwok://group-1/new", Status: nodegroups.StatusCreating},
			nodegroups.InstanceView{ID: "placeholder-1", Status: nodegroups.StatusCreating, Failure: &model.LaunchFailure{Class: model.FailureCapacity, Message: "no more kwok.8x"}},
			nodegroups.InstanceView{ID: "placeholder-2", Status: nodegroups.StatusCreating, Failure: &model.LaunchFailure{Class: model.FailureQuota, Message: "limit"}},
			nodegroups.InstanceView{ID: "placeholder-3", Status: nodegroups.StatusCreating, Failure: &model.LaunchFailure{Message: "who knows"}})
	})
	client := serve(t, fleet.show()).cloudClient(t)
	ctx := brief(t)
	group1 := &pb.NodeGroup{Id: "group-1", MinSize: 0, MaxSize: 4, Debug: "2 ready"}
	healthy := func(id model.InstanceID, state pb.InstanceStatus_InstanceState) *pb.Instance {
		return &pb.Instance{Id: string(id), Status: &pb.InstanceStatus{InstanceState: state}}
	}
	failed := func(id, code, message string, class int32) *pb.Instance {
		return &pb.Instance{Id: id, Status: &pb.InstanceStatus{
			InstanceState: pb.InstanceStatus_instanceCreating,
			ErrorInfo:     &pb.InstanceErrorInfo{ErrorCode: code, ErrorMessage: message, InstanceErrorClass: class},
		}}
	}
	forNode := func(node *pb.ExternalGrpcNode) func() (any, error) {
		return func() (any, error) { return client.NodeGroupForNode(ctx, &pb.NodeGroupForNodeRequest{Node: node}) }
	}
	noGroup := &pb.NodeGroupForNodeResponse{NodeGroup: &pb.NodeGroup{}}
	start := time.Unix(1_000_000, 0)
	for _, tc := range []struct {
		name string
		call func() (any, error)
		want any
	}{
		{"NodeGroups", func() (any, error) { return client.NodeGroups(ctx, &pb.NodeGroupsRequest{}) },
			&pb.NodeGroupsResponse{NodeGroups: []*pb.NodeGroup{{Id: "group-0", MaxSize: 4, Debug: "2 ready"}, group1}}},
		{"NodeGroupForNode", forNode(node(instance(1, 0))), &pb.NodeGroupForNodeResponse{NodeGroup: group1}},
		{"NodeGroupForNode/on its way out", forNode(node(instance(1, 1))), noGroup},
		{"NodeGroupForNode/unknown", forNode(node("aws:///eu/i-1")), noGroup},
		{"NodeGroupForNode/no providerID", forNode(&pb.ExternalGrpcNode{Name: "control-plane"}), noGroup},
		{"NodeGroupForNode/very long providerID", forNode(node(model.InstanceID(strings.Repeat("x", 100_000)))), noGroup},
		{"NodeGroupTargetSize", func() (any, error) {
			return client.NodeGroupTargetSize(ctx, &pb.NodeGroupTargetSizeRequest{Id: "group-1"})
		}, &pb.NodeGroupTargetSizeResponse{TargetSize: 5}},
		{"NodeGroupNodes", func() (any, error) { return client.NodeGroupNodes(ctx, &pb.NodeGroupNodesRequest{Id: "group-1"}) },
			&pb.NodeGroupNodesResponse{Instances: []*pb.Instance{
				healthy(instance(1, 0), pb.InstanceStatus_instanceRunning),
				healthy(instance(1, 1), pb.InstanceStatus_instanceDeleting),
				healthy("kwok://group-1/new", pb.InstanceStatus_instanceCreating),
				failed("placeholder-1", "capacity", "no more kwok.8x", 1),
				failed("placeholder-2", "quota", "limit", 1),
				failed("placeholder-3", "unknown", "who knows", 99),
			}}},
		{"GPULabel", func() (any, error) { return client.GPULabel(ctx, &pb.GPULabelRequest{}) }, &pb.GPULabelResponse{Label: "hearth.dev/gpu"}},
		{"GetAvailableGPUTypes", func() (any, error) { return client.GetAvailableGPUTypes(ctx, &pb.GetAvailableGPUTypesRequest{}) },
			&pb.GetAvailableGPUTypesResponse{}},
		{"PricingNodePrice/since 1.35", func() (any, error) {
			return client.PricingNodePrice(ctx, &pb.PricingNodePriceRequest{Node: node(instance(1, 0)), StartTimestamp: timestamppb.New(start), EndTimestamp: timestamppb.New(start.Add(3 * time.Hour))})
		}, &pb.PricingNodePriceResponse{Price: 1.5}},
		{"PricingNodePrice/before", func() (any, error) {
			return client.PricingNodePrice(ctx, &pb.PricingNodePriceRequest{Node: node(instance(1, 0)), StartTime: &pb.LegacyTime{Seconds: start.Unix()}, EndTime: &pb.LegacyTime{Seconds: start.Unix() + 1800}})
		}, &pb.PricingNodePriceResponse{Price: 0.25}},
		{"PricingNodePrice/of a template", func() (any, error) {
			template := &pb.ExternalGrpcNode{Name: "template", Labels: map[string]string{"hearth.dev/node-group": "group-1"}}
			return client.PricingNodePrice(ctx, &pb.PricingNodePriceRequest{Node: template, StartTimestamp: timestamppb.New(start), EndTimestamp: timestamppb.New(start.Add(time.Hour))})
		}, &pb.PricingNodePriceResponse{Price: 0.5}},
		{"Refresh", func() (any, error) { return client.Refresh(ctx, &pb.RefreshRequest{}) }, &pb.RefreshResponse{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tc.call()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestTemplate reads the template as both generations of CA do.
func TestTemplate(t *testing.T) {
	fleet := newFakeFleet(2, 1)
	fleet.change("group-1", func(v *nodegroups.View) {
		v.Group.Template = model.Template{
			Capacity:    map[string]string{"cpu": "4", "memory": "8Gi", "pods": "10"},
			Allocatable: map[string]string{"cpu": "3500m", "memory": "7Gi", "pods": "10"},
			Labels:      map[string]string{"kubernetes.io/arch": "arm64", "cache.hearth.dev/90db8b73387fa482": "warm"},
		}
	})
	client := serve(t, fleet.show()).cloudClient(t)
	template := func(t *testing.T, id string) v1.Node {
		t.Helper()
		resp, err := client.NodeGroupTemplateNodeInfo(brief(t), &pb.NodeGroupTemplateNodeInfoRequest{Id: id})
		must(t, err)
		var since135, before v1.Node
		must(t, since135.Unmarshal(resp.GetNodeBytes()))
		must(t, before.Unmarshal(resp.GetNodeInfo()))
		if diff := cmp.Diff(since135, before); diff != "" {
			t.Errorf("the two forms differ: %s", diff)
		}
		return since135
	}
	list := func(cpu, memory, pods string) v1.ResourceList {
		return v1.ResourceList{"cpu": resource.MustParse(cpu), "memory": resource.MustParse(memory), "pods": resource.MustParse(pods)}
	}
	check := func(t *testing.T, got v1.Node, labels map[string]string, taints []v1.Taint, capacity, allocatable v1.ResourceList) {
		t.Helper()
		if len(got.Status.Conditions) != 1 || got.Status.Conditions[0].Type != v1.NodeReady || got.Status.Conditions[0].Status != v1.ConditionTrue {
			t.Errorf("conditions: %v", got.Status.Conditions)
		}
		for what, diff := range map[string]string{
			"labels": cmp.Diff(labels, got.Labels), "taints": cmp.Diff(taints, got.Spec.Taints),
			"capacity": cmp.Diff(capacity, got.Status.Capacity), "allocatable": cmp.Diff(allocatable, got.Status.Allocatable),
		} {
			if diff != "" {
				t.Errorf("%s: %s", what, diff)
			}
		}
	}
	t.Run("all there is", func(t *testing.T) {
		check(t, template(t, "group-0"), map[string]string{
			"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": "template-group-0",
			"topology.kubernetes.io/zone": "a", "node.kubernetes.io/instance-type": "kwok.8x",
			"hearth.dev/node-group": "group-0", "example.com/team": "a",
		}, []v1.Taint{{Key: "ci", Value: "true", Effect: "NoSchedule"}}, list("8", "32Gi", "110"), list("8", "32Gi", "110"))
	})
	t.Run("allocatable and architecture of its own", func(t *testing.T) {
		check(t, template(t, "group-1"), map[string]string{
			"kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64", "kubernetes.io/hostname": "template-group-1", "hearth.dev/node-group": "group-1",
		}, nil, list("4", "8Gi", "10"), list("3500m", "7Gi", "10"))
	})
	t.Run("changes with the next Refresh", func(t *testing.T) {
		fleet.change("group-1", func(v *nodegroups.View) { v.Group.Template.Zone = "b" })
		if zone := template(t, "group-1").Labels["topology.kubernetes.io/zone"]; zone != "" {
			t.Errorf("before the Refresh the zone is %q", zone)
		}
		_, err := client.Refresh(brief(t), &pb.RefreshRequest{})
		must(t, err)
		if zone := template(t, "group-1").Labels["topology.kubernetes.io/zone"]; zone != "b" {
			t.Errorf("after the Refresh the zone is %q, want b", zone)
		}
	})
	t.Run("a template that cannot be described is an error, not an empty answer", func(t *testing.T) {
		fleet.write("group-1", func(v *nodegroups.View) { v.Group.Template.Capacity = map[string]string{"cpu": "many"} })
		resp, err := client.NodeGroupTemplateNodeInfo(brief(t), &pb.NodeGroupTemplateNodeInfoRequest{Id: "group-1"})
		if status.Code(err) != codes.Internal || resp != nil {
			t.Errorf("got %v, %v", resp, err)
		}
	})
}

// TestOptions lays a group's settings over CA's defaults, which come in either
// form and go in both.
func TestOptions(t *testing.T) {
	fleet := newFakeFleet(2, 1)
	fleet.change("group-1", func(v *nodegroups.View) {
		v.Settings.Options = nodegroups.Options{
			ScaleDownUtilizationThreshold:    new(0.1),
			ScaleDownGPUUtilizationThreshold: new(0.2),
			ScaleDownUnneededTime:            new(10 * time.Second),
			ScaleDownUnreadyTime:             new(20 * time.Second),
			MaxNodeProvisionTime:             new(30 * time.Second),
			ZeroOrMaxNodeScaling:             new(true),
			IgnoreDaemonSetsUtilization:      new(true),
		}
	})
	client := serve(t, fleet.show()).cloudClient(t)
	since135 := &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold: 0.5, ScaleDownGpuUtilizationThreshold: 0.6,
		ScaleDownUnneededDuration: durationpb.New(10 * time.Minute), ScaleDownUnreadyDuration: durationpb.New(20 * time.Minute), MaxNodeProvisionDuration: durationpb.New(15 * time.Minute),
	}
	before := &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold: 0.5, ScaleDownGpuUtilizationThreshold: 0.6,
		ScaleDownUnneededTime: legacy(10 * time.Minute), ScaleDownUnreadyTime: legacy(20 * time.Minute), MaxNodeProvisionTime: legacy(15 * time.Minute),
	}
	both := &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold: 0.5, ScaleDownGpuUtilizationThreshold: 0.6,
		ScaleDownUnneededDuration: durationpb.New(10 * time.Minute), ScaleDownUnreadyDuration: durationpb.New(20 * time.Minute), MaxNodeProvisionDuration: durationpb.New(15 * time.Minute),
		ScaleDownUnneededTime: legacy(10 * time.Minute), ScaleDownUnreadyTime: legacy(20 * time.Minute), MaxNodeProvisionTime: legacy(15 * time.Minute),
	}
	set := &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold: 0.1, ScaleDownGpuUtilizationThreshold: 0.2, ZeroOrMaxNodeScaling: true, IgnoreDaemonSetsUtilization: true,
		ScaleDownUnneededDuration: durationpb.New(10 * time.Second), ScaleDownUnreadyDuration: durationpb.New(20 * time.Second), MaxNodeProvisionDuration: durationpb.New(30 * time.Second),
		ScaleDownUnneededTime: legacy(10 * time.Second), ScaleDownUnreadyTime: legacy(20 * time.Second), MaxNodeProvisionTime: legacy(30 * time.Second),
	}
	other := &pb.NodeGroupAutoscalingOptions{ScaleDownUtilizationThreshold: 0.9, ScaleDownUnneededDuration: durationpb.New(time.Minute), ZeroOrMaxNodeScaling: true}
	otherBoth := &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold: 0.9, ZeroOrMaxNodeScaling: true,
		ScaleDownUnneededDuration: durationpb.New(time.Minute), ScaleDownUnreadyDuration: durationpb.New(0), MaxNodeProvisionDuration: durationpb.New(0),
		ScaleDownUnneededTime: legacy(time.Minute), ScaleDownUnreadyTime: legacy(0), MaxNodeProvisionTime: legacy(0),
	}
	for _, tc := range []struct {
		name, group    string
		defaults, want *pb.NodeGroupAutoscalingOptions
	}{
		{"nothing set, since 1.35", "group-0", since135, both},
		{"nothing set, before", "group-0", before, both},
		{"everything set, since 1.35", "group-1", since135, set},
		{"everything set, before", "group-1", before, set},
		{"other defaults are not confused with those before", "group-0", other, otherBoth},
		{"the first ones again", "group-0", since135, both},
		{"no defaults: CA uses its own", "group-1", nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, err := client.NodeGroupGetOptions(brief(t), &pb.NodeGroupAutoscalingOptionsRequest{Id: tc.group, Defaults: tc.defaults})
			must(t, err)
			if diff := cmp.Diff(tc.want, resp.GetNodeGroupAutoscalingOptions(), protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("an annotation takes effect at once", func(t *testing.T) {
		fleet.write("group-0", func(v *nodegroups.View) { v.Settings.Options.ScaleDownUnneededTime = new(time.Second) })
		resp, err := client.NodeGroupGetOptions(brief(t), &pb.NodeGroupAutoscalingOptionsRequest{Id: "group-0", Defaults: since135})
		must(t, err)
		if got := resp.GetNodeGroupAutoscalingOptions().ScaleDownUnneeded(); got != time.Second {
			t.Errorf("got %s, want 1s", got)
		}
	})
}

func legacy(d time.Duration) *pb.LegacyDuration { return &pb.LegacyDuration{Duration: int64(d)} }

// TestWrites follows sizes and instances through CA's writes.
func TestWrites(t *testing.T) {
	fleet := newFakeFleet(1, 3)
	client := serve(t, fleet.show()).cloudClient(t)
	ctx := brief(t)
	target := func(want int32) {
		t.Helper()
		resp, err := client.NodeGroupTargetSize(ctx, &pb.NodeGroupTargetSizeRequest{Id: "group-0"})
		must(t, err)
		if resp.GetTargetSize() != want {
			t.Errorf("the target size is %d, want %d", resp.GetTargetSize(), want)
		}
	}
	_, err := client.NodeGroupIncreaseSize(ctx, &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 2})
	must(t, err)
	target(5)
	_, err = client.NodeGroupDecreaseTargetSize(ctx, &pb.NodeGroupDecreaseTargetSizeRequest{Id: "group-0", Delta: -7})
	must(t, err)
	target(3)
	remove := &pb.NodeGroupDeleteNodesRequest{Id: "group-0", Nodes: []*pb.ExternalGrpcNode{node(instance(0, 1)), node(instance(0, 2)), node(instance(0, 1))}}
	for range 2 { // idempotent, and a node that is named twice is one node
		_, err = client.NodeGroupDeleteNodes(ctx, remove)
		must(t, err)
		target(1)
	}
	resp, err := client.NodeGroupForNode(ctx, &pb.NodeGroupForNodeRequest{Node: node(instance(0, 1))})
	must(t, err)
	if id := resp.GetNodeGroup().GetId(); id != "" {
		t.Errorf("a deleted node still belongs to %q", id)
	}
	was, _ := fleet.forgotten()
	_, err = client.Cleanup(ctx, &pb.CleanupRequest{})
	must(t, err)
	if now, _ := fleet.forgotten(); now != was+1 {
		t.Errorf("Cleanup: forgot %d times, want once", now-was)
	}
}

// TestRefusals is every bad request with its code. None changes anything.
func TestRefusals(t *testing.T) {
	fleet := newFakeFleet(2, 2)
	fleet.busy[instance(0, 1)] = true
	r := serve(t, fleet.show())
	client := r.cloudClient(t)
	ctx := brief(t)
	long := strings.Repeat("x", maxID+1)
	hour := timestamppb.New(time.Unix(3600, 0))
	fleet.change("group-1", func(v *nodegroups.View) { v.Settings.NodePrice = new(1.0) })
	fleet.show()

	increase := func(id string, delta int32) func() error {
		return func() error {
			_, err := client.NodeGroupIncreaseSize(ctx, &pb.NodeGroupIncreaseSizeRequest{Id: id, Delta: delta})
			return err
		}
	}
	decrease := func(id string, delta int32) func() error {
		return func() error {
			_, err := client.NodeGroupDecreaseTargetSize(ctx, &pb.NodeGroupDecreaseTargetSizeRequest{Id: id, Delta: delta})
			return err
		}
	}
	remove := func(id string, nodes ...*pb.ExternalGrpcNode) func() error {
		return func() error {
			_, err := client.NodeGroupDeleteNodes(ctx, &pb.NodeGroupDeleteNodesRequest{Id: id, Nodes: nodes})
			return err
		}
	}
	price := func(req *pb.PricingNodePriceRequest) func() error {
		return func() error {
			_, err := client.PricingNodePrice(ctx, req)
			return err
		}
	}
	type refusal struct {
		name string
		call func() error
		want codes.Code
		text string
	}
	cases := []refusal{
		{"NodeGroupForNode/no node", func() error {
			_, err := client.NodeGroupForNode(ctx, &pb.NodeGroupForNodeRequest{})
			return err
		}, codes.InvalidArgument, "a node is required"},
		{"IncreaseSize/zero", increase("group-0", 0), codes.InvalidArgument, "delta must be positive, got 0"},
		{"IncreaseSize/negative", increase("group-0", -1), codes.InvalidArgument, "delta must be positive, got -1"},
		{"IncreaseSize/over max", increase("group-0", 3), codes.OutOfRange, "exceeds the maximum of 4"},
		{"IncreaseSize/over any max", increase("group-0", math.MaxInt32), codes.OutOfRange, "exceeds the maximum of 4"},
		{"DecreaseTargetSize/zero", decrease("group-0", 0), codes.InvalidArgument, "delta must be negative, got 0"},
		{"DecreaseTargetSize/positive", decrease("group-0", 1), codes.InvalidArgument, "delta must be negative, got 1"},
		{"DeleteNodes/none", remove("group-0"), codes.InvalidArgument, "1 to 1000 nodes"},
		{"DeleteNodes/empty node", remove("group-0", node(instance(0, 0)), &pb.ExternalGrpcNode{}), codes.InvalidArgument, "node 1 (\"\") has no providerID"},
		{"DeleteNodes/node without providerID", remove("group-0", &pb.ExternalGrpcNode{Name: "n"}), codes.InvalidArgument, "node 0 (\"n\") has no providerID"},
		{"DeleteNodes/too long", remove("group-0", node(model.InstanceID(long))), codes.InvalidArgument, "at most 2048 bytes"},
		{"DeleteNodes/other group's", remove("group-0", node(instance(0, 0)), node(instance(1, 0))), codes.InvalidArgument, "belongs to node group \"group-1\""},
		{"DeleteNodes/foreign form", remove("group-0", node("aws:///eu/i-1")), codes.NotFound, "unknown instance"},
		{"DeleteNodes/busy", remove("group-0", node(instance(0, 0)), node(instance(0, 1))), codes.FailedPrecondition, "is busy"},
		{"PricingNodePrice/no node", price(&pb.PricingNodePriceRequest{}), codes.InvalidArgument, "a node is required"},
		{"PricingNodePrice/no price", price(&pb.PricingNodePriceRequest{Node: node(instance(0, 0)), StartTimestamp: hour, EndTimestamp: hour}), codes.Unimplemented, "not provided"},
		{"PricingNodePrice/no group", price(&pb.PricingNodePriceRequest{Node: node("x"), StartTimestamp: hour, EndTimestamp: hour}), codes.Unimplemented, "not provided"},
		{"PricingNodePrice/no period", price(&pb.PricingNodePriceRequest{Node: node(instance(1, 0)), StartTimestamp: hour}), codes.InvalidArgument, "a start and an end"},
		{"PricingNodePrice/backwards", price(&pb.PricingNodePriceRequest{Node: node(instance(1, 0)), StartTimestamp: hour, EndTimestamp: timestamppb.New(time.Unix(1, 0))}), codes.InvalidArgument, "a start and an end"},
		{"PricingPodPrice", func() error {
			_, err := client.PricingPodPrice(ctx, &pb.PricingPodPriceRequest{})
			return err
		}, codes.Unimplemented, "not provided"},
	}
	for _, group := range []struct {
		id   string
		want codes.Code
		text string
	}{
		{"none", codes.NotFound, `unknown node group "none"`},
		{"", codes.NotFound, `unknown node group ""`},
		{long, codes.InvalidArgument, "at most 2048 bytes"},
	} {
		for name, call := range map[string]func() error{
			"IncreaseSize":       increase(group.id, 1),
			"DecreaseTargetSize": decrease(group.id, -1),
			"DeleteNodes":        remove(group.id, node(instance(0, 0))),
			"TargetSize": func() error {
				_, err := client.NodeGroupTargetSize(ctx, &pb.NodeGroupTargetSizeRequest{Id: group.id})
				return err
			},
			"Nodes": func() error {
				_, err := client.NodeGroupNodes(ctx, &pb.NodeGroupNodesRequest{Id: group.id})
				return err
			},
			"TemplateNodeInfo": func() error {
				_, err := client.NodeGroupTemplateNodeInfo(ctx, &pb.NodeGroupTemplateNodeInfoRequest{Id: group.id})
				return err
			},
			"GetOptions": func() error {
				_, err := client.NodeGroupGetOptions(ctx, &pb.NodeGroupAutoscalingOptionsRequest{Id: group.id, Defaults: &pb.NodeGroupAutoscalingOptions{}})
				return err
			},
		} {
			cases = append(cases, refusal{fmt.Sprintf("%s/group %.8q", name, group.id), call, group.want, group.text})
		}
	}
	was := fleet.View()
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.call()
			if status.Code(err) != tc.want || !strings.Contains(status.Convert(err).Message(), tc.text) {
				t.Errorf("got %v, want %s … %s", err, tc.want, tc.text)
			}
			if fleet.View() != was {
				t.Error("something changed")
			}
		})
	}
}

// TestWriterErrors is what the code of an RPC says of what happened behind it.
func TestWriterErrors(t *testing.T) {
	fleet := newFakeFleet(1, 1)
	r := serve(t, fleet.show())
	client := r.cloudClient(t)
	for _, tc := range []struct {
		name string
		err  error
		want codes.Code
		text string
	}{
		{"not recorded in time", nodegroups.Refuse(nodegroups.KindUnavailable, "group-0", "not-recorded", "not recorded"), codes.Unavailable, "not recorded"},
		{"wrapped", fmt.Errorf("recording: %w", nodegroups.Refuse(nodegroups.KindVetoed, "group-0", "busy", "busy")), codes.FailedPrecondition, "busy"},
		{"canceled inside", context.Canceled, codes.Canceled, "canceled"},
		{"timed out inside", fmt.Errorf("recording: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "recording"},
		{"anything else is not shown", errors.New("secret 42"), codes.Internal, "internal error"},
		{"a status", status.Error(codes.Aborted, "as it is"), codes.Aborted, "as it is"},
	} {
		for operation, call := range map[string]func() error{
			"Refresh": func() error {
				_, err := client.Refresh(brief(t), &pb.RefreshRequest{})
				return err
			},
			"IncreaseSize": func() error {
				_, err := client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
				return err
			},
			"DecreaseTargetSize": func() error {
				_, err := client.NodeGroupDecreaseTargetSize(brief(t), &pb.NodeGroupDecreaseTargetSizeRequest{Id: "group-0", Delta: -1})
				return err
			},
			"DeleteNodes": func() error {
				_, err := client.NodeGroupDeleteNodes(brief(t), &pb.NodeGroupDeleteNodesRequest{Id: "group-0", Nodes: []*pb.ExternalGrpcNode{node(instance(0, 0))}})
				return err
			},
		} {
			t.Run(tc.name+"/"+operation, func(t *testing.T) {
				fleet.before = func(context.Context, string) error { return nil }
				_, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{}) // the connection is known now
				must(t, err)
				fleet.fails(operation, tc.err)
				err = call()
				if status.Code(err) != tc.want || !strings.Contains(err.Error(), tc.text) || strings.Contains(err.Error(), "secret") {
					t.Errorf("got %v, want %s … %s", err, tc.want, tc.text)
				}
			})
		}
	}
	if !strings.Contains(r.log.String(), "secret 42") {
		t.Error("what was not shown is not in the log either")
	}
}

// methods lists the full names of all methods of both services.
func methods(descs ...grpc.ServiceDesc) []string {
	var names []string
	for _, d := range descs {
		for _, m := range d.Methods {
			names = append(names, "/"+d.ServiceName+"/"+m.MethodName)
		}
	}
	return names
}

// TestNothingToAnswerFrom: before the first snapshot and after leadership is
// lost, everything is Unavailable, and CA's memory is not touched.
func TestNothingToAnswerFrom(t *testing.T) {
	fleet := newFakeFleet(1, 1)
	r := serve(t, fleet)
	check := func(t *testing.T) {
		t.Helper()
		for _, method := range methods(pb.CloudProvider_ServiceDesc) {
			if err := r.cloudConn(t).Invoke(brief(t), method, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unavailable {
				t.Errorf("%s: got %v, want Unavailable", method, err)
			}
		}
		_, err := r.expanderClient(t).BestOptions(brief(t), &expander.BestOptionsRequest{Options: []*expander.Option{{NodeGroupId: "group-0"}}})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("BestOptions: got %v, want Unavailable", err)
		}
	}
	if n := len(methods(pb.CloudProvider_ServiceDesc)); n != 15 {
		t.Fatalf("CloudProvider has %d methods, want 15", n)
	}
	check(t)
	if all, _ := fleet.forgotten(); all != 0 {
		t.Errorf("forgot %d times", all)
	}
	fleet.show()
	conn := r.cloudConn(t)
	client := pb.NewCloudProviderClient(conn)
	_, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{})
	must(t, err)
	fleet.hide()
	check(t)
	if _, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a connection that was served before: got %v, want Unavailable", err)
	}
}

// TestRefreshFailsWheneverNodeGroupsWould: leadership is lost in the very
// moment of the Refresh.
func TestRefreshFailsWheneverNodeGroupsWould(t *testing.T) {
	fleet := newFakeFleet(1, 1)
	client := serve(t, fleet.show()).cloudClient(t)
	provider := &cloudProvider{reader: lost{}, writer: fleet}
	if _, err := provider.Refresh(brief(t), &pb.RefreshRequest{}); codeOf(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	_, err := client.Refresh(brief(t), &pb.RefreshRequest{})
	must(t, err)
}

type lost struct{}

func (lost) View() *nodegroups.FleetView { return nil }

// TestLostBetweenAdmissionAndAnswer asks handlers directly.
func TestLostBetweenAdmissionAndAnswer(t *testing.T) {
	r := start(t, newFakeFleet(1, 1), 0)
	provider := &cloudProvider{reader: lost{}, writer: r.fleet}
	for _, m := range pb.CloudProvider_ServiceDesc.Methods {
		if m.MethodName == "Cleanup" { // reads nothing
			continue
		}
		_, err := m.Handler(provider, brief(t), func(any) error { return nil }, nil)
		if codeOf(err) != codes.Unavailable {
			t.Errorf("%s: got %v, want Unavailable", m.MethodName, err)
		}
	}
}

// raw sends bytes as they are.
type raw struct{}

func (raw) Name() string { return "proto" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (raw) Unmarshal(mem.BufferSlice, any) error { return nil }

var _ encoding.CodecV2 = raw{}

// TestMalformedRequests sends what no client library would.
func TestMalformedRequests(t *testing.T) {
	fleet := newFakeFleet(1, 1)
	r := serve(t, fleet.show())
	invalidID1, invalidID2 := []byte("\x0a\x02\xff\xfe"), []byte("\x12\x02\xff\xfe") // field 1 or 2: a text that is not UTF-8
	invalidNode := []byte("\x0a\x04\x0a\x02\xff\xfe")                                // field 1: a node whose providerID is not UTF-8
	truncated := []byte("\x0a\x7f")
	wrongType := []byte("\x08\x01") // field 1: a number
	client := pb.NewCloudProviderClient(r.cloudConn(t))
	_, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{})
	must(t, err)
	was := fleet.View()
	cloud := "/" + pb.CloudProvider_ServiceDesc.ServiceName + "/"
	for _, tc := range []struct {
		method, name string
		body         []byte
		want         codes.Code
	}{
		{"NodeGroupForNode", "UTF-8", invalidNode, codes.InvalidArgument},
		{"NodeGroupForNode", "truncated", truncated, codes.InvalidArgument},
		{"NodeGroupForNode", "wrong type is no node", wrongType, codes.InvalidArgument},
		{"NodeGroupIncreaseSize", "UTF-8", append([]byte("\x08\x01"), invalidID2...), codes.InvalidArgument},
		{"NodeGroupDecreaseTargetSize", "UTF-8", append([]byte("\x08\x01"), invalidID2...), codes.InvalidArgument},
		{"NodeGroupDeleteNodes", "UTF-8", append(invalidNode, "\x12\x07group-0"...), codes.InvalidArgument},
		{"NodeGroupDeleteNodes", "UTF-8 in the id", invalidID2, codes.InvalidArgument},
		{"NodeGroupTargetSize", "UTF-8", invalidID1, codes.InvalidArgument},
		{"NodeGroupNodes", "UTF-8", invalidID1, codes.InvalidArgument},
		{"NodeGroupTemplateNodeInfo", "UTF-8", invalidID1, codes.InvalidArgument},
		{"NodeGroupGetOptions", "UTF-8", invalidID1, codes.InvalidArgument},
		{"PricingNodePrice", "UTF-8", invalidNode, codes.InvalidArgument},
		{"Refresh", "truncated", truncated, codes.InvalidArgument},
		{"Rename", "no such method", nil, codes.Unimplemented},
	} {
		t.Run(tc.method+"/"+tc.name, func(t *testing.T) {
			err := r.cloudConn(t).Invoke(brief(t), cloud+tc.method, tc.body, nil, grpc.ForceCodecV2(raw{}))
			if status.Code(err) != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			if fleet.View() != was {
				t.Error("something changed")
			}
		})
	}
}

// TestBigRequests: what fits is answered on its merits, what does not is
// refused before it is read.
func TestBigRequests(t *testing.T) {
	fleet := newFakeFleet(1, 2)
	client := serve(t, fleet.show()).cloudClient(t)
	padded := func(bytes int) *pb.NodeGroupDeleteNodesRequest {
		n := node(instance(0, 0))
		n.Annotations = map[string]string{"padding": strings.Repeat("x", bytes)}
		return &pb.NodeGroupDeleteNodesRequest{Id: "group-0", Nodes: []*pb.ExternalGrpcNode{n}}
	}
	if _, err := client.NodeGroupDeleteNodes(brief(t), padded(17<<20)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("17 MiB: got %v, want ResourceExhausted", err)
	}
	if target := fleet.View().Group("group-0").Target; target != 2 {
		t.Errorf("17 MiB: the target is %d, want 2", target)
	}
	if _, err := client.NodeGroupDeleteNodes(brief(t), padded(10<<20)); err != nil {
		t.Errorf("10 MiB: %v", err)
	}
	if target := fleet.View().Group("group-0").Target; target != 1 {
		t.Errorf("10 MiB: the target is %d, want 1", target)
	}
	var many []*pb.ExternalGrpcNode
	for range 100_000 {
		many = append(many, node(instance(0, 1)), node("unknown"))
	}
	if _, err := client.NodeGroupDeleteNodes(brief(t), &pb.NodeGroupDeleteNodesRequest{Id: "group-0", Nodes: many}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("200,000 nodes: got %v, want InvalidArgument", err)
	}
}

// FuzzProviderID: no id makes a request panic, fail with Internal, or reach
// the fleet when it is not of it.
func FuzzProviderID(f *testing.F) {
	fleet := newFakeFleet(2, 2).show()
	f.Add(string(instance(0, 0)))
	f.Add(string(instance(1, 1)))
	f.Add("")
	f.Add("aws:///eu-central-1a/i-0123456789abcdef0")
	f.Add("\xff\x00")
	f.Add(strings.Repeat("x", maxID+1))
	f.Fuzz(func(t *testing.T, id string) {
		provider := &cloudProvider{reader: fleet, writer: fleet}
		owner := fleet.View().ForInstance(model.InstanceID(id))
		resp, err := provider.NodeGroupForNode(t.Context(), &pb.NodeGroupForNodeRequest{Node: node(model.InstanceID(id))})
		if err != nil {
			t.Fatalf("NodeGroupForNode(%q): %v", id, err)
		}
		if got := resp.GetNodeGroup().GetId(); (owner == nil) != (got == "") || owner != nil && got != string(owner.Group.ID) {
			t.Fatalf("NodeGroupForNode(%q) = %q", id, got)
		}
		ids, err := deleted(fleet.View(), "group-0", []*pb.ExternalGrpcNode{node(model.InstanceID(id)), node(model.InstanceID(id))})
		switch {
		case err != nil && codeOf(err) != codes.InvalidArgument:
			t.Fatalf("deleted(%q): %v", id, err)
		case err == nil && (len(ids) != 1 || string(ids[0]) != id || owner != nil && owner.Group.ID != "group-0"):
			t.Fatalf("deleted(%q) = %q", id, ids)
		}
	})
}
