package playground

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/refautoscaler"
)

// AutoscalerConfig says how to run an autoscaler.
type AutoscalerConfig struct {
	Flags refautoscaler.Flags
	// Observe is told what the reference autoscaler does; a real
	// cluster-autoscaler tells nothing.
	Observe func(refautoscaler.Event)
}

// Autoscaler is a running autoscaler: the reference one, or a real
// cluster-autoscaler. Like the kubelet it starts it again when its liveness
// probe fails.
type Autoscaler struct {
	stop func()
	done chan struct{}

	mu       sync.Mutex
	restarts int
}

// Real says whether the playground runs a real cluster-autoscaler.
func (p *Playground) Real() bool { return p.cfg.Autoscaler != "" }

// DefaultFlags are CA's flags as Hearth's docs recommend them, with short
// times so that a person or a test need not wait for minutes.
func DefaultFlags() refautoscaler.Flags {
	f := refautoscaler.Generation136.Flags()
	f.ScanInterval = time.Second
	f.ScaleDownDelayAfterAdd = 2 * time.Second
	f.ScaleDownDelayAfterDelete = time.Second
	f.ScaleDownDelayAfterFailure = 3 * time.Second
	f.UnremovableNodeRecheckTimeout = 2 * time.Second
	f.NodeDeleteDelayAfterTaint = time.Second
	f.ScaleDownUnneededTime = 2 * time.Second
	f.IgnoreDaemonSetsUtilization = true
	f.MaxFailingTime = 20 * time.Second
	f.InitialNodeGroupBackoffDuration = 30 * time.Second
	f.DaemonSetEvictionForOccupiedNodes = false
	f.SkipNodesWithLocalStorage = false
	f.SkipNodesWithSystemPods = false
	return f
}

// StartAutoscaler starts an autoscaler in front of the provider.
func (p *Playground) StartAutoscaler(cfg AutoscalerConfig) (*Autoscaler, error) {
	pair, err := p.Authority.Issue("autoscaler")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := &Autoscaler{stop: cancel, done: make(chan struct{})}
	run := func(ctx context.Context) error { return p.runReference(ctx, cfg, pair) }
	if p.Real() {
		run = func(ctx context.Context) error { return p.runReal(ctx, cfg, pair) }
	}
	go func() {
		defer close(a.done)
		for ctx.Err() == nil {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				p.cfg.Logger.Warn("the autoscaler ended and is started again", "err", err)
				a.mu.Lock()
				a.restarts++
				a.mu.Unlock()
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		}
	}()
	return a, nil
}

// Kill ends the autoscaler as kill -9 does: nothing is cleaned up.
func (a *Autoscaler) Kill() {
	a.stop()
	<-a.done
}

// Restarts is how often it was started again after its probe failed.
func (a *Autoscaler) Restarts() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.restarts
}

// runReference runs the reference autoscaler once, on connections of its own.
func (p *Playground) runReference(ctx context.Context, cfg AutoscalerConfig, pair KeyPair) error {
	withCert, err := p.Authority.ClientTLS(&pair)
	if err != nil {
		return err
	}
	withoutCert, err := p.Authority.ClientTLS(nil)
	if err != nil {
		return err
	}
	provider, err := grpc.NewClient(p.provider.Address(), grpc.WithTransportCredentials(credentials.NewTLS(withCert)))
	if err != nil {
		return fmt.Errorf("dialling the provider: %w", err)
	}
	defer provider.Close()
	expander, err := grpc.NewClient(p.expander.Address(), grpc.WithTransportCredentials(credentials.NewTLS(withoutCert)))
	if err != nil {
		return fmt.Errorf("dialling the expander: %w", err)
	}
	defer expander.Close()
	a, err := refautoscaler.New(refautoscaler.Config{
		Flags: cfg.Flags, Kube: p.Kube, Provider: provider, Expander: expander,
		Logger: p.cfg.Logger, Observe: cfg.Observe,
	})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// runReal runs a real cluster-autoscaler until ctx ends or its liveness probe
// fails.
func (p *Playground) runReal(ctx context.Context, cfg AutoscalerConfig, pair KeyPair) error {
	probe := localcluster.FreeAddress()
	cloud := filepath.Join(p.dir, "cloud-config.yaml")
	text := fmt.Sprintf("address: %q\nkey: %q\ncert: %q\ncacert: %q\n", p.provider.Address(), pair.Key, pair.Cert, p.Authority.CAFile())
	if err := os.WriteFile(cloud, []byte(text), 0o600); err != nil {
		return fmt.Errorf("writing the cloud config: %w", err)
	}
	args := append([]string{
		"--cloud-provider=externalgrpc", "--cloud-config=" + cloud, "--kubeconfig=" + p.AdminKubeconfig(),
		"--leader-elect=false", "--address=" + probe,
		"--expander=grpc,least-waste", "--grpc-expander-url=" + p.expander.Address(), "--grpc-expander-cert=" + p.Authority.CAFile(),
	}, cfg.Flags.Args(p.generation(ctx))...)
	process, err := p.Cluster.Spawn("cluster-autoscaler", p.cfg.Autoscaler, nil, args...)
	if err != nil {
		return err
	}
	defer process.Kill()
	return watch(ctx, process, "http://"+probe+"/health-check")
}

// generation tells which flags the binary knows. One has no way to ask for its
// version, but the flag that came with 1.36 is in its help.
func (p *Playground) generation(ctx context.Context) refautoscaler.Generation {
	help, _ := exec.CommandContext(ctx, p.cfg.Autoscaler, "--help").CombinedOutput() // fails, as flags do
	if strings.Contains(string(help), "--max-startup-time") {
		return refautoscaler.Generation136
	}
	return refautoscaler.Generation133
}

var errProbe = errors.New("its liveness probe failed")

// watch returns when the process ends or its probe fails three times in a row.
func watch(ctx context.Context, process *localcluster.Process, url string) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-process.Done():
			return fmt.Errorf("it ended: %w\n%s", process.Err(), process.LogTail())
		case <-ticker.C:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			_ = resp.Body.Close()
		}
		if err == nil && resp.StatusCode == http.StatusOK {
			failures = 0
		} else if failures++; failures >= 10 || err == nil && failures >= 3 {
			return errProbe
		}
	}
}
