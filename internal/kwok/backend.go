// Package kwok is the embedded backend: a cloud whose machines are nothing but
// Node objects, which a kwok controller in the cluster keeps alive. It serves
// the demo, tests, and whoever wants to see Hearth at work without a cloud's
// bill. It owns the ConfigMaps hearth-kwok-*, one per node group, that hold the
// instances, and creates the Nodes of those that run. It never decides how many
// there should be, and apart from that of instances which do not exist it
// deletes no Node: that is Hearth's work, as with a real cloud.
//
// # What a cloud promises
//
// Every method may be repeated: a call that has been carried out changes
// nothing when it is made again.
//
//   - Snapshot reads all groups; one that cannot be read does not fail the
//     others.
//   - Resize sets the number of instances, pending and running, that the cloud
//     works towards. Instances are born a moment later. Lowering it cancels only
//     what is not born: it never goes below the living.
//   - Terminate and Stop lower that number by every instance that was pending
//     or running. Unknown and terminated instances are skipped.
//   - Start raises it by every instance that was stopped. One that is still
//     stopping cannot be started yet, which is an error.
//
// # How it fails
//
// The ConfigMap's key "faults" tells the cloud to fail (see [Faults]); people
// may edit it. [Backend.KillInstance] makes an instance vanish. A Node with the
// annotation kwok.hearth.dev/unready="true" is never Ready where kwok was told
// to heed that: so end the Nodes of instances that are stopped or gone.
package kwok

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// tick is how often the cloud works.
	tick = time.Second
	// tendEvery is how often Nodes are looked after without a reason.
	tendEvery = 10 * time.Second
	// attempts bounds how often a change is tried when others write meanwhile.
	attempts = 5
)

// Config says what a Backend needs.
type Config struct {
	Client    client.Client
	Namespace string // of the ConfigMaps
	// BootDelay is how long a new instance takes until its Node registers,
	// ResumeDelay one that had been stopped.
	BootDelay, ResumeDelay time.Duration
	Groups                 []model.NodeGroup
	Now                    func() time.Time // nil: time.Now
	Logger                 *slog.Logger
}

// Backend is the cloud. Its methods may be called concurrently, and by several
// processes; only one of these may run it.
type Backend struct {
	cfg Config

	mu     sync.Mutex
	groups map[model.GroupID]model.NodeGroup

	// orphans are Nodes without an instance, by UID, and since when they are
	// seen as such. powered are the instances whose machines were on, and tended is
	// when the Nodes were last looked after. All belong to Run.
	orphans map[string]time.Time
	powered map[model.InstanceID]bool
	tended  time.Time
}

// New returns a backend that does nothing until it is run.
func New(cfg Config) (*Backend, error) {
	if cfg.Client == nil || cfg.Namespace == "" || cfg.Logger == nil {
		return nil, errors.New("making the embedded backend: its configuration lacks client, namespace or logger")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	for _, g := range cfg.Groups {
		if _, err := newNode(g, instance{}); err != nil {
			return nil, err
		}
	}
	b := &Backend{cfg: cfg, orphans: map[string]time.Time{}}
	b.SetGroups(cfg.Groups)
	return b, nil
}

// SetGroups replaces the groups. What exists of a group that is no longer
// among them is left alone; new templates are for new Nodes.
func (b *Backend) SetGroups(groups []model.NodeGroup) {
	byID := make(map[model.GroupID]model.NodeGroup, len(groups))
	for _, g := range groups {
		byID[g.ID] = g
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.groups = byID
}

// Snapshot reads all groups.
func (b *Backend) Snapshot(ctx context.Context) (model.Snapshot, error) {
	now := b.cfg.Now()
	stored, err := b.list(ctx)
	if err != nil {
		return model.Snapshot{}, err
	}
	snapshot := model.Snapshot{Groups: map[model.GroupID]model.GroupSnapshot{}, Errors: map[model.GroupID]error{}}
	for _, g := range b.declared() {
		cloud, err := decode(g, stored[configMapName(g.ID)])
		if err != nil {
			snapshot.Errors[g.ID] = err
			continue
		}
		snapshot.Groups[g.ID] = cloud.snapshot(now)
	}
	return snapshot, nil
}

// Resize sets how many instances the cloud works towards.
func (b *Backend) Resize(ctx context.Context, group model.GroupID, desired int) error {
	return b.change(ctx, "resizing", group, func(c *cloud) error {
		c.resize(desired)
		return nil
	})
}

// Terminate ends instances for good.
func (b *Backend) Terminate(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	return b.change(ctx, "terminating instances of", group, func(c *cloud) error {
		c.terminate(ids, b.cfg.Now())
		return nil
	})
}

// Stop ends instances in a way that they can be started again.
func (b *Backend) Stop(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	return b.change(ctx, "stopping instances of", group, func(c *cloud) error {
		c.stop(ids, b.cfg.Now())
		return nil
	})
}

// Start starts stopped instances. Those that can be are started, also when
// others cannot yet.
func (b *Backend) Start(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	var stopping []model.InstanceID
	err := b.change(ctx, "starting instances of", group, func(c *cloud) error {
		stopping = c.start(ids, b.cfg.Now(), b.cfg.ResumeDelay)
		return nil
	})
	if err == nil && len(stopping) > 0 {
		err = fmt.Errorf("starting instances of node group %q: still stopping: %q", group, stopping)
	}
	return err
}

// SetFaults tells the group's cloud how to fail from now on; the zero value
// ends all faults.
func (b *Backend) SetFaults(ctx context.Context, group model.GroupID, faults Faults) error {
	return b.change(ctx, "setting the faults of", group, func(c *cloud) error {
		c.faults = faults
		return nil
	})
}

// KillInstance makes an instance vanish, as when its host dies. The number of
// instances that the cloud works towards stays: it will launch another.
func (b *Backend) KillInstance(ctx context.Context, id model.InstanceID) error {
	group, ok := groupOf(id)
	if !ok {
		return fmt.Errorf("killing instance %q: not an instance of this backend", id)
	}
	return b.change(ctx, "killing an instance of", group, func(c *cloud) error {
		at, ok := c.find(id)
		if !ok {
			return fmt.Errorf("no instance %q", id)
		}
		c.Instances = slices.Delete(c.Instances, at, at+1)
		return nil
	})
}

// Run plays the cloud until ctx ends: instances are born, boot, register their
// Nodes, stop and vanish. What went wrong is logged and tried again. Whoever
// runs it must be the only one, the leader.
func (b *Backend) Run(ctx context.Context) error {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		if err := b.work(ctx); err != nil && ctx.Err() == nil {
			b.cfg.Logger.Warn("the embedded backend could not do all of its work", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// work does what is due in all groups.
func (b *Backend) work(ctx context.Context) error {
	stored, err := b.list(ctx)
	if err != nil {
		return err
	}
	var failed []error
	clouds := map[model.GroupID]*cloud{}
	for _, g := range b.declared() {
		c, err := b.workGroup(ctx, g, stored[configMapName(g.ID)])
		if apierrors.IsConflict(err) {
			continue // the next tick sees what somebody else wrote
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("node group %q: %w", g.ID, err))
			continue
		}
		clouds[g.ID] = c
	}
	if b.mustTend(clouds) {
		failed = append(failed, b.tend(ctx, clouds))
	}
	return errors.Join(failed...)
}

// mustTend says whether it is time to look after the Nodes, which means to list
// them all: a machine is on no more, or it has not been done for a while.
func (b *Backend) mustTend(clouds map[model.GroupID]*cloud) bool {
	powered := make(map[model.InstanceID]bool, len(b.powered))
	for _, c := range clouds {
		for _, i := range c.Instances {
			if i.State != model.InstancePending && i.State != model.InstanceStopped {
				powered[i.ID] = true
			}
		}
	}
	for id := range b.powered {
		if !powered[id] {
			b.tended = time.Time{}
		}
	}
	b.powered = powered
	return b.cfg.Now().Sub(b.tended) >= tendEvery
}

// workGroup does what is due in one group. It fails with a conflict when
// somebody else wrote in between.
func (b *Backend) workGroup(ctx context.Context, g model.NodeGroup, stored *corev1.ConfigMap) (*cloud, error) {
	c, err := decode(g, stored)
	if err != nil {
		return nil, err
	}
	notes := c.step(b.cfg.Now(), b.cfg.BootDelay, newInstanceID)
	for i := range c.Instances {
		inst := &c.Instances[i]
		if inst.State != model.InstanceRunning || inst.Registered || inst.NeverBoots {
			continue
		}
		if err := b.register(ctx, g, *inst); err != nil {
			return nil, err
		}
		inst.Registered = true
	}
	if err := b.save(ctx, c, stored); err != nil {
		return nil, err
	}
	for _, n := range notes {
		b.cfg.Logger.Info(n.what, "nodegroup", g.ID, "instance", n.instance)
	}
	return c, nil
}

// declared returns the groups, sorted by id.
func (b *Backend) declared() []model.NodeGroup {
	b.mu.Lock()
	defer b.mu.Unlock()
	groups := make([]model.NodeGroup, 0, len(b.groups))
	for _, g := range b.groups {
		groups = append(groups, g)
	}
	slices.SortFunc(groups, func(a, b model.NodeGroup) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return groups
}

// change applies f to a fresh copy of the group's cloud and saves it, and again
// when somebody else has written meanwhile.
func (b *Backend) change(ctx context.Context, doing string, group model.GroupID, f func(*cloud) error) error {
	b.mu.Lock()
	g, known := b.groups[group]
	b.mu.Unlock()
	if !known {
		return fmt.Errorf("%s node group %q: not declared", doing, group)
	}
	var err error
	for attempt := range attempts {
		if err = b.changeOnce(ctx, g, f); !apierrors.IsConflict(err) {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(attempt) * 10 * time.Millisecond):
		}
	}
	if err != nil {
		return fmt.Errorf("%s node group %q: %w", doing, group, err)
	}
	return nil
}

func (b *Backend) changeOnce(ctx context.Context, g model.NodeGroup, f func(*cloud) error) error {
	stored := &corev1.ConfigMap{}
	err := b.cfg.Client.Get(ctx, client.ObjectKey{Namespace: b.cfg.Namespace, Name: configMapName(g.ID)}, stored)
	if apierrors.IsNotFound(err) {
		stored = nil
	} else if err != nil {
		return err
	}
	c, err := decode(g, stored)
	if err != nil {
		return err
	}
	if err := f(c); err != nil {
		return err
	}
	return b.save(ctx, c, stored)
}
