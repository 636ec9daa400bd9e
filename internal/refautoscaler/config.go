package refautoscaler

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"k8s.io/client-go/kubernetes"
)

// Generation is the release of CA that is taken for a model.
type Generation int

// The generations. They differ in the form of the wire, in what a scale-up without
// a request of CA's own means, and in the defaults of some flags.
const (
	Generation136 Generation = iota // 1.36
	Generation135                   // 1.35
	Generation134                   // 1.34, from 1.34.4: both forms on the wire
	Generation133                   // 1.33 and before: the old form only
)

func (g Generation) speaksNew() bool            { return g <= Generation134 }
func (g Generation) speaksOld() bool            { return g >= Generation134 }
func (g Generation) upcomingNeedsRequest() bool { return g == Generation136 }
func (g Generation) revertsTimedOut() bool      { return g == Generation136 }
func (g Generation) losesStartupTime() bool     { return g <= Generation135 }
func (g Generation) scaleUpEndsLoop() bool      { return g == Generation133 }

// GroupOptions are the flags that a provider can override for each group.
type GroupOptions struct {
	ScaleDownUtilizationThreshold float64       // share of allocatable, 0 to 1
	ScaleDownUnneededTime         time.Duration // a ready node
	ScaleDownUnreadyTime          time.Duration // a node that is not ready
	MaxNodeProvisionTime          time.Duration // from request to registration
	IgnoreDaemonSetsUtilization   bool
}

// Flags are CA's flags of the same names. A zero is taken literally: start from
// Generation.Flags.
type Flags struct {
	GroupOptions

	ScanInterval                      time.Duration
	FrequentLoopsEnabled              bool
	MaxFailingTime                    time.Duration
	MaxStartupTime                    time.Duration // instead of MaxFailingTime, until the first good loop
	OKTotalUnreadyCount               int
	MaxTotalUnreadyPercentage         float64
	InitialNodeGroupBackoffDuration   time.Duration
	MaxNodeGroupBackoffDuration       time.Duration
	ScaleDownDelayAfterAdd            time.Duration
	ScaleDownDelayAfterDelete         time.Duration
	ScaleDownDelayAfterFailure        time.Duration
	UnremovableNodeRecheckTimeout     time.Duration
	NodeDeleteDelayAfterTaint         time.Duration
	NodeDeletionBatcherInterval       time.Duration
	MaxScaleDownParallelism           int
	MaxDrainParallelism               int
	MaxBulkSoftTaintCount             int
	MaxPodEvictionTime                time.Duration
	MaxGracefulTerminationSec         int
	CordonNodeBeforeTerminating       bool
	DaemonSetEvictionForOccupiedNodes bool
	SkipNodesWithSystemPods           bool
	SkipNodesWithLocalStorage         bool
	SkipNodesWithCustomControllerPods bool
}

// Flags returns CA's defaults.
func (g Generation) Flags() Flags {
	var f Flags
	f.bind(g)
	return f
}

// Args returns the command line that gives the same flags to a CA binary of
// generation g. Connections (kubeconfig, cloud-config, expander, listen address) are
// for the caller to add.
func (f Flags) Args(g Generation) []string {
	var bound Flags
	set := bound.bind(g)
	bound = f
	var args []string
	set.VisitAll(func(one *flag.Flag) { args = append(args, "--"+one.Name+"="+one.Value.String()) })
	return args
}

// bind sets every flag to its default in generation g and gives it CA's name.
func (f *Flags) bind(g Generation) *flag.FlagSet {
	set := flag.NewFlagSet("cluster-autoscaler", flag.ContinueOnError)
	duration := func(p *time.Duration, name string, value time.Duration) { set.DurationVar(p, name, value, "") }
	count := func(p *int, name string, value int) { set.IntVar(p, name, value, "") }
	number := func(p *float64, name string, value float64) { set.Float64Var(p, name, value, "") }
	yes := func(p *bool, name string, value bool) { set.BoolVar(p, name, value, "") }

	number(&f.ScaleDownUtilizationThreshold, "scale-down-utilization-threshold", 0.5)
	duration(&f.ScaleDownUnneededTime, "scale-down-unneeded-time", 10*time.Minute)
	duration(&f.ScaleDownUnreadyTime, "scale-down-unready-time", 20*time.Minute)
	duration(&f.MaxNodeProvisionTime, "max-node-provision-time", 15*time.Minute)
	yes(&f.IgnoreDaemonSetsUtilization, "ignore-daemonsets-utilization", false)
	duration(&f.ScanInterval, "scan-interval", 10*time.Second)
	yes(&f.FrequentLoopsEnabled, "frequent-loops-enabled", g <= Generation135)
	duration(&f.MaxFailingTime, "max-failing-time", 15*time.Minute)
	if g == Generation136 {
		duration(&f.MaxStartupTime, "max-startup-time", 20*time.Minute)
	}
	count(&f.OKTotalUnreadyCount, "ok-total-unready-count", 3)
	number(&f.MaxTotalUnreadyPercentage, "max-total-unready-percentage", 45)
	duration(&f.InitialNodeGroupBackoffDuration, "initial-node-group-backoff-duration", 5*time.Minute)
	duration(&f.MaxNodeGroupBackoffDuration, "max-node-group-backoff-duration", 30*time.Minute)
	duration(&f.ScaleDownDelayAfterAdd, "scale-down-delay-after-add", 10*time.Minute)
	duration(&f.ScaleDownDelayAfterDelete, "scale-down-delay-after-delete", 0)
	duration(&f.ScaleDownDelayAfterFailure, "scale-down-delay-after-failure", 3*time.Minute)
	duration(&f.UnremovableNodeRecheckTimeout, "unremovable-node-recheck-timeout", 5*time.Minute)
	duration(&f.NodeDeleteDelayAfterTaint, "node-delete-delay-after-taint", 5*time.Second)
	duration(&f.NodeDeletionBatcherInterval, "node-deletion-batcher-interval", 0)
	count(&f.MaxScaleDownParallelism, "max-scale-down-parallelism", 10)
	count(&f.MaxDrainParallelism, "max-drain-parallelism", 1)
	count(&f.MaxBulkSoftTaintCount, "max-bulk-soft-taint-count", 10)
	duration(&f.MaxPodEvictionTime, "max-pod-eviction-time", 2*time.Minute)
	count(&f.MaxGracefulTerminationSec, "max-graceful-termination-sec", 10*60)
	yes(&f.CordonNodeBeforeTerminating, "cordon-node-before-terminating", g <= Generation134)
	yes(&f.DaemonSetEvictionForOccupiedNodes, "daemonset-eviction-for-occupied-nodes", true)
	yes(&f.SkipNodesWithSystemPods, "skip-nodes-with-system-pods", true)
	yes(&f.SkipNodesWithLocalStorage, "skip-nodes-with-local-storage", true)
	yes(&f.SkipNodesWithCustomControllerPods, "skip-nodes-with-custom-controller-pods", true)
	return set
}

func (f *Flags) maxGrace() time.Duration {
	return time.Duration(f.MaxGracefulTerminationSec) * time.Second
}

// Config is all that an Autoscaler needs.
type Config struct {
	Generation  Generation
	Flags       Flags
	GRPCTimeout time.Duration // grpc_timeout of CA's cloud-config; 0 is CA's default, 5 s

	Kube     kubernetes.Interface
	Provider grpc.ClientConnInterface
	Expander grpc.ClientConnInterface // nil: least-waste alone

	Logger  *slog.Logger // nil: silent
	Observe func(Event)  // nil: nobody; called by several goroutines, one at a time
}

func (c *Config) complete() error {
	if c.Kube == nil || c.Provider == nil {
		return errors.New("reference autoscaler needs Kube and Provider")
	}
	if c.Generation < Generation136 || c.Generation > Generation133 {
		return fmt.Errorf("reference autoscaler knows no generation %d", c.Generation)
	}
	if c.Flags.ScanInterval <= 0 || c.Flags.MaxFailingTime <= 0 || c.Flags.MaxScaleDownParallelism <= 0 {
		return errors.New("reference autoscaler: ScanInterval, MaxFailingTime and MaxScaleDownParallelism " +
			"must be positive: start from Generation.Flags")
	}
	if c.GRPCTimeout == 0 {
		c.GRPCTimeout = 5 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Observe == nil {
		c.Observe = func(Event) {}
	}
	return nil
}

// EventKind says what an Event is about.
type EventKind string

// The kinds. Fields that an Event of the kind has are in brackets.
const (
	ScaleUp             EventKind = "ScaleUp"             // IncreaseSize succeeded [Group Delta Pods]
	ScaleUpFailed       EventKind = "ScaleUpFailed"       // IncreaseSize failed, group backed off [Group Delta Pods Reason]
	ScaleUpTimedOut     EventKind = "ScaleUpTimedOut"     // request not fulfilled in time, group backed off [Group Delta]
	InstancesFailed     EventKind = "InstancesFailed"     // creating instances have errors, group backed off [Group Delta Reason]
	NoScaleUp           EventKind = "NoScaleUp"           // pods that no group helps [Pods Reason]
	GroupSkipped        EventKind = "GroupSkipped"        // unhealthy, backed off, at max [Group Reason]
	UpcomingSkipped     EventKind = "UpcomingSkipped"     // missing nodes that do not count [Group Delta Reason]
	ScaleDownStarted    EventKind = "ScaleDownStarted"    // node tainted [Group Node Reason: empty or drain]
	ScaleDown           EventKind = "ScaleDown"           // DeleteNodes succeeded [Group Node]
	ScaleDownFailed     EventKind = "ScaleDownFailed"     // anything after the taint failed; taint removed [Group Node Reason]
	UnregisteredRemoved EventKind = "UnregisteredRemoved" // instance that never registered deleted [Group Node]
	SizeFixed           EventKind = "SizeFixed"           // DecreaseTargetSize for nodes that never came [Group Delta]
	TaintsCleaned       EventKind = "TaintsCleaned"       // at start: ToBeDeleted of an earlier run removed [Node]
	ClusterUnhealthy    EventKind = "ClusterUnhealthy"    // too many unready nodes: nothing is done
	LoopFailed          EventKind = "LoopFailed"          // the loop ended with an error [Reason]
)

// Event is something that the autoscaler did, or found that it could not do.
type Event struct {
	Time  time.Time
	Kind  EventKind
	Group string
	Node  string // name; for an instance without Node its id
	Delta int
	Pods  []string // namespace/name
	// Reason is free text for people, but for ScaleDownStarted.
	Reason string
}

// String is one line without the time.
func (e Event) String() string {
	var b strings.Builder
	b.WriteString(string(e.Kind))
	for _, part := range []struct{ key, value string }{
		{"group", e.Group}, {"node", e.Node}, {"pods", strings.Join(e.Pods, ",")}, {"reason", e.Reason},
	} {
		if part.value != "" {
			fmt.Fprintf(&b, " %s=%q", part.key, part.value)
		}
	}
	if e.Delta != 0 {
		fmt.Fprintf(&b, " delta=%d", e.Delta)
	}
	return b.String()
}
