package server

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// answers are the responses that follow from a FleetView. Requests share them,
// so they never change once made; what is costly is made when first asked for.
type answers struct {
	fleet   *nodegroups.FleetView
	groups  *pb.NodeGroupsResponse
	notOurs *pb.NodeGroupForNodeResponse // for nodes that belong to no group
	of      map[*nodegroups.View]*groupAnswers
}

// groupAnswers are the responses that follow from one group's View.
type groupAnswers struct {
	group    *pb.NodeGroup
	forNode  *pb.NodeGroupForNodeResponse
	template *templateAnswer
	options  atomic.Pointer[optionsAnswer] // the last one
}

// answerBook keeps the answers of the latest FleetView.
type answerBook struct {
	latest atomic.Pointer[answers]
	mu     sync.Mutex // held while new ones are made
}

// lookup returns the answers of fleet. It does not allocate unless fleet is new.
func (b *answerBook) lookup(fleet *nodegroups.FleetView) *answers {
	if a := b.latest.Load(); a != nil && a.fleet == fleet {
		return a
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.latest.Load()
	if last != nil && last.fleet == fleet {
		return last
	}
	next := newAnswers(fleet, last)
	b.latest.Store(next)
	return next
}

// newAnswers takes over from last, which may be nil, what is still true.
func newAnswers(fleet *nodegroups.FleetView, last *answers) *answers {
	a := &answers{
		fleet:   fleet,
		groups:  &pb.NodeGroupsResponse{NodeGroups: make([]*pb.NodeGroup, 0, len(fleet.Groups()))},
		notOurs: &pb.NodeGroupForNodeResponse{NodeGroup: &pb.NodeGroup{}},
		of:      make(map[*nodegroups.View]*groupAnswers, len(fleet.Groups())),
	}
	for _, v := range fleet.Groups() {
		var before *groupAnswers // of the group's earlier view
		if last != nil {
			before = last.of[last.fleet.Group(v.Group.ID)]
		}
		g := newGroupAnswers(v, before)
		a.of[v] = g
		a.groups.NodeGroups = append(a.groups.NodeGroups, g.group)
	}
	return a
}

func newGroupAnswers(v *nodegroups.View, before *groupAnswers) *groupAnswers {
	group := &pb.NodeGroup{
		Id:      string(v.Group.ID),
		MinSize: int32(v.Group.Min),
		MaxSize: int32(v.Group.Max),
		Debug:   v.Debug,
	}
	g := &groupAnswers{group: group, forNode: &pb.NodeGroupForNodeResponse{NodeGroup: group}}
	if before != nil && sameTemplate(before.template.group.Template, v.Group.Template) {
		g.template = before.template
	} else {
		g.template = &templateAnswer{group: v.Group}
	}
	return g
}

func sameTemplate(a, b model.Template) bool {
	return a.Zone == b.Zone && a.InstanceType == b.InstanceType &&
		slices.Equal(a.Taints, b.Taints) && maps.Equal(a.Labels, b.Labels) &&
		maps.Equal(a.Capacity, b.Capacity) && maps.Equal(a.Allocatable, b.Allocatable)
}

// templateAnswer describes a node that the group would get.
type templateAnswer struct {
	group model.NodeGroup
	once  sync.Once
	resp  *pb.NodeGroupTemplateNodeInfoResponse
	err   error
}

func (t *templateAnswer) get() (*pb.NodeGroupTemplateNodeInfoResponse, error) {
	t.once.Do(func() {
		node, err := encodeTemplate(t.group)
		if err != nil {
			t.err = err
			return
		}
		t.resp = pb.NewTemplateNodeInfoResponse(node)
	})
	return t.resp, t.err
}

// optionsAnswer is the answer to NodeGroupGetOptions for certain defaults. CA
// sends the same ones in every request.
type optionsAnswer struct {
	defaults options
	resp     *pb.NodeGroupAutoscalingOptionsResponse
}

// options are the values of NodeGroupAutoscalingOptions, of either generation.
type options struct {
	utilization, gpuUtilization    float64
	unneeded, unready, provision   time.Duration
	zeroOrMax, ignoreDaemonSetPods bool
}

func optionsOf(o *pb.NodeGroupAutoscalingOptions) options {
	return options{
		utilization:         o.GetScaleDownUtilizationThreshold(),
		gpuUtilization:      o.GetScaleDownGpuUtilizationThreshold(),
		unneeded:            o.ScaleDownUnneeded(),
		unready:             o.ScaleDownUnready(),
		provision:           o.MaxNodeProvision(),
		zeroOrMax:           o.GetZeroOrMaxNodeScaling(),
		ignoreDaemonSetPods: o.GetIgnoreDaemonSetsUtilization(),
	}
}

// withDefaults answers with the group's settings over CA's defaults, all of
// them in both forms: CA takes what is not set for zero. Without defaults
// there is nothing to start from, and no options mean that CA uses its own.
func (g *groupAnswers) withDefaults(set nodegroups.Options, defaults *pb.NodeGroupAutoscalingOptions) *pb.NodeGroupAutoscalingOptionsResponse {
	if defaults == nil {
		return &pb.NodeGroupAutoscalingOptionsResponse{}
	}
	asked := optionsOf(defaults)
	if last := g.options.Load(); last != nil && last.defaults == asked {
		return last.resp
	}
	o := pb.CopyOptions(defaults)
	override(&o.ScaleDownUtilizationThreshold, set.ScaleDownUtilizationThreshold)
	override(&o.ScaleDownGpuUtilizationThreshold, set.ScaleDownGPUUtilizationThreshold)
	override(&o.ZeroOrMaxNodeScaling, set.ZeroOrMaxNodeScaling)
	override(&o.IgnoreDaemonSetsUtilization, set.IgnoreDaemonSetsUtilization)
	if d := set.ScaleDownUnneededTime; d != nil {
		o.SetScaleDownUnneeded(*d)
	}
	if d := set.ScaleDownUnreadyTime; d != nil {
		o.SetScaleDownUnready(*d)
	}
	if d := set.MaxNodeProvisionTime; d != nil {
		o.SetMaxNodeProvision(*d)
	}
	resp := &pb.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: o}
	g.options.Store(&optionsAnswer{defaults: asked, resp: resp})
	return resp
}

func override[T any](value *T, by *T) {
	if by != nil {
		*value = *by
	}
}

// instances lists a group's instances.
func instances(v *nodegroups.View) *pb.NodeGroupNodesResponse {
	made := make([]pb.Instance, len(v.Instances)) // one allocation for all
	resp := &pb.NodeGroupNodesResponse{Instances: make([]*pb.Instance, len(v.Instances))}
	healthy := [...]*pb.InstanceStatus{
		nodegroups.StatusRunning:  {InstanceState: pb.InstanceStatus_instanceRunning},
		nodegroups.StatusCreating: {InstanceState: pb.InstanceStatus_instanceCreating},
		nodegroups.StatusDeleting: {InstanceState: pb.InstanceStatus_instanceDeleting},
	}
	for i, instance := range v.Instances {
		made[i].Id = string(instance.ID)
		made[i].Status = healthy[instance.Status]
		if f := instance.Failure; f != nil {
			made[i].Status = &pb.InstanceStatus{
				InstanceState: pb.InstanceStatus_InstanceState(instance.Status),
				ErrorInfo:     &pb.InstanceErrorInfo{ErrorCode: failureCode(f.Class), ErrorMessage: f.Message, InstanceErrorClass: errorClass(f.Class)},
			}
		}
		resp.Instances[i] = &made[i]
	}
	return resp
}

// failureCode is never empty: to CA that would mean no error.
func failureCode(c model.FailureClass) string {
	if c == "" {
		c = model.FailureUnknown
	}
	return string(c)
}

// errorClass returns CA's number: 1 means that the cloud has none to give, 99
// anything else.
func errorClass(c model.FailureClass) int32 {
	switch c {
	case model.FailureCapacity, model.FailureQuota:
		return 1
	}
	return 99
}
