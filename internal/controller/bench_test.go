package controller

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-ci/hearth/internal/telemetry"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// still is a cloud, a cluster, a store and a listener in which nothing happens.
type still struct{ snapshot model.Snapshot }

func (s *still) Snapshot(context.Context) (model.Snapshot, error)                 { return s.snapshot, nil }
func (*still) Resize(context.Context, model.GroupID, int) error                   { return nil }
func (*still) Terminate(context.Context, model.GroupID, []model.InstanceID) error { return nil }
func (*still) Stop(context.Context, model.GroupID, []model.InstanceID) error      { return nil }
func (*still) Start(context.Context, model.GroupID, []model.InstanceID) error     { return nil }
func (*still) Taint(context.Context, model.NodeName, string) error                { return nil }
func (*still) Untaint(context.Context, model.NodeName, string) error              { return nil }
func (*still) ClearCATaint(context.Context, model.NodeName, string) error         { return nil }
func (*still) Delete(context.Context, model.NodeName, string) error               { return nil }
func (*still) Label(context.Context, model.NodeName, string, model.GroupID) error { return nil }
func (*still) Mark(context.Context, model.NodeName, string, model.Marks) error    { return nil }
func (*still) NodeOf(context.Context, model.InstanceID) (model.Node, error) {
	return model.Node{}, nil
}

func (*still) PodsOn(context.Context, model.NodeName) ([]model.Pod, error) { return nil, nil }
func (*still) StopEngine(context.Context, model.Pod) (bool, error)         { return false, nil }
func (*still) ReleaseEngine(context.Context, model.Pod) error              { return nil }
func (*still) Node(model.Node, model.Severity, string, string)             {}
func (*still) Group(model.GroupID, model.Severity, string, string)         {}
func (*still) SaveNode(context.Context, model.NodeRecord) error            { return nil }
func (*still) DeleteNode(context.Context, model.InstanceID) error          { return nil }
func (*still) SaveGroup(context.Context, model.GroupID, nodegroups.Record, model.GroupSummary) error {
	return nil
}

func (*still) Load(context.Context) (map[model.GroupID]nodegroups.Record, map[model.GroupID]map[string]string, []model.NodeRecord, error) {
	return nil, nil, nil, nil
}

func (*still) LoadLearnt(context.Context) (map[model.GroupID][]byte, error) { return nil, nil }
func (*still) SaveLearnt(context.Context, model.GroupID, []byte) error      { return nil }

// largeFleet returns an owner that serves a fleet of idle Ready nodes.
func largeFleet(b *testing.B, groups, each int) (o *owner, r reading, end func()) {
	b.Helper()
	began := time.Now().Add(-time.Hour)
	var declared []model.NodeGroup
	s := &still{model.Snapshot{Groups: map[model.GroupID]model.GroupSnapshot{}}}
	for g := range groups {
		id := model.GroupID(fmt.Sprintf("runners-%03d", g))
		spec := group(id, "max-idle", "240h")
		spec.Max = 2 * each
		declared = append(declared, spec)
	}
	world := NewWorld(declared)
	for _, spec := range declared {
		snapshot := model.GroupSnapshot{Desired: each}
		for n := range each {
			name := fmt.Sprintf("ip-10-0-%s-%03d.eu-central-1.compute.internal", spec.ID, n)
			id := model.InstanceID(fmt.Sprintf("aws:///eu-central-1a/i-%s-%013d", spec.ID, n))
			snapshot.Instances = append(snapshot.Instances, model.Instance{ID: id, State: model.InstanceRunning, LaunchedAt: began})
			labels := map[string]string{model.Prefix + "/node-group": string(spec.ID), "kubernetes.io/hostname": name}
			for i := range 10 {
				labels[fmt.Sprintf("topology.kubernetes.io/label-%d", i)] = "a value"
			}
			world.NodeChanged(model.Node{
				Name: model.NodeName(name), UID: name, ID: id, Ready: true, Created: began, ReadyChanged: began,
				Marks: model.Marks{Decision: model.DecisionKeep, Protected: true, ProtectedByUs: true}, Labels: labels,
			})
		}
		s.snapshot.Groups[spec.ID] = snapshot
	}
	c, err := New(Config{
		Backend: s, Store: s, Memories: s, Nodes: s, Pods: s, Engines: s, Events: s, World: world, Watched: func() bool { return true },
		Groups: declared, Metrics: telemetry.NewMetrics(prometheus.NewRegistry()), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	var work sync.WaitGroup
	o = c.newOwner(ctx, cancel, &work)
	if !o.begin(ctx) {
		b.Fatal("the owner did not begin")
	}
	work.Go(func() { c.records.run(ctx, cancel) })
	r = reading{at: time.Now(), snapshot: s.snapshot}
	o.read(r)
	o.advance()
	if v := c.View(); v == nil || len(v.Groups()) != groups || len(v.Groups()[0].Instances) != each {
		b.Fatal("the fleet is not served")
	}
	return o, r, func() { cancel(nil); work.Wait() }
}

// BenchmarkOwner measures what the owner of 300 groups of 50 nodes does: while
// it does one thing, cluster-autoscaler's requests wait.
func BenchmarkOwner(b *testing.B) {
	o, r, end := largeFleet(b, 300, 50)
	defer end()
	refresh := func() {
		for _, g := range o.fleet {
			o.apply(g, nodegroups.Refresh{})
		}
		o.publish()
	}
	for _, step := range []struct {
		name string
		run  func()
	}{
		{"tick", o.advance}, // every second, nothing to do
		{"plan", func() { o.plan(); o.advance() }},
		{"snapshot", func() { r.at = time.Now(); o.read(r); o.advance() }},
		{"refresh", refresh},
		{"refresh+tick", func() { refresh(); o.advance() }},
		{"node", func() {
			n := o.registered[r.snapshot.Groups["runners-007"].Instances[7].ID]
			o.observe([]nodeChange{{node: n}}, nil, nil)
			o.advance()
		}},
		{"write", func() {
			if err := o.write(o.ctx, "runners-007", nodegroups.DecreaseTargetSize{Delta: -1}); err != nil {
				b.Fatal(err)
			}
			o.advance()
		}},
	} {
		b.Run(step.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				step.run()
			}
		})
	}
}

// BenchmarkGrowth measures the whole fleet's steps with 300 groups as their nodes
// become more: a node should cost no more in a large fleet.
func BenchmarkGrowth(b *testing.B) {
	const groups = 300
	for _, each := range []int{4, 17, 68} {
		o, r, end := largeFleet(b, groups, each)
		for name, step := range map[string]func(){
			"tick":     o.advance,
			"plan":     func() { o.plan(); o.advance() },
			"snapshot": func() { r.at = time.Now(); o.read(r); o.advance() },
			"refresh": func() {
				for _, g := range o.fleet {
					o.apply(g, nodegroups.Refresh{})
				}
				o.publish()
				o.advance()
			},
		} {
			b.Run(fmt.Sprintf("%s/%d", name, groups*each), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					step()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*groups*each), "ns/node")
			})
		}
		end()
	}
}

// BenchmarkMemory measures what 1,000 nodes keep in memory: the groups and
// views alone, and everything that the owner holds.
func BenchmarkMemory(b *testing.B) {
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	const groups, each = 300, 50
	for b.Loop() {
		before := heap()
		o, _, end := largeFleet(b, groups, each)
		end()
		all := heap()
		fleet, view := o.fleet, o.view.Load()
		o = nil //nolint:wastedassign // what it held may go
		core := heap()
		runtime.KeepAlive(fleet)
		runtime.KeepAlive(view)
		const thousands = groups * each / 1000.0
		b.ReportMetric((all-before)/1e6/thousands, "MB/1000nodes")
		b.ReportMetric((core-before)/1e6/thousands, "groups+views-MB/1000nodes")
	}
}
