package server

import (
	"context"
	"log/slog"
	"math"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

const (
	// maxID bounds ids, in bytes.
	maxID = 2048
	// gpuLabel is what CA takes for the label of nodes with GPUs. It asks
	// once, so this can never change at run time.
	gpuLabel = model.Prefix + "/gpu"
	// forgetWithin bounds the clean-up after an IncreaseSize that was answered
	// too late.
	forgetWithin = 2 * time.Second
)

// cloudProvider implements CA's CloudProvider service.
type cloudProvider struct {
	pb.UnimplementedCloudProviderServer
	reader Reader
	writer Writer
	log    *slog.Logger
	book   answerBook
}

// fleet returns what reads are answered from.
func (p *cloudProvider) fleet() (*nodegroups.FleetView, error) {
	if fleet := p.reader.View(); fleet != nil {
		return fleet, nil
	}
	return nil, errNotSynced
}

// group returns the view of one group.
func (p *cloudProvider) group(id string) (*nodegroups.FleetView, *nodegroups.View, error) {
	fleet, err := p.fleet()
	if err != nil {
		return nil, nil, err
	}
	if len(id) > maxID {
		return nil, nil, invalid("", "id", "a node group's id has at most %d bytes, got %d", maxID, len(id))
	}
	view := fleet.Group(model.GroupID(id))
	if view == nil {
		return nil, nil, nodegroups.Refuse(nodegroups.KindNotFound, "", "unknown-group", "unknown node group %q", id)
	}
	return fleet, view, nil
}

func invalid(group model.GroupID, reason, format string, args ...any) error {
	return nodegroups.Refuse(nodegroups.KindInvalid, group, reason, format, args...)
}

// NodeGroups lists all groups.
func (p *cloudProvider) NodeGroups(context.Context, *pb.NodeGroupsRequest) (*pb.NodeGroupsResponse, error) {
	fleet, err := p.fleet()
	if err != nil {
		return nil, err
	}
	return p.book.lookup(fleet).groups, nil
}

// NodeGroupForNode names the group that owns the node. CA asks this of every
// node of the cluster, so whatever form its providerID has, it is not an error.
func (p *cloudProvider) NodeGroupForNode(_ context.Context, req *pb.NodeGroupForNodeRequest) (*pb.NodeGroupForNodeResponse, error) {
	fleet, err := p.fleet()
	if err != nil {
		return nil, err
	}
	if req.GetNode() == nil {
		return nil, invalid("", "node", "a node is required")
	}
	answers := p.book.lookup(fleet)
	view := fleet.ForInstance(model.InstanceID(req.GetNode().GetProviderID()))
	if view == nil {
		return answers.notOurs, nil
	}
	return answers.of[view].forNode, nil
}

// PricingNodePrice is the group's node-price for the period.
func (p *cloudProvider) PricingNodePrice(_ context.Context, req *pb.PricingNodePriceRequest) (*pb.PricingNodePriceResponse, error) {
	fleet, err := p.fleet()
	if err != nil {
		return nil, err
	}
	if req.GetNode() == nil {
		return nil, invalid("", "node", "a node is required")
	}
	view := fleet.ForInstance(model.InstanceID(req.GetNode().GetProviderID()))
	if view == nil { // templates have no providerID
		view = labelled(fleet, req.GetNode().GetLabels()[nodeGroupLabel])
	}
	if view == nil || view.Settings.NodePrice == nil {
		return nil, errUnimplemented
	}
	start, end := instant(req.GetStartTimestamp(), req.GetStartTime()), instant(req.GetEndTimestamp(), req.GetEndTime())
	if start.IsZero() || end.IsZero() || end.Before(start) {
		return nil, invalid(view.Group.ID, "period", "a start and an end not before it are required")
	}
	return &pb.PricingNodePriceResponse{Price: *view.Settings.NodePrice * end.Sub(start).Hours()}, nil
}

// labelled returns the view of the group that a node's label names, nil when
// there is none.
func labelled(fleet *nodegroups.FleetView, label string) *nodegroups.View {
	if view := fleet.Group(model.GroupID(label)); view != nil || label == "" {
		return view
	}
	for _, view := range fleet.Groups() {
		if model.GroupLabel(view.Group.ID) == label {
			return view
		}
	}
	return nil
}

// instant reads a time from whichever form is set.
func instant(since135 *timestamppb.Timestamp, before *pb.LegacyTime) time.Time {
	switch {
	case since135 != nil:
		return since135.AsTime()
	case before != nil:
		return time.Unix(before.GetSeconds(), int64(before.GetNanos()))
	}
	return time.Time{}
}

// PricingPodPrice is not provided.
func (p *cloudProvider) PricingPodPrice(context.Context, *pb.PricingPodPriceRequest) (*pb.PricingPodPriceResponse, error) {
	if _, err := p.fleet(); err != nil {
		return nil, err
	}
	return nil, errUnimplemented
}

// GPULabel is constant.
func (p *cloudProvider) GPULabel(context.Context, *pb.GPULabelRequest) (*pb.GPULabelResponse, error) {
	if _, err := p.fleet(); err != nil {
		return nil, err
	}
	return &pb.GPULabelResponse{Label: gpuLabel}, nil
}

// GetAvailableGPUTypes is constant: none is known by name.
func (p *cloudProvider) GetAvailableGPUTypes(context.Context, *pb.GetAvailableGPUTypesRequest) (*pb.GetAvailableGPUTypesResponse, error) {
	if _, err := p.fleet(); err != nil {
		return nil, err
	}
	return &pb.GetAvailableGPUTypesResponse{}, nil
}

// Cleanup is CA's good-bye: it takes its memory with it.
func (p *cloudProvider) Cleanup(ctx context.Context, _ *pb.CleanupRequest) (*pb.CleanupResponse, error) {
	if err := p.writer.Forget(ctx); err != nil {
		return nil, err
	}
	return &pb.CleanupResponse{}, nil
}

// Refresh begins a loop of CA's. It fails whenever NodeGroups would: an error
// here ends the loop without harm, an error there looks like no groups at all.
func (p *cloudProvider) Refresh(ctx context.Context, _ *pb.RefreshRequest) (*pb.RefreshResponse, error) {
	if err := p.writer.Refresh(ctx); err != nil {
		return nil, err
	}
	if _, err := p.fleet(); err != nil {
		return nil, err
	}
	return &pb.RefreshResponse{}, nil
}

// NodeGroupTargetSize is the size that the group is meant to have.
func (p *cloudProvider) NodeGroupTargetSize(_ context.Context, req *pb.NodeGroupTargetSizeRequest) (*pb.NodeGroupTargetSizeResponse, error) {
	_, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	return &pb.NodeGroupTargetSizeResponse{TargetSize: int32(min(view.Target, math.MaxInt32))}, nil
}

// NodeGroupIncreaseSize raises the target size. When the request has ended
// meanwhile, CA believes that it failed, whatever was recorded: what is not
// Ready yet is hidden until CA asks again.
func (p *cloudProvider) NodeGroupIncreaseSize(ctx context.Context, req *pb.NodeGroupIncreaseSizeRequest) (*pb.NodeGroupIncreaseSizeResponse, error) {
	_, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	id := view.Group.ID
	if req.GetDelta() <= 0 {
		return nil, invalid(id, "delta", "delta must be positive, got %d", req.GetDelta())
	}
	err = p.writer.IncreaseSize(ctx, id, int(req.GetDelta()))
	if ctx.Err() != nil {
		p.forgetGroup(ctx, id)
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	return &pb.NodeGroupIncreaseSizeResponse{}, nil
}

func (p *cloudProvider) forgetGroup(ended context.Context, id model.GroupID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ended), forgetWithin)
	defer cancel()
	if err := p.writer.ForgetGroup(ctx, id); err != nil {
		p.log.Warn("forgetting an increase that was answered too late failed", "nodegroup", id, "err", err)
	}
}

// NodeGroupDeleteNodes accepts the removal of all the nodes, or of none.
func (p *cloudProvider) NodeGroupDeleteNodes(ctx context.Context, req *pb.NodeGroupDeleteNodesRequest) (*pb.NodeGroupDeleteNodesResponse, error) {
	fleet, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	ids, err := deleted(fleet, view.Group.ID, req.GetNodes())
	if err != nil {
		return nil, err
	}
	if err := p.writer.DeleteNodes(ctx, view.Group.ID, ids); err != nil {
		return nil, err
	}
	return &pb.NodeGroupDeleteNodesResponse{}, nil
}

// maxDeletes bounds the nodes of one request; CA batches far fewer.
const maxDeletes = 1000

// deleted returns the ids of the nodes, each once.
func deleted(fleet *nodegroups.FleetView, group model.GroupID, nodes []*pb.ExternalGrpcNode) ([]model.InstanceID, error) {
	if len(nodes) == 0 || len(nodes) > maxDeletes {
		return nil, invalid(group, "nodes", "1 to %d nodes are required, got %d", maxDeletes, len(nodes))
	}
	ids := make([]model.InstanceID, 0, len(nodes))
	seen := make(map[model.InstanceID]bool, len(nodes))
	for i, node := range nodes {
		id := model.InstanceID(node.GetProviderID())
		switch {
		case id == "":
			return nil, invalid(group, "provider-id", "node %d (%q) has no providerID", i, clip(node.GetName()))
		case len(id) > maxID:
			return nil, invalid(group, "provider-id", "a providerID has at most %d bytes, that of node %d has %d", maxID, i, len(id))
		case seen[id]:
			continue
		}
		if other := fleet.ForInstance(id); other != nil && other.Group.ID != group {
			return nil, invalid(group, "other-group", "instance %q belongs to node group %q", string(id), string(other.Group.ID))
		}
		seen[id] = true
		ids = append(ids, id)
	}
	return ids, nil
}

// clip bounds what a request may put into an error.
func clip(s string) string { return s[:min(len(s), maxID)] }

// NodeGroupDecreaseTargetSize takes back what is not born yet.
func (p *cloudProvider) NodeGroupDecreaseTargetSize(ctx context.Context, req *pb.NodeGroupDecreaseTargetSizeRequest) (*pb.NodeGroupDecreaseTargetSizeResponse, error) {
	_, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	if req.GetDelta() >= 0 {
		return nil, invalid(view.Group.ID, "delta", "delta must be negative, got %d", req.GetDelta())
	}
	if err := p.writer.DecreaseTargetSize(ctx, view.Group.ID, int(req.GetDelta())); err != nil {
		return nil, err
	}
	return &pb.NodeGroupDecreaseTargetSizeResponse{}, nil
}

// NodeGroupNodes lists the group's instances.
func (p *cloudProvider) NodeGroupNodes(_ context.Context, req *pb.NodeGroupNodesRequest) (*pb.NodeGroupNodesResponse, error) {
	_, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	return instances(view), nil
}

// NodeGroupTemplateNodeInfo describes a node that the group would get.
func (p *cloudProvider) NodeGroupTemplateNodeInfo(_ context.Context, req *pb.NodeGroupTemplateNodeInfoRequest) (*pb.NodeGroupTemplateNodeInfoResponse, error) {
	fleet, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	return p.book.lookup(fleet).of[view].template.get()
}

// NodeGroupGetOptions gives the group's own options over CA's defaults; while
// nodes of the group are starting it gives none, which means the defaults: CA
// takes a max-node-startup-time of 0 from any answer, for the message has no
// such field, and would then hold a registered node that is not Ready yet for
// unready at once and order it a second time (measured, CA 1.36.1; since 1.35,
// https://github.com/kubernetes/autoscaler/issues/10245).
func (p *cloudProvider) NodeGroupGetOptions(_ context.Context, req *pb.NodeGroupAutoscalingOptionsRequest) (*pb.NodeGroupAutoscalingOptionsResponse, error) {
	fleet, view, err := p.group(req.GetId())
	if err != nil {
		return nil, err
	}
	if view.Starting {
		return &pb.NodeGroupAutoscalingOptionsResponse{}, nil
	}
	return p.book.lookup(fleet).of[view].withDefaults(view.Settings.Options, req.GetDefaults()), nil
}
