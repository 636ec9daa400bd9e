package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/internal/placement"
	"github.com/hearth-ci/hearth/pkg/model"
)

// patience is how long a job waits for a warm node at most: what a parked one
// takes to resume.
const patience = 45 * time.Second

// placer is the placement webhook of a replica. A nil one does nothing.
type placer struct {
	index  *placement.Index
	server *placement.Server
	secret *placement.Secret // nil: the certificate is in files
}

// newPlacer makes what the webhook knows, if there is to be one.
func (p *provider) newPlacer() error {
	if p.cfg.Placement == nil {
		return nil
	}
	index, err := placement.NewIndex(placement.IndexConfig{
		Label: kube.WarmLabel, WarmLabels: kube.WarmLabels,
		Group:    func(labels map[string]string) model.GroupID { return model.GroupID(labels[v1alpha1.NodeGroupLabel]) },
		Slots:    p.world.JobsPerNode,
		Patience: patience, Now: time.Now,
	})
	if err != nil {
		return err
	}
	p.placer = &placer{index: index}
	return nil
}

// listenForPlacement takes the webhook's port.
func (p *provider) listenForPlacement() error {
	if p.placer == nil {
		return nil
	}
	handler, err := placement.NewHandler(placement.HandlerConfig{
		Index: p.placer.index, Read: p.readForPlacement, Label: kube.WarmLabel, Requests: p.metrics.Placements, Logger: p.log,
	})
	if err != nil {
		return err
	}
	certificate, err := p.placementCertificate()
	if err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", p.cfg.Placement.Address)
	if err != nil {
		return fmt.Errorf("placement.address: %w", err)
	}
	p.placer.server, err = placement.NewServer(placement.ServerConfig{
		Listener: listener, Handler: handler, Certificate: certificate, Logger: p.log,
	})
	return err
}

// readForPlacement reads a pod; its group is named as nodes bear it.
func (p *provider) readForPlacement(pod *corev1.Pod) model.Pod {
	read := p.feed.Read(pod)
	if read.Group != "" {
		read.Group = model.GroupID(v1alpha1.GroupLabel(read.Group))
	}
	return read
}

func (p *provider) placementCertificate() (func() (*tls.Certificate, error), error) {
	if c := p.cfg.Placement; c.CertFile != "" {
		files, err := placement.NewFiles(c.CertFile, c.KeyFile, p.log)
		if err != nil {
			return nil, usageError{fmt.Errorf("placement.tls: %w", err)}
		}
		return files.Certificate, nil
	}
	namespace := p.cfg.LeaderElection.Namespace
	service := deploy.PlacementName + "." + namespace + ".svc"
	var err error
	p.placer.secret, err = placement.NewSecret(placement.SecretConfig{
		Client: p.client, Namespace: namespace, Name: deploy.PlacementName, Webhook: deploy.PlacementName,
		// Loopback is for who forwards a port to it.
		Hosts: []string{service, service + ".cluster.local", "localhost", "127.0.0.1"},
		Now:   time.Now, Logger: p.log,
	})
	if err != nil {
		return nil, err
	}
	return p.placer.secret.Certificate, nil
}

// run serves until ctx ends, on every replica.
func (p *placer) run(ctx context.Context, group *errgroup.Group) {
	if p == nil {
		return
	}
	group.Go(func() error { return p.server.Run(ctx) })
	if p.secret != nil {
		group.Go(func() error { p.secret.Follow(ctx); return nil })
	}
}

// lead does what only the leader does.
func (p *placer) lead(ctx context.Context, group *errgroup.Group) {
	if p != nil && p.secret != nil {
		group.Go(func() error { p.secret.Lead(ctx); return nil })
	}
}
