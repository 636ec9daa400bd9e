package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/hearth-ci/hearth/internal/aws"
	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/internal/controller"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/internal/kwok"
	"github.com/hearth-ci/hearth/internal/server"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// backend is the cloud that the config file chooses, and what it needs beside
// the calls that the controller makes.
type backend struct {
	controller.Backend
	// setGroups takes those of a reloaded file.
	setGroups func([]model.NodeGroup)
	// attend runs in every replica, lead in the one that leads.
	attend, lead func(context.Context) error
	// uninstall takes back what was done to instances.
	uninstall func(context.Context) error
	// declared is closed once the groups are.
	declared chan struct{}
	// snapshotFast is the time between two readings while something is under
	// way, the controller's default when zero.
	snapshotFast time.Duration
	dryRun       bool
}

func idle(context.Context) error { return nil }

func (p *provider) newBackend(ctx context.Context) (backend, error) {
	if p.cfg.Backend.AWS != nil {
		return p.newScaling(ctx)
	}
	// A client of its own: a cloud's calls do not count against Hearth's limit.
	client, err := kube.NewClient(p.rest)
	if err != nil {
		return backend{}, err
	}
	embedded, err := kwok.New(kwok.Config{
		Client: client, Namespace: p.cfg.LeaderElection.Namespace, Groups: p.cfg.NodeGroups(),
		BootDelay: p.cfg.Backend.Kwok.BootDelay, ResumeDelay: p.cfg.Backend.Kwok.ResumeDelay, Logger: p.log,
	})
	declared := make(chan struct{})
	close(declared)
	return backend{
		Backend: embedded, attend: idle, lead: embedded.Run, uninstall: idle, declared: declared,
		setGroups: func(groups []model.NodeGroup) {
			embedded.SetGroups(groups)
			p.declare(groups)
		},
	}, err
}

// newAWS makes the backend on Auto Scaling groups.
func newAWS(ctx context.Context, cfg *config.Config, protects func(model.GroupID) bool, logger *slog.Logger) (*aws.Backend, error) {
	wanted := cfg.Backend.AWS
	clients, err := aws.Connect(ctx, wanted.Region, wanted.Endpoint)
	if err != nil {
		return nil, err
	}
	if clients.Region == "" {
		return nil, usageError{errors.New("backend.aws.region: want a region here or in AWS_REGION, got nothing")}
	}
	cloud, err := aws.New(aws.Config{
		AutoScaling: clients.AutoScaling, EC2: clients.EC2, EKS: clients.EKS, Region: clients.Region,
		Tags: wanted.AutoDiscoveryTags, Groups: cfg.NodeGroups(), Prices: wanted.Prices, DryRun: wanted.DryRun, Protect: protects, Logger: logger,
	})
	if err != nil {
		return nil, usageError{err}
	}
	return cloud, nil
}

// newScaling wires the backend on Auto Scaling groups. These declare themselves.
func (p *provider) newScaling(ctx context.Context) (backend, error) {
	cloud, err := newAWS(ctx, p.cfg, p.protects, p.log)
	if err != nil {
		return backend{}, err
	}
	b := backend{
		Backend: cloud, setGroups: cloud.SetGroups, lead: idle, uninstall: cloud.Uninstall,
		declared: make(chan struct{}), snapshotFast: 5 * time.Second, dryRun: p.cfg.Backend.AWS.DryRun,
	}
	b.attend = func(ctx context.Context) error {
		first := true
		return cloud.Run(ctx, func(groups []model.NodeGroup) {
			p.declare(groups)
			if first {
				close(b.declared)
				first = false
			}
		})
	}
	return b, nil
}

// protects says whether this replica leads and the group's instances are
// Hearth's to choose from.
func (p *provider) protects(id model.GroupID) bool {
	fleet := p.controller.View()
	if fleet == nil {
		return false
	}
	view := fleet.Group(id)
	return view != nil && view.Settings.Runner()
}

// declare puts groups into force.
func (p *provider) declare(groups []model.NodeGroup) {
	p.world.SetGroups(groups)
	p.controller.SetGroups(groups)
}

// watchingWriter refuses what would change something: in a dry run another
// provider serves the autoscaler that scales.
type watchingWriter struct{ server.Writer }

func refuseDryRun(id model.GroupID) error {
	return nodegroups.Refuse(nodegroups.KindVetoed, id, "dry-run", "backend.aws.dryRun is on: nothing is changed")
}

func (watchingWriter) IncreaseSize(_ context.Context, id model.GroupID, _ int) error {
	return refuseDryRun(id)
}

func (watchingWriter) DeleteNodes(_ context.Context, id model.GroupID, _ []model.InstanceID) error {
	return refuseDryRun(id)
}

func (watchingWriter) DecreaseTargetSize(_ context.Context, id model.GroupID, _ int) error {
	return refuseDryRun(id)
}

// untouched leaves Nodes and engines as they are. What the plan decides is in
// the log, the events and the explanation all the same.
type untouched struct{}

func (untouched) Taint(context.Context, model.NodeName, string) error        { return model.ErrDryRun }
func (untouched) Untaint(context.Context, model.NodeName, string) error      { return model.ErrDryRun }
func (untouched) ClearCATaint(context.Context, model.NodeName, string) error { return model.ErrDryRun }
func (untouched) Delete(context.Context, model.NodeName, string) error       { return model.ErrDryRun }
func (untouched) Label(context.Context, model.NodeName, string, model.GroupID) error {
	return nil
}
func (untouched) Mark(context.Context, model.NodeName, string, model.Marks) error { return nil }
func (untouched) StopEngine(context.Context, model.Pod) (bool, error) {
	return false, model.ErrDryRun
}
func (untouched) ReleaseEngine(context.Context, model.Pod) error { return nil }
