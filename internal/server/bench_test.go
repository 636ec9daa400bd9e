package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// The size that the benchmarks are made for.
const (
	benchGroups = 300
	benchNodes  = 50 // of each group
)

// benchNode is a node as CA sends it: with all its labels and annotations.
func benchNode(group, n int) *pb.ExternalGrpcNode {
	node := node(instance(group, n))
	node.Labels, node.Annotations = map[string]string{}, map[string]string{}
	for i := range 20 {
		node.Labels[fmt.Sprintf("label.example.com/key-%02d", i)] = fmt.Sprintf("value-%d-%d", group, n)
	}
	for i := range 5 {
		node.Annotations[fmt.Sprintf("annotation.example.com/key-%d", i)] = "value"
	}
	return node
}

func benchDefaults() *pb.NodeGroupAutoscalingOptions {
	o := &pb.NodeGroupAutoscalingOptions{ScaleDownUtilizationThreshold: 0.5, ScaleDownGpuUtilizationThreshold: 0.5}
	o.SetScaleDownUnneeded(10 * time.Minute)
	o.SetScaleDownUnready(20 * time.Minute)
	o.SetMaxNodeProvision(15 * time.Minute)
	return pb.CopyOptions(o)
}

// noop answers requests of each type with a message made in advance.
type noop struct{ answer atomic.Pointer[proto.Message] }

func (n *noop) desc() grpc.ServiceDesc {
	method := func(name string, request func() proto.Message) grpc.MethodDesc {
		return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			in := request()
			if err := decode(in); err != nil {
				return nil, err
			}
			info := &grpc.UnaryServerInfo{Server: srv, FullMethod: "/bench.Noop/" + name}
			return interceptor(ctx, in, info, func(context.Context, any) (any, error) { return *n.answer.Load(), nil })
		}}
	}
	return grpc.ServiceDesc{ServiceName: "bench.Noop", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{
		method("NodeGroupForNode", func() proto.Message { return &pb.NodeGroupForNodeRequest{} }),
		method("NodeGroupNodes", func() proto.Message { return &pb.NodeGroupNodesRequest{} }),
		method("NodeGroupGetOptions", func() proto.Message { return &pb.NodeGroupAutoscalingOptionsRequest{} }),
	}}
}

// BenchmarkRPC compares read RPCs at 300 groups of 50 nodes with a method that
// does nothing: the same request and response, the same server, over mutual
// TLS, turn by turn. An operation is one call of each.
func BenchmarkRPC(b *testing.B) {
	fleet := newFakeFleet(benchGroups, benchNodes).show()
	r := start(b, fleet, slog.LevelInfo)
	nothing := &noop{}
	register(r.cloud, nothing.desc(), nothing)
	conn := r.run(b).cloudConn(b)

	var forNode, nodes, options []proto.Message
	for g := range benchGroups {
		id := fmt.Sprintf("group-%d", g)
		nodes = append(nodes, &pb.NodeGroupNodesRequest{Id: id})
		options = append(options, &pb.NodeGroupAutoscalingOptionsRequest{Id: id, Defaults: benchDefaults()})
		for n := range benchNodes {
			forNode = append(forNode, &pb.NodeGroupForNodeRequest{Node: benchNode(g, n)})
		}
	}
	for _, bc := range []struct {
		method   string
		requests []proto.Message
		response func() proto.Message
	}{
		{"NodeGroupForNode", forNode, func() proto.Message { return &pb.NodeGroupForNodeResponse{} }},
		{"NodeGroupGetOptions", options, func() proto.Message { return &pb.NodeGroupAutoscalingOptionsResponse{} }},
		{"NodeGroupNodes", nodes, func() proto.Message { return &pb.NodeGroupNodesResponse{} }},
	} {
		b.Run(bc.method, func(b *testing.B) {
			ours, none := "/"+pb.CloudProvider_ServiceDesc.ServiceName+"/"+bc.method, "/bench.Noop/"+bc.method
			call := func(method string, i int) (proto.Message, time.Duration) {
				response, began := bc.response(), time.Now()
				if err := conn.Invoke(b.Context(), method, bc.requests[i%len(bc.requests)], response); err != nil {
					b.Fatal(err)
				}
				return response, time.Since(began)
			}
			answer, _ := call(ours, 0)
			nothing.answer.Store(&answer)
			var took [2][]time.Duration
			for i := 0; b.Loop(); i++ {
				_, t0 := call(ours, i)
				_, t1 := call(none, i)
				took[0], took[1] = append(took[0], t0), append(took[1], t1)
			}
			for _, q := range []struct {
				name string
				at   float64
			}{{"p50", 0.50}, {"p99", 0.99}} {
				mine, noops := quantile(took[0], q.at), quantile(took[1], q.at)
				b.ReportMetric(float64(mine)/float64(noops), q.name+"-ratio")
				b.ReportMetric(float64(mine.Nanoseconds())/1e3, q.name+"-µs")
			}
		})
	}
}

func quantile(d []time.Duration, q float64) time.Duration {
	slices.Sort(d)
	return d[int(q*float64(len(d)-1))]
}

// BenchmarkHandler is what the same RPCs cost without gRPC.
func BenchmarkHandler(b *testing.B) {
	fleet := newFakeFleet(benchGroups, benchNodes).show()
	provider := &cloudProvider{reader: fleet, writer: fleet}
	ctx := b.Context()
	forNode := &pb.NodeGroupForNodeRequest{Node: benchNode(7, 7)}
	options := &pb.NodeGroupAutoscalingOptionsRequest{Id: "group-7", Defaults: benchDefaults()}
	nodes := &pb.NodeGroupNodesRequest{Id: "group-7"}
	for name, call := range map[string]func() error{
		"NodeGroupForNode":    func() error { _, err := provider.NodeGroupForNode(ctx, forNode); return err },
		"NodeGroupGetOptions": func() error { _, err := provider.NodeGroupGetOptions(ctx, options); return err },
		"NodeGroupNodes":      func() error { _, err := provider.NodeGroupNodes(ctx, nodes); return err },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := call(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestHotReadsDoNotAllocate holds what BenchmarkHandler shows.
func TestHotReadsDoNotAllocate(t *testing.T) {
	fleet := newFakeFleet(3, 3).show()
	provider := &cloudProvider{reader: fleet, writer: fleet}
	ours := &pb.NodeGroupForNodeRequest{Node: node(instance(1, 1))}
	foreign := &pb.NodeGroupForNodeRequest{Node: node("foreign")}
	options := &pb.NodeGroupAutoscalingOptionsRequest{Id: "group-1", Defaults: benchDefaults()}
	for name, call := range map[string]func(){
		"NodeGroupForNode":          func() { _, _ = provider.NodeGroupForNode(t.Context(), ours) },
		"NodeGroupForNode, foreign": func() { _, _ = provider.NodeGroupForNode(t.Context(), foreign) },
		"NodeGroupGetOptions":       func() { _, _ = provider.NodeGroupGetOptions(t.Context(), options) },
		"NodeGroups":                func() { _, _ = provider.NodeGroups(t.Context(), &pb.NodeGroupsRequest{}) },
	} {
		if n := testing.AllocsPerRun(100, call); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

// BenchmarkLoop makes the calls of one whole loop of CA, one after the other
// on one connection: what CA asks once of every node and group, and options 24
// times a group, as it does with four idle nodes in each.
func BenchmarkLoop(b *testing.B) {
	fleet := newFakeFleet(benchGroups, benchNodes).show()
	r := start(b, fleet, slog.LevelInfo).run(b)
	client, ctx := r.cloudClient(b), b.Context()
	var nodes []*pb.ExternalGrpcNode
	for g := range benchGroups {
		for n := range benchNodes {
			nodes = append(nodes, benchNode(g, n))
		}
	}
	defaults := benchDefaults()
	calls := 0
	check := func(err error) {
		calls++
		if err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		calls = 0
		_, err := client.Refresh(ctx, &pb.RefreshRequest{})
		check(err)
		groups, err := client.NodeGroups(ctx, &pb.NodeGroupsRequest{})
		check(err)
		for _, node := range nodes {
			_, err := client.NodeGroupForNode(ctx, &pb.NodeGroupForNodeRequest{Node: node})
			check(err)
		}
		for _, g := range groups.GetNodeGroups() {
			for range 4 {
				_, err := client.NodeGroupTargetSize(ctx, &pb.NodeGroupTargetSizeRequest{Id: g.GetId()})
				check(err)
			}
			_, err := client.NodeGroupNodes(ctx, &pb.NodeGroupNodesRequest{Id: g.GetId()})
			check(err)
			_, err = client.NodeGroupTemplateNodeInfo(ctx, &pb.NodeGroupTemplateNodeInfoRequest{Id: g.GetId()})
			check(err)
			for range 24 {
				_, err := client.NodeGroupGetOptions(ctx, &pb.NodeGroupAutoscalingOptionsRequest{Id: g.GetId(), Defaults: defaults})
				check(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/loop")
	b.ReportMetric(float64(calls), "calls/loop")
}

// BenchmarkMemory is what the answers for 300 groups of 50 nodes hold, with
// the view that they are made from.
func BenchmarkMemory(b *testing.B) {
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var perThousand float64
	for b.Loop() {
		before := heap()
		fleet := newFakeFleet(benchGroups, benchNodes).show()
		provider := &cloudProvider{reader: fleet, writer: fleet}
		for g := range benchGroups {
			id := fmt.Sprintf("group-%d", g)
			if _, err := provider.NodeGroupTemplateNodeInfo(b.Context(), &pb.NodeGroupTemplateNodeInfoRequest{Id: id}); err != nil {
				b.Fatal(err)
			}
			if _, err := provider.NodeGroupGetOptions(b.Context(), &pb.NodeGroupAutoscalingOptionsRequest{Id: id, Defaults: benchDefaults()}); err != nil {
				b.Fatal(err)
			}
		}
		perThousand = float64(heap()-before) / (benchGroups * benchNodes / 1000)
		runtime.KeepAlive(provider)
	}
	b.ReportMetric(perThousand/1024, "KiB/1000-nodes")
}
