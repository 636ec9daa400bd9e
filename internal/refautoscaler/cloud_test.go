package refautoscaler

import (
	"context"
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/hearth-ci/hearth/protos/expander"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// cloud is a provider with state and failure modes. Its instances do not become
// nodes by themselves: the test registers them.
type cloud struct {
	pb.UnimplementedCloudProviderServer
	expander.UnimplementedExpanderServer

	mu       sync.Mutex
	groups   []*cloudGroup
	fail     map[string]error // by method
	slow     map[string]time.Duration
	calls    map[string]int
	writes   []string // write RPCs in order
	nodes    map[string]string
	bornAs   int
	choose   func(*expander.BestOptionsRequest) (*expander.BestOptionsResponse, error)
	asked    *expander.BestOptionsRequest
	defaults *pb.NodeGroupAutoscalingOptions // of the last GetOptions
}

type cloudGroup struct {
	id            string
	min, max, now int32
	template      *corev1.Node
	options       *pb.NodeGroupAutoscalingOptionsResponse // nil: Unimplemented
	instances     []*pb.Instance
	stillborn     bool // IncreaseSize makes no instances
}

func (c *cloud) group(id string) *cloudGroup {
	for _, g := range c.groups {
		if g.id == id {
			return g
		}
	}
	return nil
}

// intercept counts calls, and makes them slow or fail.
func (c *cloud) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	c.mu.Lock()
	c.calls[method]++
	err, delay := c.fail[method], c.slow[method]
	c.mu.Unlock()
	if delay > 0 {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(delay):
		}
	}
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return handler(ctx, req)
}

func (c *cloud) Refresh(context.Context, *pb.RefreshRequest) (*pb.RefreshResponse, error) {
	return &pb.RefreshResponse{}, nil
}

func (c *cloud) Cleanup(context.Context, *pb.CleanupRequest) (*pb.CleanupResponse, error) {
	return &pb.CleanupResponse{}, nil
}

func (g *cloudGroup) wire() *pb.NodeGroup {
	return &pb.NodeGroup{Id: g.id, MinSize: g.min, MaxSize: g.max}
}

func (c *cloud) NodeGroups(context.Context, *pb.NodeGroupsRequest) (*pb.NodeGroupsResponse, error) {
	resp := &pb.NodeGroupsResponse{}
	for _, g := range c.groups {
		resp.NodeGroups = append(resp.NodeGroups, g.wire())
	}
	return resp, nil
}

func (c *cloud) NodeGroupForNode(_ context.Context, r *pb.NodeGroupForNodeRequest) (*pb.NodeGroupForNodeResponse, error) {
	resp := &pb.NodeGroupForNodeResponse{NodeGroup: &pb.NodeGroup{}}
	if g := c.group(c.nodes[r.GetNode().GetProviderID()]); g != nil {
		resp.NodeGroup = g.wire()
	}
	return resp, nil
}

func (c *cloud) NodeGroupTargetSize(_ context.Context, r *pb.NodeGroupTargetSizeRequest) (*pb.NodeGroupTargetSizeResponse, error) {
	return &pb.NodeGroupTargetSizeResponse{TargetSize: c.group(r.GetId()).now}, nil
}

func (c *cloud) NodeGroupIncreaseSize(_ context.Context, r *pb.NodeGroupIncreaseSizeRequest) (*pb.NodeGroupIncreaseSizeResponse, error) {
	c.writes = append(c.writes, fmt.Sprintf("increase %s %+d", r.GetId(), r.GetDelta()))
	c.grow(r.GetId(), r.GetDelta())
	return &pb.NodeGroupIncreaseSizeResponse{}, nil
}

// grow raises a group's size, as CA asks or behind its back.
func (c *cloud) grow(id string, by int32) {
	g := c.group(id)
	g.now += by
	for range by {
		if g.stillborn {
			return
		}
		c.bornAs++
		i := fmt.Sprintf("i-%02d", c.bornAs)
		c.nodes[i] = id
		g.instances = append(g.instances, &pb.Instance{
			Id: i, Status: &pb.InstanceStatus{InstanceState: pb.InstanceStatus_instanceCreating},
		})
	}
}

func (c *cloud) NodeGroupDecreaseTargetSize(_ context.Context, r *pb.NodeGroupDecreaseTargetSizeRequest) (*pb.NodeGroupDecreaseTargetSizeResponse, error) {
	c.writes = append(c.writes, fmt.Sprintf("decrease %s %+d", r.GetId(), r.GetDelta()))
	c.group(r.GetId()).now += r.GetDelta()
	return &pb.NodeGroupDecreaseTargetSizeResponse{}, nil
}

func (c *cloud) NodeGroupDeleteNodes(_ context.Context, r *pb.NodeGroupDeleteNodesRequest) (*pb.NodeGroupDeleteNodesResponse, error) {
	var ids []string
	for _, n := range r.GetNodes() {
		ids = append(ids, n.GetName())
	}
	slices.Sort(ids)
	c.writes = append(c.writes, fmt.Sprintf("delete %s %v", r.GetId(), ids))
	g := c.group(r.GetId())
	g.now -= int32(len(ids))
	for _, n := range r.GetNodes() {
		delete(c.nodes, n.GetProviderID())
		g.instances = slices.DeleteFunc(g.instances, func(i *pb.Instance) bool { return i.GetId() == n.GetProviderID() })
	}
	return &pb.NodeGroupDeleteNodesResponse{}, nil
}

func (c *cloud) NodeGroupNodes(_ context.Context, r *pb.NodeGroupNodesRequest) (*pb.NodeGroupNodesResponse, error) {
	return &pb.NodeGroupNodesResponse{Instances: c.group(r.GetId()).instances}, nil
}

func (c *cloud) NodeGroupTemplateNodeInfo(_ context.Context, r *pb.NodeGroupTemplateNodeInfoRequest) (*pb.NodeGroupTemplateNodeInfoResponse, error) {
	wire, err := c.group(r.GetId()).template.Marshal()
	return &pb.NodeGroupTemplateNodeInfoResponse{NodeInfo: wire, NodeBytes: wire}, err
}

func (c *cloud) NodeGroupGetOptions(_ context.Context, r *pb.NodeGroupAutoscalingOptionsRequest) (*pb.NodeGroupAutoscalingOptionsResponse, error) {
	c.defaults = r.GetDefaults()
	if o := c.group(r.GetId()).options; o != nil {
		return o, nil
	}
	return nil, status.Error(codes.Unimplemented, "no options")
}

func (c *cloud) BestOptions(_ context.Context, r *expander.BestOptionsRequest) (*expander.BestOptionsResponse, error) {
	c.asked = r
	return c.choose(r)
}

// bench is one test: a cluster, a cloud and an autoscaler in virtual time.
type bench struct {
	*testing.T
	cloud  *cloud
	kube   *fake.Clientset
	cfg    Config
	a      *Autoscaler
	ctx    context.Context
	mu     sync.Mutex
	events []Event
}

// inBench runs a test in a bubble with one group, "a": 0 to 10 nodes of 4 CPU.
func inBench(t *testing.T, test func(*bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bench{T: t, kube: fake.NewClientset(), cloud: &cloud{
			fail: map[string]error{}, slow: map[string]time.Duration{}, calls: map[string]int{}, nodes: map[string]string{},
		}}
		b.kube.PrependReactor("create", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
			if action.GetSubresource() != "eviction" {
				return false, nil, nil
			}
			name := action.(clienttesting.CreateAction).GetObject().(metav1.Object).GetName()
			return true, nil, b.kube.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("pods"), action.GetNamespace(), name)
		})
		listener := bufconn.Listen(1 << 16)
		server := grpc.NewServer(grpc.UnaryInterceptor(b.cloud.intercept))
		pb.RegisterCloudProviderServer(server, b.cloud)
		expander.RegisterExpanderServer(server, b.cloud)
		go func() { _ = server.Serve(listener) }()
		conn, err := grpc.NewClient("passthrough:///cloud", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		var cancel context.CancelFunc
		b.ctx, cancel = context.WithCancel(t.Context())
		b.cfg = Config{
			Flags: Generation136.Flags(), Kube: b.kube, Provider: conn,
			Observe: func(e Event) { b.mu.Lock(); b.events = append(b.events, e); b.mu.Unlock() },
		}
		b.addGroup("a", 0, 10)
		test(b)
		cancel()
		if b.a != nil {
			b.a.Wait()
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		server.Stop()
	})
}

func (b *bench) use(g Generation) { b.cfg.Generation, b.cfg.Flags = g, g.Flags() }

// start makes a new autoscaler, as a restart of CA does.
func (b *bench) start() {
	b.Helper()
	a, err := New(b.cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.a = a
}

// loop lets a scan interval pass and runs one loop.
func (b *bench) loop() error {
	b.Helper()
	if b.a == nil {
		b.start()
	}
	time.Sleep(b.cfg.Flags.ScanInterval)
	err := b.a.RunOnce(b.ctx)
	synctest.Wait()
	return err
}

// loops runs n loops, none of which may fail.
func (b *bench) loops(n int) {
	b.Helper()
	for range n {
		if err := b.loop(); err != nil {
			b.Fatalf("loop: %v", err)
		}
	}
}

func resources(cpu string) corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse("16Gi"),
		corev1.ResourcePods: resource.MustParse("10"),
	}
}

func (b *bench) addGroup(id string, least, most int32) *cloudGroup {
	g := &cloudGroup{id: id, min: least, max: most, template: &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: id, Labels: map[string]string{"group": id}},
		Status:     corev1.NodeStatus{Capacity: resources("4"), Allocatable: resources("4")},
	}}
	b.cloud.groups = append(b.cloud.groups, g)
	return g
}

func condition(ready bool) []corev1.NodeCondition {
	state := corev1.ConditionFalse
	if ready {
		state = corev1.ConditionTrue
	}
	return []corev1.NodeCondition{{Type: corev1.NodeReady, Status: state, LastTransitionTime: metav1.Now()}}
}

// register makes the instance a Node; its name is the instance's id.
func (b *bench) register(instance string, ready bool) *corev1.Node {
	b.Helper()
	n := b.cloud.group(b.cloud.nodes[instance]).template.DeepCopy()
	n.Name, n.Spec.ProviderID, n.CreationTimestamp = instance, instance, metav1.Now()
	n.Status.Conditions = condition(ready)
	if !ready {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule})
	}
	for _, i := range b.cloud.group(b.cloud.nodes[instance]).instances {
		if i.GetId() == instance {
			i.Status = &pb.InstanceStatus{InstanceState: pb.InstanceStatus_instanceRunning}
		}
	}
	if err := b.kube.Tracker().Add(n); err != nil {
		b.Fatal(err)
	}
	return n
}

// addReady gives a group n ready nodes that CA finds at its start.
func (b *bench) addReady(group string, n int32) (names []string) {
	b.Helper()
	first := b.cloud.bornAs
	b.cloud.grow(group, n)
	for i := first + 1; i <= b.cloud.bornAs; i++ {
		names = append(names, b.register(fmt.Sprintf("i-%02d", i), true).Name)
	}
	return names
}

func (b *bench) node(name string) *corev1.Node {
	b.Helper()
	n, err := b.kube.CoreV1().Nodes().Get(b.ctx, name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return n
}

func (b *bench) update(n *corev1.Node) {
	b.Helper()
	if _, err := b.kube.CoreV1().Nodes().Update(b.ctx, n, metav1.UpdateOptions{}); err != nil {
		b.Fatal(err)
	}
}

// pod adds a pod of that much CPU: pending without a node, running with one.
func (b *bench) pod(name, cpu, node string, change ...func(*corev1.Pod)) {
	b.Helper()
	yes := true
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ci", Name: name, CreationTimestamp: metav1.Now(),
			OwnerReferences: []metav1.OwnerReference{{Kind: "Job", Name: "j", Controller: &yes}},
		},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)},
		}}}},
	}
	if node == "" {
		p.Status.Conditions = []corev1.PodCondition{{
			Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable,
			LastTransitionTime: metav1.Now(),
		}}
	}
	for _, c := range change {
		c(p)
	}
	if err := b.kube.Tracker().Add(p); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) removePod(name string) {
	b.Helper()
	if err := b.kube.CoreV1().Pods("ci").Delete(b.ctx, name, metav1.DeleteOptions{}); err != nil {
		b.Fatal(err)
	}
}

func ofDaemonSet(p *corev1.Pod) { p.OwnerReferences[0].Kind = "DaemonSet" }

func annotated(key, value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations = map[string]string{key: value} }
}

func (b *bench) daemonSet(cpu string) {
	b.Helper()
	d := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Name: "engine"}}
	d.Spec.Template.Spec.Containers = []corev1.Container{{Resources: corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)},
	}}}
	if err := b.kube.Tracker().Add(d); err != nil {
		b.Fatal(err)
	}
}

// wrote fails unless the write RPCs since the last call are these.
func (b *bench) wrote(want ...string) {
	b.Helper()
	b.cloud.mu.Lock()
	defer b.cloud.mu.Unlock()
	if !slices.Equal(b.cloud.writes, want) {
		b.Errorf("writes: %q, want %q", b.cloud.writes, want)
	}
	b.cloud.writes = nil
}

// saw fails unless an event has the kind and the reason.
func (b *bench) saw(kind EventKind, reason string) {
	b.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.ContainsFunc(b.events, func(e Event) bool { return e.Kind == kind && (reason == "" || e.Reason == reason) }) {
		b.Errorf("no %s %q among %v", kind, reason, b.events)
	}
}

func (b *bench) forgetEvents() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = nil
}

// tainted returns the names of nodes with the taint.
func (b *bench) tainted(key string) []string {
	b.Helper()
	list, err := b.kube.CoreV1().Nodes().List(b.ctx, metav1.ListOptions{})
	if err != nil {
		b.Fatal(err)
	}
	names := map[string]bool{}
	for i := range list.Items {
		if hasTaint(&list.Items[i], key) {
			names[list.Items[i].Name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// noteTime notes when something was asked of the API server.
func noteTime(at *[]time.Time) clienttesting.ReactionFunc {
	return func(clienttesting.Action) (bool, runtime.Object, error) {
		*at = append(*at, time.Now())
		return false, nil, nil
	}
}
