// Package externalgrpc is the wire of cluster-autoscaler's external cloud
// provider: the messages and the service generated from externalgrpc.proto, and
// the few readers and writers that hide which generation of the wire the other
// side speaks. It owns no behaviour of a provider and keeps no state.
//
// Readers prefer the new generation and fall back to the old one; writers write
// both, because an answer does not know who asked. Readers accept nil messages,
// as generated getters do.
package externalgrpc

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
)

// NewTemplateNodeInfoResponse answers with a marshalled v1.Node in both forms.
// The node must not be empty, since cluster-autoscaler crashes on that. Both
// forms share node, which must not change afterwards.
func NewTemplateNodeInfoResponse(node []byte) *NodeGroupTemplateNodeInfoResponse {
	return &NodeGroupTemplateNodeInfoResponse{NodeInfo: node, NodeBytes: node}
}

// CopyOptions returns a copy of o that has every duration in both forms; nil for
// nil, which cluster-autoscaler takes for its defaults. Start an answer to
// NodeGroupGetOptions from the copy of the request's defaults.
func CopyOptions(o *NodeGroupAutoscalingOptions) *NodeGroupAutoscalingOptions {
	if o == nil {
		return nil
	}
	c := &NodeGroupAutoscalingOptions{
		ScaleDownUtilizationThreshold:    o.GetScaleDownUtilizationThreshold(),
		ScaleDownGpuUtilizationThreshold: o.GetScaleDownGpuUtilizationThreshold(),
		ZeroOrMaxNodeScaling:             o.GetZeroOrMaxNodeScaling(),
		IgnoreDaemonSetsUtilization:      o.GetIgnoreDaemonSetsUtilization(),
	}
	c.SetScaleDownUnneeded(o.ScaleDownUnneeded())
	c.SetScaleDownUnready(o.ScaleDownUnready())
	c.SetMaxNodeProvision(o.MaxNodeProvision())
	return c
}

// ScaleDownUnneeded is how long a node is unneeded before it goes.
func (x *NodeGroupAutoscalingOptions) ScaleDownUnneeded() time.Duration {
	return either(x.GetScaleDownUnneededDuration(), x.GetScaleDownUnneededTime())
}

// SetScaleDownUnneeded sets how long a node is unneeded before it goes.
func (x *NodeGroupAutoscalingOptions) SetScaleDownUnneeded(d time.Duration) {
	x.ScaleDownUnneededDuration, x.ScaleDownUnneededTime = both(d)
}

// ScaleDownUnready is how long an unready node is unneeded before it goes.
func (x *NodeGroupAutoscalingOptions) ScaleDownUnready() time.Duration {
	return either(x.GetScaleDownUnreadyDuration(), x.GetScaleDownUnreadyTime())
}

// SetScaleDownUnready sets how long an unready node is unneeded before it goes.
func (x *NodeGroupAutoscalingOptions) SetScaleDownUnready(d time.Duration) {
	x.ScaleDownUnreadyDuration, x.ScaleDownUnreadyTime = both(d)
}

// MaxNodeProvision is how long a node may take to come up.
func (x *NodeGroupAutoscalingOptions) MaxNodeProvision() time.Duration {
	return either(x.GetMaxNodeProvisionDuration(), x.GetMaxNodeProvisionTime())
}

// SetMaxNodeProvision sets how long a node may take to come up.
func (x *NodeGroupAutoscalingOptions) SetMaxNodeProvision(d time.Duration) {
	x.MaxNodeProvisionDuration, x.MaxNodeProvisionTime = both(d)
}

// either reads a duration from whichever form is set, 0 if none is.
func either(since135 *durationpb.Duration, before *LegacyDuration) time.Duration {
	if since135 != nil {
		return since135.AsDuration()
	}
	return time.Duration(before.GetDuration())
}

// both gives a duration in both forms.
func both(d time.Duration) (*durationpb.Duration, *LegacyDuration) {
	return durationpb.New(d), &LegacyDuration{Duration: int64(d)}
}
