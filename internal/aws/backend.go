// Package aws is the backend on Amazon EC2 Auto Scaling: node groups are Auto
// Scaling groups, parked nodes are stopped instances in standby. It owns every
// call to AWS, what was last read there, and how AWS's failures are told. It
// never decides how many instances there should be or which, and it changes
// nothing of a group but its desired capacity and its instances' states.
//
// # How AWS's states are told
//
// The desired number of a snapshot is the group's desired capacity plus the
// instances in standby that run: entering standby lowers the capacity before
// the instance has stopped, and to the fleet both happen when it stops. An
// instance that is being unparked counts as stopped until it is back in
// service: Start is asked again until it is. A tag on the instance, written
// before either begins, tells parking from unparking; both can be taken up
// after a restart.
//
// # Repeated calls
//
// What lowers or raises the capacity by a number (termination, standby) is
// never sent twice by the SDK. When its outcome is not known the group is left
// alone for settle, then read again. An instance that was terminated stays so
// in every snapshot, whatever a stale read says.
package aws

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	astypes "github.com/aws/aws-sdk-go-v2/service/autoscaling/types"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// fullEvery is the time between two reads of all groups, and up to jitter
	// more, so that clusters of one account do not ask at the same time. In
	// between only those are read in which something is under way.
	fullEvery = time.Minute
	jitter    = 3 * time.Second
	// fresh is the age up to which a reading serves an act as a new one would:
	// AWS reads are eventually consistent anyway.
	fresh = 2 * time.Second
	// settle follows a call whose outcome is not known.
	settle = 5 * time.Second
	// remember is how long our own terminations win over what is read.
	remember = 10 * time.Minute
	// activitiesEvery bounds how often a group's scaling activities are read,
	// activitiesAfter how soon after its capacity was raised.
	activitiesEvery = 5 * time.Second
	activitiesAfter = 2 * time.Second
	// lookAgain is how long a group is read on after an instance has gone, so
	// that it is believed.
	lookAgain = 15 * time.Second
	// lostAfter is how many full reads in a row must lack a group.
	lostAfter = 3
)

// Config says what a Backend needs.
type Config struct {
	AutoScaling AutoScaling
	EC2         EC2
	EKS         EKS
	// Region becomes a label of templates.
	Region string
	// Tags select groups: all of them, as key or key=value, must be on a
	// group. None selects nothing.
	Tags []string
	// Groups are named ones; their annotations win over tags.
	Groups []model.NodeGroup
	// Protect says whether the group's instances are to be protected from
	// scale in; nil means none.
	Protect func(model.GroupID) bool
	// Prices are what an hour of an instance type costs, in dollars. They win
	// over the list that is part of the binary.
	Prices map[string]float64
	// DryRun logs writes and refuses them.
	DryRun bool
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger
}

// Backend is the cloud. Its methods are safe for concurrent use.
type Backend struct {
	cfg    Config
	prices priceTable

	mu        sync.Mutex
	groups    map[model.GroupID]*group
	fullAt    time.Time // of the last full snapshot
	readAt    time.Time // of the last read of all groups
	templates templates
	changed   chan struct{} // the groups that are named have
}

// group is what is known of one Auto Scaling group.
type group struct {
	asg    astypes.AutoScalingGroup
	readAt time.Time
	missed int // full reads in a row without it
	// instances as last read of EC2, by instance id.
	instances map[string]machine
	ended     map[string]time.Time // terminated by us
	markers   map[string]string    // written by us
	listed    map[string]string    // id to zone, of the last snapshot
	actedAt   time.Time
	version   string    // that the group launches now, as far as it is known
	lostAt    time.Time // when an instance was seen to be gone
	would     string    // what a dry run last said
	setTo     int       // the capacity that was set last, at setAt
	setAt     time.Time
	hold      time.Time
	failure   *model.LaunchFailure
	failureAt time.Time
	raisedAt  time.Time            // when the capacity was last raised by us
	refused   *model.LaunchFailure // why it could not be
}

// machine is what EC2 says of an instance.
type machine struct {
	state    ec2types.InstanceStateName
	marker   string
	group    string
	parkable bool
}

// markerTag says what is being done with an instance in standby.
const (
	markerTag = model.Prefix + "/state"
	sinceTag  = model.Prefix + "/since"
	parking   = "parking"
	resuming  = "resuming"
	groupTag  = "aws:autoscaling:groupName"
)

// New returns a backend. It calls nothing yet.
func New(cfg Config) (*Backend, error) {
	if cfg.AutoScaling == nil || cfg.EC2 == nil || cfg.Logger == nil {
		return nil, errors.New("making the AWS backend: its configuration lacks a client or a logger")
	}
	if len(cfg.Tags) == 0 && len(cfg.Groups) == 0 {
		return nil, errors.New("making the AWS backend: neither autoDiscoveryTags nor nodeGroups select any group")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Protect == nil {
		cfg.Protect = func(model.GroupID) bool { return false }
	}
	return &Backend{cfg: cfg, prices: listedPrices(), groups: map[model.GroupID]*group{}, templates: newTemplates(), changed: make(chan struct{}, 1)}, nil
}

// SetGroups replaces the groups that are named and their annotations.
func (b *Backend) SetGroups(groups []model.NodeGroup) {
	b.mu.Lock()
	b.cfg.Groups = groups
	b.readAt = time.Time{}
	b.mu.Unlock()
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// named returns the groups that the config names.
func (b *Backend) named() []model.NodeGroup {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cfg.Groups
}

// Snapshot reads all groups once a minute, and in between those in which
// something is under way; the others are left out.
func (b *Backend) Snapshot(ctx context.Context) (model.Snapshot, error) {
	now := b.cfg.Now()
	b.mu.Lock()
	full := b.fullAt.IsZero() || now.Sub(b.fullAt) >= fullEvery
	var names []string
	for id, g := range b.groups {
		if g.busy() {
			names = append(names, string(id))
		}
	}
	first := b.fullAt.IsZero()
	b.mu.Unlock()
	if full && !first {
		if err := pause(ctx, rand.N(jitter)); err != nil {
			return model.Snapshot{}, err
		}
		now = b.cfg.Now()
	}
	out := model.Snapshot{Groups: map[model.GroupID]model.GroupSnapshot{}, Errors: map[model.GroupID]error{}}
	var read []astypes.AutoScalingGroup
	var err error
	switch {
	case full:
		read, err = b.listAll(ctx)
	case len(names) > 0:
		slices.Sort(names)
		read, err = b.listNamed(ctx, names)
	default:
		return out, nil
	}
	if err != nil {
		return model.Snapshot{}, fmt.Errorf("reading Auto Scaling groups: %w", err)
	}
	b.take(read, full, now, out.Errors)
	if full {
		b.mu.Lock()
		b.fullAt = now
		b.mu.Unlock()
	}
	b.observe(ctx, read, now, &out)
	return out, nil
}

// pause waits, or returns why ctx ended first.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// busy says whether the group is expected to change.
func (g *group) busy() bool {
	if g.actedAt.After(g.readAt) || !g.actedAt.IsZero() && g.readAt.Sub(g.actedAt) < settle {
		return true
	}
	listed := map[string]bool{}
	inService := 0
	for _, i := range g.asg.Instances {
		listed[awssdk.ToString(i.InstanceId)] = true
		switch {
		case i.LifecycleState == astypes.LifecycleStateInService:
			inService++
		case i.LifecycleState != astypes.LifecycleStateStandby || g.instances[awssdk.ToString(i.InstanceId)].state != ec2types.InstanceStateNameStopped:
			return true
		}
	}
	for id := range g.listed {
		if !listed[id] {
			return true
		}
	}
	if !g.lostAt.IsZero() && g.readAt.Sub(g.lostAt) < lookAgain {
		return true
	}
	return inService != int(awssdk.ToInt32(g.asg.DesiredCapacity))
}

// listAll reads every group that is selected.
func (b *Backend) listAll(ctx context.Context) ([]astypes.AutoScalingGroup, error) {
	byName := map[string]astypes.AutoScalingGroup{}
	if len(b.cfg.Tags) > 0 {
		var filters []astypes.Filter
		for _, tag := range b.cfg.Tags {
			key, value, valued := strings.Cut(tag, "=")
			f := astypes.Filter{Name: awssdk.String("tag-key"), Values: []string{key}}
			if valued {
				f = astypes.Filter{Name: awssdk.String("tag:" + key), Values: []string{value}}
			}
			filters = append(filters, f)
		}
		found, err := b.list(ctx, &autoscaling.DescribeAutoScalingGroupsInput{Filters: filters})
		if err != nil {
			return nil, err
		}
		for _, g := range found {
			byName[awssdk.ToString(g.AutoScalingGroupName)] = g
		}
	}
	var names []string
	for _, g := range b.named() {
		if _, found := byName[string(g.ID)]; !found {
			names = append(names, string(g.ID))
		}
	}
	named, err := b.listNamed(ctx, names)
	if err != nil {
		return nil, err
	}
	for _, g := range named {
		byName[awssdk.ToString(g.AutoScalingGroupName)] = g
	}
	out := make([]astypes.AutoScalingGroup, 0, len(byName))
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		out = append(out, byName[name])
	}
	return out, nil
}

func (b *Backend) listNamed(ctx context.Context, names []string) (out []astypes.AutoScalingGroup, err error) {
	for part := range slices.Chunk(names, 100) {
		found, err := b.list(ctx, &autoscaling.DescribeAutoScalingGroupsInput{AutoScalingGroupNames: part})
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

// list reads all pages of an answer.
func (b *Backend) list(ctx context.Context, in *autoscaling.DescribeAutoScalingGroupsInput) (out []astypes.AutoScalingGroup, err error) {
	in.MaxRecords = awssdk.Int32(100)
	for {
		answer, err := b.cfg.AutoScaling.DescribeAutoScalingGroups(ctx, in)
		if err != nil {
			return nil, err
		}
		out = append(out, answer.AutoScalingGroups...)
		if awssdk.ToString(answer.NextToken) == "" {
			return out, nil
		}
		in.NextToken = answer.NextToken
	}
}

// take notes what was read. A group that a full read lacks is forgotten only
// when others lack it too.
func (b *Backend) take(read []astypes.AutoScalingGroup, full bool, now time.Time, failed map[model.GroupID]error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen := map[model.GroupID]bool{}
	for _, asg := range read {
		id := model.GroupID(awssdk.ToString(asg.AutoScalingGroupName))
		seen[id] = true
		g := b.groups[id]
		if g == nil {
			g = &group{instances: map[string]machine{}, ended: map[string]time.Time{}, markers: map[string]string{}, listed: map[string]string{}}
			b.groups[id] = g
		}
		if g.readAt.After(now) {
			continue // an act has read it meanwhile
		}
		g.asg, g.readAt, g.missed = asg, now, 0
	}
	if !full {
		return
	}
	b.readAt = now
	for id, g := range b.groups {
		if seen[id] {
			continue
		}
		if g.missed++; g.missed >= lostAfter {
			delete(b.groups, id)
			b.cfg.Logger.Warn("the Auto Scaling group is gone", "nodegroup", id)
			continue
		}
		failed[id] = errors.New("the Auto Scaling group is not listed any more")
	}
}

// observe makes snapshots of the groups that were read.
func (b *Backend) observe(ctx context.Context, read []astypes.AutoScalingGroup, now time.Time, out *model.Snapshot) {
	asks := map[model.GroupID][]string{}
	var ids []string
	owners := map[string]model.GroupID{}
	b.mu.Lock()
	for _, asg := range read {
		id := model.GroupID(awssdk.ToString(asg.AutoScalingGroupName))
		g := b.groups[id]
		if g == nil {
			continue
		}
		if weighted(g.asg) {
			out.Errors[id] = errors.New("the group counts its capacity in weights, not instances: not supported")
			continue
		}
		asks[id] = g.unclear()
		ids = append(ids, asks[id]...)
	}
	b.mu.Unlock()
	machines, err := b.describe(ctx, ids)
	for _, id := range slices.Sorted(maps.Keys(asks)) {
		if err != nil && len(asks[id]) > 0 {
			out.Errors[id] = fmt.Errorf("reading instances of %q: %w", id, err)
			continue
		}
		b.mu.Lock()
		g := b.groups[id]
		if g == nil {
			b.mu.Unlock()
			continue
		}
		g.know(asks[id], machines)
		s, missing := g.snapshot(now)
		ask := missing > 0 && now.Sub(g.failureAt) >= activitiesEvery && now.Sub(g.raisedAt) >= activitiesAfter
		if missing == 0 {
			g.failure, g.failureAt = nil, time.Time{}
		}
		asg, raised := g.asg, g.raisedAt
		b.mu.Unlock()
		for _, i := range s.Instances {
			if other, twice := owners[string(i.ID)]; twice {
				out.Errors[id] = fmt.Errorf("instance %q is listed by group %q too", i.ID, other)
			}
			owners[string(i.ID)] = id
		}
		if ask {
			failure, err := b.lastFailure(ctx, asg, raised, now)
			if err != nil {
				b.cfg.Logger.Warn("reading scaling activities failed", "nodegroup", id, "err", err)
			}
			b.mu.Lock()
			g.failureAt = now
			if err == nil {
				g.failure = failure
			}
			b.mu.Unlock()
		}
		b.mu.Lock()
		s.Failure = g.refused
		if missing > 0 && g.failure != nil {
			s.Failure = g.failure
		}
		b.mu.Unlock()
		if _, bad := out.Errors[id]; !bad {
			out.Groups[id] = s
		}
	}
}

// weighted says whether instances count for more than one.
func weighted(asg astypes.AutoScalingGroup) bool {
	if t := awssdk.ToString(asg.DesiredCapacityType); t != "" && t != "units" {
		return true
	}
	if p := asg.MixedInstancesPolicy; p != nil && p.LaunchTemplate != nil {
		for _, o := range p.LaunchTemplate.Overrides {
			if w := awssdk.ToString(o.WeightedCapacity); w != "" && w != "1" {
				return true
			}
		}
	}
	return false
}

// unclear returns the instances of which EC2 must be asked: those in standby,
// and those that were listed and are not any more.
func (g *group) unclear() (ids []string) {
	listed := map[string]bool{}
	for _, i := range g.asg.Instances {
		id := awssdk.ToString(i.InstanceId)
		listed[id] = true
		if standby(i.LifecycleState) {
			ids = append(ids, id)
		}
	}
	for id := range g.listed {
		if _, ended := g.ended[id]; !listed[id] && !ended {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func standby(s astypes.LifecycleState) bool {
	return s == astypes.LifecycleStateEnteringStandby || s == astypes.LifecycleStateStandby
}

// counted says whether an instance counts towards the desired capacity.
func counted(s astypes.LifecycleState) bool {
	return !standby(s) && !leaving(s) && !strings.HasPrefix(string(s), "Warmed:")
}

func leaving(s astypes.LifecycleState) bool {
	return strings.HasPrefix(string(s), "Terminat") || strings.HasPrefix(string(s), "Detach")
}

// know takes in what EC2 says of instances that were asked for.
func (g *group) know(asked []string, machines map[string]machine) {
	known := make(map[string]machine, len(asked))
	for _, id := range asked {
		if m, ok := machines[id]; ok {
			if marker := g.markers[id]; marker != "" {
				m.marker = marker // tags are read with a lag
			}
			known[id] = m
		}
	}
	g.instances = known
}

// snapshot tells the group's state, and how many instances it lacks.
func (g *group) snapshot(now time.Time) (s model.GroupSnapshot, missing int) {
	s = model.GroupSnapshot{TakenAt: g.readAt, Desired: int(awssdk.ToInt32(g.asg.DesiredCapacity))}
	missing = s.Desired
	maps.DeleteFunc(g.ended, func(_ string, at time.Time) bool { return now.Sub(at) > remember })
	zones := map[string]string{}
	for _, i := range g.asg.Instances {
		id := awssdk.ToString(i.InstanceId)
		state, ok := g.state(id, i.LifecycleState)
		if !ok {
			continue
		}
		if counted(i.LifecycleState) {
			missing--
		}
		if standby(i.LifecycleState) && running(state) {
			s.Desired++
		}
		zones[id] = awssdk.ToString(i.AvailabilityZone)
		s.Instances = append(s.Instances, model.Instance{ID: providerID(zones[id], id), State: state, Outdated: g.outdated(i)})
	}
	for id, zone := range g.listed {
		m, exists := g.instances[id]
		if _, listed := zones[id]; listed || !exists || m.group != awssdk.ToString(g.asg.AutoScalingGroupName) {
			continue
		}
		// EC2 has it and says that it is the group's: it has just ended, which
		// is told once more, or the list lags, and it is counted as it is.
		state := ec2State(m.state)
		s.Instances = append(s.Instances, model.Instance{ID: providerID(zone, id), State: state})
		if state == model.InstanceTerminating {
			continue
		}
		zones[id] = zone
		if running(state) {
			missing--
		}
	}
	if slices.ContainsFunc(slices.Collect(maps.Keys(g.listed)), func(id string) bool { return zones[id] == "" }) {
		g.lostAt = now
	}
	g.listed = zones
	slices.SortFunc(s.Instances, func(a, b model.Instance) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return s, max(missing, 0)
}

// outdated says whether an instance was launched from another version than the
// group's next one will be.
func (g *group) outdated(i astypes.Instance) bool {
	return g.version != "" && i.LaunchTemplate != nil &&
		awssdk.ToString(i.LaunchTemplate.LaunchTemplateId)+" "+awssdk.ToString(i.LaunchTemplate.Version) != g.version
}

// state tells an instance's state; false when it is not to be told at all.
func (g *group) state(id string, lifecycle astypes.LifecycleState) (model.InstanceState, bool) {
	_, ended := g.ended[id]
	switch {
	case ended || leaving(lifecycle):
		return model.InstanceTerminating, true
	case strings.HasPrefix(string(lifecycle), "Warmed:"):
		return "", false
	case standby(lifecycle):
		m, known := g.instances[id]
		if !known {
			return model.InstanceTerminating, true // listed, but EC2 has it no more
		}
		state := ec2State(m.state)
		if m.marker == resuming && running(state) {
			state = model.InstanceStopped
		}
		return state, true
	case strings.HasPrefix(string(lifecycle), "Pending"):
		return model.InstancePending, true
	}
	return model.InstanceRunning, true
}

func running(s model.InstanceState) bool {
	return s == model.InstancePending || s == model.InstanceRunning
}

func ec2State(s ec2types.InstanceStateName) model.InstanceState {
	switch s {
	case ec2types.InstanceStateNamePending:
		return model.InstancePending
	case ec2types.InstanceStateNameRunning:
		return model.InstanceRunning
	case ec2types.InstanceStateNameStopping:
		return model.InstanceStopping
	case ec2types.InstanceStateNameStopped:
		return model.InstanceStopped
	}
	return model.InstanceTerminating
}

func providerID(zone, id string) model.InstanceID {
	return model.InstanceID("aws:///" + zone + "/" + id)
}

// instanceID is the last part of a providerID.
func instanceID(id model.InstanceID) string {
	return string(id[strings.LastIndexByte(string(id), '/')+1:])
}

// describe reads instances, 200 a call (the bound of a filter's values); those
// that do not exist are left out.
func (b *Backend) describe(ctx context.Context, ids []string) (map[string]machine, error) {
	out := map[string]machine{}
	for part := range slices.Chunk(ids, 200) {
		in := &ec2.DescribeInstancesInput{Filters: []ec2types.Filter{{Name: awssdk.String("instance-id"), Values: part}}}
		for {
			answer, err := b.cfg.EC2.DescribeInstances(ctx, in)
			if err != nil {
				return nil, err
			}
			for _, r := range answer.Reservations {
				for _, i := range r.Instances {
					out[awssdk.ToString(i.InstanceId)] = machineOf(i)
				}
			}
			if awssdk.ToString(answer.NextToken) == "" {
				break
			}
			in.NextToken = answer.NextToken
		}
	}
	return out, nil
}

func machineOf(i ec2types.Instance) machine {
	// A spot instance can be stopped only if its request is persistent, which
	// those of Auto Scaling are not; one on instance store never.
	m := machine{parkable: i.InstanceLifecycle == "" && i.RootDeviceType != ec2types.DeviceTypeInstanceStore}
	if i.State != nil {
		m.state = i.State.Name
	}
	for _, t := range i.Tags {
		switch awssdk.ToString(t.Key) {
		case markerTag:
			m.marker = awssdk.ToString(t.Value)
		case groupTag:
			m.group = awssdk.ToString(t.Value)
		}
	}
	return m
}
