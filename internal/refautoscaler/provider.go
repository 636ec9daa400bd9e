package refautoscaler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"

	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// maxNodeStartup is how long a registered node may stay not ready and still count
// as on its way (CA: max-node-startup-time; a constant until 1.34).
const maxNodeStartup = 15 * time.Minute

// provider is the client of the external provider, with CA's caches.
type provider struct {
	rpc      pb.CloudProviderClient
	timeout  time.Duration
	gen      Generation
	defaults GroupOptions
	log      *slog.Logger

	// mu is held across the calls that fill the caches, as CA does: a slow answer
	// holds up everybody who asks.
	mu     sync.Mutex
	groups []*nodeGroup          // nil: not asked since Refresh
	byNode map[string]*nodeGroup // never "not mine"
}

// nodeGroup is what CA keeps of a group from one Refresh to the next.
type nodeGroup struct {
	id       string
	min, max int
	template *corev1.Node // nil: not asked since Refresh
}

// effectiveOptions are a group's options as CA applies them.
type effectiveOptions struct {
	GroupOptions
	startup time.Duration
}

// call makes one RPC under CA's deadline.
func call[Req, Resp any](ctx context.Context, p *provider,
	rpc func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	return rpc(ctx, req)
}

// refresh drops the caches, whatever the provider then answers.
func (p *provider) refresh(ctx context.Context) error {
	p.mu.Lock()
	p.groups, p.byNode = nil, map[string]*nodeGroup{}
	p.mu.Unlock()
	_, err := call(ctx, p, p.rpc.Refresh, &pb.RefreshRequest{})
	return err
}

func (p *provider) nodeGroups(ctx context.Context) []*nodeGroup {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.groups != nil {
		return p.groups
	}
	resp, err := call(ctx, p, p.rpc.NodeGroups, &pb.NodeGroupsRequest{})
	if err != nil {
		p.log.Error("NodeGroups failed: no groups", "err", err)
		return nil
	}
	p.groups = []*nodeGroup{}
	for _, g := range resp.GetNodeGroups() {
		p.groups = append(p.groups, newNodeGroup(g))
	}
	return p.groups
}

func newNodeGroup(g *pb.NodeGroup) *nodeGroup {
	return &nodeGroup{id: g.GetId(), min: int(g.GetMinSize()), max: int(g.GetMaxSize())}
}

// groupOf returns nil for a node that is not the provider's.
func (p *provider) groupOf(ctx context.Context, node *corev1.Node) (*nodeGroup, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := node.Name + node.Spec.ProviderID
	if g, ok := p.byNode[key]; ok {
		return g, nil
	}
	resp, err := call(ctx, p, p.rpc.NodeGroupForNode, &pb.NodeGroupForNodeRequest{Node: wireNode(node)})
	if err != nil {
		return nil, fmt.Errorf("asking for the group of node %q: %w", node.Name, err)
	}
	if resp.GetNodeGroup().GetId() == "" {
		return nil, nil
	}
	g := newNodeGroup(resp.GetNodeGroup())
	p.byNode[key] = g
	return g, nil
}

// ownGroupOf is groupOf where CA logs an error and goes on without the node.
func (p *provider) ownGroupOf(ctx context.Context, node *corev1.Node) *nodeGroup {
	g, err := p.groupOf(ctx, node)
	if err != nil {
		p.log.Error("node left out", "node", node.Name, "err", err)
	}
	return g
}

func (p *provider) targetSize(ctx context.Context, id string) (int, error) {
	resp, err := call(ctx, p, p.rpc.NodeGroupTargetSize, &pb.NodeGroupTargetSizeRequest{Id: id})
	return int(resp.GetTargetSize()), err
}

// knownTargetSizes leaves out groups that answer with an error.
func (p *provider) knownTargetSizes(ctx context.Context) map[string]int {
	sizes := map[string]int{}
	for _, g := range p.nodeGroups(ctx) {
		if size, err := p.targetSize(ctx, g.id); err == nil {
			sizes[g.id] = size
		}
	}
	return sizes
}

func (p *provider) increaseSize(ctx context.Context, id string, delta int) error {
	_, err := call(ctx, p, p.rpc.NodeGroupIncreaseSize, &pb.NodeGroupIncreaseSizeRequest{Id: id, Delta: int32(delta)})
	return err
}

func (p *provider) decreaseTargetSize(ctx context.Context, id string, delta int) error {
	_, err := call(ctx, p, p.rpc.NodeGroupDecreaseTargetSize,
		&pb.NodeGroupDecreaseTargetSizeRequest{Id: id, Delta: int32(delta)})
	return err
}

func (p *provider) deleteNodes(ctx context.Context, id string, nodes []*corev1.Node) error {
	req := &pb.NodeGroupDeleteNodesRequest{Id: id}
	for _, n := range nodes {
		req.Nodes = append(req.Nodes, wireNode(n))
	}
	_, err := call(ctx, p, p.rpc.NodeGroupDeleteNodes, req)
	return err
}

func (p *provider) instances(ctx context.Context, id string) ([]*pb.Instance, error) {
	resp, err := call(ctx, p, p.rpc.NodeGroupNodes, &pb.NodeGroupNodesRequest{Id: id})
	return resp.GetInstances(), err
}

// templateOf returns an error where CA would crash: no node in the answer.
func (p *provider) templateOf(ctx context.Context, g *nodeGroup) (*corev1.Node, error) {
	if g.template != nil {
		return g.template, nil
	}
	resp, err := call(ctx, p, p.rpc.NodeGroupTemplateNodeInfo, &pb.NodeGroupTemplateNodeInfoRequest{Id: g.id})
	if err != nil {
		return nil, err
	}
	var wire []byte
	if p.gen.speaksNew() {
		wire = resp.GetNodeBytes()
	}
	if wire == nil && p.gen.speaksOld() {
		wire = resp.GetNodeInfo()
	}
	if wire == nil {
		return nil, errors.New("answer without a node, at which CA would crash")
	}
	node := &corev1.Node{}
	if err := node.Unmarshal(wire); err != nil {
		return nil, fmt.Errorf("reading the template: %w", err)
	}
	g.template = node
	return node, nil
}

func (p *provider) options(ctx context.Context, id string) (effectiveOptions, error) {
	d := p.defaults
	defaults := &pb.NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold:    d.ScaleDownUtilizationThreshold,
		ScaleDownGpuUtilizationThreshold: d.ScaleDownUtilizationThreshold,
		IgnoreDaemonSetsUtilization:      d.IgnoreDaemonSetsUtilization,
	}
	if p.gen.speaksNew() {
		defaults.ScaleDownUnneededDuration = durationpb.New(d.ScaleDownUnneededTime)
		defaults.ScaleDownUnreadyDuration = durationpb.New(d.ScaleDownUnreadyTime)
		defaults.MaxNodeProvisionDuration = durationpb.New(d.MaxNodeProvisionTime)
	}
	if p.gen.speaksOld() {
		defaults.ScaleDownUnneededTime = &pb.LegacyDuration{Duration: int64(d.ScaleDownUnneededTime)}
		defaults.ScaleDownUnreadyTime = &pb.LegacyDuration{Duration: int64(d.ScaleDownUnreadyTime)}
		defaults.MaxNodeProvisionTime = &pb.LegacyDuration{Duration: int64(d.MaxNodeProvisionTime)}
	}
	resp, err := call(ctx, p, p.rpc.NodeGroupGetOptions, &pb.NodeGroupAutoscalingOptionsRequest{Id: id, Defaults: defaults})
	if err != nil && status.Code(err) != codes.Unimplemented {
		return effectiveOptions{}, fmt.Errorf("asking for the options of group %q: %w", id, err)
	}
	o := resp.GetNodeGroupAutoscalingOptions()
	if o == nil {
		return effectiveOptions{GroupOptions: d, startup: maxNodeStartup}, nil
	}
	duration := func(d *durationpb.Duration, old *pb.LegacyDuration) time.Duration {
		if d != nil && p.gen.speaksNew() {
			return d.AsDuration()
		}
		if p.gen.speaksOld() {
			return time.Duration(old.GetDuration())
		}
		return 0
	}
	result := effectiveOptions{startup: maxNodeStartup, GroupOptions: GroupOptions{
		ScaleDownUtilizationThreshold: o.GetScaleDownUtilizationThreshold(),
		ScaleDownUnneededTime:         duration(o.GetScaleDownUnneededDuration(), o.GetScaleDownUnneededTime()),
		ScaleDownUnreadyTime:          duration(o.GetScaleDownUnreadyDuration(), o.GetScaleDownUnreadyTime()),
		MaxNodeProvisionTime:          duration(o.GetMaxNodeProvisionDuration(), o.GetMaxNodeProvisionTime()),
		IgnoreDaemonSetsUtilization:   o.GetIgnoreDaemonSetsUtilization(),
	}}
	if p.gen.losesStartupTime() { // the wire has no field for it, and 0 is taken literally
		result.startup = 0
	}
	return result, nil
}

func wireNode(n *corev1.Node) *pb.ExternalGrpcNode {
	return &pb.ExternalGrpcNode{
		ProviderID: n.Spec.ProviderID, Name: n.Name, Labels: n.Labels, Annotations: n.Annotations,
	}
}
