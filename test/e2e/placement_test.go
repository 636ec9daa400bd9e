package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	placementNodes  = 8
	placementKeys   = 12
	placementJobs   = 200
	placementAtOnce = 5 // jobs that run at a time, so that there is a choice
	placementKey    = "hearth.dev/placement"
)

// arm is one way of placing jobs, in a namespace and a node group of its own.
type arm struct {
	*ground
	name string
	// prefix starts the names of pods.
	prefix string
	// say changes a pod before it is created, as a person would.
	say func(pod *corev1.Pod, key string)

	mu    sync.Mutex
	pods  map[string]*corev1.Pod // as last seen
	moved chan struct{}

	warm     map[string]map[string]bool // what ran where, by node and key
	hits     int                        // jobs that landed on a warm node
	possible int                        // jobs for which a warm node was free, or that landed on one
	waits    []time.Duration            // from the call that creates a pod until it was seen bound
	lasted   time.Duration
}

// Jobs land on warm nodes: hardly without help, mostly by a label that a person
// asks for, and nearly always by the webhook, which a replica serves that does
// not lead, with a certificate that the leader made.
func TestPlacement(t *testing.T) {
	g := newGround(t)
	g.must(g.Cluster.Apply(g.ctx, deploy.RBACPlacement(), deploy.Placement()))
	groups := "backend:\n  kwok: {bootDelay: 1s, resumeDelay: 1s}\nnodeGroups:\n"
	names := []string{"nothing", "static", "webhook"}
	for _, name := range names {
		groups += fmt.Sprintf(`- id: %s
  max: %d
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {hearth.dev/role: runner, hearth.dev/min-warm: "%d"}
`, name, placementNodes, placementNodes)
	}
	config := func() (text, address string) {
		address = freeAddress(t)
		return groups + fmt.Sprintf("placement: {address: %q}\n", address), address
	}
	text, _ := config()
	g.Provider("a", text)
	text, address := config()
	standby, err := g.StartProvider("b", text)
	g.must(err)
	g.eventually("a stand-by", 30*time.Second, func() error { return standby.Ready(g.ctx) })
	g.lead("https://" + address + "/placement")
	arms := make([]*arm, len(names))
	for i, name := range names {
		arms[i] = g.arm(name)
		g.eventually("nodes of "+name, time.Minute, g.readyNodes(name, placementNodes))
	}
	arms[1].say = func(pod *corev1.Pod, key string) {
		pod.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
			PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{
				Weight: 100, Preference: corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{
					Key: warmLabel(key), Operator: corev1.NodeSelectorOpExists,
				}}},
			}},
		}}
	}
	g.enable("webhook", "enabled")
	// The leader has made the certificate and the API server trusts it.
	g.eventually("the webhook to answer", time.Minute, func() error {
		pod, err := g.try(arms[2], "key-0")
		if err == nil && pod.Annotations[placementKey] == "" {
			err = fmt.Errorf("the pod came through as it was: %v", pod.Annotations)
		}
		return err
	})

	jobs := make([]string, placementJobs)
	for i := range jobs {
		jobs[i] = fmt.Sprintf("key-%d", i%placementKeys)
	}
	r := rand.New(rand.NewPCG(20260105, 8))
	r.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	all := func(prefix string, jobs []string) {
		var wg sync.WaitGroup
		for _, a := range arms {
			a.prefix, a.hits, a.possible, a.waits = prefix, 0, 0, nil
			wg.Go(func() { a.run(jobs) })
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	// Jobs of minutes leave the labels time to follow; ones of a second do not.
	all("before-", jobs[:3*placementKeys])
	for _, a := range arms {
		g.eventually("labels of what ran on the nodes of "+a.name, 2*time.Minute, a.labelled)
	}
	all("job-", jobs)
	for _, a := range arms {
		t.Logf("%-8s %d jobs, %d landed on a warm node (%.0f %%), %.0f %% of the %d for which one was free; pods bound after p50 %s, p95 %s; all in %s",
			a.name, len(a.waits), a.hits, 100*float64(a.hits)/placementJobs, 100*a.share(), a.possible, a.wait(50), a.wait(95), a.lasted.Round(time.Second))
		if len(a.waits) != placementJobs {
			t.Errorf("%s started %d jobs", a.name, len(a.waits))
		}
	}
	nothing, webhook := arms[0], arms[2]
	if webhook.share() < 0.95 || webhook.hits <= nothing.hits {
		t.Errorf("the webhook led %.1f %% of the jobs to a warm node that could have one", 100*webhook.share())
	}
	if late := webhook.wait(50) - nothing.wait(50); late > 100*time.Millisecond {
		t.Errorf("jobs start %s later with the webhook", late)
	}
	if webhook.lasted > nothing.lasted*5/4 {
		t.Errorf("all jobs took %s, without the webhook %s", webhook.lasted, nothing.lasted)
	}
	placed := 0
	for name, pod := range webhook.pods {
		if strings.HasPrefix(name, "job-") && pod.Annotations[placementKey] != "" && pod.Annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false" {
			placed++
		}
	}
	t.Logf("%d of %d pods went through the webhook", placed, placementJobs)
	if placed < placementJobs*95/100 {
		t.Errorf("only %d pods went through the webhook", placed)
	}

	t.Run("opted out mid-way", func(t *testing.T) {
		g.enable("webhook", "no")
		g.eventually("pods that come through as they are", 10*time.Second, func() error { return g.untouched(webhook) })
		g.enable("webhook", "enabled")
		g.eventually("pods that are placed", 10*time.Second, func() error { return g.touched(webhook) })
	})
	t.Run("hangs", func(t *testing.T) {
		g.must(standby.Signal(syscall.SIGSTOP))
		for range 3 {
			began := time.Now()
			g.must(g.untouched(webhook))
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("a pod was created after %s", took)
			}
		}
		g.must(standby.Signal(syscall.SIGCONT))
		g.eventually("pods that are placed", 10*time.Second, func() error { return g.touched(webhook) })
	})
	t.Run("killed in the middle", func(t *testing.T) {
		before := len(webhook.waits)
		killed := make(chan struct{})
		var once sync.Once
		webhook.say = func(*corev1.Pod, string) {
			if len(webhook.waits) == before+10 {
				once.Do(func() { standby.Kill(); close(killed) })
			}
		}
		webhook.prefix = "killed-"
		webhook.run(jobs[:30])
		<-killed
		if got := len(webhook.waits) - before; got != 30 {
			t.Errorf("%d of 30 jobs started", got)
		}
		g.must(g.untouched(webhook))
	})
}

// freeAddress returns a loopback address on which nothing listens now.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 100 {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(12000)))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

// lead makes the API server call the webhook at url: here it cannot reach a
// Service.
func (g *ground) lead(url string) {
	g.t.Helper()
	hook := &admissionregistrationv1.MutatingWebhookConfiguration{}
	for _, document := range bytes.Split(deploy.Placement(), []byte("\n---\n")) {
		if bytes.Contains(document, []byte("MutatingWebhookConfiguration")) {
			g.must(yaml.Unmarshal(document, hook))
		}
	}
	have := &admissionregistrationv1.MutatingWebhookConfiguration{}
	g.must(g.Client.Get(g.ctx, client.ObjectKeyFromObject(hook), have))
	have.Webhooks = hook.Webhooks
	for i := range have.Webhooks {
		have.Webhooks[i].ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url}
	}
	g.must(g.Client.Update(g.ctx, have))
}

// enable sets the label by which a namespace opts in.
func (g *ground) enable(namespace, value string) {
	g.t.Helper()
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, placementKey, value)
	g.must(g.Client.Patch(g.ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, client.RawPatch(types.MergePatchType, patch)))
}

// arm makes a namespace for pods of a group, and watches them.
func (g *ground) arm(name string) *arm {
	g.t.Helper()
	g.must(g.Client.Create(g.ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}))
	g.eventually("the service account of "+name, 20*time.Second, func() error {
		return g.Client.Get(g.ctx, client.ObjectKey{Namespace: name, Name: "default"}, &corev1.ServiceAccount{})
	})
	a := &arm{
		ground: g, name: name, prefix: "job-", say: func(*corev1.Pod, string) {},
		pods: map[string]*corev1.Pod{}, moved: make(chan struct{}, 1), warm: map[string]map[string]bool{},
	}
	ctx, cancel := context.WithCancel(g.ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); a.watch(ctx) }()
	g.t.Cleanup(func() { cancel(); <-ended })
	return a
}

func (a *arm) watch(ctx context.Context) {
	for ctx.Err() == nil {
		w, err := a.Kube.CoreV1().Pods(a.name).Watch(ctx, metav1.ListOptions{})
		if err != nil {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		for e := range w.ResultChan() {
			pod, ok := e.Object.(*corev1.Pod)
			if !ok {
				continue
			}
			a.mu.Lock()
			if e.Type == watch.Deleted {
				delete(a.pods, pod.Name)
			} else {
				a.pods[pod.Name] = pod
			}
			a.mu.Unlock()
			select {
			case a.moved <- struct{}{}:
			default:
			}
		}
		w.Stop()
	}
}

// busy are the nodes that a pod runs on.
func (a *arm) busy() map[string]bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	nodes := map[string]bool{}
	for _, pod := range a.pods {
		if pod.Spec.NodeName != "" && pod.Status.Phase != corev1.PodSucceeded {
			nodes[pod.Spec.NodeName] = true
		}
	}
	return nodes
}

func (a *arm) nodeOf(name string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if pod := a.pods[name]; pod != nil {
		return pod.Spec.NodeName
	}
	return ""
}

// until waits for the pods to become so; false when that takes too long.
func (a *arm) until(ok func() bool) bool {
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for !ok() {
		select {
		case <-a.moved:
		case <-deadline.C:
			return false
		}
	}
	return true
}

// run creates the pods of jobs one after another, each as soon as few enough
// run, and keeps count.
func (a *arm) run(jobs []string) {
	began := time.Now()
	for i, key := range jobs {
		if !a.until(func() bool { return len(a.busy()) < placementAtOnce }) {
			a.t.Errorf("%s: jobs do not end", a.name)
			return
		}
		busy := a.busy()
		possible := false
		for node, warm := range a.warm {
			possible = possible || warm[key] && !busy[node]
		}
		pod := a.pod(fmt.Sprintf("%s%03d", a.prefix, i), key)
		a.say(pod, key)
		at := time.Now()
		if _, err := a.Kube.CoreV1().Pods(a.name).Create(a.ctx, pod, metav1.CreateOptions{}); err != nil {
			a.t.Errorf("%s: %v", a.name, err)
			return
		}
		if !a.until(func() bool { return a.nodeOf(pod.Name) != "" }) {
			a.t.Errorf("%s: pod %s was not bound", a.name, pod.Name)
			return
		}
		a.waits = append(a.waits, time.Since(at))
		node := a.nodeOf(pod.Name)
		if a.warm[node] == nil {
			a.warm[node] = map[string]bool{}
		}
		if a.warm[node][key] {
			a.hits++
			possible = true
		}
		if possible {
			a.possible++
		}
		a.warm[node][key] = true
	}
	a.lasted = time.Since(began)
}

// pod is a runner pod that fills most of a node for a second.
func (a *arm) pod(name, key string) *corev1.Pod {
	pod := playground.Job{Name: name, Group: a.name, Key: key, CPU: "6", RunFor: time.Second}.Pod()
	pod.Namespace = a.name
	delete(pod.Annotations, "cluster-autoscaler.kubernetes.io/safe-to-evict")
	return pod
}

func (a *arm) share() float64 { return float64(a.hits) / float64(max(a.possible, 1)) }

func (a *arm) wait(percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(a.waits))
	return sorted[(len(sorted)-1)*percent/100].Round(time.Millisecond)
}

// try asks for a pod that is not kept.
func (g *ground) try(a *arm, key string) (*corev1.Pod, error) {
	return g.Kube.CoreV1().Pods(a.name).Create(g.ctx, a.pod("try", key), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

func (g *ground) untouched(a *arm) error {
	pod, err := g.try(a, "key-0")
	if err == nil && (pod.Annotations[placementKey] != "" || pod.Spec.Affinity != nil) {
		err = fmt.Errorf("the pod was changed: %v", pod.Annotations)
	}
	return err
}

func (g *ground) touched(a *arm) error {
	pod, err := g.try(a, "key-0")
	if err == nil && (pod.Annotations[placementKey] == "" || pod.Spec.Affinity == nil) {
		err = fmt.Errorf("the pod came through as it was: %v", pod.Annotations)
	}
	return err
}

// labelled fails until the labels of the nodes say what ran there, and nothing
// else.
func (a *arm) labelled() error {
	nodes, err := a.nodes(a.name)
	if err != nil {
		return err
	}
	for _, node := range nodes {
		want := map[string]bool{}
		for key := range a.warm[node.Name] {
			want[warmLabel(key)] = true
		}
		have := map[string]bool{}
		for label, value := range node.Labels {
			if strings.HasPrefix(label, "cache.hearth.dev/") && value == "warm" {
				have[label] = true
			}
		}
		if !maps.Equal(have, want) {
			return fmt.Errorf("node %s bears %d labels of the %d keys that ran there", node.Name, len(have), len(want))
		}
	}
	return nil
}

// warmLabel is the label as docs/placement.md tells people to make it.
func warmLabel(key string) string {
	return fmt.Sprintf("cache.hearth.dev/%x", sha256.Sum256([]byte(key)))[:len("cache.hearth.dev/")+16]
}

// TestWarmGroupIsScaledUp: of two groups that pods may go to, the autoscaler's
// expander takes the one whose parked node is warm for them, though the other's
// is cheaper; and `hearth explain pod` tells of it.
func TestWarmGroupIsScaledUp(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", `backend:
  kwok: {bootDelay: 1s, resumeDelay: 1s}
nodeGroups:
- id: cheap
  max: 5
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, labels: {pool: ci}}
  annotations: {hearth.dev/role: runner, hearth.dev/node-price: "0.1", hearth.dev/park: stop, hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s}
- id: dear
  max: 5
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, labels: {pool: ci}}
  annotations: {hearth.dev/role: runner, hearth.dev/node-price: "0.5", hearth.dev/park: stop, hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s}
`)
	g.Autoscaler(nil)
	g.submit(
		playground.Job{Name: "web", Group: "cheap", Key: "acme/web", CPU: "6"},
		playground.Job{Name: "api", Group: "dear", Key: "acme/api", CPU: "6"},
	)
	g.eventually("the jobs to run", 40*time.Second, g.pods(corev1.PodRunning, "web", "api"))
	parked := map[string]model.InstanceID{"web": g.instanceOf("web"), "api": g.instanceOf("api")}
	g.finish("web", "api")
	g.eventually("both to be parked", 60*time.Second, func() error {
		for _, group := range []string{"cheap", "dear"} {
			rng, err := g.group(group)
			if err == nil && rng.Status.Parked != 1 {
				err = fmt.Errorf("%s is not told to be parked", group)
			}
			if err != nil {
				return err
			}
		}
		return errors.Join(
			g.cloudHas("cheap", 0, 1, model.InstanceStopped)(), g.cloudHas("dear", 0, 1, model.InstanceStopped)(),
			g.readyNodes("cheap", 0)(), g.readyNodes("dear", 0)())
	})
	anywhere := func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"pool": "ci"} }
	g.create(playground.Job{Name: "api-again", Key: "acme/api", CPU: "6"}, anywhere)
	g.eventually("the job to run again", 40*time.Second, g.pods(corev1.PodRunning, "api-again"))
	if got := g.instanceOf("api-again"); got != parked["api"] {
		t.Errorf("the job runs on %s, want the parked %s that ran its key before", got, parked["api"])
	}
	if n := g.Instances("cheap") + g.Instances("dear"); n != 2 {
		t.Errorf("%d instances were launched, want the first 2", n)
	}
	out, err := exec.CommandContext(g.ctx, hearth, "explain", "pod", "default/api-again", "--address", "http://"+provider.HTTPAddress).CombinedOutput()
	g.must(err)
	for _, want := range []string{"key         acme/api", "of node group dear; warm for the key"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("hearth explain pod says:\n%s\nwant %q in it", out, want)
		}
	}
}
