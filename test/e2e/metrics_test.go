package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/dagger/enginetest"
	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// kubelet runs a process for every engine pod, which serves metrics at the
// pod's own address: kwok gives pods loopback addresses. An engine's data folder
// is that of its instance. A pod that is told to stop ends when its process has,
// if by its annotations it would otherwise not end for long.
type kubelet struct {
	*engines
	port string
	root string // of the data folders

	mu sync.Mutex
	// byPod are the processes by the UID of their pod.
	byPod map[string]*enginetest.Engine
	// paused: no process is started.
	paused bool
}

// runEngines runs engines until the test ends, with metrics on port.
func (e *engines) runEngines(port string) *kubelet {
	k := &kubelet{engines: e, port: port, root: e.t.TempDir(), byPod: map[string]*enginetest.Engine{}}
	ctx, cancel := context.WithCancel(e.ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			for _, pod := range e.all() {
				if err := k.tend(ctx, pod); err != nil && ctx.Err() == nil {
					e.t.Errorf("engine %s: %v", pod.Name, err)
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	e.t.Cleanup(func() {
		cancel()
		wg.Wait()
		for _, process := range k.byPod {
			process.Kill()
		}
	})
	return k
}

// all returns the present engine pods.
func (e *engines) all() (pods []*corev1.Pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range e.pods {
		pods = append(pods, p)
	}
	return pods
}

// tend starts the process of a pod that runs, and stops that of one that is
// told to; a pod ends after its process, with the code of that.
func (k *kubelet) tend(ctx context.Context, pod *corev1.Pod) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	process := k.byPod[string(pod.UID)]
	switch {
	case process == nil && runs(pod) && pod.Status.PodIP != "" && !k.paused:
		node, err := k.node(pod.Spec.NodeName)
		if err != nil {
			return err
		}
		k.byPod[string(pod.UID)], err = enginetest.Start(ctx, enginetest.Config{
			Dir: k.folder(model.InstanceID(node.Spec.ProviderID)), MetricsAddr: net.JoinHostPort(pod.Status.PodIP, k.port),
		})
		return err
	case process != nil && pod.DeletionTimestamp != nil && !hasEnded(pod):
		process.Stop()
		select {
		case <-process.Ended():
		default:
			return nil
		}
		code, err := process.Wait(ctx)
		if err != nil {
			return err
		}
		patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:"%d",%q:"0s"}}}`,
			localcluster.ExitCodeAnnotation, code, localcluster.StopAfterAnnotation)
		_, err = k.Kube.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		return client.IgnoreNotFound(err)
	}
	return nil
}

func (k *kubelet) folder(id model.InstanceID) string {
	return filepath.Join(k.root, filepath.Base(string(id)))
}

// pause says whether processes are kept from being started.
func (k *kubelet) pause(on bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.paused = on
}

// connect opens a session at the engine of an instance: a job that leaves so
// many bytes of its key.
func (k *kubelet) connect(id model.InstanceID, key string, bytes int64) *enginetest.Session {
	k.t.Helper()
	var session *enginetest.Session
	k.eventually("a session", 10*time.Second, func() error {
		rn, err := k.runnerNode(id)
		if err != nil {
			return err
		}
		pods := k.on(rn.Status.NodeName)
		if len(pods) != 1 {
			return fmt.Errorf("%d engines on node %q, want one", len(pods), rn.Status.NodeName)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		process := k.byPod[string(pods[0].UID)]
		if process == nil {
			return errors.New("the engine has not started")
		}
		session, err = process.Connect(k.ctx, key, bytes)
		return err
	})
	k.t.Cleanup(session.Close)
	return session
}

// runnerNode reads the RunnerNode of an instance.
func (g *ground) runnerNode(id model.InstanceID) (*v1alpha1.RunnerNode, error) {
	var list v1alpha1.RunnerNodeList
	if err := g.Client.List(g.ctx, &list); err != nil {
		return nil, err
	}
	for i := range list.Items {
		if list.Items[i].Spec.ProviderID == string(id) {
			return &list.Items[i], nil
		}
	}
	return nil, fmt.Errorf("no RunnerNode of %s", id)
}

// runnerNodeThat fails until the RunnerNode of an instance is ok.
func (g *ground) runnerNodeThat(id model.InstanceID, ok func(*v1alpha1.RunnerNode) bool) func() error {
	return func() error {
		rn, err := g.runnerNode(id)
		if err == nil && !ok(rn) {
			err = fmt.Errorf("the RunnerNode of %s is %+v", id, rn.Status)
		}
		return err
	}
}

// shown returns what `kubectl get` shows of a RunnerNode, by the column.
func (g *ground) shown(name string) map[string]string {
	g.t.Helper()
	var table metav1.Table
	g.must(g.Kube.CoreV1().RESTClient().Get().AbsPath("/apis", v1alpha1.GroupVersion().String(), "runnernodes", name).
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").Do(g.ctx).Into(&table))
	row := map[string]string{}
	for i, column := range table.ColumnDefinitions {
		row[column.Name] = fmt.Sprint(table.Rows[0].Cells[i])
	}
	return row
}

// TestMetricsOfEngines: what engines say of themselves decides. One that has a
// session keeps its node, though no runner pod is there; one that has none is
// stopped and its node parked. Back from that, the node whose engine finds its
// cache is warm, and that whose cache is gone is not.
func TestMetricsOfEngines(t *testing.T) {
	const (
		cache = 3 << 30
		// Times for so many readings, which are 20 s apart, and what follows.
		once, twice, thrice = 35 * time.Second, 55 * time.Second, 80 * time.Second
	)
	g := newGround(t)
	l, err := (&net.ListenConfig{}).Listen(g.ctx, "tcp", "127.0.0.1:0")
	g.must(err)
	_, port, err := net.SplitHostPort(l.Addr().String())
	g.must(err)
	g.must(l.Close())
	groups := []string{"kept", "wiped"}
	g.Provider("provider", alone+"engines: {metricsPort: "+port+"}\n"+fleet("1s", "hearth.dev/role: runner, "+parkSoon, groups...))
	e := g.watchEngines()
	g.daemons("dagger", func(p *corev1.PodTemplateSpec) { p.Annotations[localcluster.StopAfterAnnotation] = "1h" })
	k := e.runEngines(port)
	ca := g.CloudProvider()
	grow := func() {
		for _, group := range groups {
			_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: group, Delta: 1})
			g.must(err)
		}
		g.eventually("a node of each", 30*time.Second, all(g.readyNodes("kept", 1), g.readyNodes("wiped", 1)))
	}
	grow()
	for _, group := range groups {
		g.submit(playground.Job{Name: group, Group: group, Key: "acme/api", CPU: "6"})
	}
	g.eventually("the jobs to run", 20*time.Second, g.pods(corev1.PodRunning, groups...))
	kept, wiped := g.instanceOf("kept"), g.instanceOf("wiped")
	both := func(ok func(*v1alpha1.RunnerNode) bool) func() error {
		return all(g.runnerNodeThat(kept, ok), g.runnerNodeThat(wiped, ok))
	}
	decided := func(decision string) func() error {
		return both(func(rn *v1alpha1.RunnerNode) bool { return rn.Status.Decision == decision })
	}
	g.finish(groups...)
	g.eventually("the nodes to be let go", 30*time.Second, decided("park"))

	sessions := []*enginetest.Session{k.connect(kept, "acme/api", cache), k.connect(wiped, "acme/api", cache)}
	g.eventually("the nodes to be kept", twice, decided("keep"))
	nodes := map[string]*corev1.Node{}
	for _, id := range []model.InstanceID{kept, wiped} {
		rn, err := g.runnerNode(id)
		g.must(err)
		node, err := g.node(rn.Status.NodeName)
		g.must(err)
		nodes[rn.Spec.NodeGroup] = node
		if err := g.deleteNodes(ca, rn.Spec.NodeGroup, node); err == nil || !strings.Contains(err.Error(), "has sessions") {
			t.Errorf("deleting a node whose engine has a session: %v", err)
		}
		if row := g.shown(rn.Name); row["Clients"] != "1" || row["Cache"] != "3Gi" || row["Phase"] != "Ready" {
			t.Errorf("kubectl shows %v, want 1 client and 3Gi", row)
		}
	}

	for _, s := range sessions {
		s.Close()
	}
	g.eventually("the nodes to be let go again", thrice, decided("park"))
	for group, node := range nodes {
		g.must(g.deleteNodes(ca, group, node))
	}
	g.eventually("both to be parked", thrice, all(e.parkedCleanly("kept", kept), e.parkedCleanly("wiped", wiped)))
	g.must(both(func(rn *v1alpha1.RunnerNode) bool {
		return rn.Status.CacheBytes.Value() == cache && rn.Status.ConnectedClients == 0
	})())
	for _, id := range []model.InstanceID{kept, wiped} {
		if got := enginetest.Bytes(k.folder(id), "acme/api"); got != cache {
			t.Errorf("%d bytes are on the disk of %s, want all", got, id)
		}
	}
	g.must(enginetest.Wipe(k.folder(wiped)))

	k.pause(true)
	grow()
	if got := []int{g.Instances("kept"), g.Instances("wiped")}; !slices.Equal(got, []int{1, 1}) {
		t.Fatalf("%d instances were launched, want one of each", got)
	}
	g.eventually("the caches to be in doubt", 20*time.Second, both(func(rn *v1alpha1.RunnerNode) bool {
		return rn.Status.Phase == "Ready" && meta.IsStatusConditionFalse(rn.Status.Conditions, "CacheVerified")
	}))
	k.pause(false)
	// An engine that has lost its cache is not empty for long.
	if k.connect(wiped, "acme/api", 64<<10).Warm {
		t.Error("the wiped cache is warm")
	}
	verified := func(rn *v1alpha1.RunnerNode) bool {
		return !meta.IsStatusConditionFalse(rn.Status.Conditions, "CacheVerified")
	}
	g.eventually("one cache to be found and the other not", once, all(
		g.runnerNodeThat(kept, func(rn *v1alpha1.RunnerNode) bool {
			return verified(rn) && len(rn.Status.Warmth) == 1 && rn.Status.CacheBytes.Value() == cache &&
				!meta.IsStatusConditionTrue(rn.Status.Conditions, "CacheLost")
		}),
		g.runnerNodeThat(wiped, func(rn *v1alpha1.RunnerNode) bool {
			return verified(rn) && len(rn.Status.Warmth) == 0 && meta.IsStatusConditionTrue(rn.Status.Conditions, "CacheLost")
		})))
	rn, err := g.runnerNode(wiped)
	g.must(err)
	g.eventually("an event", 10*time.Second, func() error {
		events, err := g.Kube.CoreV1().Events(metav1.NamespaceDefault).List(g.ctx, metav1.ListOptions{
			FieldSelector: "reason=CacheLost,involvedObject.name=" + rn.Status.NodeName,
		})
		if err == nil && len(events.Items) == 0 {
			err = errors.New("there is none")
		}
		return err
	})
}
