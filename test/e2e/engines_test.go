package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	admissionregistration "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	engineLabel   = "app.kubernetes.io/name=dagger-helm"
	exitFinalizer = "hearth.dev/exit-code"
	// parkSoon has idle nodes parked at once.
	parkSoon = `hearth.dev/park: stop, hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s`
)

// engines watches the engine pods of a test, and for what must never happen to
// one: to end otherwise than by itself.
type engines struct {
	*ground
	mu sync.Mutex
	// pods are the present ones by UID, killed says what happened to whom.
	pods   map[string]*corev1.Pod
	killed map[string]string
}

// watchEngines watches until the test ends, which fails when an engine was
// killed.
func (g *ground) watchEngines() *engines {
	e := &engines{ground: g, pods: map[string]*corev1.Pod{}, killed: map[string]string{}}
	w, err := g.Kube.CoreV1().Pods(metav1.NamespaceAll).Watch(g.ctx, metav1.ListOptions{LabelSelector: engineLabel})
	g.must(err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for event := range w.ResultChan() {
			pod, ok := event.Object.(*corev1.Pod)
			if !ok {
				continue
			}
			e.mu.Lock()
			if event.Type == watch.Deleted {
				delete(e.pods, string(pod.UID))
				if pod.Spec.NodeName != "" && !hasEnded(pod) {
					e.killed[string(pod.UID)] = fmt.Sprintf("%s on %s went while it was %s", pod.Name, pod.Spec.NodeName, pod.Status.Phase)
				}
			} else {
				e.pods[string(pod.UID)] = pod
			}
			e.mu.Unlock()
		}
	}()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-done:
				return
			case <-time.After(100 * time.Millisecond):
			}
			e.lookAtCloud()
		}
	}()
	g.t.Cleanup(func() {
		w.Stop()
		<-done
		<-watched
		for _, what := range e.killed {
			g.t.Errorf("an engine was killed: %s", what)
		}
	})
	return e
}

// lookAtCloud: the engine on an instance that does not run any more is dead. It
// must have ended before, as the API server still knows it.
func (e *engines) lookAtCloud() {
	snapshot, err := e.cloud.Snapshot(e.ctx)
	if err != nil {
		return
	}
	off := map[string]model.InstanceState{}
	for _, group := range snapshot.Groups {
		for _, i := range group.Instances {
			if i.State != model.InstanceRunning && i.State != model.InstancePending {
				off[string(i.ID)] = i.State
			}
		}
	}
	pods, err := e.Kube.CoreV1().Pods(metav1.NamespaceAll).List(e.ctx, metav1.ListOptions{LabelSelector: engineLabel})
	if err != nil {
		return
	}
	e.ground.mu.Lock()
	defer e.ground.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, pod := range pods.Items {
		node := e.launched[pod.Spec.NodeName]
		if node == nil {
			continue
		}
		if state := off[node.Spec.ProviderID]; state != "" && !hasEnded(&pod) {
			e.killed[string(pod.UID)] = fmt.Sprintf("%s is %s while its instance %s is %s", pod.Name, pod.Status.Phase, node.Spec.ProviderID, state)
		}
	}
}

// forgive returns what was killed, and takes it from the account.
func (e *engines) forgive() (killed []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for uid, what := range e.killed {
		killed = append(killed, what)
		delete(e.killed, uid)
	}
	return killed
}

func hasEnded(pod *corev1.Pod) bool {
	return len(pod.Status.ContainerStatuses) > 0 && !slices.ContainsFunc(pod.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool {
		return c.State.Terminated == nil
	})
}

// daemons runs an engine on every node of the groups, all groups for none.
func (g *ground) daemons(name string, change func(*corev1.PodTemplateSpec), groups ...string) {
	g.t.Helper()
	labels := map[string]string{"app.kubernetes.io/name": "dagger-helm", "name": name}
	set := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: metav1.NamespaceDefault},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{
					Labels:      labels,
					Annotations: map[string]string{localcluster.StopAfterAnnotation: "1s"},
				},
				Spec: corev1.PodSpec{
					Containers:                    []corev1.Container{{Name: "dagger-engine", Image: "engine"}},
					TerminationGracePeriodSeconds: new(int64(300)),
				},
			},
		},
	}
	if len(groups) > 0 {
		set.Spec.Template.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: groupLabel, Operator: corev1.NodeSelectorOpIn, Values: groups}},
			}}},
		}}
	}
	if change != nil {
		change(&set.Spec.Template)
	}
	_, err := g.Kube.AppsV1().DaemonSets(set.Namespace).Create(g.ctx, set, metav1.CreateOptions{})
	g.must(err)
}

// on returns the engine pods on a node.
func (e *engines) on(node string) (pods []*corev1.Pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range e.pods {
		if p.Spec.NodeName == node {
			pods = append(pods, p)
		}
	}
	return pods
}

// engine fails until there is exactly one engine on the node, and it is ok.
func (e *engines) engine(node string, ok func(*corev1.Pod) bool) func() error {
	return func() error {
		pods := e.on(node)
		if len(pods) != 1 {
			return fmt.Errorf("%d engines on node %q, want one", len(pods), node)
		}
		if !ok(pods[0]) {
			return fmt.Errorf("engine %s: deleted at %v, finalizers %v, %s", pods[0].Name, pods[0].DeletionTimestamp, pods[0].Finalizers, pods[0].Status.Phase)
		}
		return nil
	}
}

func runs(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil
}

func guarded(p *corev1.Pod) bool { return slices.Contains(p.Finalizers, exitFinalizer) }

// annotateEngine annotates the engine's pod on a node.
func (e *engines) annotateEngine(node string, annotations map[string]any) {
	e.t.Helper()
	for _, p := range e.on(node) {
		e.annotate(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name}}, annotations)
	}
}

// instanceOf returns the instance on which a pod runs.
func (g *ground) instanceOf(pod string) model.InstanceID {
	g.t.Helper()
	node, err := g.node(g.nodeOf(pod))
	g.must(err)
	return model.InstanceID(node.Spec.ProviderID)
}

// parkedCleanly fails until exactly these instances of the group are parked,
// with engines that ended by themselves, and nothing of the group runs.
func (e *engines) parkedCleanly(group string, ids ...model.InstanceID) func() error {
	return func() error {
		snapshot, err := e.cloud.Snapshot(e.ctx)
		if err != nil {
			return err
		}
		rng, err := e.group(group)
		if err != nil {
			return err
		}
		for _, i := range snapshot.Groups[model.GroupID(group)].Instances {
			if i.State != model.InstanceStopped || !slices.Contains(ids, i.ID) {
				err = errors.Join(err, fmt.Errorf("instance %s is %s", i.ID, i.State))
			}
		}
		for _, i := range rng.Status.Intents {
			if i.Desired != "Parked" || i.Stage != "Stopping" || i.Exit != "0" || i.Engine == "" {
				err = errors.Join(err, fmt.Errorf("recorded is %+v", i))
			}
		}
		if len(rng.Status.Intents) != len(ids) || rng.Status.Parked != len(ids) || rng.Status.Target != 0 || rng.Status.Hidden != 0 {
			err = errors.Join(err, fmt.Errorf("status %+v, want %d parked", rng.Status, len(ids)))
		}
		var list v1alpha1.RunnerNodeList
		if err := e.Client.List(e.ctx, &list); err != nil {
			return err
		}
		warm := 0
		for _, rn := range list.Items {
			if rn.Spec.NodeGroup == group && rn.Status.Phase == "Parked" && len(rn.Status.Warmth) > 0 {
				warm++
			}
		}
		if warm != len(ids) {
			err = errors.Join(err, fmt.Errorf("%d RunnerNodes are parked and warm, want %d", warm, len(ids)))
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, p := range e.pods {
			if strings.HasPrefix(p.Spec.NodeName, group+"-") {
				err = errors.Join(err, fmt.Errorf("engine %s is still on %s", p.Name, p.Spec.NodeName))
			}
		}
		return errors.Join(err, e.readyNodes(group, 0)())
	}
}

// TestParkedWithItsCache: the engine of an idle node ends before its instance
// is stopped; the job that the node is warm for brings it back before any
// other, and a job that no parked node is warm for the least valuable.
func TestParkedWithItsCache(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", runners("1s", 5, parkSoon))
	e := g.watchEngines()
	g.daemons("dagger", nil)
	ca := g.CloudProvider()
	g.Autoscaler(nil)
	g.submit(job("api", "acme/api"), job("web", "acme/web"))
	g.eventually("the jobs to run", 40*time.Second, g.pods(corev1.PodRunning, "api", "web"))
	api, web := g.instanceOf("api"), g.instanceOf("web")
	for _, pod := range []string{"api", "web"} {
		node, err := g.node(g.nodeOf(pod))
		g.must(err)
		g.eventually("its engine", 10*time.Second, e.engine(node.Name, runs))
		g.eventually("its instance to be known", 20*time.Second, g.knows("runners", node.Name))
		if err := g.deleteNodes(ca, "runners", node); err == nil || !strings.Contains(err.Error(), "runs a CI job") {
			t.Errorf("deleting the busy node of %s: %v", pod, err)
		}
	}
	// What has run the jobs of two keys is worth more.
	beside := playground.Job{Name: "lib", Group: "runners", Key: "acme/lib", CPU: "1"}
	g.create(beside, func(p *corev1.Pod) { p.Spec.NodeName = g.nodeOf("api") })
	g.eventually("a job beside another", 10*time.Second, g.pods(corev1.PodRunning, "lib"))
	g.finish("web")
	g.eventually("one to be parked", 60*time.Second, func() error {
		return errors.Join(g.cloudHas("runners", 1, 1, model.InstanceStopped)(), g.readyNodes("runners", 1)())
	})
	g.finish("api", "lib")
	g.eventually("both to be parked", 60*time.Second, e.parkedCleanly("runners", api, web))

	g.submit(job("docs", "acme/docs"))
	g.eventually("the job of another key to run", 40*time.Second, g.pods(corev1.PodRunning, "docs"))
	if got := g.instanceOf("docs"); got != web {
		t.Errorf("a job of an unknown key runs on %s, want the least valuable %s", got, web)
	}
	g.eventually("an engine beside it", 10*time.Second, e.engine(g.nodeOf("docs"), runs))
	g.finish("docs")
	g.eventually("the docs' node to be parked again", 60*time.Second, g.cloudHas("runners", 0, 2, model.InstanceStopped))
	g.eventually("its Node to go", 20*time.Second, g.readyNodes("runners", 0))
	g.submit(job("api-again", "acme/api"))
	g.eventually("the job to run again", 40*time.Second, g.pods(corev1.PodRunning, "api-again"))
	if got := g.instanceOf("api-again"); got != api {
		t.Errorf("the job runs on %s, want the parked %s that ran it before", got, api)
	}
	if got := g.Instances("runners"); got != 2 {
		t.Errorf("%d instances were launched, want the first 2", got)
	}
	g.eventually("its RunnerNode", 10*time.Second, func() error {
		nodes, err := g.runnerNodes("runners")
		if err != nil {
			return err
		}
		if rn := nodes[g.nodeOf("api-again")]; rn.Status.Phase != "Ready" || len(rn.Status.Warmth) != 2 {
			return fmt.Errorf("it is %+v", rn.Status)
		}
		return nil
	})
}

// knows fails until Hearth has read the instance of a node.
func (g *ground) knows(group, node string) func() error {
	return func() error {
		nodes, err := g.runnerNodes(group)
		if _, known := nodes[node]; err == nil && !known {
			err = fmt.Errorf("no RunnerNode is of %s", node)
		}
		return err
	}
}

// TestProviderKilledWhileParking: after kill -9 at any step of a clean stop the
// next life goes on where the record says that the last one was, and ends as
// if nothing had happened. Each group is held at another step by having its
// next write refused.
func TestProviderKilledWhileParking(t *testing.T) {
	g := newGround(t)
	const ours = `request.userInfo.username.endsWith(":hearth:hearth") && `
	podOf := func(object, group string) string { return object + `.spec.nodeName.startsWith("` + group + `-")` }
	stage := func(group, stage string) string {
		return fmt.Sprintf(`object.metadata.name == %q && has(object.status.intents) && object.status.intents.exists(i, i.stage == %q)`, group, stage)
	}
	e := g.watchEngines()
	node := map[string]string{}
	drained := func(group string) func() error { return g.nodeThat(node[group], tainted(drainTaint)) }
	told := func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil }
	ended := func(p *corev1.Pod) bool { return told(p) && guarded(p) && hasEnded(p) }
	steps := []struct {
		group string
		next  refusal // the write that is refused
		at    func(group string) func() error
	}{
		{"accepted", refusal{admissionregistration.Update, "nodes", `object.metadata.labels["hearth.dev/node-group"] == "accepted" && has(object.spec.taints) && object.spec.taints.exists(t, t.key.endsWith("hearth-draining"))`},
			func(group string) func() error { return g.intents(group, "Draining", 1) }},
		{"tainted", refusal{admissionregistration.Update, "runnernodegroups/status", stage("tainted", "StoppingEngine")},
			func(group string) func() error {
				return all(g.intents(group, "Draining", 1), drained(group), e.engine(node[group], runs))
			}},
		{"condemned", refusal{admissionregistration.Update, "pods", ours + podOf("object", "condemned")},
			func(group string) func() error {
				return all(g.intents(group, "StoppingEngine", 1), e.engine(node[group], func(p *corev1.Pod) bool { return runs(p) && !guarded(p) }))
			}},
		{"guarded", refusal{admissionregistration.Delete, "pods", ours + podOf("oldObject", "guarded")},
			func(group string) func() error {
				return all(g.intents(group, "StoppingEngine", 1), e.engine(node[group], func(p *corev1.Pod) bool { return runs(p) && guarded(p) }))
			}},
		{"ending", refusal{}, // its engine takes its time
			func(group string) func() error {
				return all(g.intents(group, "StoppingEngine", 1), e.engine(node[group], func(p *corev1.Pod) bool { return told(p) && guarded(p) && !hasEnded(p) }))
			}},
		{"ended", refusal{admissionregistration.Update, "runnernodegroups/status", stage("ended", "Stopping")},
			func(group string) func() error {
				return all(g.intents(group, "StoppingEngine", 1), e.engine(node[group], ended))
			}},
		{"recorded", refusal{admissionregistration.Update, "pods", ours + podOf("object", "recorded") + ` && !(has(object.metadata.finalizers) && "hearth.dev/exit-code" in object.metadata.finalizers)`},
			func(group string) func() error {
				return all(g.intents(group, "Stopping", 1), e.engine(node[group], ended))
			}},
		{"released", g.cloudRefusals("released"),
			func(group string) func() error {
				return all(g.intents(group, "Stopping", 1), g.cloudHas(group, 1, 1, model.InstanceRunning), func() error {
					if n := len(e.on(node[group])); n != 0 {
						return fmt.Errorf("%d engines are on it", n)
					}
					return nil
				})
			}},
		{"stopped", refusal{admissionregistration.Delete, "nodes", ours + `oldObject.metadata.labels["hearth.dev/node-group"] == "stopped"`},
			func(group string) func() error {
				return all(g.intents(group, "Stopping", 1), g.cloudHas(group, 0, 1, model.InstanceStopped), drained(group))
			}},
		{"undisturbed", refusal{}, nil},
	}
	var groups, pods []string
	var refusals []refusal
	for _, s := range steps {
		groups, pods = append(groups, s.group), append(pods, s.group+"-job")
		if s.next.when != "" {
			refusals = append(refusals, s.next)
		}
	}
	provider := g.Provider("provider", alone+fleet("1s", "hearth.dev/role: runner, "+parkSoon, groups...))
	g.daemons("dagger", nil)
	g.Autoscaler(nil)
	instance := map[string]model.InstanceID{}
	for _, group := range groups {
		g.submit(playground.Job{Name: group + "-job", Group: group, Key: "acme/api", CPU: "6"})
	}
	g.eventually("the jobs to run", 60*time.Second, g.pods(corev1.PodRunning, pods...))
	for _, group := range groups {
		node[group], instance[group] = g.nodeOf(group+"-job"), g.instanceOf(group+"-job")
		g.eventually("its engine", 20*time.Second, e.engine(node[group], runs))
	}
	e.annotateEngine(node["ending"], map[string]any{localcluster.StopAfterAnnotation: "1h"})
	allow := g.refuse(refusals...)
	g.finish(pods...)
	for _, s := range steps {
		if s.at != nil {
			g.eventually(fmt.Sprintf("%q to be at its step", s.group), 60*time.Second, s.at(s.group))
		}
	}
	// Twice: a life that comes to nothing must not cost anything either.
	g.restart(provider, func() {})
	g.restart(provider, allow)
	e.annotateEngine(node["ending"], map[string]any{localcluster.StopAfterAnnotation: "0s"})
	for _, group := range groups {
		g.eventually(fmt.Sprintf("%q to be parked", group), 60*time.Second, e.parkedCleanly(group, instance[group]))
	}
}

// TestUncleanStopIsNotParked: an engine that is killed, or that would come
// back, costs its node; and people are told what to change.
func TestUncleanStopIsNotParked(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", fleet("1s", "hearth.dev/role: runner, "+parkSoon, "killed", "tolerant", "clean"))
	e := g.watchEngines()
	g.daemons("killed", func(p *corev1.PodTemplateSpec) { p.Annotations[localcluster.ExitCodeAnnotation] = "137" }, "killed")
	g.daemons("clean", nil, "clean")
	g.daemons("tolerant", func(p *corev1.PodTemplateSpec) {
		p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	}, "tolerant")
	g.Autoscaler(nil)
	groups := []string{"killed", "tolerant", "clean"}
	node := map[string]string{}
	for _, group := range groups {
		g.submit(playground.Job{Name: group, Group: group, Key: "acme/api", CPU: "6"})
	}
	g.eventually("the jobs to run", 40*time.Second, g.pods(corev1.PodRunning, groups...))
	for _, group := range groups {
		node[group] = g.nodeOf(group)
		g.eventually("its engine", 20*time.Second, e.engine(node[group], runs))
	}
	clean := g.instanceOf("clean")
	g.finish(groups...)
	g.eventually("the others to go", 60*time.Second, func() error {
		return errors.Join(g.gone(node["killed"])(), g.gone(node["tolerant"])(),
			g.cloudHas("killed", 0, 0, model.InstanceStopped)(), g.intents("killed", "", 0)(),
			g.cloudHas("tolerant", 0, 0, model.InstanceStopped)(), g.intents("tolerant", "", 0)())
	})
	g.eventually("the clean one to be parked", 30*time.Second, e.parkedCleanly("clean", clean))
	// The one that came back went with its node: nothing can be done about it.
	for _, what := range e.forgive() {
		if !strings.HasPrefix(what, "tolerant") {
			t.Errorf("an engine was killed: %s", what)
		}
	}
	metrics, err := provider.Metrics(g.ctx)
	g.must(err)
	for group, want := range map[string]struct{ reason, advice string }{
		"killed":   {"unclean-stop", "terminationGracePeriodSeconds"},
		"tolerant": {"engine-tolerates-taint", "by key"},
	} {
		if got := metric(metrics, "hearth_scale_events_total", `nodegroup="`+group+`"`, `action="terminate"`, `reason="`+want.reason+`"`); got != 1 {
			t.Errorf("%s is counted %g times, want once", want.reason, got)
		}
		g.eventually("an event on the node of "+group, 10*time.Second, func() error {
			events, err := g.Kube.CoreV1().Events(metav1.NamespaceDefault).List(g.ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + node[group]})
			if err != nil {
				return err
			}
			var said []string
			for _, event := range events.Items {
				said = append(said, event.Type+" "+event.Reason+": "+event.Message)
				if event.Type == corev1.EventTypeWarning && strings.Contains(event.Message, want.reason) && strings.Contains(event.Message, want.advice) {
					return nil
				}
			}
			return fmt.Errorf("said was %q", said)
		})
	}
}

// TestUninstallLetsEnginesGo: no pod is left with our finalizer.
func TestUninstallLetsEnginesGo(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 5, parkSoon))
	e := g.watchEngines()
	g.daemons("dagger", func(p *corev1.PodTemplateSpec) { p.Annotations[localcluster.StopAfterAnnotation] = "1h" })
	g.Autoscaler(nil)
	g.submit(job("api", "acme/api"))
	g.eventually("the job to run", 40*time.Second, g.pods(corev1.PodRunning, "api"))
	node := g.nodeOf("api")
	g.finish("api")
	g.eventually("the engine to be told to stop", 60*time.Second, e.engine(node, func(p *corev1.Pod) bool { return guarded(p) && p.DeletionTimestamp != nil }))
	g.must(provider.Terminate(g.ctx))
	g.must(provider.Uninstall(g.ctx))
	g.must(e.engine(node, func(p *corev1.Pod) bool { return !guarded(p) })())
	e.annotateEngine(node, map[string]any{localcluster.StopAfterAnnotation: "0s"})
	g.eventually("the engine's pod to go", 20*time.Second, func() error {
		if slices.ContainsFunc(e.on(node), func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil }) {
			return errors.New("it is there")
		}
		return nil
	})
}
