// Command scale runs Hearth with many groups and nodes on the embedded backend
// and a real control plane, and prints what it costs, a line a minute:
// `make scale MINUTES=30`. CI jobs come at an even rate, and every ten seconds
// all that cluster-autoscaler reads in a loop is read, as it reads it.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

func main() {
	r := &run{}
	flag.StringVar(&r.hearth, "hearth", "bin/hearth", "the binary")
	flag.DurationVar(&r.span, "for", 30*time.Minute, "how long")
	flag.IntVar(&r.groups, "groups", 300, "node groups")
	flag.IntVar(&r.nodes, "nodes", 5000, "nodes of all groups together")
	flag.IntVar(&r.jobs, "jobs", 20000, "CI jobs an hour")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := r.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

type run struct {
	hearth              string
	span                time.Duration
	groups, nodes, jobs int

	ground   *playground.Playground
	provider *playground.Provider
	writes   int   // of Hearth's to the API server
	read     int64 // bytes of the audit log
}

func (r *run) config() string {
	each := (r.nodes + r.groups - 1) / r.groups
	var b strings.Builder
	b.WriteString("backend: {kwok: {bootDelay: 5s}}\nnodeGroups:\n")
	for i := range r.groups {
		fmt.Fprintf(&b, "- {id: g%03d, max: %d, template: {capacity: {cpu: \"8\", memory: 32Gi, pods: \"110\"}}, annotations: {hearth.dev/role: runner, hearth.dev/min-warm: \"%d\"}}\n", i, 2*each, each)
	}
	return b.String()
}

func (r *run) run(ctx context.Context) (err error) {
	hearth, err := filepath.Abs(r.hearth)
	if err != nil {
		return err
	}
	r.ground, err = playground.Start(ctx, playground.Config{Hearth: hearth, Logger: slog.New(slog.DiscardHandler), Audit: true, LeaseDuration: 4 * time.Minute})
	if err != nil {
		return err
	}
	defer func() { err = firstOf(err, r.ground.Stop()) }()
	if r.provider, err = r.ground.StartProvider("provider", r.config()); err != nil {
		return err
	}
	if err := r.provider.Serving(ctx, 2*time.Minute); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, r.span)
	defer cancel()
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return r.submit(ctx) })
	work.Go(func() error { return r.observe(ctx) })
	return work.Wait()
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// submit makes runner pods at an even rate, and deletes those that are done.
func (r *run) submit(ctx context.Context) error {
	ticker := time.NewTicker(time.Hour / time.Duration(r.jobs))
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		job := playground.Job{
			Name: fmt.Sprintf("job-%d", n), Group: fmt.Sprintf("g%03d", n%r.groups), Key: fmt.Sprintf("repo-%d", n%977), CPU: "6", RunFor: 40 * time.Second,
		}
		if err := r.ground.Submit(ctx, job); err != nil && ctx.Err() == nil {
			return err
		}
		if old := n - r.jobs/30; old >= 0 { // two minutes ago
			_ = r.ground.Finish(ctx, fmt.Sprintf("job-%d", old))
		}
	}
}

// observe reads as cluster-autoscaler does, and prints a line a minute.
func (r *run) observe(ctx context.Context) error {
	pair, err := r.ground.Authority.Issue("scale")
	if err != nil {
		return err
	}
	tls, err := r.ground.Authority.ClientTLS(&pair)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(r.ground.ProviderAddress(), grpc.WithTransportCredentials(credentials.NewTLS(tls)))
	if err != nil {
		return err
	}
	defer conn.Close()
	ca := externalgrpc.NewCloudProviderClient(conn)
	fmt.Println("minute  instances  Ready  listed  loop p50 ms  loop max ms  CPU %  RSS MiB  heap MiB  goroutines  snapshot age s  API writes/s")
	began, loops := time.Now(), []time.Duration{}
	ticker := time.NewTicker(10 * time.Second)
	defer ticker.Stop()
	lastLine, lastCPU, lastWrites := began, 0.0, 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		loop := time.Now()
		listed, err := r.loop(ctx, ca)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			fmt.Fprintln(os.Stderr, "scale: a loop failed:", err)
			continue
		}
		loops = append(loops, time.Since(loop))
		if time.Since(lastLine) < time.Minute-time.Second {
			continue
		}
		text, err := r.provider.Metrics(ctx)
		if err != nil {
			return firstOf(ctx.Err(), err)
		}
		if err := r.countWrites(); err != nil {
			return err
		}
		slices.Sort(loops)
		span, cpu := time.Since(lastLine).Seconds(), metric(text, "process_cpu_seconds_total")
		const mib = 1 << 20
		launching := sum(text, "hearth_nodegroup_nodes", `phase="Launching"`)
		instances := sum(text, "hearth_nodegroup_nodes", "")
		fmt.Printf("%6.1f  %9.0f  %5.0f  %6d  %11.1f  %11.1f  %5.0f  %7.0f  %8.0f  %10.0f  %14.1f  %12.1f\n", time.Since(began).Minutes(), instances, instances-launching, listed,
			1000*loops[len(loops)/2].Seconds(), 1000*loops[len(loops)-1].Seconds(), 100*(cpu-lastCPU)/span,
			metric(text, "process_resident_memory_bytes")/mib, metric(text, "go_memstats_heap_alloc_bytes")/mib, metric(text, "go_goroutines"),
			metric(text, "hearth_snapshot_age_seconds"), float64(r.writes-lastWrites)/span)
		lastLine, lastCPU, lastWrites, loops = time.Now(), cpu, r.writes, nil
	}
}

// loop makes the reads of one loop of cluster-autoscaler's, and returns how many
// instances were listed.
func (r *run) loop(ctx context.Context, ca externalgrpc.CloudProviderClient) (listed int, err error) {
	if _, err := ca.Refresh(ctx, &externalgrpc.RefreshRequest{}); err != nil {
		return 0, err
	}
	groups, err := ca.NodeGroups(ctx, &externalgrpc.NodeGroupsRequest{})
	if err != nil {
		return 0, err
	}
	for _, g := range groups.GetNodeGroups() {
		nodes, err := ca.NodeGroupNodes(ctx, &externalgrpc.NodeGroupNodesRequest{Id: g.GetId()})
		if err != nil {
			return 0, err
		}
		if _, err := ca.NodeGroupTargetSize(ctx, &externalgrpc.NodeGroupTargetSizeRequest{Id: g.GetId()}); err != nil {
			return 0, err
		}
		if _, err := ca.NodeGroupGetOptions(ctx, &externalgrpc.NodeGroupAutoscalingOptionsRequest{Id: g.GetId(), Defaults: defaults()}); err != nil {
			return 0, err
		}
		for _, i := range nodes.GetInstances() {
			listed++
			if _, err := ca.NodeGroupForNode(ctx, &externalgrpc.NodeGroupForNodeRequest{Node: &externalgrpc.ExternalGrpcNode{ProviderID: i.GetId()}}); err != nil {
				return 0, err
			}
		}
	}
	return listed, nil
}

func defaults() *externalgrpc.NodeGroupAutoscalingOptions {
	return &externalgrpc.NodeGroupAutoscalingOptions{ScaleDownUtilizationThreshold: 0.5, ScaleDownUnneededDuration: durationpb.New(time.Minute)}
}

// countWrites reads on in the API server's audit log.
func (r *run) countWrites() error {
	file, err := os.Open(filepath.Join(r.ground.Cluster.LogDir(), localcluster.AuditLog))
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Seek(r.read, io.SeekStart); err != nil {
		return err
	}
	lines := bufio.NewReader(file)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return nil // the rest is not written yet
		}
		r.read += int64(len(line))
		var e struct{ Verb string }
		if json.Unmarshal(line, &e) == nil && slices.Contains([]string{"create", "update", "patch", "delete"}, e.Verb) {
			r.writes++
		}
	}
}

// metric returns the value of a metric without labels, 0 when it is not there.
func metric(text, name string) float64 {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			f, _ := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return f
		}
	}
	return 0
}

// sum adds up a metric's values whose labels contain the text.
func sum(text, name, labels string) (total float64) {
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name+"{")
		if !ok || !strings.Contains(rest, labels) {
			continue
		}
		f, _ := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(rest, '}')+1:]), 64)
		total += f
	}
	return total
}
