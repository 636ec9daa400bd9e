package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/savings"
	"github.com/hearth-ci/hearth/internal/telemetry"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// Config is what a Controller needs. Zero durations take the defaults below.
type Config struct {
	Backend Backend
	Store   Store
	// Memories keeps what the policy learns.
	Memories Memories
	Nodes    Nodes
	Pods     Pods
	Engines  Engines
	Events   Events
	World    *World
	// Watched says whether the watches have delivered everything that existed
	// at their start. Once true it stays true.
	Watched func() bool
	Groups  []model.NodeGroup
	Metrics *telemetry.Metrics
	Logger  *slog.Logger
	// Tick is how often what waits for time is looked at, PlanEvery how often
	// idle nodes are planned anew. Defaults 1 s and 5 s.
	Tick, PlanEvery time.Duration
	// SnapshotEvery is the time between two readings of the cloud at rest,
	// SnapshotFast while something is under way. Defaults 10 s and 1 s.
	SnapshotEvery, SnapshotFast time.Duration
	// RecordWithin bounds the write before an answer: cluster-autoscaler waits
	// 5 s in all. Default 3 s.
	RecordWithin time.Duration
	// DryRun says that nothing is acted on: Savings then says what Hearth would
	// have cost.
	DryRun bool
	// OnSynced is called once, when the first view is there.
	OnSynced func()
}

func (c *Config) validate() error {
	for name, missing := range map[string]bool{
		"Backend": c.Backend == nil, "Store": c.Store == nil, "Memories": c.Memories == nil, "Nodes": c.Nodes == nil, "Pods": c.Pods == nil,
		"Engines": c.Engines == nil, "Events": c.Events == nil, "World": c.World == nil, "Watched": c.Watched == nil,
		"Metrics": c.Metrics == nil, "Logger": c.Logger == nil,
	} {
		if missing {
			return fmt.Errorf("controller config: %s is required", name)
		}
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{{&c.Tick, time.Second}, {&c.PlanEvery, 5 * time.Second}, {&c.SnapshotEvery, 10 * time.Second}, {&c.SnapshotFast, time.Second}, {&c.RecordWithin, 3 * time.Second}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if c.OnSynced == nil {
		c.OnSynced = func() {}
	}
	return nil
}

// Controller is the loop. View and the write methods are safe for concurrent
// use; before Run has synced and after it has ended View is nil and writes are
// refused as unavailable.
type Controller struct {
	cfg      Config
	log      *slog.Logger
	view     atomic.Pointer[nodegroups.FleetView]
	spare    atomic.Pointer[map[model.GroupID]spare]
	report   atomic.Pointer[explain.Report]
	timeline timeline
	tape     savings.Tape
	commands chan *command
	groups   chan []model.NodeGroup
	results  chan result
	marked   chan model.InstanceID
	readings chan reading
	kept     chan keptMemory
	poll     chan struct{}
	records  *recorder
	fast     atomic.Bool
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Controller, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return &Controller{
		cfg:      cfg,
		log:      cfg.Logger,
		commands: make(chan *command),
		groups:   make(chan []model.NodeGroup, 1),
		results:  make(chan result),
		marked:   make(chan model.InstanceID),
		readings: make(chan reading),
		kept:     make(chan keptMemory),
		poll:     make(chan struct{}, 1),
		records:  newRecorder(cfg.Store, cfg.Logger),
	}, nil
}

// View is what cluster-autoscaler is told, nil before the first snapshot and
// while not leading.
func (c *Controller) View() *nodegroups.FleetView { return c.view.Load() }

// SetGroups replaces the declared groups after a reload of the config. It takes
// effect at once, but for the list of groups that cluster-autoscaler sees: that
// one changes at its next Refresh.
func (c *Controller) SetGroups(groups []model.NodeGroup) {
	select {
	case <-c.groups: // an older declaration that was not taken yet
	default:
	}
	c.groups <- groups
}

// Run leads until ctx ends or another process is found to lead. It returns
// when every goroutine that it started has ended.
func (c *Controller) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.view.Store(nil) // nothing is answered while the last calls end
	defer cancel(nil)

	o := c.newOwner(ctx, cancel, &wg)
	for !c.cfg.Watched() {
		if !pause(ctx, 50*time.Millisecond) {
			return ended(ctx)
		}
	}
	for !o.begin(ctx) {
		if !pause(ctx, 2*time.Second) {
			return ended(ctx)
		}
	}
	wg.Go(func() { c.pollCloud(ctx) })
	wg.Go(func() { c.records.run(ctx, cancel) })
	o.loop()
	c.view.Store(nil) // nothing is answered while the last writes are made
	err := ended(ctx)
	if err == nil {
		o.keepAll()
	}
	return err
}

// pause waits; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// ended is why Run returns: nil when it was asked to.
func ended(ctx context.Context) error {
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// reading is one answer of the cloud.
type reading struct {
	at       time.Time
	snapshot model.Snapshot
	err      error
}

// pollCloud reads the cloud: when asked to, often while something is under
// way, seldom at rest.
func (c *Controller) pollCloud(ctx context.Context) {
	for {
		at := time.Now()
		readCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
		snapshot, err := c.cfg.Backend.Snapshot(readCtx)
		cancel()
		c.observeCall("snapshot", at, err)
		select {
		case c.readings <- reading{at, snapshot, err}:
		case <-ctx.Done():
			return
		}
		if !c.awaitPoll(ctx, at, err != nil) {
			return
		}
	}
}

// awaitPoll waits until the cloud is to be read again; false when ctx ended
// first. Whether something is under way may come out only of the last reading,
// which the owner is still taking in.
func (c *Controller) awaitPoll(ctx context.Context, last time.Time, failed bool) bool {
	ticker := time.NewTicker(c.cfg.SnapshotFast)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-c.poll:
			return true
		case <-ticker.C:
			if failed || c.fast.Load() || time.Since(last) >= c.cfg.SnapshotEvery {
				return true
			}
		}
	}
}

func (c *Controller) pollNow() {
	select {
	case c.poll <- struct{}{}:
	default:
	}
}

func (c *Controller) observeCall(operation string, began time.Time, err error) {
	code := "ok"
	switch {
	case errors.Is(err, model.ErrDryRun):
		code = "dry-run"
	case errors.Is(err, model.ErrUnderWay):
		code = "under-way"
	case errors.Is(err, context.DeadlineExceeded):
		code = "timeout"
	case errors.Is(err, context.Canceled):
		code = "canceled"
	case err != nil:
		code = "error"
	}
	c.cfg.Metrics.CloudRequestDuration.WithLabelValues(operation, code).Observe(time.Since(began).Seconds())
}
