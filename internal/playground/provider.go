package playground

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/hearth-ci/hearth/internal/localcluster"
)

// Provider is one replica of `hearth serve`.
type Provider struct {
	Name            string
	Address         string // gRPC CloudProvider
	ExpanderAddress string
	HTTPAddress     string
	ConfigFile      string
	TLS             KeyPair

	process    *localcluster.Process
	health     *grpc.ClientConn
	playground *Playground
}

// StartProvider starts a replica. groups is the YAML of the config's
// nodeGroups and backend fields, and of leaderElection where its short times
// are not wanted; everything else is filled in. It returns when the process
// runs; Serving says when it leads.
func (p *Playground) StartProvider(name, groups string) (*Provider, error) {
	r := &Provider{Name: name, ConfigFile: filepath.Join(p.dir, name+".yaml"), playground: p}
	var err error
	for _, address := range []*string{&r.Address, &r.ExpanderAddress, &r.HTTPAddress} {
		*address = localcluster.FreeAddress()
	}
	if r.TLS, err = p.Authority.Issue(name); err != nil {
		return nil, err
	}
	if err = r.WriteConfig(groups); err != nil {
		return nil, err
	}
	return r, r.Restart()
}

// WriteConfig replaces the replica's config file; a running one reloads it.
func (r *Provider) WriteConfig(groups string) error {
	election := ""
	if !strings.Contains("\n"+groups, "\nleaderElection:") {
		election = "leaderElection: {enabled: true, namespace: hearth, leaseDuration: 6s, renewDeadline: 4s, retryPeriod: 1s}\n"
	}
	text := fmt.Sprintf(`apiVersion: hearth.dev/v1alpha1
kind: ProviderConfig
server:
  address: %q
  expanderAddress: %q
  tls: {certFile: %q, keyFile: %q, clientCAFile: %q}
http: {address: %q}
kubernetes: {kubeconfig: %q}
%s%s`, r.Address, r.ExpanderAddress, r.TLS.Cert, r.TLS.Key, r.playground.Authority.CAFile(), r.HTTPAddress,
		r.playground.kubeconfig(), election, groups)
	next := r.ConfigFile + ".next"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		return fmt.Errorf("writing the config of %q: %w", r.Name, err)
	}
	if err := os.Rename(next, r.ConfigFile); err != nil {
		return fmt.Errorf("writing the config of %q: %w", r.Name, err)
	}
	return nil
}

// Restart starts the replica's process again after Kill or Terminate.
func (r *Provider) Restart() error {
	p := r.playground
	process, err := p.Cluster.Spawn("hearth-"+r.Name, p.cfg.Hearth, nil,
		"serve", "--config", r.ConfigFile, "--log-format", "text", "--log-level", "debug")
	if err != nil {
		return err
	}
	r.process = process
	cfg, err := p.Authority.ClientTLS(&r.TLS)
	if err != nil {
		return err
	}
	if r.health == nil {
		if r.health, err = grpc.NewClient(r.Address, grpc.WithTransportCredentials(credentials.NewTLS(cfg))); err != nil {
			return fmt.Errorf("dialling %q: %w", r.Name, err)
		}
	}
	r.health.ResetConnectBackoff() // grown while the process was gone
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, known := range p.providers {
		if known == r {
			return nil
		}
	}
	p.providers = append(p.providers, r)
	return nil
}

// Uninstall runs `hearth serve --uninstall` with the replica's config, after
// every replica has ended.
func (r *Provider) Uninstall(ctx context.Context) error {
	p := r.playground
	process, err := p.Cluster.Spawn("hearth-uninstall", p.cfg.Hearth, nil,
		"serve", "--config", r.ConfigFile, "--log-format", "text", "--uninstall")
	if err != nil {
		return err
	}
	defer process.Kill()
	select {
	case <-process.Done():
		if process.Err() != nil {
			return fmt.Errorf("uninstalling: %w\n%s", process.Err(), process.LogTail())
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Kill ends the process as kill -9 does, and waits until it is gone.
func (r *Provider) Kill() { r.process.Kill() }

// Signal sends the process a signal; SIGSTOP makes it a host that hangs.
func (r *Provider) Signal(s os.Signal) error { return r.process.Signal(s) }

// Terminate asks the process to end, and returns how it ended.
func (r *Provider) Terminate(ctx context.Context) error {
	if err := r.process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-r.process.Done():
		return r.process.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Log returns the last lines that the replica wrote.
func (r *Provider) Log() string { return r.process.LogTail() }

var errNotServing = errors.New("it does not serve")

// serves asks the replica's gRPC health service.
func (r *Provider) serves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	answer, err := grpc_health_v1.NewHealthClient(r.health).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return err
	}
	if answer.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return errNotServing
	}
	return nil
}

// Serving waits until the replica leads and serves.
func (r *Provider) Serving(ctx context.Context, within time.Duration) error {
	return await(ctx, within, fmt.Sprintf("provider %q to serve", r.Name), func(ctx context.Context) error {
		select {
		case <-r.process.Done():
			return fmt.Errorf("it ended: %w\n%s", r.process.Err(), r.Log())
		default:
			return r.serves(ctx)
		}
	})
}

// leader returns an address of the replica that serves, empty when none does.
func (p *Playground) leader(address func(*Provider) string) string {
	p.mu.Lock()
	providers := append([]*Provider(nil), p.providers...)
	p.mu.Unlock()
	for _, r := range providers {
		if r.serves(context.Background()) == nil {
			return address(r)
		}
	}
	return ""
}

// Metrics returns the text of the replica's /metrics.
func (r *Provider) Metrics(ctx context.Context) (string, error) {
	return r.get(ctx, "/metrics")
}

// Ready says whether the replica's /readyz answers ok.
func (r *Provider) Ready(ctx context.Context) error {
	_, err := r.get(ctx, "/readyz")
	return err
}

func (r *Provider) get(ctx context.Context, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.HTTPAddress+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answered %s: %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return string(body), nil
}
