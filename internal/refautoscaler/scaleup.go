package refautoscaler

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-ci/hearth/protos/expander"
)

const (
	podsAreNew         = 2 * time.Second // pods all younger than this: more may be coming
	maxNodesPerScaleUp = 1000
	expanderTimeout    = 5 * time.Second
	expanderMaxMessage = 128 << 20 // bytes
)

// option is one way to help pending pods.
type option struct {
	group *nodeGroup
	nodes int
	pods  []*corev1.Pod
}

// pendingPods returns the pods that the scheduler could not place, and those that
// nodes under drain will lose.
func pendingPods(pods []*corev1.Pod, draining map[string]bool) []*corev1.Pod {
	var pending []*corev1.Pod
	for _, p := range pods {
		switch {
		case p.Spec.NodeName == "" && p.DeletionTimestamp == nil && isUnschedulable(p):
			pending = append(pending, p)
		case draining[p.Spec.NodeName] && p.DeletionTimestamp == nil && !isDaemonSetPod(p) && !isMirrorPod(p):
			p = p.DeepCopy()
			p.Spec.NodeName = ""
			pending = append(pending, p)
		}
	}
	return pending
}

func isUnschedulable(p *corev1.Pod) bool {
	c := scheduledCondition(p)
	return c != nil && c.Status == corev1.ConditionFalse && c.Reason == corev1.PodReasonUnschedulable &&
		p.Status.NominatedNodeName == ""
}

func scheduledCondition(p *corev1.Pod) *corev1.PodCondition {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == corev1.PodScheduled {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

// unhelped puts pods where they fit already, upcoming nodes included, and returns
// the rest.
func unhelped(world snapshot, pending []*corev1.Pod) []*corev1.Pod {
	return slices.DeleteFunc(pending, func(p *corev1.Pod) bool {
		return world.place(p, anyNode) != nil || isDaemonSetPod(p)
	})
}

func allNew(pods []*corev1.Pod, now time.Time) bool {
	return !slices.ContainsFunc(pods, func(p *corev1.Pod) bool {
		return !p.CreationTimestamp.Add(podsAreNew).After(now)
	})
}

// scaleUp grows at most one group. Its error is that of IncreaseSize.
func (a *Autoscaler) scaleUp(ctx context.Context, pods []*corev1.Pod, now time.Time) error {
	options := a.scaleUpOptions(ctx, pods, now)
	best := a.bestOption(ctx, options)
	if best == nil {
		reason := "no group takes them"
		if len(options) > 0 {
			reason = "the expander left no option"
		}
		a.emit(Event{Kind: NoScaleUp, Pods: podNames(pods), Reason: reason})
		return nil
	}
	event := Event{Kind: ScaleUp, Group: best.group.id, Delta: best.nodes, Pods: podNames(best.pods)}
	if err := a.provider.increaseSize(ctx, best.group.id, best.nodes); err != nil {
		a.state.backOff(best.group.id, "IncreaseSize failed", now)
		event.Kind, event.Reason = ScaleUpFailed, err.Error()
		a.emit(event)
		return fmt.Errorf("increasing group %q by %d: %w", best.group.id, best.nodes, err)
	}
	a.state.request(ctx, best.group.id, best.nodes, now)
	a.state.recalculate(ctx)
	a.lastScaleUp = now
	a.emit(event)
	return nil
}

func (a *Autoscaler) scaleUpOptions(ctx context.Context, pods []*corev1.Pod, now time.Time) []option {
	var options []option
	for _, g := range a.provider.nodeGroups(ctx) {
		target, err := a.provider.targetSize(ctx, g.id)
		reason := ""
		switch {
		case !a.state.groupHealthy(g.id):
			reason = skippedUnhealthy
		case a.state.backedOff(g.id, now):
			reason = skippedBackedOff + ": " + a.state.backoffs[g.id].reason
		case err != nil:
			reason = err.Error()
		case target >= g.max:
			reason = skippedAtMax
		case a.templates[g.id] == nil:
			reason = skippedNoTemplate
		}
		if reason != "" {
			a.emit(Event{Kind: GroupSkipped, Group: g.id, Reason: reason})
			continue
		}
		n, placed := estimate(a.templates[g.id], pods, min(g.max-target, maxNodesPerScaleUp))
		if n > 0 {
			options = append(options, option{group: g, nodes: n, pods: placed})
		}
	}
	return options
}

// bestOption asks the expanders one after the other until one option is left.
func (a *Autoscaler) bestOption(ctx context.Context, options []option) *option {
	if a.expander != nil && len(options) > 0 {
		options = a.askExpander(ctx, options)
	}
	if len(options) == 0 {
		return nil
	}
	best := slices.MinFunc(options, func(x, y option) int { return cmp.Compare(a.waste(x), a.waste(y)) })
	return &best
}

// askExpander returns the options that the external expander names; all of them if
// it fails or names none of ours, none of them if its answer is empty.
func (a *Autoscaler) askExpander(ctx context.Context, options []option) []option {
	req, err := a.expanderRequest(options)
	if err != nil {
		a.log.Error("expander not asked", "err", err)
		return options
	}
	ctx, cancel := context.WithTimeout(ctx, expanderTimeout)
	defer cancel()
	resp, err := a.expander.BestOptions(ctx, req, grpc.MaxCallRecvMsgSize(expanderMaxMessage))
	if err != nil {
		a.log.Error("expander failed: nothing filtered", "err", err)
		return options
	}
	if len(resp.GetOptions()) == 0 {
		return nil
	}
	var kept []option
	for _, named := range resp.GetOptions() {
		if i := slices.IndexFunc(options, func(o option) bool { return o.group.id == named.GetNodeGroupId() }); i >= 0 {
			kept = append(kept, options[i])
		}
	}
	if len(kept) == 0 {
		return options
	}
	return kept
}

func (a *Autoscaler) expanderRequest(options []option) (*expander.BestOptionsRequest, error) {
	req := &expander.BestOptionsRequest{}
	templates := map[string][]byte{}
	for id, t := range a.templates {
		wire, err := t.node.Marshal()
		if err != nil {
			return nil, fmt.Errorf("marshalling the template of group %q: %w", id, err)
		}
		templates[id] = wire
	}
	if a.cfg.Generation.speaksNew() {
		req.NodeBytesMap = templates
	}
	if a.cfg.Generation.speaksOld() {
		req.NodeMap = templates
	}
	for _, o := range options {
		wire := &expander.Option{NodeGroupId: o.group.id, NodeCount: int32(o.nodes)}
		for _, p := range o.pods {
			pod, err := p.Marshal()
			if err != nil {
				return nil, fmt.Errorf("marshalling pod %s/%s: %w", p.Namespace, p.Name, err)
			}
			if a.cfg.Generation.speaksNew() {
				wire.PodBytes = append(wire.PodBytes, pod)
			}
			if a.cfg.Generation.speaksOld() {
				wire.Pod = append(wire.Pod, pod)
			}
		}
		req.Options = append(req.Options, wire)
	}
	return req, nil
}

// waste is the share of CPU plus the share of memory that nobody would use.
func (a *Autoscaler) waste(o option) float64 {
	var sum float64
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		capacity := a.templates[o.group.id].node.Status.Capacity[name]
		available := capacity.AsApproximateFloat64() * float64(o.nodes)
		used := 0.0
		for _, p := range o.pods {
			request := requests(p)[name]
			used += request.AsApproximateFloat64()
		}
		if available > 0 {
			sum += (available - used) / available
		}
	}
	return sum
}
