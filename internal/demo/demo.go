// Package demo shows the whole loop on one machine: CI jobs get nodes, warm
// nodes stay, cold ones go. It narrates what really happens, taken from the
// cluster, and checks every claim of its summary against the cluster before it
// makes it. It owns the story; the parts are internal/playground's.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/internal/refautoscaler"
)

// Config says how to run the demo.
type Config struct {
	// Hearth is the path of the hearth binary, Autoscaler that of a real
	// cluster-autoscaler or empty.
	Hearth, Autoscaler string
	Out                io.Writer
	Logger             *slog.Logger
	// Stay keeps everything running after the summary, until ctx ends.
	Stay bool
}

// groups are the demo's two node groups: a node takes one job at a time.
const groups = `backend:
  kwok: {bootDelay: 3s, resumeDelay: 2s}
engines: {podSelector: "app.kubernetes.io/name=dagger-helm"}
nodeGroups:
- id: runners-large
  min: 0
  max: 8
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, zone: a, instanceType: kwok.8x}
  annotations: {hearth.dev/role: runner, hearth.dev/min-warm: "2", hearth.dev/max-idle: 12s, hearth.dev/scale-down-unneeded-time: 1s}
- id: runners-small
  min: 0
  max: 4
  template: {capacity: {cpu: "4", memory: 16Gi, pods: "110"}, zone: b, instanceType: kwok.4x}
  annotations: {hearth.dev/role: runner, hearth.dev/min-warm: "1", hearth.dev/max-idle: 12s, hearth.dev/scale-down-unneeded-time: 1s}
`

// minWarm is what the annotations above keep.
func minWarm() map[string]int { return map[string]int{"runners-large": 2, "runners-small": 1} }

// burst is a number of jobs of one repository that arrive together.
type burst struct {
	group, repository string
	jobs              int
}

// The first wave makes nodes; the second uses them again and so makes some
// warmer than others.
func waves() [][]burst {
	return [][]burst{
		{{"runners-large", "acme/api", 2}, {"runners-large", "acme/web", 2}, {"runners-large", "acme/docs", 1}, {"runners-small", "acme/mobile", 2}},
		{{"runners-large", "acme/api", 2}, {"runners-small", "acme/mobile", 1}},
	}
}

const jobLength = 6 * time.Second

// ErrClaims is why the demo fails when something that it shows did not happen.
var ErrClaims = errors.New("the demo did not show what it claims")

var errInterrupted = errors.New("interrupted before its end")

// story is one run of the demo.
type story struct {
	cfg    Config
	ground *playground.Playground
	began  time.Time
	ended  time.Time // when the summary was made
	http   string    // where the provider serves HTTP

	mu    sync.Mutex
	nodes map[string]*nodeStory // by RunnerNode name
	jobs  map[string]*jobStory  // by pod name
}

// nodeStory is what was seen of one instance.
type nodeStory struct {
	v1alpha1.RunnerNode
	jobs []string // repositories of the jobs that ran here, in order
	gone bool
}

type jobStory struct {
	burst
	node string
	done bool
}

// Run runs the demo until its summary, an error or the end of ctx, and cleans
// up everything whichever comes first. The error is nil only if every claim of
// the summary was found true.
func Run(ctx context.Context, cfg Config) error {
	s := &story{cfg: cfg, began: time.Now(), nodes: map[string]*nodeStory{}, jobs: map[string]*jobStory{}}
	s.tell("Hearth demo: a real control plane, two runner node groups, CI jobs in bursts. Nothing leaves this machine.")
	ground, err := playground.Start(ctx, playground.Config{
		Hearth: cfg.Hearth, Autoscaler: cfg.Autoscaler, Logger: cfg.Logger,
		Progress: func(step string) { s.tell("starting %s …", step) },
	})
	if err != nil {
		return err
	}
	s.ground = ground
	last, err := s.run(ctx)
	s.tell("stopping everything …")
	if errors.Is(err, context.Canceled) {
		err = errInterrupted
	}
	if err := errors.Join(err, ground.Stop()); err != nil {
		return err
	}
	fmt.Fprintln(cfg.Out, last)
	return nil
}

func (s *story) tell(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tellLocked(format, args...)
}

func (s *story) tellLocked(format string, args ...any) {
	fmt.Fprintf(s.cfg.Out, "[%5.1fs] %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

// run tells the story and returns the last line.
func (s *story) run(ctx context.Context) (last string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	if err := s.engines(ctx); err != nil {
		return "", err
	}
	s.tell("starting hearth serve (mutual TLS, its own service account) …")
	provider, err := s.ground.StartProvider("provider", groups)
	if err != nil {
		return "", err
	}
	if err := provider.Serving(ctx, 30*time.Second); err != nil {
		return "", err
	}
	s.http = provider.HTTPAddress
	s.tell("the status page is http://%s/ui while this runs", s.http)
	kind := "the reference autoscaler"
	if s.ground.Real() {
		kind = "cluster-autoscaler"
	}
	s.tell("starting %s in front of it …", kind)
	autoscaler, err := s.ground.StartAutoscaler(playground.AutoscalerConfig{Flags: playground.DefaultFlags(), Observe: s.autoscaler})
	if err != nil {
		return "", err
	}
	defer autoscaler.Kill()
	wg.Go(func() { s.watch(ctx) })

	for n, wave := range waves() {
		if err := s.submit(ctx, n+1, wave); err != nil {
			return "", err
		}
		if err := s.await(ctx, 60*time.Second, "every job to finish", s.allDone); err != nil {
			return "", err
		}
	}
	s.tell("quiet: no job waits or runs. Idle nodes are kept for 12 s, then the coldest go first, down to min-warm")
	if err := s.await(ctx, 90*time.Second, "the cold nodes to go", s.quiet); err != nil {
		return "", err
	}
	last, err = s.summary(ctx)
	if err == nil && s.cfg.Stay {
		fmt.Fprintf(s.cfg.Out, "%s\n\nIt stays until Ctrl-C. In another terminal:\n\n  export KUBECONFIG=%s\n  kubectl get rng,rn -o wide\n  bin/hearth explain --address http://%s\n\nand in a browser http://%[3]s/ui\n",
			last, s.ground.AdminKubeconfig(), s.http)
		<-ctx.Done()
		last = "ended"
	}
	return last, err
}

// engines runs one Dagger engine per runner node, as Dagger's chart does.
func (s *story) engines(ctx context.Context) error {
	labels := map[string]string{"app.kubernetes.io/name": "dagger-helm"}
	_, err := s.ground.Kube.AppsV1().DaemonSets(metav1.NamespaceDefault).Create(ctx, &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "dagger-engine"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					Containers: []corev1.Container{{Name: "engine", Image: "dagger-engine"}},
					Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
						NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{
							{Key: nodeGroupLabel, Operator: corev1.NodeSelectorOpExists},
						}}},
					}}},
				},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("creating the engines' DaemonSet: %w", err)
	}
	return nil
}

const nodeGroupLabel = "hearth.dev/node-group"

// submit lets one wave of jobs arrive.
func (s *story) submit(ctx context.Context, wave int, bursts []burst) error {
	for _, b := range bursts {
		s.tell("wave %d: %d jobs of %s queue for %s", wave, b.jobs, b.repository, b.group)
		cpu := "6"
		if b.group == "runners-small" {
			cpu = "3"
		}
		for n := range b.jobs {
			name := fmt.Sprintf("%s-%d-%d", strings.ReplaceAll(b.repository, "/", "-"), wave, n+1)
			s.mu.Lock()
			s.jobs[name] = &jobStory{burst: b}
			s.mu.Unlock()
			job := playground.Job{Name: name, Group: b.group, Key: b.repository, CPU: cpu, RunFor: jobLength}
			if err := s.ground.Submit(ctx, job); err != nil {
				return err
			}
		}
	}
	return nil
}

// autoscaler narrates what the reference autoscaler does.
func (s *story) autoscaler(e refautoscaler.Event) {
	switch e.Kind {
	case refautoscaler.ScaleUp:
		s.tell("autoscaler: %d pods wait; asks %s for %d nodes", len(e.Pods), e.Group, e.Delta)
	case refautoscaler.ScaleDownStarted:
		s.tell("autoscaler: node %s is unneeded; asks to delete it", e.Node)
	case refautoscaler.ScaleDownFailed, refautoscaler.ScaleUpFailed, refautoscaler.LoopFailed:
		s.tell("autoscaler: %s", e)
	default:
	}
}

// watch follows pods and RunnerNodes and narrates what changes.
func (s *story) watch(ctx context.Context) {
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		if err := s.look(ctx); err != nil && ctx.Err() == nil {
			s.tell("looking at the cluster failed: %v", err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *story) look(ctx context.Context) error {
	pods, err := s.ground.Kube.CoreV1().Pods(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "app=ci-runner"})
	if err != nil {
		return err
	}
	var nodes v1alpha1.RunnerNodeList
	if err := s.ground.Client.List(ctx, &nodes); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lookAtNodes(nodes.Items)
	s.lookAtPods(pods.Items)
	return nil
}

func (s *story) lookAtPods(pods []corev1.Pod) {
	for _, pod := range pods {
		job := s.jobs[pod.Name]
		if job == nil {
			continue
		}
		if job.node == "" && pod.Spec.NodeName != "" {
			job.node = pod.Spec.NodeName
			if n := s.byNode(job.node); n != nil {
				temperature := "cold"
				if slices.Contains(n.jobs, job.repository) {
					temperature = "warm"
				}
				n.jobs = append(n.jobs, job.repository)
				s.tellLocked("  job %s runs on %s (%s)", pod.Name, job.node, temperature)
			}
		}
		if !job.done && pod.Status.Phase == corev1.PodSucceeded {
			job.done = true
		}
	}
}

func (s *story) byNode(name string) *nodeStory {
	for _, n := range s.nodes {
		if n.Status.NodeName == name && !n.gone {
			return n
		}
	}
	return nil
}

func (s *story) lookAtNodes(nodes []v1alpha1.RunnerNode) {
	seen := map[string]bool{}
	for _, now := range nodes {
		seen[now.Name] = true
		before := s.nodes[now.Name]
		if before == nil {
			before = &nodeStory{}
			s.nodes[now.Name] = before
			s.tellLocked("  node group %s launches %s", now.Spec.NodeGroup, now.Name)
		}
		if now.Status.Phase != before.Status.Phase && now.Status.Phase == "Ready" {
			s.tellLocked("  node %s is ready in %s", now.Status.NodeName, now.Spec.NodeGroup)
		}
		if now.Status.NodeName == "" {
			now.Status.NodeName = before.Status.NodeName // its Node is deleted first
		}
		if now.Status.Decision != before.Status.Decision && before.Status.Decision != "" {
			s.tellLocked("  hearth: %s %s (score %s): %s", now.Status.Decision, now.Status.NodeName, now.Status.Score, now.Status.Reason)
		}
		before.RunnerNode = now
	}
	for name, n := range s.nodes {
		if !seen[name] && !n.gone {
			n.gone = true
			s.tellLocked("  node %s is gone", n.Status.NodeName)
		}
	}
}

// await waits until ok returns "", and fails with what it returned last.
func (s *story) await(ctx context.Context, within time.Duration, what string, ok func() string) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		s.mu.Lock()
		missing := ok()
		s.mu.Unlock()
		if missing == "" {
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("%w: waited %s for %s: %s", ErrClaims, within, what, missing)
			}
			return ctx.Err()
		}
	}
}

func (s *story) allDone() string {
	waiting := 0
	for _, j := range s.jobs {
		if !j.done {
			waiting++
		}
	}
	if waiting > 0 {
		return fmt.Sprintf("%d jobs have not finished", waiting)
	}
	return ""
}

// quiet says what is still to happen before every group is down to min-warm.
func (s *story) quiet() string {
	left := map[string]int{}
	for _, n := range s.nodes {
		if !n.gone {
			left[n.Spec.NodeGroup]++
		}
	}
	for group, want := range minWarm() {
		if left[group] > want {
			return fmt.Sprintf("%s has %d nodes, min-warm is %d", group, left[group], want)
		}
	}
	return ""
}
