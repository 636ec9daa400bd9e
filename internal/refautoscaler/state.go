package refautoscaler

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

const (
	instancesRefresh  = 2 * time.Minute // CA's interval for asking every group for its instances
	backoffForgotten  = 3 * time.Hour   // CA's node-group-backoff-reset-timeout
	unhealthyCluster  = "too many nodes are not ready"
	skippedNoRequest  = "no active scale-up request"
	skippedBackedOff  = "backed off"
	skippedUnhealthy  = "unhealthy"
	skippedAtMax      = "max size reached"
	skippedNoTemplate = "no template"
)

// readiness counts the nodes and instances of a group, or of the cluster.
type readiness struct {
	registered, ready, unready, longUnregistered, unregistered int
	notStarted                                                 []string // names
}

// sizeRange is how many nodes a group should have: target, or fewer as long as a
// scale-up is under way.
type sizeRange struct{ min, target int }

// scaleUpRequest is what CA remembers of its own IncreaseSize, in memory only.
type scaleUpRequest struct {
	increase int
	deadline time.Time
}

type wrongSize struct {
	current, expected int
	since             time.Time
}

type backoff struct {
	duration     time.Duration
	until, since time.Time
	reason       string
}

// clusterState reconciles what the provider says with the registered nodes and with
// the requests that were made. Only the loop uses it.
type clusterState struct {
	provider    *provider
	gen         Generation
	flags       Flags
	log         *slog.Logger
	emit        func(Event)
	hasTemplate func(group string) bool

	cached      map[string][]*pb.Instance // by group
	refreshedAt time.Time

	nodeCount    int
	targets      map[string]int
	instances    map[string][]*pb.Instance
	previous     map[string][]*pb.Instance // of the round before
	unregistered map[string]time.Time      // instance id → first seen
	groups       map[string]*readiness
	total        readiness
	ranges       map[string]sizeRange
	requests     map[string]*scaleUpRequest
	wrongSizes   map[string]wrongSize
	backoffs     map[string]backoff
}

// update takes in a new observation; an error ends the loop.
func (s *clusterState) update(ctx context.Context, nodes []*corev1.Node, now time.Time) error {
	targets := map[string]int{}
	for _, g := range s.provider.nodeGroups(ctx) {
		size, err := s.provider.targetSize(ctx, g.id)
		if err != nil {
			return fmt.Errorf("asking for the target size of group %q: %w", g.id, err)
		}
		targets[g.id] = size
	}
	instances, err := s.listInstances(ctx, now)
	if err != nil {
		return err
	}
	s.nodeCount, s.targets = len(nodes), targets
	s.previous, s.instances = s.instances, instances
	s.updateUnregistered(nodes, now)
	s.updateReadiness(ctx, nodes, now)
	s.updateRanges(ctx)
	s.updateRequests(ctx, now)
	s.handleFailedInstances(ctx, now)
	s.updateRanges(ctx) // without the requests that have just ended
	s.updateWrongSizes(ctx, now)
	return nil
}

// recalculate follows a change that CA itself has made.
func (s *clusterState) recalculate(ctx context.Context) {
	s.targets = map[string]int{}
	for _, g := range s.provider.nodeGroups(ctx) {
		size, err := s.provider.targetSize(ctx, g.id)
		if err != nil { // one error makes CA take all targets for 0 until the next loop
			s.log.Error("target sizes unknown", "group", g.id, "err", err)
			s.targets = map[string]int{}
			break
		}
		s.targets[g.id] = size
	}
	s.updateRanges(ctx)
}

// listInstances answers from the cache, but for groups that are scaling up.
func (s *clusterState) listInstances(ctx context.Context, now time.Time) (map[string][]*pb.Instance, error) {
	groups := s.provider.nodeGroups(ctx)
	if now.Sub(s.refreshedAt) >= instancesRefresh {
		s.refreshedAt, s.cached = now, map[string][]*pb.Instance{}
		for _, g := range groups {
			list, err := s.provider.instances(ctx, g.id)
			if err != nil {
				s.log.Error("NodeGroupNodes failed: no instances", "group", g.id, "err", err)
			}
			s.cached[g.id] = list
		}
	}
	result := map[string][]*pb.Instance{}
	for _, g := range groups {
		if s.scalingUp(g.id) {
			delete(s.cached, g.id)
		}
		if _, ok := s.cached[g.id]; !ok {
			list, err := s.provider.instances(ctx, g.id)
			if err != nil {
				return nil, fmt.Errorf("asking for the instances of group %q: %w", g.id, err)
			}
			s.cached[g.id] = list
		}
		result[g.id] = s.cached[g.id]
	}
	return result, nil
}

func (s *clusterState) forgetInstances(group string) { delete(s.cached, group) }

func (s *clusterState) updateUnregistered(nodes []*corev1.Node, now time.Time) {
	registered := map[string]bool{}
	for _, n := range nodes {
		registered[n.Spec.ProviderID] = true
	}
	unregistered := map[string]time.Time{}
	for _, list := range s.instances {
		for _, i := range list {
			status := i.GetStatus()
			leaving := status.GetInstanceState() == pb.InstanceStatus_instanceDeleting
			failed := status.GetInstanceState() != pb.InstanceStatus_unspecified && status.GetErrorInfo().GetErrorCode() != ""
			if registered[i.GetId()] || leaving || failed {
				continue
			}
			unregistered[i.GetId()] = now
			if since, ok := s.unregistered[i.GetId()]; ok {
				unregistered[i.GetId()] = since
			}
		}
	}
	s.unregistered = unregistered
}

func (s *clusterState) updateReadiness(ctx context.Context, nodes []*corev1.Node, now time.Time) {
	s.groups, s.total = map[string]*readiness{}, readiness{}
	of := func(group string) *readiness {
		if s.groups[group] == nil {
			s.groups[group] = &readiness{}
		}
		return s.groups[group]
	}
	startup := maxNodeStartup // carried over from node to node, as in CA
	for _, n := range nodes {
		counts := []*readiness{&s.total}
		if g := s.provider.ownGroupOf(ctx, n); g != nil {
			counts = append(counts, of(g.id))
			if s.gen.losesStartupTime() {
				if o, err := s.provider.options(ctx, g.id); err == nil {
					startup = o.startup
				}
			}
		}
		ready, _ := readinessOf(n)
		for _, r := range counts {
			r.registered++
			switch {
			case hasTaint(n, toBeDeletedTaint):
			case ready:
				r.ready++
			case n.CreationTimestamp.Add(startup).After(now):
				r.notStarted = append(r.notStarted, n.Name)
			default:
				r.unready++
			}
		}
	}
	for id, since := range s.unregistered {
		g := s.provider.ownGroupOf(ctx, instanceAsNode(id))
		if g == nil {
			continue
		}
		o, err := s.provider.options(ctx, g.id)
		if err != nil {
			s.log.Error("instance left out", "instance", id, "err", err)
			continue
		}
		if since.Add(o.MaxNodeProvisionTime).Before(now) {
			of(g.id).longUnregistered++
		} else {
			of(g.id).unregistered++
		}
	}
}

// instanceAsNode is how CA speaks of an instance that has no Node.
func instanceAsNode(id string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: id}, Spec: corev1.NodeSpec{ProviderID: id}}
}

func (s *clusterState) updateRanges(ctx context.Context) {
	s.ranges = map[string]sizeRange{}
	for _, g := range s.provider.nodeGroups(ctx) {
		r := sizeRange{min: s.targets[g.id], target: s.targets[g.id]}
		if counted := s.groups[g.id]; counted != nil {
			r.min -= counted.longUnregistered
		}
		s.ranges[g.id] = r
	}
	for id, request := range s.requests {
		r := s.ranges[id]
		r.min -= request.increase
		s.ranges[id] = r
	}
}

// missing is how many nodes of the target are neither ready nor known to be lost.
func (s *clusterState) missing(group string) int {
	target, r := s.ranges[group].target, s.groups[group]
	if r == nil {
		return target
	}
	return target - r.ready - r.unready - r.longUnregistered
}

func (s *clusterState) scalingUp(group string) bool {
	return s.requests[group] != nil && s.unfulfilled(group)
}

// unfulfilled tells whether a scale-up still waits for nodes. Until 1.35 instances
// that never register are waited for until the request times out.
func (s *clusterState) unfulfilled(group string) bool {
	if r := s.groups[group]; r != nil && !s.gen.upcomingNeedsRequest() {
		return s.ranges[group].target > r.registered-len(r.notStarted)
	}
	return s.missing(group) > 0
}

// request registers a change of the target size that CA itself has made.
func (s *clusterState) request(ctx context.Context, group string, delta int, now time.Time) {
	o, err := s.provider.options(ctx, group)
	if err != nil {
		s.log.Error("scale-up not remembered", "group", group, "err", err)
		return
	}
	r := s.requests[group]
	if r == nil {
		r = &scaleUpRequest{}
	}
	r.increase += delta
	if r.increase <= 0 {
		delete(s.requests, group)
		return
	}
	if delta > 0 {
		r.deadline = now.Add(o.MaxNodeProvisionTime)
	}
	s.requests[group] = r
}

func (s *clusterState) updateRequests(ctx context.Context, now time.Time) {
	for id, b := range s.backoffs {
		if b.since.Add(backoffForgotten).Before(now) {
			delete(s.backoffs, id)
		}
	}
	for id, r := range s.requests {
		switch {
		case !s.unfulfilled(id):
			delete(s.requests, id)
		case r.deadline.Before(now):
			s.emit(Event{Kind: ScaleUpTimedOut, Group: id, Delta: r.increase})
			s.backOff(id, "scale-up timed out", now)
			if s.gen.revertsTimedOut() {
				if err := s.provider.decreaseTargetSize(ctx, id, -r.increase); err != nil {
					s.log.Error("timed-out scale-up not reverted", "group", id, "err", err)
				}
			}
			delete(s.requests, id)
		}
	}
}

// failedInstances returns the ids of creating instances with an error, by message.
func failedInstances(list []*pb.Instance) map[string]string {
	failed := map[string]string{}
	for _, i := range list {
		status := i.GetStatus()
		if code := status.GetErrorInfo().GetErrorCode(); code != "" && status.GetInstanceState() == pb.InstanceStatus_instanceCreating {
			failed[i.GetId()] = code + ": " + status.GetErrorInfo().GetErrorMessage()
		}
	}
	return failed
}

func (s *clusterState) handleFailedInstances(ctx context.Context, now time.Time) {
	for _, g := range s.provider.nodeGroups(ctx) {
		seen, unseen, reason := failedInstances(s.previous[g.id]), 0, ""
		for id, message := range failedInstances(s.instances[g.id]) {
			if _, ok := seen[id]; !ok {
				unseen, reason = unseen+1, message
			}
		}
		if unseen > 0 && s.scalingUp(g.id) {
			s.request(ctx, g.id, -unseen, now)
			s.backOff(g.id, reason, now)
			s.emit(Event{Kind: InstancesFailed, Group: g.id, Delta: unseen, Reason: reason})
		}
	}
}

func (s *clusterState) updateWrongSizes(ctx context.Context, now time.Time) {
	wrong := map[string]wrongSize{}
	for _, g := range s.provider.nodeGroups(ctx) {
		r, target := s.groups[g.id], s.ranges[g.id].target
		if r == nil {
			continue
		}
		if r.registered > target || r.registered < target-r.unregistered-r.longUnregistered {
			w := wrongSize{current: r.registered, expected: target, since: now}
			if old, ok := s.wrongSizes[g.id]; ok && old.current == w.current && old.expected == w.expected {
				w = old
			}
			wrong[g.id] = w
		}
	}
	s.wrongSizes = wrong
}

// backOff keeps a group from being scaled up for a while: longer when it fails again
// after an earlier back-off has ended.
func (s *clusterState) backOff(group, reason string, now time.Time) {
	if !s.hasTemplate(group) {
		return
	}
	duration := s.flags.InitialNodeGroupBackoffDuration
	if old, ok := s.backoffs[group]; ok {
		duration = old.duration
		if old.until.Before(now) {
			duration = min(2*duration, s.flags.MaxNodeGroupBackoffDuration)
		}
	}
	s.backoffs[group] = backoff{duration: duration, until: now.Add(duration), since: now, reason: reason}
}

func (s *clusterState) backedOff(group string, now time.Time) bool {
	b, ok := s.backoffs[group]
	return ok && s.hasTemplate(group) && !b.until.Before(now)
}

func (s *clusterState) tooMany(bad, of int) bool {
	return bad > s.flags.OKTotalUnreadyCount && float64(bad) > s.flags.MaxTotalUnreadyPercentage/100*float64(of)
}

func (s *clusterState) clusterHealthy() bool { return !s.tooMany(s.total.unready, s.nodeCount) }

func (s *clusterState) groupHealthy(group string) bool {
	want, ok := s.ranges[group]
	if !ok {
		return false
	}
	r := s.groups[group]
	if r == nil {
		return want.target == 0 || want.min == 0 && want.target > 0
	}
	return !s.tooMany(max(0, want.min-r.ready), r.ready+r.unready+len(r.notStarted))
}

// upcoming returns how many nodes of each group are on their way, and the names of
// those that are registered already.
func (s *clusterState) upcoming(ctx context.Context, now time.Time) (counts map[string]int, registered map[string]bool) {
	counts, registered = map[string]int{}, map[string]bool{}
	for _, g := range s.provider.nodeGroups(ctx) {
		n := s.missing(g.id)
		if n <= 0 {
			continue
		}
		if s.gen.upcomingNeedsRequest() {
			reason := ""
			if s.requests[g.id] == nil {
				reason = skippedNoRequest
			} else if s.backedOff(g.id, now) {
				reason = skippedBackedOff
			}
			if reason != "" {
				s.emit(Event{Kind: UpcomingSkipped, Group: g.id, Delta: n, Reason: reason})
				continue
			}
		}
		counts[g.id] = n
		if r := s.groups[g.id]; r != nil {
			for _, name := range r.notStarted {
				registered[name] = true
			}
		}
	}
	return counts, registered
}
