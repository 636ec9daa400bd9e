package refautoscaler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/hearth-ci/hearth/protos/expander"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// ErrFailing ends Run when no loop was good for MaxFailingTime: the liveness probe
// kills CA then. Whoever ran it dials anew and starts another Autoscaler, as the
// kubelet restarts CA's container.
var ErrFailing = errors.New("no good loop for too long")

// Autoscaler is one run of the reference autoscaler: all that it knows is in memory.
type Autoscaler struct {
	cfg      Config
	log      *slog.Logger
	provider *provider
	expander expander.ExpanderClient // nil: none

	state         *clusterState
	templates     map[string]*simulated // of this loop, by group
	liveTemplates map[string]*simulated // last seen on live nodes, by group
	unneeded      []unneeded            // in the order of candidates
	unremovable   map[string]time.Time  // node name → until when it is not looked at
	actuator      actuator
	cleaned       bool
	observing     sync.Mutex

	lastScaleUp, lastScaleDown, lastScaleDownFailure time.Time
}

// New checks the config. It starts nothing and calls nobody.
func New(cfg Config) (*Autoscaler, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	a := &Autoscaler{
		cfg: cfg,
		log: cfg.Logger,
		provider: &provider{
			rpc: pb.NewCloudProviderClient(cfg.Provider), timeout: cfg.GRPCTimeout, gen: cfg.Generation,
			defaults: cfg.Flags.GroupOptions, log: cfg.Logger, byNode: map[string]*nodeGroup{},
		},
		liveTemplates: map[string]*simulated{},
		unremovable:   map[string]time.Time{},
		actuator:      actuator{running: deletions{}, batches: map[string][]*corev1.Node{}},
	}
	a.state = &clusterState{
		provider: a.provider, gen: cfg.Generation, flags: cfg.Flags, log: cfg.Logger, emit: a.emit,
		hasTemplate: func(group string) bool { return a.templates[group] != nil },
		requests:    map[string]*scaleUpRequest{},
		backoffs:    map[string]backoff{},
	}
	if cfg.Expander != nil {
		a.expander = expander.NewExpanderClient(cfg.Expander)
	}
	return a, nil
}

// Run makes loops until ctx ends, and then returns nil; or until CA's liveness probe
// would kill it, and then returns ErrFailing. Either way it ends as a killed CA does:
// deletions under way stop where they are, taints stay, the provider is not told.
func (a *Autoscaler) Run(ctx context.Context) error {
	ctx, kill := context.WithCancelCause(ctx)
	probe := time.AfterFunc(max(a.cfg.Flags.MaxStartupTime, a.cfg.Flags.MaxFailingTime), func() { kill(ErrFailing) })
	defer a.Wait()
	defer kill(nil)
	defer probe.Stop()
	appeared, stopWatching := a.watchUnschedulable(ctx)
	defer stopWatching()

	// CA compares with the start of the loop before the last one: two loops follow a
	// productive one at once.
	previous, last := time.Now(), time.Now()
	for ctx.Err() == nil {
		productive := a.cfg.Flags.FrequentLoopsEnabled &&
			(!a.lastScaleUp.Before(previous) || !a.lastScaleDown.Before(previous))
		if !productive {
			select {
			case <-ctx.Done():
			case <-time.After(a.cfg.Flags.ScanInterval):
			case <-appeared:
			}
		}
		if ctx.Err() != nil {
			break
		}
		previous, last = last, time.Now()
		if err := a.RunOnce(ctx); err == nil {
			probe.Reset(a.cfg.Flags.MaxFailingTime)
		} else if ctx.Err() == nil {
			a.emit(Event{Kind: LoopFailed, Reason: err.Error()})
		}
	}
	if errors.Is(context.Cause(ctx), ErrFailing) {
		return ErrFailing
	}
	return nil
}

// Wait returns when the deletions have ended that RunOnce has started. They end
// with its ctx at the latest.
func (a *Autoscaler) Wait() { a.actuator.wg.Wait() }

// Cleanup tells the provider what CA tells it when it is asked to end (SIGTERM).
func (a *Autoscaler) Cleanup(ctx context.Context) error {
	_, err := call(ctx, a.provider, a.provider.rpc.Cleanup, &pb.CleanupRequest{})
	return err
}

// RunOnce is one loop. Deletions that it starts go on in the background until they
// are done or ctx ends. It must not be called concurrently.
func (a *Autoscaler) RunOnce(ctx context.Context) error {
	now := time.Now()
	nodes, pods, daemons, err := a.list(ctx)
	if err != nil {
		return err
	}
	a.removeOldTaints(ctx, nodes)
	busy := a.actuator.snapshot()
	if err := a.provider.refresh(ctx); err != nil {
		return fmt.Errorf("refreshing the provider: %w", err)
	}
	world := newSnapshot(nodes, pods)
	a.updateTemplates(ctx, world, daemons, now)
	if err := a.state.update(ctx, nodes, now); err != nil {
		a.unneeded = nil
		return err
	}
	a.removeUnregistered(ctx, now)
	if !a.state.clusterHealthy() {
		a.unneeded = nil
		a.emit(Event{Kind: ClusterUnhealthy, Reason: unhealthyCluster})
		return nil
	}
	a.deleteFailedInstances(ctx)
	if fixed, err := a.fixSizes(ctx, now); fixed || err != nil {
		return err
	}

	counts, registered := a.state.upcoming(ctx, now)
	world = slices.DeleteFunc(world, func(n *simulated) bool { return registered[n.node.Name] })
	for group, n := range counts {
		for range n {
			if t := a.templates[group]; t != nil {
				upcoming := t.clone()
				upcoming.upcoming = true
				world = append(world, upcoming)
			}
		}
	}
	draining := map[string]bool{}
	for name, d := range busy {
		draining[name] = d.drain
	}
	pending := unhelped(world, pendingPods(pods, draining))
	waiting := len(pending) > 0 && allNew(pending, now)
	if len(pending) > 0 && !waiting {
		err := a.scaleUp(ctx, pending, now)
		if a.cfg.Generation.scaleUpEndsLoop() && (err != nil || a.lastScaleUp.Equal(now)) {
			return err
		}
	}
	return a.scaleDown(ctx, world, busy, waiting, now)
}

// list reads the cluster. A node with a startup taint is not ready, whatever it says
// itself: readinessOf knows.
func (a *Autoscaler) list(ctx context.Context) ([]*corev1.Node, []*corev1.Pod, []appsv1.DaemonSet, error) {
	list, err := a.cfg.Kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("listing nodes: %w", err)
	}
	nodes := make([]*corev1.Node, len(list.Items))
	for i := range list.Items {
		nodes[i] = &list.Items[i]
	}
	pods, err := a.listPods(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	daemons, err := a.cfg.Kube.AppsV1().DaemonSets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("listing daemon sets: %w", err)
	}
	return nodes, pods, daemons.Items, nil
}

// listPods returns the pods that have not ended.
func (a *Autoscaler) listPods(ctx context.Context) ([]*corev1.Pod, error) {
	list, err := a.cfg.Kube.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing pods: %w", err)
	}
	var pods []*corev1.Pod
	for i := range list.Items {
		if p := &list.Items[i]; p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
			pods = append(pods, p)
		}
	}
	return pods, nil
}

// removeOldTaints undoes, once, what an earlier run may have left on nodes that the
// provider claims. It does so before the first Refresh.
func (a *Autoscaler) removeOldTaints(ctx context.Context, nodes []*corev1.Node) {
	if a.cleaned {
		return
	}
	a.cleaned = true
	for _, n := range nodes {
		if !hasTaint(n, toBeDeletedTaint) || a.provider.ownGroupOf(ctx, n) == nil {
			continue
		}
		if err := a.untaint(ctx, n.Name, toBeDeletedTaint, a.cfg.Flags.CordonNodeBeforeTerminating); err != nil {
			a.log.Warn("taint not removed", "node", n.Name, "err", err)
			continue
		}
		a.emit(Event{Kind: TaintsCleaned, Node: n.Name})
	}
}

// removeUnregistered deletes instances that should have registered long ago, as far
// as the minimum of their group allows.
func (a *Autoscaler) removeUnregistered(ctx context.Context, now time.Time) {
	late := map[string][]*corev1.Node{}
	for id, since := range a.state.unregistered {
		node := instanceAsNode(id)
		g := a.provider.ownGroupOf(ctx, node)
		if g == nil {
			continue
		}
		o, err := a.provider.options(ctx, g.id)
		if err != nil {
			a.log.Error("unregistered instances left alone", "err", err)
			return
		}
		if since.Add(o.MaxNodeProvisionTime).Before(now) {
			late[g.id] = append(late[g.id], node)
		}
	}
	sizes := a.provider.knownTargetSizes(ctx)
	for _, g := range a.provider.nodeGroups(ctx) {
		nodes := late[g.id]
		nodes = nodes[:max(0, min(len(nodes), sizes[g.id]-g.min))]
		if len(nodes) == 0 {
			continue
		}
		err := a.provider.deleteNodes(ctx, g.id, nodes)
		a.state.forgetInstances(g.id)
		if err != nil {
			a.log.Error("unregistered instances not deleted", "group", g.id, "err", err)
			return
		}
		for _, n := range nodes {
			a.emit(Event{Kind: UnregisteredRemoved, Group: g.id, Node: n.Name})
		}
	}
}

// deleteFailedInstances orders the deletion of all instances with an error, again in
// every loop as long as they are listed.
func (a *Autoscaler) deleteFailedInstances(ctx context.Context) {
	deleted := false
	for _, g := range a.provider.nodeGroups(ctx) {
		var nodes []*corev1.Node
		for id := range failedInstances(a.state.instances[g.id]) {
			nodes = append(nodes, instanceAsNode(id))
		}
		if len(nodes) == 0 {
			continue
		}
		if err := a.provider.deleteNodes(ctx, g.id, nodes); err != nil {
			a.log.Error("failed instances not deleted", "group", g.id, "err", err)
			continue
		}
		a.state.forgetInstances(g.id)
		deleted = true
	}
	if deleted {
		a.state.recalculate(ctx)
	}
}

// fixSizes takes back target sizes that the group has not reached for too long.
func (a *Autoscaler) fixSizes(ctx context.Context, now time.Time) (fixed bool, err error) {
	for _, g := range a.provider.nodeGroups(ctx) {
		w, ok := a.state.wrongSizes[g.id]
		if !ok {
			continue
		}
		o, err := a.provider.options(ctx, g.id)
		if err != nil {
			return fixed, err
		}
		delta := w.current - w.expected
		if delta >= 0 || !w.since.Add(o.MaxNodeProvisionTime).Before(now) {
			continue
		}
		if err := a.provider.decreaseTargetSize(ctx, g.id, delta); err != nil {
			return fixed, fmt.Errorf("decreasing the target size of group %q by %d: %w", g.id, -delta, err)
		}
		a.emit(Event{Kind: SizeFixed, Group: g.id, Delta: delta})
		fixed = true
	}
	return fixed, nil
}

// watchUnschedulable signals that a pod has just been found unschedulable.
func (a *Autoscaler) watchUnschedulable(ctx context.Context) (appeared <-chan struct{}, stop func()) {
	signal := make(chan struct{}, 1)
	if !a.cfg.Flags.FrequentLoopsEnabled {
		return signal, func() {}
	}
	notice := func(obj any) {
		p, ok := obj.(*corev1.Pod)
		if !ok || p.Spec.NodeName != "" || !isUnschedulable(p) ||
			scheduledCondition(p).LastTransitionTime.Add(10*time.Second).Before(time.Now()) {
			return
		}
		select {
		case signal <- struct{}{}:
		default:
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	factory := informers.NewSharedInformerFactoryWithOptions(a.cfg.Kube, 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.FieldSelector = "spec.nodeName=" }))
	_, err := factory.Core().V1().Pods().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: notice, UpdateFunc: func(_, obj any) { notice(obj) },
	})
	if err != nil {
		a.log.Error("pods not watched", "err", err)
	}
	factory.Start(ctx.Done())
	return signal, func() { cancel(); factory.Shutdown() }
}

func (a *Autoscaler) emit(e Event) {
	a.observing.Lock()
	defer a.observing.Unlock()
	e.Time = time.Now()
	a.log.Info(e.String())
	a.cfg.Observe(e)
}
