package kwok

import (
	"cmp"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// stopTime and terminateTime are how long an instance takes to be stopped
	// and to be gone.
	stopTime      = 2 * time.Second
	terminateTime = 3 * time.Second
	// retryLaunch is the pause after a launch that failed.
	retryLaunch = 20 * time.Second
)

// Faults say how a group's cloud fails. They are kept as JSON.
type Faults struct {
	// CapacityUntil: no instance can be launched before this time.
	CapacityUntil time.Time `json:"capacityUntil,omitzero"`
	// CapacityAbove, when set, is the number of living instances from which on
	// no more can be launched.
	CapacityAbove *int `json:"capacityAbove,omitempty"`
	// BootDelay, when set, replaces the configured one.
	BootDelay *metav1.Duration `json:"bootDelay,omitempty"`
	// NeverBoot is the number of next launches whose instances run and never
	// register a Node.
	NeverBoot int `json:"neverBoot,omitempty"`
}

// capacity says whether one more instance can be launched beside the living.
func (f Faults) capacity(living int, now time.Time) bool {
	return !now.Before(f.CapacityUntil) && (f.CapacityAbove == nil || living < *f.CapacityAbove)
}

// cloud is all there is of one group. It is kept as JSON, the faults apart. It
// reads no clock and does no I/O.
type cloud struct {
	// Desired is the number of pending and running instances to work towards.
	Desired   int        `json:"desired"`
	Instances []instance `json:"instances,omitempty"`
	// Failure is of the last attempt to launch, nil when it succeeded or none
	// is needed. RetryAt is when the next may be made.
	Failure *failure  `json:"failure,omitempty"`
	RetryAt time.Time `json:"retryAt,omitzero"`

	faults Faults
	group  model.GroupID
}

// instance is a machine.
type instance struct {
	ID         model.InstanceID    `json:"id"`
	Node       string              `json:"node"` // the name that it registers under
	State      model.InstanceState `json:"state"`
	LaunchedAt time.Time           `json:"launchedAt"` // or when it was last started
	// Due is when a passing state ends.
	Due time.Time `json:"due,omitzero"`
	// Registered: it has created its Node since it was last started.
	Registered bool `json:"registered,omitempty"`
	NeverBoots bool `json:"neverBoots,omitempty"`
}

func (i instance) living() bool {
	return i.State == model.InstancePending || i.State == model.InstanceRunning
}

// failure is a launch that failed.
type failure struct {
	Activity string    `json:"activity"`
	Message  string    `json:"message"`
	At       time.Time `json:"at"`
}

// note is something that happened.
type note struct {
	what     string
	instance model.InstanceID
}

func (c *cloud) living() (n int) {
	for _, i := range c.Instances {
		if i.living() {
			n++
		}
	}
	return n
}

func (c *cloud) find(id model.InstanceID) (int, bool) {
	at := slices.IndexFunc(c.Instances, func(i instance) bool { return i.ID == id })
	return at, at >= 0
}

func (c *cloud) snapshot(now time.Time) model.GroupSnapshot {
	s := model.GroupSnapshot{TakenAt: now, Desired: c.Desired}
	for _, i := range c.Instances {
		s.Instances = append(s.Instances, model.Instance{ID: i.ID, State: i.State, LaunchedAt: i.LaunchedAt})
	}
	slices.SortFunc(s.Instances, func(a, b model.Instance) int { return cmp.Compare(a.ID, b.ID) })
	if f := c.Failure; f != nil {
		s.Failure = &model.LaunchFailure{
			Activity: f.Activity, Class: model.FailureCapacity, Message: f.Message, At: f.At,
		}
	}
	return s
}

func (c *cloud) resize(desired int) {
	if desired > c.Desired {
		c.RetryAt = time.Time{}
	}
	c.Desired = max(desired, c.living())
	c.settle()
}

// settle forgets a failure that no longer matters.
func (c *cloud) settle() {
	if c.living() >= c.Desired {
		c.Failure, c.RetryAt = nil, time.Time{}
	}
}

// each calls f for the instances with these ids that exist.
func (c *cloud) each(ids []model.InstanceID, f func(*instance)) {
	for i := range c.Instances {
		if slices.Contains(ids, c.Instances[i].ID) {
			f(&c.Instances[i])
		}
	}
}

func (c *cloud) terminate(ids []model.InstanceID, now time.Time) {
	c.each(ids, func(i *instance) {
		if i.State == model.InstanceTerminating {
			return
		}
		if i.living() {
			c.Desired--
		}
		i.State, i.Due = model.InstanceTerminating, now.Add(terminateTime)
	})
	c.settle()
}

func (c *cloud) stop(ids []model.InstanceID, now time.Time) {
	c.each(ids, func(i *instance) {
		if i.living() {
			c.Desired--
			i.State, i.Due = model.InstanceStopping, now.Add(stopTime)
		}
	})
	c.settle()
}

// start returns those that cannot be started because they are still stopping.
func (c *cloud) start(ids []model.InstanceID, now time.Time, delay time.Duration) (stopping []model.InstanceID) {
	c.each(ids, func(i *instance) {
		switch i.State {
		case model.InstanceStopped:
			c.Desired++
			i.State, i.LaunchedAt, i.Due, i.Registered = model.InstancePending, now, now.Add(delay), false
		case model.InstanceStopping:
			stopping = append(stopping, i.ID)
		}
	})
	return stopping
}

// step does what is due at a time now. newID makes an id and the name of a
// Node, neither used before.
func (c *cloud) step(now time.Time, bootDelay time.Duration, newID func(model.GroupID) (model.InstanceID, string)) []note {
	var notes []note
	next := map[model.InstanceState]model.InstanceState{
		model.InstancePending:  model.InstanceRunning,
		model.InstanceStopping: model.InstanceStopped,
	}
	c.Instances = slices.DeleteFunc(c.Instances, func(i instance) bool {
		return i.State == model.InstanceTerminating && !now.Before(i.Due)
	})
	for i := range c.Instances {
		inst := &c.Instances[i]
		if state, passing := next[inst.State]; passing && !now.Before(inst.Due) {
			inst.State, inst.Due = state, time.Time{}
			notes = append(notes, note{"instance is " + string(state), inst.ID})
		}
	}
	if now.Before(c.RetryAt) {
		return notes
	}
	if c.faults.BootDelay != nil {
		bootDelay = c.faults.BootDelay.Duration
	}
	for living := c.living(); living < c.Desired; living++ {
		id, node := newID(c.group)
		if !c.faults.capacity(living, now) {
			c.Failure = &failure{
				Activity: node, At: now,
				Message: "the embedded backend was told to have no capacity",
			}
			c.RetryAt = now.Add(retryLaunch)
			return append(notes, note{"launch failed: no capacity", ""})
		}
		inst := instance{
			ID: id, Node: node, State: model.InstancePending, LaunchedAt: now, Due: now.Add(bootDelay),
			NeverBoots: c.faults.NeverBoot > 0,
		}
		c.faults.NeverBoot = max(c.faults.NeverBoot-1, 0)
		c.Instances = append(c.Instances, inst)
		notes = append(notes, note{"instance launched", id})
	}
	c.settle()
	return notes
}
