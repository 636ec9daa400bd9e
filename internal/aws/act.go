package aws

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	astypes "github.com/aws/aws-sdk-go-v2/service/autoscaling/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Most instances that a call takes (API references of EnterStandby and
// ExitStandby, SetInstanceProtection, TerminateInstanceInAutoScalingGroup).
const (
	mostStandby   = 20
	mostProtect   = 50
	mostTerminate = 100
	mostEC2       = 100
)

// reading is one look at a group that an act rests on. It does not change.
type reading struct {
	name     string
	min, max int
	desired  int
	members  []member
	lagging  []string // instances that exist, and that the group does not list
}

type member struct {
	id        string
	lifecycle astypes.LifecycleState
	protected bool
	ended     bool // by us
	machine   machine
}

// parkedRunning counts the instances that a snapshot's desired number has
// beyond the group's.
func (r reading) parkedRunning() (n int) {
	for _, m := range r.members {
		if standby(m.lifecycle) && running(ec2State(m.machine.state)) && m.machine.marker != resuming && !m.ended {
			n++
		}
	}
	return n
}

func (r reading) counted() (n int) {
	for _, m := range r.members {
		if counted(m.lifecycle) {
			n++
		}
	}
	return n
}

// pick returns the members among ids for which the condition holds.
func (r reading) pick(ids []model.InstanceID, holds func(member) bool) (out []string) {
	for _, m := range r.members {
		if holds(m) && slices.ContainsFunc(ids, func(id model.InstanceID) bool { return instanceID(id) == m.id }) {
			out = append(out, m.id)
		}
	}
	return out
}

// begin reads the group that is to be changed, unless it has just been.
func (b *Backend) begin(ctx context.Context, id model.GroupID, doing string) (reading, error) {
	if b.cfg.DryRun {
		b.mu.Lock()
		g := b.groups[id]
		news := g != nil && g.would != doing
		if news {
			g.would = doing
		}
		b.mu.Unlock()
		if news {
			b.cfg.Logger.Info("dry run: the group would be "+doing, "nodegroup", id)
		}
		return reading{}, model.ErrDryRun
	}
	now := b.cfg.Now()
	b.mu.Lock()
	g := b.groups[id]
	usable := g != nil && now.Sub(g.readAt) < fresh && g.readAt.After(g.actedAt)
	held := g != nil && now.Before(g.hold)
	b.mu.Unlock()
	if held {
		return reading{}, underWay("the outcome of an earlier call is not known yet")
	}
	if !usable {
		read, err := b.listNamed(ctx, []string{string(id)})
		if err != nil {
			return reading{}, err
		}
		if len(read) == 0 {
			return reading{}, errors.New("there is no such Auto Scaling group")
		}
		b.take(read, false, now, nil)
		b.mu.Lock()
		ask := b.groups[id].unclear()
		b.mu.Unlock()
		machines, err := b.describe(ctx, ask)
		if err != nil {
			return reading{}, err
		}
		b.mu.Lock()
		b.groups[id].know(ask, machines)
		b.mu.Unlock()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if g = b.groups[id]; g == nil {
		return reading{}, errors.New("there is no such Auto Scaling group")
	}
	r := reading{
		name: string(id), min: int(awssdk.ToInt32(g.asg.MinSize)), max: int(awssdk.ToInt32(g.asg.MaxSize)),
		desired: int(awssdk.ToInt32(g.asg.DesiredCapacity)),
	}
	for _, i := range g.asg.Instances {
		m := member{id: awssdk.ToString(i.InstanceId), lifecycle: i.LifecycleState, protected: awssdk.ToBool(i.ProtectedFromScaleIn)}
		_, m.ended = g.ended[m.id]
		m.machine = g.instances[m.id]
		r.members = append(r.members, m)
	}
	for id := range g.listed {
		if m, exists := g.instances[id]; exists && m.group == r.name && !slices.ContainsFunc(r.members, func(m member) bool { return m.id == id }) {
			r.lagging = append(r.lagging, id)
		}
	}
	return r, nil
}

// acted notes that a group was changed, or may have been.
func (b *Backend) acted(id string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.groups[model.GroupID(id)]
	if g == nil {
		return
	}
	g.actedAt = b.cfg.Now()
	if err != nil && !rejected(err) {
		g.hold = g.actedAt.Add(settle)
	}
}

// raised notes that a group's capacity was raised, or why it could not be.
func (b *Backend) raised(id string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.groups[model.GroupID(id)]
	if g == nil {
		return
	}
	now := b.cfg.Now()
	g.refused = nil
	switch {
	case err == nil:
		g.raisedAt, g.failure, g.failureAt = now, nil, time.Time{}
	case rejected(err):
		g.refused = refusal(err, now)
		g.setAt = time.Time{}
	}
}

// rejected says whether a call is known not to have taken effect.
func rejected(err error) bool {
	response, ok := errors.AsType[*smithyhttp.ResponseError](err)
	return ok && response.HTTPStatusCode()/100 == 4
}

// Resize sets the desired capacity. It raises it once for however many calls,
// and lowers it never below what exists or is being launched.
func (b *Backend) Resize(ctx context.Context, id model.GroupID, desired int) error {
	if err := b.resize(ctx, id, desired); err != nil {
		return fmt.Errorf("resizing node group %q to %d: %w", id, desired, err)
	}
	return nil
}

func (b *Backend) resize(ctx context.Context, id model.GroupID, desired int) error {
	r, err := b.begin(ctx, id, fmt.Sprintf("resized to %d", desired))
	if err != nil {
		return err
	}
	want := desired - r.parkedRunning()
	var refused error
	if want > r.max {
		refused = fmt.Errorf("the group's maximum is %d", r.max)
		want = r.max
	}
	if want < r.desired {
		coming, err := b.launching(ctx, r)
		if err != nil {
			return err
		}
		want = max(want, r.counted()+coming, r.min)
		if want >= r.desired {
			return underWay("what is to be cancelled is being launched")
		}
		// Should one be born between our read and the write, the group must
		// not take one that works.
		if b.cfg.Protect(id) {
			if err := b.protect(ctx, r); err != nil {
				return err
			}
		}
	}
	if want == r.desired {
		return refused
	}
	if b.alreadySet(r.name, want) {
		return cmp.Or(refused, underWay("the new capacity is not read yet"))
	}
	_, err = b.cfg.AutoScaling.SetDesiredCapacity(ctx, &autoscaling.SetDesiredCapacityInput{
		AutoScalingGroupName: &r.name, DesiredCapacity: awssdk.Int32(int32(want)), HonorCooldown: awssdk.Bool(false), //nolint:gosec // at most the group's maximum
	}, once)
	b.acted(r.name, err)
	if want > r.desired {
		b.raised(r.name, err)
	}
	return errors.Join(err, refused)
}

// alreadySet says whether the capacity was set to the same a moment ago and a
// reading that lags has it otherwise; else it notes that it is about to be.
func (b *Backend) alreadySet(name string, want int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	g, now := b.groups[model.GroupID(name)], b.cfg.Now()
	if g == nil {
		return false
	}
	if g.setTo == want && now.Sub(g.setAt) < settle {
		return true
	}
	g.setTo, g.setAt = want, now
	return false
}

// underWay has the core come back later; what says what is waited for.
func underWay(what string) error { return fmt.Errorf("%s: %w", what, model.ErrUnderWay) }

// protect protects the group's instances from scale in.
func (b *Backend) protect(ctx context.Context, r reading) error {
	var ids []string
	for _, m := range r.members {
		if m.lifecycle == astypes.LifecycleStateInService && !m.protected && !m.ended {
			ids = append(ids, m.id)
		}
	}
	for part := range slices.Chunk(ids, mostProtect) {
		_, err := b.cfg.AutoScaling.SetInstanceProtection(ctx, &autoscaling.SetInstanceProtectionInput{
			AutoScalingGroupName: &r.name, InstanceIds: part, ProtectedFromScaleIn: awssdk.Bool(true),
		})
		if err != nil {
			return fmt.Errorf("protecting instances: %w", err)
		}
	}
	return nil
}

// Terminate ends instances for good.
func (b *Backend) Terminate(ctx context.Context, id model.GroupID, ids []model.InstanceID) error {
	r, err := b.begin(ctx, id, fmt.Sprintf("rid of %v", ids))
	if err == nil {
		err = b.terminate(ctx, r, ids)
	}
	if err != nil {
		return fmt.Errorf("terminating instances of node group %q: %w", id, err)
	}
	return nil
}

func (b *Backend) terminate(ctx context.Context, r reading, ids []model.InstanceID) error {
	living := r.pick(ids, func(m member) bool { return counted(m.lifecycle) && !m.ended })
	// The capacity was lowered when these entered standby.
	parked := r.pick(ids, func(m member) bool { return standby(m.lifecycle) && !m.ended })
	lower, stay := living, parked
	if room := max(r.desired-r.min, 0); len(lower) > room {
		// At its minimum the group replaces what goes.
		lower, stay = living[:room], append(slices.Clone(parked), living[room:]...)
	}
	for _, job := range []struct {
		ids       []string
		decrement bool
	}{{lower, true}, {stay, false}} {
		for part := range slices.Chunk(job.ids, mostTerminate) {
			if err := b.terminatePart(ctx, r, part, job.decrement); err != nil {
				return err
			}
		}
	}
	if slices.ContainsFunc(ids, func(id model.InstanceID) bool { return slices.Contains(r.lagging, instanceID(id)) }) {
		return underWay("the group does not list what it has")
	}
	return nil
}

// terminatePart ends instances in one call. When the call is refused because
// of one of them, each gets its own.
func (b *Backend) terminatePart(ctx context.Context, r reading, ids []string, decrement bool) error {
	in := &autoscaling.TerminateInstanceInAutoScalingGroupInput{ShouldDecrementDesiredCapacity: &decrement}
	if len(ids) == 1 {
		in.InstanceId = &ids[0]
	} else {
		in.AutoScalingGroupName, in.InstanceIds = &r.name, ids
	}
	_, err := b.cfg.AutoScaling.TerminateInstanceInAutoScalingGroup(ctx, in, once)
	b.acted(r.name, err)
	switch {
	case err == nil:
		b.mu.Lock()
		defer b.mu.Unlock()
		if g := b.groups[model.GroupID(r.name)]; g != nil {
			for _, id := range ids {
				g.ended[id] = b.cfg.Now()
			}
		}
		return nil
	case len(ids) > 1 && isCode(err, "ValidationError"):
		var failed []error
		for _, id := range ids {
			failed = append(failed, b.terminatePart(ctx, r, []string{id}, decrement))
		}
		return errors.Join(failed...)
	}
	return err
}

// Stop parks instances. One that cannot be stopped is terminated. It is to be
// called again for those that are not in standby yet.
func (b *Backend) Stop(ctx context.Context, id model.GroupID, ids []model.InstanceID) error {
	r, err := b.begin(ctx, id, fmt.Sprintf("parking %v", ids))
	if err == nil {
		err = b.stop(ctx, r, ids)
	}
	if err != nil {
		return fmt.Errorf("stopping instances of node group %q: %w", id, err)
	}
	return nil
}

func (b *Backend) stop(ctx context.Context, r reading, ids []model.InstanceID) error {
	var unfit []string
	serving := r.pick(ids, func(m member) bool { return m.lifecycle == astypes.LifecycleStateInService && !m.ended })
	if len(serving) > 0 {
		machines, err := b.describe(ctx, serving)
		if err != nil {
			return err
		}
		unfit = slices.DeleteFunc(slices.Clone(serving), func(id string) bool { m, ok := machines[id]; return !ok || m.parkable })
		if b.managed(r.name) {
			unfit = slices.Clone(serving) // never shown to work in managed node groups
		}
		serving = slices.DeleteFunc(serving, func(id string) bool { return slices.Contains(unfit, id) })
		if len(unfit) > 0 {
			b.cfg.Logger.Warn("instances cannot be parked and are terminated", "nodegroup", r.name, "instances", unfit)
			if err := b.terminate(ctx, r, providerIDs(unfit)); err != nil {
				return err
			}
			r.desired = max(r.min, r.desired-len(unfit))
		}
		if err := b.mark(ctx, r.name, serving, parking); err != nil {
			return err
		}
	}
	room := min(max(r.desired-r.min, 0), len(serving))
	for _, job := range []struct {
		ids       []string
		decrement bool
	}{{serving[:room], true}, {serving[room:], false}} {
		for part := range slices.Chunk(job.ids, mostStandby) {
			_, err := b.cfg.AutoScaling.EnterStandby(ctx, &autoscaling.EnterStandbyInput{
				AutoScalingGroupName: &r.name, InstanceIds: part, ShouldDecrementDesiredCapacity: &job.decrement,
			}, once)
			b.acted(r.name, err)
			if err != nil {
				return fmt.Errorf("entering standby: %w", err)
			}
		}
	}
	aside := r.pick(ids, func(m member) bool {
		return m.lifecycle == astypes.LifecycleStateStandby && m.machine.state == ec2types.InstanceStateNameRunning
	})
	if err := b.mark(ctx, r.name, aside, parking); err != nil {
		return err
	}
	if err := inParts(aside, func(part []string) error {
		_, err := b.cfg.EC2.StopInstances(ctx, &ec2.StopInstancesInput{InstanceIds: part})
		b.acted(r.name, err)
		return err
	}); err != nil {
		return err
	}
	if waiting := r.pick(ids, func(m member) bool {
		return !m.ended && !leaving(m.lifecycle) && !slices.Contains(unfit, m.id) &&
			(m.lifecycle != astypes.LifecycleStateStandby || running(ec2State(m.machine.state)))
	}); len(waiting) > 0 {
		return underWay("entering standby and stopping")
	}
	return nil
}

// inParts starts or stops instances, many in a call. When EC2 refuses a call
// because of one of them, each gets its own.
func inParts(ids []string, call func(part []string) error) error {
	for part := range slices.Chunk(ids, mostEC2) {
		err := call(part)
		if len(part) > 1 && isCode(err, "InsufficientInstanceCapacity", "IncorrectInstanceState", "IncorrectState",
			"InvalidInstanceID.NotFound", "UnsupportedOperation", "OperationNotPermitted") {
			var failed []error
			for _, id := range part {
				failed = append(failed, call([]string{id}))
			}
			err = errors.Join(failed...)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func providerIDs(ids []string) []model.InstanceID {
	out := make([]model.InstanceID, 0, len(ids))
	for _, id := range ids {
		out = append(out, providerID("", id))
	}
	return out
}

// Start unparks instances: it starts them and, once they run, brings them back
// into service. It is to be called again until it has.
func (b *Backend) Start(ctx context.Context, id model.GroupID, ids []model.InstanceID) error {
	r, err := b.begin(ctx, id, fmt.Sprintf("resuming %v", ids))
	if err == nil {
		err = b.resume(ctx, r, ids)
	}
	if err != nil {
		return fmt.Errorf("starting instances of node group %q: %w", id, err)
	}
	return nil
}

func (b *Backend) resume(ctx context.Context, r reading, ids []model.InstanceID) error {
	in := func(state ec2types.InstanceStateName) []string {
		return r.pick(ids, func(m member) bool {
			return m.lifecycle == astypes.LifecycleStateStandby && !m.ended && m.machine.state == state
		})
	}
	stopped, ready := in(ec2types.InstanceStateNameStopped), in(ec2types.InstanceStateNameRunning)
	if err := b.mark(ctx, r.name, append(slices.Clone(stopped), ready...), resuming); err != nil {
		return err
	}
	// One that there is no capacity for must not keep the others.
	refused := inParts(stopped, func(part []string) error {
		_, err := b.cfg.EC2.StartInstances(ctx, &ec2.StartInstancesInput{InstanceIds: part})
		b.acted(r.name, err)
		return err
	})
	if room := max(r.max-r.desired, 0); len(ready) > room {
		refused = errors.Join(refused, fmt.Errorf("the group's maximum is %d", r.max))
		ready = ready[:room]
	}
	for part := range slices.Chunk(ready, mostStandby) {
		_, err := b.cfg.AutoScaling.ExitStandby(ctx, &autoscaling.ExitStandbyInput{AutoScalingGroupName: &r.name, InstanceIds: part}, once)
		b.acted(r.name, err)
		if err != nil {
			return fmt.Errorf("leaving standby: %w", err)
		}
	}
	if waiting := r.pick(ids, func(m member) bool { return standby(m.lifecycle) && !m.ended }); len(waiting) > 0 {
		return cmp.Or(refused, underWay("starting and leaving standby"))
	}
	return refused
}

// mark writes what is being done with instances, unless it stands there.
func (b *Backend) mark(ctx context.Context, group string, ids []string, marker string) error {
	b.mu.Lock()
	g := b.groups[model.GroupID(group)]
	ids = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return g != nil && g.markers[id] == marker })
	b.mu.Unlock()
	for part := range slices.Chunk(ids, mostEC2) {
		_, err := b.cfg.EC2.CreateTags(ctx, &ec2.CreateTagsInput{Resources: part, Tags: []ec2types.Tag{
			{Key: awssdk.String(markerTag), Value: &marker},
			{Key: awssdk.String(sinceTag), Value: awssdk.String(b.cfg.Now().UTC().Format(time.RFC3339))},
		}})
		if err != nil {
			return fmt.Errorf("tagging instances: %w", err)
		}
		b.mu.Lock()
		if g != nil {
			for _, id := range part {
				g.markers[id] = marker
			}
		}
		b.mu.Unlock()
	}
	return nil
}

// Uninstall takes the protection from scale in off the instances of all
// selected groups, but of those whose new instances are protected anyway, and
// names the instances that are parked: these stay as they are.
func (b *Backend) Uninstall(ctx context.Context) error {
	if b.cfg.DryRun {
		return nil
	}
	groups, err := b.listAll(ctx)
	if err != nil {
		return fmt.Errorf("reading Auto Scaling groups: %w", err)
	}
	var failed []error
	for _, g := range groups {
		var ids []string
		for _, i := range g.Instances {
			if awssdk.ToBool(i.ProtectedFromScaleIn) && !awssdk.ToBool(g.NewInstancesProtectedFromScaleIn) && !leaving(i.LifecycleState) {
				ids = append(ids, awssdk.ToString(i.InstanceId))
			}
			if standby(i.LifecycleState) {
				b.cfg.Logger.Warn("the instance is parked and stays so: end it, or start it and have it leave standby",
					"nodegroup", awssdk.ToString(g.AutoScalingGroupName), "instance", awssdk.ToString(i.InstanceId))
			}
		}
		for part := range slices.Chunk(ids, mostProtect) {
			_, err := b.cfg.AutoScaling.SetInstanceProtection(ctx, &autoscaling.SetInstanceProtectionInput{
				AutoScalingGroupName: g.AutoScalingGroupName, InstanceIds: part, ProtectedFromScaleIn: awssdk.Bool(false),
			})
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}
