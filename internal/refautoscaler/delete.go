package refautoscaler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

const (
	evictionRetry    = 10 * time.Second
	evictionPoll     = 5 * time.Second
	evictionHeadroom = 30 * time.Second // on top of a pod's grace period
)

// deletion is a node on its way out, from the taint to the provider's answer.
type deletion struct {
	group string
	drain bool
}

// deletions are by node name.
type deletions map[string]deletion

func (d deletions) has(node string) bool { _, ok := d[node]; return ok }

func (d deletions) count(counts func(deletion) bool) int {
	n := 0
	for _, one := range d {
		if counts(one) {
			n++
		}
	}
	return n
}

func (d deletions) inGroup(group string) int {
	return d.count(func(one deletion) bool { return one.group == group })
}

func (d deletions) draining() int { return d.count(func(one deletion) bool { return one.drain }) }

// actuator is what the goroutines that delete nodes share.
type actuator struct {
	mu      sync.Mutex
	running deletions
	batches map[string][]*corev1.Node // by group, waiting for NodeDeletionBatcherInterval
	wg      sync.WaitGroup
}

func (t *actuator) snapshot() deletions {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.running)
}

func (t *actuator) begin(node string, d deletion) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running[node] = d
}

func (t *actuator) end(node string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.running, node)
}

// addToBatch returns whether the batch was empty before.
func (t *actuator) addToBatch(group string, node *corev1.Node) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.batches[group] = append(t.batches[group], node)
	return len(t.batches[group]) == 1
}

func (t *actuator) takeBatch(group string) []*corev1.Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	batch := t.batches[group]
	delete(t.batches, group)
	return batch
}

// startDeletions taints as many nodes as may be deleted at a time, first the empty
// ones, and starts a goroutine for each group. If one taint fails, the others of the
// same round come off again.
func (a *Autoscaler) startDeletions(ctx context.Context, ripe []candidate) (bool, error) {
	running := a.actuator.snapshot()
	budget := a.cfg.Flags.MaxScaleDownParallelism - len(running)
	drainBudget := a.cfg.Flags.MaxDrainParallelism - running.draining()
	started := false
	for _, drain := range []bool{false, true} {
		var chosen []candidate
		for _, c := range ripe {
			if drain != (len(c.move) > 0) || budget <= 0 || drain && drainBudget <= 0 {
				continue
			}
			chosen, budget = append(chosen, c), budget-1
			if drain {
				drainBudget--
			}
		}
		if err := a.taintAll(ctx, chosen); err != nil {
			return started, err
		}
		groups := map[string][]*corev1.Node{}
		for _, c := range chosen {
			a.actuator.begin(c.node.Name, deletion{group: c.group.id, drain: drain})
			reason := "empty"
			if drain {
				reason = "drain"
			}
			a.emit(Event{Kind: ScaleDownStarted, Group: c.group.id, Node: c.node.Name, Pods: podNames(c.move), Reason: reason})
			groups[c.group.id] = append(groups[c.group.id], c.node)
			started = true
		}
		for group, nodes := range groups {
			a.actuator.wg.Go(func() { a.deleteNodes(ctx, group, nodes, drain) })
		}
	}
	return started, nil
}

func (a *Autoscaler) taintAll(ctx context.Context, chosen []candidate) error {
	cordon := a.cfg.Flags.CordonNodeBeforeTerminating
	for i, c := range chosen {
		err := a.taint(ctx, c.node.Name, toBeDeletedTaint, corev1.TaintEffectNoSchedule, cordon)
		if err == nil {
			continue
		}
		for _, tainted := range chosen[:i] {
			if err := a.untaint(ctx, tainted.node.Name, toBeDeletedTaint, cordon); err != nil {
				a.log.Warn("taint not removed", "node", tainted.node.Name, "err", err)
			}
		}
		return fmt.Errorf("tainting node %q: %w", c.node.Name, err)
	}
	return nil
}

// deleteNodes looks at the nodes again, some seconds after the taint, and deletes
// those that are still as empty as they should be.
func (a *Autoscaler) deleteNodes(ctx context.Context, group string, nodes []*corev1.Node, drain bool) {
	if !sleep(ctx, a.cfg.Flags.NodeDeleteDelayAfterTaint) {
		return
	}
	pods, err := a.listPods(ctx)
	if err != nil {
		for _, n := range nodes {
			a.abort(ctx, group, n, err)
		}
		return
	}
	for _, n := range newSnapshot(nodes, pods) {
		d := a.cfg.Flags.departureOf(n, time.Now())
		switch {
		case d.blocked != nil:
			a.abort(ctx, group, n.node, d.blocked)
		case !drain && len(d.move) > 0, !drain && d.waiting:
			a.abort(ctx, group, n.node, errors.New("new pods scheduled on an empty node"))
		default:
			a.actuator.wg.Go(func() { a.deleteNode(ctx, group, n, drain) })
		}
	}
}

func (a *Autoscaler) deleteNode(ctx context.Context, group string, n *simulated, drain bool) {
	if _, err := a.provider.options(ctx, group); err != nil {
		a.abort(ctx, group, n.node, err)
		return
	}
	if drain {
		if err := a.evict(ctx, n); err != nil {
			a.abort(ctx, group, n.node, err)
			return
		}
	}
	if a.cfg.Flags.NodeDeletionBatcherInterval == 0 {
		a.deleteFromProvider(ctx, group, []*corev1.Node{n.node})
		return
	}
	if a.actuator.addToBatch(group, n.node) && sleep(ctx, a.cfg.Flags.NodeDeletionBatcherInterval) {
		a.deleteFromProvider(ctx, group, a.actuator.takeBatch(group))
	}
}

// deleteFromProvider makes one DeleteNodes call; its error concerns all its nodes.
func (a *Autoscaler) deleteFromProvider(ctx context.Context, group string, nodes []*corev1.Node) {
	g, err := a.provider.groupOf(ctx, nodes[0])
	if err == nil && g == nil {
		err = errors.New("node is of no group any more")
	}
	if err == nil {
		err = a.provider.deleteNodes(ctx, g.id, nodes)
	}
	for _, n := range nodes {
		if err != nil {
			a.abort(ctx, group, n, err)
			continue
		}
		a.emit(Event{Kind: ScaleDown, Group: group, Node: n.Name})
		a.actuator.end(n.Name)
	}
}

// abort gives a node back to the cluster, but not when the autoscaler is ending: a
// CA that is killed leaves its taints behind.
func (a *Autoscaler) abort(ctx context.Context, group string, node *corev1.Node, reason error) {
	if ctx.Err() != nil {
		return
	}
	a.emit(Event{Kind: ScaleDownFailed, Group: group, Node: node.Name, Reason: reason.Error()})
	if err := a.untaint(ctx, node.Name, toBeDeletedTaint, a.cfg.Flags.CordonNodeBeforeTerminating); err != nil {
		a.log.Warn("taint not removed", "node", node.Name, "err", err)
	}
	a.actuator.end(node.Name)
}

// evict evicts all pods and waits until they are gone; those of DaemonSets, if at
// all, without caring whether it works.
func (a *Autoscaler) evict(ctx context.Context, n *simulated) error {
	var evictions sync.WaitGroup
	defer evictions.Wait()
	var pods []*corev1.Pod
	for _, p := range n.pods {
		switch {
		case isMirrorPod(p):
		case !isDaemonSetPod(p):
			pods = append(pods, p)
		case a.cfg.Flags.DaemonSetEvictionForOccupiedNodes:
			evictions.Go(func() {
				if err := a.evictPod(ctx, p); err != nil {
					a.log.Info("DaemonSet pod not evicted", "pod", p.Name, "err", err)
				}
			})
		}
	}
	errs := make([]error, len(pods))
	for i, p := range pods {
		evictions.Go(func() { errs[i] = a.evictPod(ctx, p) })
	}
	evictions.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for deadline := time.Now().Add(a.cfg.Flags.maxGrace() + evictionHeadroom); ; {
		left := slices.ContainsFunc(pods, func(p *corev1.Pod) bool {
			now, err := a.cfg.Kube.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
			return err == nil && now.Spec.NodeName == n.node.Name || err != nil && !apierrors.IsNotFound(err)
		})
		if !left {
			return nil
		}
		if !time.Now().Before(deadline) || !sleep(ctx, evictionPoll) {
			return fmt.Errorf("draining node %q: pods are left", n.node.Name)
		}
	}
}

func (a *Autoscaler) evictPod(ctx context.Context, p *corev1.Pod) error {
	grace := gracePeriod(p)
	if limit := a.cfg.Flags.maxGrace(); limit > 0 {
		grace = min(grace, limit)
	}
	seconds := int64(grace.Seconds())
	eviction := &policyv1.Eviction{
		ObjectMeta:    metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name},
		DeleteOptions: &metav1.DeleteOptions{GracePeriodSeconds: &seconds},
	}
	for deadline := time.Now().Add(a.cfg.Flags.MaxPodEvictionTime); ; {
		err := a.cfg.Kube.CoreV1().Pods(p.Namespace).EvictV1(ctx, eviction)
		if err == nil || apierrors.IsNotFound(err) {
			return nil
		}
		if !sleep(ctx, evictionRetry) || !time.Now().Before(deadline) {
			return fmt.Errorf("evicting pod %s/%s: %w", p.Namespace, p.Name, err)
		}
	}
}

func (a *Autoscaler) taint(ctx context.Context, name, key string, effect corev1.TaintEffect, cordon bool) error {
	return a.updateNode(ctx, name, func(n *corev1.Node) bool {
		if hasTaint(n, key) {
			return false
		}
		value := strconv.FormatInt(time.Now().Unix(), 10)
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Value: value, Effect: effect})
		n.Spec.Unschedulable = n.Spec.Unschedulable || cordon
		return true
	})
}

func (a *Autoscaler) untaint(ctx context.Context, name, key string, uncordon bool) error {
	return a.updateNode(ctx, name, func(n *corev1.Node) bool {
		before := len(n.Spec.Taints)
		n.Spec.Taints = slices.DeleteFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
		n.Spec.Unschedulable = n.Spec.Unschedulable && !uncordon
		return len(n.Spec.Taints) != before
	})
}

// updateNode writes the newest version of the node if change says that it differs.
func (a *Autoscaler) updateNode(ctx context.Context, name string, change func(*corev1.Node) bool) error {
	nodes := a.cfg.Kube.CoreV1().Nodes()
	return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		n, err := nodes.Get(ctx, name, metav1.GetOptions{})
		if err != nil || !change(n) {
			return err
		}
		_, err = nodes.Update(ctx, n, metav1.UpdateOptions{})
		return err
	})
}

// sleep returns false if the context ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
