package playground

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/internal/localcluster"
)

// Config says what to run.
type Config struct {
	// Hearth is the path of the hearth binary.
	Hearth string
	// Autoscaler is the path of a cluster-autoscaler binary built with the
	// externalgrpc provider; empty means the reference autoscaler.
	Autoscaler string
	Logger     *slog.Logger
	Progress   func(string)
	// Audit has every request of Hearth's to the API server logged.
	Audit bool
	// LeaseDuration is that of localcluster.Config.
	LeaseDuration time.Duration
}

// Playground is a running control plane with everything that a provider and an
// autoscaler need to be started on it. Its methods are safe for concurrent use.
type Playground struct {
	Cluster   *localcluster.Cluster
	Kube      kubernetes.Interface // as administrator
	Client    client.WithWatch     // as administrator; knows Hearth's kinds
	Authority *Authority

	cfg      Config
	dir      string
	token    string
	provider *Forwarder
	expander *Forwarder

	mu        sync.Mutex
	providers []*Provider
}

// Start brings the control plane up and installs Hearth's manifests. Stop ends
// everything; so does the end of ctx.
func Start(ctx context.Context, cfg Config) (*Playground, error) {
	p := &Playground{cfg: cfg}
	if err := p.start(ctx); err != nil {
		return nil, errors.Join(err, p.Stop())
	}
	return p, nil
}

func (p *Playground) start(ctx context.Context) (err error) {
	if p.dir, err = os.MkdirTemp("", "hearth-playground-"); err != nil {
		return fmt.Errorf("making the playground's folder: %w", err)
	}
	if p.Authority, err = NewAuthority(p.dir); err != nil {
		return err
	}
	cluster := localcluster.Config{Logger: p.cfg.Logger, Progress: p.cfg.Progress, LeaseDuration: p.cfg.LeaseDuration}
	if p.cfg.Audit {
		cluster.AuditUser = "system:serviceaccount:" + deploy.Namespace + ":" + deploy.ServiceAccount
	}
	if p.Cluster, err = localcluster.Start(ctx, cluster); err != nil {
		return err
	}
	admin := p.Cluster.AdminConfig()
	admin.QPS, admin.Burst = 200, 400
	if p.Kube, err = kubernetes.NewForConfig(admin); err != nil {
		return fmt.Errorf("making the administrator's client: %w", err)
	}
	if p.Client, err = kube.NewClient(admin); err != nil {
		return err
	}
	manifests := append(deploy.CRDs(), deploy.RBAC(), deploy.RBACKwok())
	if err = p.Cluster.Apply(ctx, manifests...); err != nil {
		return err
	}
	account, err := p.Cluster.ServiceAccountConfig(ctx, deploy.Namespace, deploy.ServiceAccount)
	if err != nil {
		return err
	}
	p.token = account.BearerToken
	if err = p.Cluster.WriteKubeconfig(p.kubeconfig(), account); err != nil {
		return err
	}
	if err = p.Cluster.WriteKubeconfig(p.AdminKubeconfig(), admin); err != nil {
		return err
	}
	if p.provider, err = NewForwarder(func() string { return p.leader(func(r *Provider) string { return r.Address }) }); err != nil {
		return err
	}
	p.expander, err = NewForwarder(func() string { return p.leader(func(r *Provider) string { return r.ExpanderAddress }) })
	return err
}

func (p *Playground) kubeconfig() string { return filepath.Join(p.dir, "hearth.kubeconfig") }

// AdminKubeconfig is the path of a kubeconfig that may do everything.
func (p *Playground) AdminKubeconfig() string { return filepath.Join(p.dir, "admin.kubeconfig") }

// ProviderAddress is where an autoscaler reaches the provider that serves.
func (p *Playground) ProviderAddress() string { return p.provider.Address() }

// DropConnections silently drops the packets of every connection between
// autoscaler and provider that exists now.
func (p *Playground) DropConnections() { p.provider.Silence() }

// Token is what Hearth shows to the API server.
func (p *Playground) Token() string { return p.token }

// Dir is the playground's folder; it is removed by Stop.
func (p *Playground) Dir() string { return p.dir }

// Stop ends everything and removes the playground's folder.
func (p *Playground) Stop() error {
	p.mu.Lock()
	providers := p.providers
	p.providers = nil
	p.mu.Unlock()
	for _, r := range providers {
		r.process.Kill()
		_ = r.health.Close()
	}
	for _, f := range []*Forwarder{p.provider, p.expander} {
		if f != nil {
			f.Close()
		}
	}
	var errs []error
	if p.Cluster != nil {
		errs = append(errs, p.Cluster.Stop())
	}
	if p.dir != "" {
		errs = append(errs, os.RemoveAll(p.dir))
	}
	return errors.Join(errs...)
}

// await tries until ok, or fails with the last reason when ctx or within ends.
func await(ctx context.Context, within time.Duration, what string, ok func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := ok(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
	}
}
