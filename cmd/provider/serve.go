package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/internal/controller"
	"github.com/hearth-ci/hearth/internal/dagger"
	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/internal/server"
	"github.com/hearth-ci/hearth/internal/telemetry"
	"github.com/hearth-ci/hearth/internal/ui"
	"github.com/hearth-ci/hearth/pkg/model"
)

func serveCommand() *cobra.Command {
	var path, logFormat, logLevel string
	var uninstall bool
	cmd := &cobra.Command{
		Use: "serve --config FILE", Short: "Serve cluster-autoscaler", Args: cobra.NoArgs,
		Long: "Serves the CloudProvider and Expander services of cluster-autoscaler and runs the\n" +
			"controller behind them. The config file is reloaded when it changes.\n\n" +
			"To uninstall: stop every replica, then run `hearth serve --config FILE --uninstall`\n" +
			"once. It takes Hearth's annotations, labels and taints off all nodes, its finalizer\n" +
			"off the pods of engines, and exits; nodes and instances stay as they are.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(path)
			if err != nil {
				return usageError{err}
			}
			level, err := newLogLevel(logLevel, cfg.Log.Level)
			if err != nil {
				return usageError{err}
			}
			logger, err := telemetry.NewLevelled(cmd.ErrOrStderr(), logFormat, level)
			if err != nil {
				return usageError{err}
			}
			telemetry.RouteLibraries(logger)
			for _, w := range append(cfg.Warnings(), cfg.Problems()...) {
				logger.Warn("config", "problem", w.String())
			}
			p, err := newProvider(cmd.Context(), cfg, path, logger)
			if err != nil {
				return err
			}
			p.level = level
			if uninstall {
				return errors.Join(p.nodes.Uninstall(cmd.Context()), p.engines.Uninstall(cmd.Context()), p.backend.uninstall(cmd.Context()))
			}
			return p.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the config file (required)")
	cmd.Flags().StringVar(&logFormat, "log-format", "json", "json or text")
	cmd.Flags().StringVar(&logLevel, "log-level", "info", "debug, info, warn or error; log.level in the config file, which may change at run time, wins over it")
	cmd.Flags().BoolVar(&uninstall, "uninstall", false, "take everything of Hearth's off nodes and pods and exit")
	_ = cmd.MarkFlagRequired("config")
	return cmd
}

// provider is everything that one replica runs.
type provider struct {
	cfg        *config.Config
	path       string
	log        *slog.Logger
	rest       *rest.Config
	client     client.Client
	registry   *prometheus.Registry
	metrics    *telemetry.Metrics
	nodes      *kube.Nodes
	engines    *kube.Engines
	events     *kube.Events
	feed       *kube.Feed
	world      *controller.World
	readings   *dagger.Watcher
	backend    backend
	controller *controller.Controller
	server     *server.Server
	http       *telemetry.HTTP
	placer     *placer // nil: no placement webhook
	hearing    *hearing
	ui         *ui.UI
	level      *logLevel
	leader     atomic.Pointer[string] // the replica that leads, nil: not known
}

// newProvider wires the parts. Nothing runs yet, but the ports are taken, so
// that a port in use is told at once.
func newProvider(ctx context.Context, cfg *config.Config, path string, logger *slog.Logger) (*provider, error) {
	p := &provider{cfg: cfg, path: path, log: logger, registry: prometheus.NewRegistry()}
	p.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	p.metrics = telemetry.NewMetrics(p.registry)
	p.metrics.SetBuild(version, "")

	var err error
	// An empty path means the service account that a pod runs under.
	if p.rest, err = clientcmd.BuildConfigFromFlags("", cfg.Kubernetes.Kubeconfig); err != nil {
		return nil, usageError{fmt.Errorf("kubernetes.kubeconfig: %w", err)}
	}
	p.rest.QPS, p.rest.Burst, p.rest.UserAgent = 100, 200, "hearth/"+version
	client, err := kube.NewClient(p.rest)
	if err != nil {
		return nil, err
	}
	p.client = client
	engines := kube.EngineSelector{Namespaces: cfg.Engines.Namespaces}
	if engines.Labels, err = labels.Parse(cfg.Engines.PodSelector); err != nil {
		return nil, fmt.Errorf("engines.podSelector: %w", err)
	}
	store := kube.NewStore(client)
	p.nodes = kube.NewNodes(client, engines)
	p.engines = kube.NewEngines(client)
	p.events = kube.NewEvents(client, store, logger)
	p.world = controller.NewWorld(cfg.NodeGroups())
	if p.readings, err = dagger.NewWatcher(uint16(cfg.Engines.MetricsPort), p.world.EngineSampled, logger); err != nil {
		return nil, err
	}
	watching := []watcher{p.readings}
	if err := p.newPlacer(); err != nil {
		return nil, err
	}
	if p.placer != nil {
		watching = append(watching, p.placer.index)
	}
	if p.feed, err = kube.NewFeed(kube.FeedConfig{
		Client: client, Sink: sink{p.world, watching}, Engines: engines, KeysFor: p.world.KeysFor, Logger: logger,
	}); err != nil {
		return nil, err
	}
	if p.backend, err = p.newBackend(ctx); err != nil {
		return nil, err
	}
	acting := controller.Config{Nodes: p.nodes, Engines: p.engines}
	if p.backend.dryRun {
		acting = controller.Config{Nodes: untouched{}, Engines: untouched{}}
	}
	if p.controller, err = controller.New(controller.Config{
		Backend: p.backend, SnapshotFast: p.backend.snapshotFast, Store: store, Memories: kube.NewMemories(client, cfg.LeaderElection.Namespace), Nodes: acting.Nodes, Pods: p.nodes, Engines: acting.Engines, Events: p.events,
		World: p.world, Watched: p.feed.Synced, Groups: cfg.NodeGroups(), Metrics: p.metrics, Logger: logger,
		DryRun: p.backend.dryRun, OnSynced: func() { p.server.SetServing(true) },
	}); err != nil {
		return nil, err
	}
	return p, p.listen()
}

// listen takes the ports.
func (p *provider) listen() error {
	lc := net.ListenConfig{}
	listeners := make([]net.Listener, 3)
	for i, l := range []struct{ field, address string }{
		{"server.address", p.cfg.Server.Address},
		{"server.expanderAddress", p.cfg.Server.ExpanderAddress},
		{"http.address", p.cfg.HTTP.Address},
	} {
		var err error
		if listeners[i], err = lc.Listen(context.Background(), "tcp", l.address); err != nil {
			return fmt.Errorf("%s: %w", l.field, err)
		}
	}
	var err error
	writer := server.Writer(p.controller)
	if p.backend.dryRun {
		writer = watchingWriter{writer}
	}
	if p.server, err = server.New(server.Config{
		Reader: p.controller, Writer: writer, Ranker: ranker{p},
		Listener: listeners[0], ExpanderListener: listeners[1],
		TLS:    server.TLS(p.cfg.Server.TLS),
		Logger: p.log, Registerer: p.registry,
	}); err != nil {
		return usageError{fmt.Errorf("server: %w", err)}
	}
	if p.hearing, err = p.newHearing(); err != nil {
		return err
	}
	if p.ui, err = ui.New(ui.Config{Source: p.controller, Logger: p.log, Leader: p.whoLeads}); err != nil {
		return err
	}
	p.http, err = telemetry.NewHTTP(telemetry.HTTPConfig{
		Listener: listeners[2], Gatherer: p.registry, Ready: p.ready, Logger: p.log,
		API: explain.Handler(p.controller), Webhooks: p.hearing.receiver, UI: p.ui, Stopping: p.ui.Close,
	})
	if err != nil {
		return err
	}
	return p.listenForPlacement()
}

var errNotSynced = errors.New("the watches have not delivered what exists yet")

// ready is what /readyz says: every synced replica is, whether it leads or not;
// else a rolling update would wait for ever.
func (p *provider) ready() error {
	if !p.feed.Synced() {
		return errNotSynced
	}
	return nil
}

// run runs until ctx ends or this replica stops leading.
func (p *provider) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { p.feed.Run(ctx); return nil })
	group.Go(func() error { p.events.Run(ctx); return nil })
	group.Go(func() error { return p.server.Run(ctx) })
	group.Go(func() error { return p.http.Run(ctx) })
	group.Go(func() error { p.ui.Run(ctx); return nil })
	if p.backend.dryRun {
		group.Go(func() error { p.sayWhatItWouldSave(ctx); return nil })
	}
	p.placer.run(ctx, group)
	group.Go(func() error { return config.Watch(ctx, p.path, p.cfg, p.apply, p.reloaded) })
	group.Go(func() error { return p.backend.attend(ctx) })
	group.Go(func() error { return p.elect(ctx) })
	return group.Wait()
}

// apply puts a reloaded config into force.
func (p *provider) apply(next *config.Config) error {
	p.backend.setGroups(next.NodeGroups())
	return p.level.set(next.Log.Level)
}

func (p *provider) reloaded(err error) {
	p.metrics.ConfigReloaded(err)
	if err != nil {
		p.log.Error("the changed config file is not used; the one before stays", "err", err)
		return
	}
	p.log.Info("config reloaded")
}

// sayWhatItWouldSave logs once an hour what Hearth would have cost, until ctx
// ends.
func (p *provider) sayWhatItWouldSave(ctx context.Context) {
	ticker := time.NewTicker(time.Hour)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		for _, g := range p.controller.Savings(time.Now()).Groups {
			if g.DryRun != nil {
				p.log.Info("dry run: what Hearth would have cost", "nodegroup", g.ID, "since", g.Since, "jobs", g.Jobs,
					"nodes", fmt.Sprintf("$%.2f", g.DryRun.Nodes), "instead of", fmt.Sprintf("$%.2f", g.Hearth.Nodes),
					"with waiting", fmt.Sprintf("$%.2f", g.DryRun.Total()), "instead of with waiting", fmt.Sprintf("$%.2f", g.Hearth.Total()),
					"warm", fmt.Sprintf("%.0f%%", 100*g.DryRun.WarmHitRate))
			}
		}
	}
}

// whoLeads names the replica that leads, empty while that is not known.
func (p *provider) whoLeads() string {
	if leader := p.leader.Load(); leader != nil {
		return *leader
	}
	return ""
}

// leaseName names the Lease that replicas agree by.
const leaseName = "hearth"

var errLostLease = errors.New("the lease was lost: another replica may lead now")

// elect leads once this replica holds the lease, and ends with it.
func (p *provider) elect(ctx context.Context) error {
	if !p.cfg.LeaderElection.Enabled {
		return p.lead(ctx)
	}
	clientset, err := kubernetes.NewForConfig(p.rest)
	if err != nil {
		return fmt.Errorf("making the client for leader election: %w", err)
	}
	identity := os.Getenv("POD_NAME")
	if identity == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("naming this replica: %w", err)
		}
		identity = fmt.Sprintf("%s-%d", host, os.Getpid())
	}
	election := p.cfg.LeaderElection
	started, leading := make(chan struct{}), make(chan error, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: election.Namespace, Name: leaseName},
			Client:     clientset.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
		},
		LeaseDuration: election.LeaseDuration, RenewDeadline: election.RenewDeadline, RetryPeriod: election.RetryPeriod,
		ReleaseOnCancel: true, Name: leaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(held context.Context) {
				close(started)
				ctx, cancel := context.WithCancel(ctx)
				defer context.AfterFunc(held, cancel)()
				leading <- p.lead(ctx)
			},
			OnStoppedLeading: func() {},
			OnNewLeader:      func(identity string) { p.leader.Store(&identity) },
		},
	})
	if err != nil {
		return fmt.Errorf("leaderElection: %w", err)
	}
	// The lease is let go only after everything that acts has ended.
	electorCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ended := make(chan struct{})
	go func() { defer close(ended); elector.Run(electorCtx) }()
	defer func() { stop(); <-ended }()
	select {
	case err := <-leading:
		if err == nil && ctx.Err() == nil {
			err = errLostLease
		}
		return err
	case <-ctx.Done():
		select {
		case <-started:
			return <-leading
		default:
			return nil
		}
	}
}

// lead runs what only the leader runs.
func (p *provider) lead(ctx context.Context) error {
	p.log.Info("leading")
	p.metrics.Leader.Set(1)
	defer p.metrics.Leader.Set(0)
	defer p.server.SetServing(false)
	select {
	case <-p.backend.declared:
	case <-ctx.Done():
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.backend.lead(ctx) })
	group.Go(func() error { return p.controller.Run(ctx) })
	group.Go(func() error { p.readings.Run(ctx); return nil })
	p.placer.lead(ctx, group)
	p.hearing.lead(ctx, group)
	if p.cfg.Kubernetes.Kubeconfig == "" && os.Getenv("POD_NAME") == "" {
		p.log.Warn("POD_NAME and POD_NAMESPACE are not set: the leader's pod gets no label for the Services to select")
	}
	if pod, namespace := os.Getenv("POD_NAME"), os.Getenv("POD_NAMESPACE"); pod != "" && namespace != "" {
		group.Go(func() error { p.labelPod(ctx, namespace, pod); return nil })
	}
	return group.Wait()
}

// labelPod leads the Services to this replica; it tries until that is done.
func (p *provider) labelPod(ctx context.Context, namespace, pod string) {
	for {
		err := kube.LabelLeader(ctx, p.client, namespace, pod)
		if err == nil || ctx.Err() != nil {
			return
		}
		p.log.Error("labelling the leader's pod failed; trying again", "pod", pod, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(2 * time.Second):
		}
	}
}

// watcher is told of what exists beside the controller.
type watcher interface {
	NodeChanged(model.Node)
	NodeGone(model.Node)
	PodChanged(model.Pod)
	PodGone(model.Pod)
}

// sink hands what the watches see to the controller and to whoever else wants
// it.
type sink struct {
	*controller.World
	others []watcher
}

func (s sink) NodeChanged(n model.Node) {
	s.World.NodeChanged(n)
	for _, o := range s.others {
		o.NodeChanged(n)
	}
}

func (s sink) NodeGone(n model.Node) {
	s.World.NodeGone(n)
	for _, o := range s.others {
		o.NodeGone(n)
	}
}

func (s sink) PodChanged(p model.Pod) {
	s.World.PodChanged(p)
	for _, o := range s.others {
		o.PodChanged(p)
	}
}

func (s sink) PodGone(p model.Pod) {
	s.World.PodGone(p)
	for _, o := range s.others {
		o.PodGone(p)
	}
}

// ranker translates the expander's options for the controller.
type ranker struct{ *provider }

// BestOptions implements server.Ranker.
func (r ranker) BestOptions(options []server.ExpanderOption) []model.GroupID {
	translated := make([]controller.Option, 0, len(options))
	for _, o := range options {
		keys := r.world.KeysFor(o.Group)
		jobs := map[model.CacheKey]int{}
		for pod, err := range o.Pods() {
			if err != nil {
				r.log.Warn("a pending pod cannot be read; it counts as one of an unknown key", "err", err)
				jobs[""]++
				continue
			}
			jobs[kube.CacheKey(pod.Labels, pod.Annotations, keys)]++
		}
		translated = append(translated, controller.Option{Group: o.Group, Nodes: o.NodeCount, Jobs: jobs})
	}
	return []model.GroupID{r.controller.BestOption(translated)}
}
