// Package localcluster runs a real Kubernetes control plane on loopback for the demo and for
// end-to-end tests: etcd, kube-apiserver with RBAC, kube-controller-manager, kube-scheduler, and
// kwok in place of the kubelets. The binaries come from test/cluster (`make cluster`).
//
// It owns these processes, their certificates, data and logs, and ends and removes all of them:
// at Stop, at the end of Start's context, and on Linux also when this program is killed. It
// never builds or downloads anything, listens beyond 127.0.0.1, or knows what Hearth is.
//
// How kwok plays the kubelets (kwok.yaml):
//   - Only Nodes with the annotation kwok.x-k8s.io/node=fake are played. Such a Node becomes
//     Ready within about a second, with the capacity it was created with, and its Lease is kept
//     fresh. It is never created, nor created again after somebody deleted it. If its name is
//     used again within a second of that, pods on the new Node start up to 10 seconds late.
//   - A Node with the annotation kwok.hearth.dev/unready="true" reports Ready=False: it never
//     becomes Ready if made with it, and stops being Ready when it gets it later. Without the
//     annotation it becomes Ready again.
//   - A pod bound to such a Node is Running at once, also a DaemonSet's. It ends as Succeeded
//     when demo.hearth.dev/run-for (a Go duration such as "8s") has passed since its start,
//     which the API keeps to the second; without the annotation it runs until it is deleted.
//   - A pod that is deleted stops at once, or when demo.hearth.dev/stop-after has passed. Its
//     containers then have ended with the exit code 0, or that of demo.hearth.dev/exit-code, and
//     the pod is deleted for good; if a finalizer keeps it, that can be read.
//   - Pods have addresses in 127.1.0.0/16: what is dialled there never leaves the machine.
package localcluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Annotations that tell kwok how to play a Node or pod; see the package comment.
const (
	FakeNodeAnnotation = "kwok.x-k8s.io/node" // on Nodes: "fake"
	UnreadyAnnotation  = "kwok.hearth.dev/unready"
	RunForAnnotation   = "demo.hearth.dev/run-for"
	// On pods: how long they take to stop, a Go duration, and their exit code.
	StopAfterAnnotation = "demo.hearth.dev/stop-after"
	ExitCodeAnnotation  = "demo.hearth.dev/exit-code"
)

// startTimeout bounds Start where the machine is slow; it takes seconds where it is not.
const startTimeout = 90 * time.Second

//go:embed kwok.yaml
var kwokStages []byte

// Config says how to run a cluster. Its zero value is usable.
type Config struct {
	BinDir   string       // folder of the binaries; empty: FindBinaries
	Dir      string       // for data, certificates and logs, kept after Stop; empty: a temporary one
	Logger   *slog.Logger // nil: silent
	Progress func(string) // told in a few words what Start is waiting for; may be nil
	// AuditUser: this user's requests are in LogDir's audit.log, an audit.k8s.io
	// Event a line; empty: nobody's are.
	AuditUser string
	// LeaseDuration is how long a played kubelet's heartbeat is good for; each makes
	// four in that time. Zero: 40 s. Thousands of nodes want minutes.
	LeaseDuration time.Duration
}

func (cfg *Config) complete() (err error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	if cfg.LeaseDuration == 0 {
		cfg.LeaseDuration = 40 * time.Second
	}
	if cfg.BinDir == "" {
		cfg.BinDir, err = FindBinaries()
		return err
	}
	return checkBinaries(cfg.BinDir)
}

// Cluster is a running control plane. Its methods may be called concurrently.
type Cluster struct {
	cfg       Config
	dir       string
	temporary bool // dir is removed by Stop
	authority *authority
	admin     *rest.Config
	apiArgs   []string // the same whenever the API server is started
	spawner   *spawner

	forgetContext func() bool // ends the tie to Start's context

	mu      sync.Mutex
	running map[string]*process // by name of the binary
	stopped bool
	stopErr error
}

// Start runs a control plane until Stop is called or ctx ends, whichever is first. It returns
// when the API server is ready with its default roles in place, pods can be created in the
// namespace default, and scheduler, controller manager and kwok are healthy. On an error
// nothing is left running. The error wraps ErrNoBinaries if the binaries are not built.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("starting a local cluster: %w", err)
	}
	c := &Cluster{
		cfg: cfg, dir: cfg.Dir, running: map[string]*process{}, spawner: newSpawner(),
		forgetContext: func() bool { return true }, // until there is something to tie to it
	}
	began := time.Now()
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("starting a local cluster: %w", err), c.Stop())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetContext = context.AfterFunc(ctx, func() {
		if err := c.Stop(); err != nil {
			cfg.Logger.Error("stopping the local cluster", "err", err)
		}
	})
	cfg.Logger.Info("local cluster started", "took", time.Since(began), "url", c.admin.Host, "dir", c.dir)
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := c.prepare(); err != nil {
		return err
	}

	c.cfg.Progress("etcd")
	etcdURL, peerURL := "http://"+FreeAddress(), "http://"+FreeAddress()
	if err := c.run(etcd, nil,
		"--data-dir="+filepath.Join(c.dir, "etcd"),
		"--listen-client-urls="+etcdURL,
		"--advertise-client-urls="+etcdURL,
		"--listen-peer-urls="+peerURL,
		"--initial-advertise-peer-urls="+peerURL,
		"--initial-cluster=default="+peerURL,
		"--unsafe-no-fsync", // the data need not survive this machine
		"--log-level=warn",
	); err != nil {
		return err
	}
	if err := c.awaitHealth(ctx, etcd, etcdURL+"/health"); err != nil {
		return err
	}

	c.cfg.Progress("API server")
	if err := c.configureAPI(etcdURL); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}

	c.cfg.Progress("controller manager, scheduler and kwok")
	managerURL, schedulerURL, kwokAddress := "https://"+FreeAddress(), "https://"+FreeAddress(), FreeAddress()
	if err := errors.Join(
		c.runManager(managerURL),
		c.runScheduler(schedulerURL),
		c.runKwok(kwokAddress),
	); err != nil {
		return err
	}
	if err := errors.Join(
		c.awaitHealth(ctx, controllerManager, managerURL+"/healthz"),
		c.awaitHealth(ctx, scheduler, schedulerURL+"/healthz"),
		c.awaitHealth(ctx, kwok, "http://"+kwokAddress+"/healthz"),
	); err != nil {
		return err
	}
	return c.awaitNamespaces(ctx)
}

// prepare makes the folders and certificates.
func (c *Cluster) prepare() (err error) {
	if c.dir == "" {
		c.temporary = true
		if c.dir, err = os.MkdirTemp("", "hearth-cluster-"); err != nil {
			return fmt.Errorf("making the cluster's folder: %w", err)
		}
	}
	for _, dir := range []string{c.LogDir(), c.cert("")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making the cluster's folder: %w", err)
		}
	}
	if c.authority, err = newAuthority(); err != nil {
		return err
	}
	if err := c.authority.writeServing(c.cert("")); err != nil {
		return err
	}
	c.admin, err = c.authority.config("https://"+FreeAddress(), "localcluster-admin", "system:masters")
	return err
}

func (c *Cluster) configureAPI(etcdURL string) error {
	host, port := splitURL(c.admin.Host)
	c.apiArgs = []string{
		"--etcd-servers=" + etcdURL,
		"--bind-address=" + host,
		"--secure-port=" + port,
		"--advertise-address=" + host,
		"--endpoint-reconciler-type=none", // it refuses to advertise a loopback address
		"--authorization-mode=Node,RBAC",
		"--client-ca-file=" + c.cert(caFile),
		"--tls-cert-file=" + c.cert(servingCert),
		"--tls-private-key-file=" + c.cert(servingKey),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + c.cert(accountKeyFile),
		"--service-account-signing-key-file=" + c.cert(accountKeyFile),
		"--service-cluster-ip-range=10.96.0.0/16",
		"--profiling=false",
	}
	if c.cfg.AuditUser == "" {
		return nil
	}
	policy := filepath.Join(c.dir, "audit.yaml")
	c.apiArgs = append(c.apiArgs, "--audit-policy-file="+policy, "--audit-log-path="+filepath.Join(c.LogDir(), AuditLog), "--audit-log-mode=blocking")
	text := fmt.Sprintf("apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n- {level: Metadata, users: [%q]}\n- {level: None}\n", c.cfg.AuditUser)
	if err := os.WriteFile(policy, []byte(text), 0o600); err != nil {
		return fmt.Errorf("writing the audit policy: %w", err)
	}
	return nil
}

// AuditLog is the name of the file in LogDir that Config.AuditUser is about.
const AuditLog = "audit.log"

// runManager starts the controller manager. That its controllers share one identity with all
// rights, instead of a service account each, makes them start 4 seconds sooner.
func (c *Cluster) runManager(url string) error {
	kubeconfig, err := c.kubeconfig(controllerManager, "system:masters")
	if err != nil {
		return err
	}
	return c.run(controllerManager, nil, append(c.clientArgs(kubeconfig, url),
		"--root-ca-file="+c.cert(caFile),
		"--node-monitor-grace-period="+(c.cfg.LeaseDuration+10*time.Second).String(),
	)...)
}

func (c *Cluster) runScheduler(url string) error {
	kubeconfig, err := c.kubeconfig(scheduler)
	if err != nil {
		return err
	}
	return c.run(scheduler, nil, c.clientArgs(kubeconfig, url)...)
}

// clientArgs are the arguments that controller manager and scheduler have in common. Each is
// the only one of its kind; and losing a lease would end it while the API server is away.
func (c *Cluster) clientArgs(kubeconfig, url string) []string {
	host, port := splitURL(url)
	return []string{
		"--kubeconfig=" + kubeconfig,
		"--leader-elect=false",
		"--bind-address=" + host,
		"--secure-port=" + port,
		"--tls-cert-file=" + c.cert(servingCert),
		"--tls-private-key-file=" + c.cert(servingKey),
		"--profiling=false",
	}
}

func (c *Cluster) runKwok(address string) error {
	kubeconfig, err := c.kubeconfig(kwok, "system:masters")
	if err != nil {
		return err
	}
	stages := filepath.Join(c.dir, "kwok.yaml")
	if err := os.WriteFile(stages, kwokStages, 0o600); err != nil {
		return fmt.Errorf("writing kwok's stages: %w", err)
	}
	// Without KWOK_WORKDIR it would also read ~/.kwok/kwok.yaml.
	return c.run(kwok, []string{"KWOK_WORKDIR=" + c.dir},
		"--config="+stages,
		"--kubeconfig="+kubeconfig,
		"--manage-nodes-with-annotation-selector="+FakeNodeAnnotation+"=fake",
		"--node-lease-duration-seconds="+strconv.Itoa(int(c.cfg.LeaseDuration.Seconds())),
		"--cidr=127.1.0.0/16",
		"--server-address="+address,
	)
}

// kubeconfig writes a kubeconfig for one of our own processes, as user system:NAME, and
// returns its path.
func (c *Cluster) kubeconfig(name string, groups ...string) (string, error) {
	cfg, err := c.authority.config(c.admin.Host, "system:"+name, groups...)
	if err != nil {
		return "", err
	}
	path := filepath.Join(c.dir, name+".kubeconfig")
	return path, c.WriteKubeconfig(path, cfg)
}

// run starts a binary, which Stop will end.
func (c *Cluster) run(name string, env []string, args ...string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return fmt.Errorf("starting %s: %w", name, errStopped)
	}
	if c.running[name] != nil {
		return fmt.Errorf("starting %s: it is running", name)
	}
	p, err := c.spawner.start(name, filepath.Join(c.cfg.BinDir, name), c.LogDir(), env, args)
	if err != nil {
		return err
	}
	c.running[name] = p
	c.cfg.Logger.Debug("started", "process", name, "pid", p.cmd.Process.Pid)
	return nil
}

var errStopped = errors.New("the cluster is stopped")

// StartAPIServer starts the API server again after StopAPIServer, at the same address and with
// the same data, and returns when it is ready or ctx ends.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	if err := c.run(apiServer, nil, c.apiArgs...); err != nil {
		return err
	}
	return c.awaitHealth(ctx, apiServer, c.admin.Host+"/readyz")
}

// StopAPIServer kills the API server: connections break, and new ones are refused until
// StartAPIServer. Everything else goes on; but after half a minute without the API, client-go's
// back-off makes controllers, scheduler and kwok take up to another half to notice its return,
// and the controller manager may hold Nodes for unknown in between. It does nothing if the API
// server is not running.
func (c *Cluster) StopAPIServer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.running[apiServer]; p != nil {
		p.kill()
		delete(c.running, apiServer)
	}
}

// Stop ends all processes, waits until they are gone, and removes the temporary folder. Only
// the first call does anything; each returns its error.
func (c *Cluster) Stop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return c.stopErr
	}
	c.stopped = true
	c.forgetContext()
	for _, p := range c.running {
		p.signalKill()
	}
	for _, p := range c.running {
		<-p.done
	}
	c.spawner.close()
	if c.temporary {
		c.stopErr = os.RemoveAll(c.dir)
	}
	return c.stopErr
}

// LogDir returns the folder with one log file per process.
func (c *Cluster) LogDir() string { return filepath.Join(c.dir, "logs") }

// cert returns the path of a file in the certificates folder.
func (c *Cluster) cert(name string) string { return filepath.Join(c.dir, "pki", name) }

// awaitHealth waits until url answers 200 to the administrator.
func (c *Cluster) awaitHealth(ctx context.Context, name, url string) error {
	client, err := rest.HTTPClientFor(c.admin)
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", name, err)
	}
	return c.await(ctx, name, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// awaitNamespaces waits for what the first nodes and pods need: the namespace of node leases,
// and the service account that pods get by default.
func (c *Cluster) awaitNamespaces(ctx context.Context) error {
	client, err := kubernetes.NewForConfig(c.admin)
	if err != nil {
		return fmt.Errorf("connecting to the API server: %w", err)
	}
	return c.await(ctx, controllerManager, func() error {
		_, err := client.CoreV1().Namespaces().Get(ctx, "kube-node-lease", metav1.GetOptions{})
		if err != nil {
			return err
		}
		_, err = client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// await calls ready until it returns nil, ctx ends or the named process does.
func (c *Cluster) await(ctx context.Context, name string, ready func() error) error {
	c.mu.Lock()
	p := c.running[name]
	c.mu.Unlock()
	if p == nil {
		return fmt.Errorf("waiting for %s: it is not running", name)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("waiting for %s: it ended: %w\n%s", name, p.err, p.logTail())
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w (last answer: %w)", name, ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// splitURL returns host and port of a URL that was made from a FreeAddress.
func splitURL(url string) (host, port string) {
	_, address, _ := strings.Cut(url, "://")
	host, port, _ = strings.Cut(address, ":")
	return host, port
}

// taken are the ports that this process has given away: whoever they are for may
// not listen yet, or may be between two lives.
//
//nolint:gochecknoglobals // ports are the machine's
var taken sync.Map

// FreeAddress returns a loopback address that nobody listens on, and never the same
// twice in a process. Its port is below the range that Linux takes for outgoing
// connections, so that none of ours can occupy it before the process that it is for
// listens, or while that is started again.
func FreeAddress() string {
	for {
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(20000+rand.IntN(12000)))
		if l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", address); err == nil {
			_ = l.Close()
			if _, given := taken.LoadOrStore(address, true); !given {
				return address
			}
		}
	}
}
