package controller

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/internal/dagger/enginetest"
	"github.com/hearth-ci/hearth/internal/telemetry"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

func TestMain(m *testing.M) {
	enginetest.Main()
	goleak.VerifyTestMain(m)
}

// runners is the group that most tests are about.
const runners = model.GroupID("runners")

// group declares a runner group; annotations are key, value, key, value, …
// without the prefix.
func group(id model.GroupID, annotations ...string) model.NodeGroup {
	g := model.NodeGroup{ID: id, Max: 10, Annotations: annotation(append([]string{"role", "runner"}, annotations...)...)}
	return g
}

func annotation(pairs ...string) map[string]string {
	out := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		out[model.Prefix+"/"+pairs[i]] = pairs[i+1]
	}
	return out
}

// lab is a cloud, a cluster and a store in virtual time, and the present life
// of a controller between them.
type lab struct {
	t       *testing.T
	cloud   *fakeCloud
	cluster *fakeCluster
	store   *fakeStore
	// memories is where what was learnt is kept.
	memories *fakeMemories
	events   *fakeEvents
	groups   []model.NodeGroup
	// change, when set, is applied to the config of every life.
	change func(*Config)
	synced int // times that OnSynced was called

	world   *World
	ctl     *Controller
	metrics *telemetry.Metrics
	stop    context.CancelFunc
	done    chan error
	log     *logBuffer
}

// experiment runs f in virtual time. It fails when anything that f started is
// still running in the end.
func experiment(t *testing.T, groups []model.NodeGroup, f func(t *testing.T, l *lab)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, groups)
		defer l.close()
		f(t, l)
	})
}

func newLab(t *testing.T, groups []model.NodeGroup) *lab {
	cloud := newFakeCloud(groups)
	l := &lab{
		t: t, cloud: cloud, cluster: newFakeCluster(cloud), store: newFakeStore(), memories: newFakeMemories(), events: &fakeEvents{},
		groups: groups, log: &logBuffer{},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var physics sync.WaitGroup
	physics.Go(func() { l.cluster.run(ctx) })
	t.Cleanup(func() { cancel(); physics.Wait() })
	return l
}

// close ends the present life and shows its log when the test has failed.
func (l *lab) close() {
	if l.ctl != nil {
		_ = l.kill()
	}
	if l.t.Failed() {
		l.t.Logf("log:\n%s", l.log.tail(40))
	}
}

// prepare makes a controller as a new process would, and does not run it.
func (l *lab) prepare() {
	l.world = NewWorld(l.groups)
	l.cluster.watch(l.world)
	l.metrics = telemetry.NewMetrics(prometheus.NewRegistry())
	cfg := Config{
		Backend: l.cloud, Store: l.store.open(), Memories: l.memories, Nodes: l.cluster, Pods: l.cluster, Engines: l.cluster, Events: l.events, World: l.world,
		Watched: func() bool { return true }, Groups: l.groups, Metrics: l.metrics,
		Logger:   slog.New(slog.NewTextHandler(l.log, nil)),
		OnSynced: func() { l.synced++ },
	}
	if l.change != nil {
		l.change(&cfg)
	}
	ctl, err := New(cfg)
	if err != nil {
		l.t.Fatalf("New: %v", err)
	}
	l.ctl = ctl
}

// begin starts a life and does not wait for it.
func (l *lab) begin() {
	l.prepare()
	ctx, cancel := context.WithCancel(context.Background())
	ctl, done := l.ctl, make(chan error, 1)
	l.stop, l.done = cancel, done
	go func() { done <- ctl.Run(ctx) }()
}

// start begins a life and waits until it serves.
func (l *lab) start() {
	l.t.Helper()
	l.begin()
	l.within(20*time.Second, "the first view", func() bool { return l.ctl.View() != nil })
}

// kill ends the present life wherever it is.
func (l *lab) kill() error {
	l.stop()
	err := <-l.done
	l.ctl, l.done = nil, nil
	return err
}

// restart is a kill and a new life, with something happening in between.
func (l *lab) restart(between ...func()) {
	l.t.Helper()
	l.must(l.kill())
	for _, f := range between {
		f()
	}
	l.start()
}

// within waits until cond holds.
func (l *lab) within(most time.Duration, what string, cond func() bool) {
	l.t.Helper()
	for end := time.Now().Add(most); !cond(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("no %s within %s\n%s", what, most, l.state())
		}
	}
}

// always checks that cond holds for a while.
func (l *lab) always(span time.Duration, what string, cond func() bool) {
	l.t.Helper()
	for end := time.Now().Add(span); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if !cond() {
			l.t.Fatalf("not any more: %s\n%s", what, l.state())
		}
	}
}

// state describes everything, for failures.
func (l *lab) state() string {
	var b bytes.Buffer
	for _, g := range l.groups {
		r := l.store.record(g.ID)
		fmt.Fprintf(&b, "%s: cloud desires %d; record %+v\n", g.ID, l.cloud.desired(g.ID), r)
		if l.ctl != nil {
			if v := l.view(g.ID); v != nil {
				fmt.Fprintf(&b, "  view: target %d %+v (%s)\n", v.Target, v.Instances, v.Debug)
			}
		}
		for id, m := range l.cloud.machines(g.ID) {
			fmt.Fprintf(&b, "  %s %s\n", id, m.State)
		}
	}
	for _, n := range l.cluster.all() {
		fmt.Fprintf(&b, "  node %s %s ready %v draining %v marks %+v jobs %d engines %+v\n", n.Name, n.ID, n.Ready, n.Draining, n.Marks, l.cluster.jobs(n.Name), l.cluster.enginesOn(n.Name))
	}
	const most = 4000
	return string(b.Bytes()[:min(b.Len(), most)])
}

func (l *lab) view(id model.GroupID) *nodegroups.View {
	if fleet := l.ctl.View(); fleet != nil {
		return fleet.Group(id)
	}
	return nil
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatalf("%v\n%s", err, l.state())
	}
}

// wantKind checks the kind of a refusal.
func (l *lab) wantKind(err error, kind nodegroups.Kind) {
	l.t.Helper()
	if err == nil || nodegroups.KindOf(err) != kind {
		l.t.Fatalf("got error %v, want one of kind %q", err, kind)
	}
}

// Requests as cluster-autoscaler makes them: it waits 5 s.
func (l *lab) refresh() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	l.must(l.ctl.Refresh(ctx))
}

func (l *lab) increase(id model.GroupID, delta int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return l.ctl.IncreaseSize(ctx, id, delta)
}

func (l *lab) remove(id model.GroupID, nodes ...model.Node) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	ids := make([]model.InstanceID, 0, len(nodes))
	for _, n := range nodes {
		ids = append(ids, n.ID)
	}
	return l.ctl.DeleteNodes(ctx, id, ids)
}

// ready returns the Nodes that are Ready.
func (l *lab) ready() []model.Node {
	return slices.DeleteFunc(l.cluster.all(), func(n model.Node) bool { return !n.Ready })
}

// fleet brings the runners to n Ready nodes as cluster-autoscaler would, and
// waits until they are marked.
func (l *lab) fleet(n int) []model.Node { return l.fleets(map[model.GroupID]int{runners: n}) }

func (l *lab) fleets(sizes map[model.GroupID]int) []model.Node {
	l.t.Helper()
	l.refresh()
	all := 0
	for id, n := range sizes {
		l.must(l.increase(id, n))
		all += n
	}
	l.within(2*time.Minute, "fleet of Ready and marked nodes", func() bool {
		nodes := l.ready()
		return len(nodes) >= all && !slices.ContainsFunc(nodes, func(n model.Node) bool { return n.Marks.Decision == "" })
	})
	l.settle()
	l.refresh()
	return l.ready()
}

// settle lets the watch catch up.
func (l *lab) settle() { time.Sleep(time.Second) }

// released waits until the plan has released exactly these nodes.
func (l *lab) released(most time.Duration, names ...model.NodeName) {
	l.t.Helper()
	slices.Sort(names)
	l.within(most, fmt.Sprintf("release of %v", names), func() bool { return slices.Equal(l.unprotected(), names) })
}

// unprotected returns the Ready nodes that cluster-autoscaler may remove.
func (l *lab) unprotected() (names []model.NodeName) {
	for _, n := range l.ready() {
		if !n.Marks.Protected && !n.Draining {
			names = append(names, n.Name)
		}
	}
	return names
}

func (l *lab) metric(c prometheus.Collector) float64 { return testutil.ToFloat64(c) }

// logBuffer keeps the log for when a test fails.
type logBuffer struct {
	mu    sync.Mutex
	lines [][]byte
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, bytes.Clone(p))
	return len(p), nil
}

func (b *logBuffer) tail(n int) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(bytes.Join(b.lines[max(0, len(b.lines)-n):], nil))
}

// count returns the lines that contain text.
func (b *logBuffer) count(text string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, line := range b.lines {
		if bytes.Contains(line, []byte(text)) {
			n++
		}
	}
	return n
}
