package protos_test

import (
	"encoding/hex"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/protos/expander"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// TestEveryMessage sends every message with every field set from a CA of either
// generation to us and back: we must know each field, and lose none.
func TestEveryMessage(t *testing.T) {
	for _, ca := range []dialect{oldCA, newCA} {
		for _, pkg := range []string{cloudProvider, grpcPlugin} {
			messages := load(t, pkg, ca).Messages()
			for i := range messages.Len() {
				desc := messages.Get(i)
				t.Run(fmt.Sprintf("%s/%s", ca, desc.FullName()), func(t *testing.T) {
					sent := dynamicpb.NewMessage(desc)
					fill(t, sent, 1)
					ours := newMessage(t, desc.FullName())
					transfer(t, sent, ours)
					noUnknowns(t, ours.ProtoReflect())
					back := dynamicpb.NewMessage(desc)
					transfer(t, ours, back)
					if diff := cmp.Diff(sent, back, protocmp.Transform()); diff != "" {
						t.Errorf("what came back is not what was sent (-sent +back):\n%s", diff)
					}
				})
			}
		}
	}
}

func TestTemplate(t *testing.T) {
	node := exampleNode()
	answer := externalgrpc.NewTemplateNodeInfoResponse(marshal(t, node))

	seenByOld := receive(t, oldCA, answer)
	embedded := seenByOld.Get(field(t, seenByOld, "nodeInfo")).Message().Interface()
	seenByNew := receive(t, newCA, answer)
	inBytes := seenByNew.Get(field(t, seenByNew, "nodeBytes")).Bytes()
	for ca, raw := range map[dialect][]byte{oldCA: protoMarshal(t, embedded), newCA: inBytes} {
		got := &corev1.Node{}
		if err := got.Unmarshal(raw); err != nil {
			t.Fatalf("%s: %v", ca, err)
		}
		if !equality.Semantic.DeepEqual(node, got) {
			t.Errorf("%s sees another node:\n%s", ca, cmp.Diff(node, got))
		}
	}
}

func TestOptions(t *testing.T) {
	const unneeded, unready, provision = 10*time.Second + 1, 20 * time.Minute, 15 * time.Minute
	fields := map[dialect][3]string{
		oldCA: {"scaleDownUnneededTime", "scaleDownUnreadyTime", "MaxNodeProvisionTime"},
		newCA: {"scaleDownUnneededDuration", "scaleDownUnreadyDuration", "MaxNodeProvisionDuration"},
	}
	for _, ca := range []dialect{oldCA, newCA} {
		t.Run(string(ca), func(t *testing.T) {
			// CA's defaults, as it writes them.
			sent := dynamicpb.NewMessage(load(t, cloudProvider, ca).Messages().ByName("NodeGroupAutoscalingOptionsRequest"))
			sent.Set(field(t, sent, "id"), protoreflect.ValueOfString("runners-a"))
			defaults := sent.Mutable(field(t, sent, "defaults")).Message()
			defaults.Set(field(t, defaults, "scaleDownUtilizationThreshold"), protoreflect.ValueOfFloat64(0.5))
			defaults.Set(field(t, defaults, "scaleDownGpuUtilizationThreshold"), protoreflect.ValueOfFloat64(0.25))
			defaults.Set(field(t, defaults, "zeroOrMaxNodeScaling"), protoreflect.ValueOfBool(true))
			for i, d := range []time.Duration{10 * time.Minute, unready, provision} {
				setDuration(t, defaults, fields[ca][i], d)
			}

			request := &externalgrpc.NodeGroupAutoscalingOptionsRequest{}
			transfer(t, sent, request)
			if got := request.GetDefaults().ScaleDownUnneeded(); got != 10*time.Minute {
				t.Fatalf("default unneeded time %v, want 10m", got)
			}
			options := externalgrpc.CopyOptions(request.GetDefaults())
			options.SetScaleDownUnneeded(unneeded)
			options.IgnoreDaemonSetsUtilization = true
			answer := &externalgrpc.NodeGroupAutoscalingOptionsResponse{NodeGroupAutoscalingOptions: options}

			// The answer must not depend on who asked.
			for _, reader := range []dialect{oldCA, newCA} {
				seen := receive(t, reader, answer)
				got := seen.Get(field(t, seen, "nodeGroupAutoscalingOptions")).Message()
				for i, want := range []time.Duration{unneeded, unready, provision} {
					if d := duration(t, got, fields[reader][i]); d != want {
						t.Errorf("%s sees %s %v, want %v", reader, fields[reader][i], d, want)
					}
				}
				for name, want := range map[protoreflect.Name]any{
					"scaleDownUtilizationThreshold": 0.5, "scaleDownGpuUtilizationThreshold": 0.25,
					"zeroOrMaxNodeScaling": true, "ignoreDaemonSetsUtilization": true,
				} {
					if v := got.Get(field(t, got, name)).Interface(); v != want {
						t.Errorf("%s sees %s %v, want %v", reader, name, v, want)
					}
				}
			}
		})
	}
}

// TestOptionsOfBothGenerations is what late 1.34 patches send.
func TestOptionsOfBothGenerations(t *testing.T) {
	o := &externalgrpc.NodeGroupAutoscalingOptions{}
	o.SetScaleDownUnneeded(time.Minute)
	o.SetScaleDownUnready(2 * time.Minute)
	o.SetMaxNodeProvision(3 * time.Minute)
	o.ScaleDownUnneededTime.Duration = 0
	o.ScaleDownUnreadyTime.Duration = 0
	o.MaxNodeProvisionTime.Duration = 0
	if o.ScaleDownUnneeded() != time.Minute || o.ScaleDownUnready() != 2*time.Minute || o.MaxNodeProvision() != 3*time.Minute {
		t.Errorf("the new form does not win: %v", o)
	}
}

func TestOptionsUnset(t *testing.T) {
	if got := externalgrpc.CopyOptions(nil); got != nil {
		t.Errorf("CopyOptions(nil) = %v, want nil: cluster-autoscaler's defaults", got)
	}
	var none *externalgrpc.NodeGroupAutoscalingOptions
	if none.ScaleDownUnneeded() != 0 || none.ScaleDownUnready() != 0 || none.MaxNodeProvision() != 0 {
		t.Error("durations of nil options are not 0")
	}
}

// TestOptionsBytes spells the durations' bytes out, apart from any schema.
func TestOptionsBytes(t *testing.T) {
	const (
		old10s   = "1a06" + "08" + "80c8afa025"           // field 3: {1: 10,000,000,000}
		new10s   = "4202" + "080a"                        // field 8: {1: 10}
		new500ms = "4206" + "10" + "80cab5ee01"           // field 8: {2: 500,000,000}
		old500ms = "1a06" + "08" + "80cab5ee01"           // field 3: {1: 500,000,000}
		oldUnset = "1a00"                                 // field 3: {}
		oldMinus = "1a0b" + "08" + "ffffffffffffffffff01" // field 3: {1: -1}
	)
	for raw, want := range map[string]time.Duration{
		old10s: 10 * time.Second, new10s: 10 * time.Second, old10s + new10s: 10 * time.Second,
		old500ms: 500 * time.Millisecond, new500ms: 500 * time.Millisecond,
		oldUnset: 0, oldMinus: -1, "": 0,
	} {
		o := &externalgrpc.NodeGroupAutoscalingOptions{}
		if err := proto.Unmarshal(unhex(t, raw), o); err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if got := o.ScaleDownUnneeded(); got != want {
			t.Errorf("%s reads as %v, want %v", raw, got, want)
		}
	}
	o := &externalgrpc.NodeGroupAutoscalingOptions{}
	o.SetScaleDownUnneeded(10 * time.Second)
	if got := protoMarshal(t, o); hex.EncodeToString(got) != old10s+new10s {
		t.Errorf("10 s is written as %x, want %s", got, old10s+new10s)
	}
}

// TestLegacyTypes holds our stand-ins to what Kubernetes writes.
func TestLegacyTypes(t *testing.T) {
	at := metav1.NewTime(time.Unix(1_700_000_000, 123_456_789))
	gotTime := &externalgrpc.LegacyTime{}
	if err := proto.Unmarshal(marshal(t, &at), gotTime); err != nil {
		t.Fatal(err)
	}
	// Kubernetes' Time has a resolution of seconds on the wire.
	if want := (&externalgrpc.LegacyTime{Seconds: 1_700_000_000}); !proto.Equal(gotTime, want) {
		t.Errorf("got time %v, want %v", gotTime, want)
	}
	gotDuration := &externalgrpc.LegacyDuration{}
	if err := proto.Unmarshal(marshal(t, &metav1.Duration{Duration: 90 * time.Second}), gotDuration); err != nil {
		t.Fatal(err)
	}
	if want := (&externalgrpc.LegacyDuration{Duration: 90e9}); !proto.Equal(gotDuration, want) {
		t.Errorf("got duration %v, want %v", gotDuration, want)
	}
}

func TestPricing(t *testing.T) {
	pod, start := examplePod("job-1"), metav1.NewTime(time.Unix(1_700_000_000, 0))
	for ca, raw := range map[dialect][]byte{
		oldCA: record(part{1, marshal(t, pod)}, part{2, marshal(t, &start)}),
		newCA: record(part{4, marshal(t, pod)}, part{5, protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 1_700_000_000)}),
	} {
		request := &externalgrpc.PricingPodPriceRequest{}
		if err := proto.Unmarshal(raw, request); err != nil {
			t.Fatal(err)
		}
		got := map[dialect][]byte{oldCA: request.GetPod(), newCA: request.GetPodBytes()}[ca]
		seconds := map[dialect]int64{oldCA: request.GetStartTime().GetSeconds(), newCA: request.GetStartTimestamp().GetSeconds()}[ca]
		if samePod(t, got, pod); seconds != start.Unix() {
			t.Errorf("%s: start %d, want %d", ca, seconds, start.Unix())
		}
	}
}

func TestExpander(t *testing.T) {
	node, pods := exampleNode(), []*corev1.Pod{examplePod("job-1"), examplePod("job-2")}
	for ca, numbers := range map[dialect]struct{ pods, nodes protowire.Number }{
		oldCA: {pods: 4, nodes: 2}, newCA: {pods: 5, nodes: 3},
	} {
		t.Run(string(ca), func(t *testing.T) {
			option := record(part{1, []byte("runners-a")}, part{numbers.pods, marshal(t, pods[0])}, part{numbers.pods, marshal(t, pods[1])})
			request := &expander.BestOptionsRequest{}
			raw := record(part{1, option}, part{numbers.nodes, record(part{1, []byte("runners-a")}, part{2, marshal(t, node)})})
			if err := proto.Unmarshal(raw, request); err != nil {
				t.Fatal(err)
			}
			got := &corev1.Node{}
			if err := got.Unmarshal(request.Nodes()["runners-a"]); err != nil {
				t.Fatal(err)
			}
			if !equality.Semantic.DeepEqual(node, got) || len(request.Nodes()) != 1 {
				t.Errorf("got nodes %v, want one: %v", request.Nodes(), cmp.Diff(node, got))
			}
			if n := len(request.GetOptions()[0].Pods()); n != len(pods) {
				t.Fatalf("got %d pods, want %d", n, len(pods))
			}
			for i, raw := range request.GetOptions()[0].Pods() {
				samePod(t, raw, pods[i])
			}

			// An option of the request is an answer that its sender can read.
			answer := &expander.BestOptionsResponse{Options: request.GetOptions()}
			seen := dynamicpb.NewMessage(load(t, grpcPlugin, ca).Messages().ByName("BestOptionsResponse"))
			transfer(t, answer, seen)
			best := seen.Get(field(t, seen, "options")).List()
			if best.Len() != 1 {
				t.Fatalf("CA sees %d options, want 1", best.Len())
			}
			chosen := best.Get(0).Message()
			if id := chosen.Get(field(t, chosen, "nodeGroupId")).String(); id != "runners-a" {
				t.Errorf("CA sees option %q, want runners-a", id)
			}
		})
	}
}

// TestExpanderOfBothGenerations is what late 1.34 patches send.
func TestExpanderOfBothGenerations(t *testing.T) {
	old, recent := []byte("old"), []byte("new")
	option := &expander.Option{Pod: [][]byte{old}, PodBytes: [][]byte{recent}}
	if diff := cmp.Diff([][]byte{recent}, option.Pods()); diff != "" {
		t.Errorf("pods: the new form does not win:\n%s", diff)
	}
	request := &expander.BestOptionsRequest{
		NodeMap:      map[string][]byte{"a": old},
		NodeBytesMap: map[string][]byte{"a": recent},
	}
	if diff := cmp.Diff(map[string][]byte{"a": recent}, request.Nodes()); diff != "" {
		t.Errorf("nodes: the new form does not win:\n%s", diff)
	}
}

// load makes a package usable in CA's dialect.
func load(t testing.TB, pkg string, ca dialect) protoreflect.FileDescriptor {
	t.Helper()
	kubernetes, err := protodesc.NewFile(kubernetesSchema(), nil)
	if err != nil {
		t.Fatal(err)
	}
	file, err := protodesc.NewFile(schema(t, pkg, ca), resolver{kubernetes})
	if err != nil {
		t.Fatalf("package %s as %s: %v", pkg, ca, err)
	}
	return file
}

// A resolver finds kubernetes.proto beside what the process has registered.
type resolver struct{ kubernetes protoreflect.FileDescriptor }

func (r resolver) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if path == r.kubernetes.Path() {
		return r.kubernetes, nil
	}
	return protoregistry.GlobalFiles.FindFileByPath(path)
}

func (r resolver) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if d := r.kubernetes.Messages().ByName(name.Name()); d != nil && d.FullName() == name {
		return d, nil
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(name)
}

// kubernetesSchema declares what the old generation embeds. Node and Pod have
// no fields here: their content stays as unknown fields, byte for byte, for
// Kubernetes' own types to read.
func kubernetesSchema() *descriptorpb.FileDescriptorProto {
	scalar := func(name string, number int32, typ descriptorpb.FieldDescriptorProto_Type) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{
			Name: proto.String(name), Number: proto.Int32(number), Type: typ.Enum(),
			Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
		}
	}
	return &descriptorpb.FileDescriptorProto{
		Syntax: proto.String("proto3"), Name: proto.String("kubernetes.proto"), Package: proto.String("kubernetes"),
		MessageType: []*descriptorpb.DescriptorProto{
			{Name: proto.String("Node")},
			{Name: proto.String("Pod")},
			{Name: proto.String("Time"), Field: []*descriptorpb.FieldDescriptorProto{
				scalar("seconds", 1, descriptorpb.FieldDescriptorProto_TYPE_INT64),
				scalar("nanos", 2, descriptorpb.FieldDescriptorProto_TYPE_INT32),
			}},
			{Name: proto.String("Duration"), Field: []*descriptorpb.FieldDescriptorProto{
				scalar("duration", 1, descriptorpb.FieldDescriptorProto_TYPE_INT64),
			}},
		},
	}
}

// newMessage makes a message of the generated type.
func newMessage(t testing.TB, name protoreflect.FullName) proto.Message {
	t.Helper()
	typ, err := protoregistry.GlobalTypes.FindMessageByName(name)
	if err != nil {
		t.Fatalf("message %s: %v", name, err)
	}
	return typ.New().Interface()
}

// fill sets every field to a value of its own, lists and maps to two elements.
func fill(t testing.TB, m protoreflect.Message, n int) int {
	t.Helper()
	if name := m.Descriptor().FullName(); name == "kubernetes.Node" || name == "kubernetes.Pod" {
		m.SetUnknown(marshal(t, exampleNode()))
		return n
	}
	value := func(f protoreflect.FieldDescriptor, fresh func() protoreflect.Value) protoreflect.Value {
		n++
		switch f.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(fmt.Sprintf("%s-%d", f.Name(), n))
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes(fmt.Appendf(nil, "%s-%d", f.Name(), n))
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case protoreflect.DoubleKind:
			return protoreflect.ValueOfFloat64(float64(n) + 0.5)
		case protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(int32(n))
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(int64(n) << 33)
		case protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(f.Enum().Values().Get(f.Enum().Values().Len() - 1).Number())
		case protoreflect.MessageKind:
			v := fresh()
			n = fill(t, v.Message(), n)
			return v
		default:
			t.Fatalf("field %s: the contract has no %s", f.FullName(), f.Kind())
			return protoreflect.Value{}
		}
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		switch f := fields.Get(i); {
		case f.IsMap():
			for range 2 {
				key := value(f.MapKey(), nil).MapKey()
				m.Mutable(f).Map().Set(key, value(f.MapValue(), m.Mutable(f).Map().NewValue))
			}
		case f.IsList():
			for range 2 {
				m.Mutable(f).List().Append(value(f, m.Mutable(f).List().NewElement))
			}
		default:
			m.Set(f, value(f, func() protoreflect.Value { return m.NewField(f) }))
		}
	}
	return n
}

// noUnknowns fails for any field that the generated type does not know.
func noUnknowns(t testing.TB, m protoreflect.Message) {
	t.Helper()
	if raw := m.GetUnknown(); len(raw) > 0 {
		t.Errorf("%s does not know the fields in %x", m.Descriptor().FullName(), raw)
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Kind() == protoreflect.MessageKind {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					noUnknowns(t, v.Message())
					return true
				})
			}
		case f.Kind() != protoreflect.MessageKind:
		case f.IsList():
			for i := range v.List().Len() {
				noUnknowns(t, v.List().Get(i).Message())
			}
		default:
			noUnknowns(t, v.Message())
		}
		return true
	})
}

// transfer sends a message over the wire to a reader with another schema.
func transfer(t testing.TB, from, to proto.Message) {
	t.Helper()
	if err := proto.Unmarshal(protoMarshal(t, from), to); err != nil {
		t.Fatalf("reading %s: %v", from.ProtoReflect().Descriptor().FullName(), err)
	}
}

// receive is what CA sees of an answer of ours.
func receive(t testing.TB, ca dialect, answer proto.Message) *dynamicpb.Message {
	t.Helper()
	seen := dynamicpb.NewMessage(load(t, cloudProvider, ca).Messages().ByName(answer.ProtoReflect().Descriptor().Name()))
	transfer(t, answer, seen)
	return seen
}

func field(t testing.TB, m protoreflect.Message, name protoreflect.Name) protoreflect.FieldDescriptor {
	t.Helper()
	f := m.Descriptor().Fields().ByName(name)
	if f == nil {
		t.Fatalf("%s has no field %s", m.Descriptor().FullName(), name)
	}
	return f
}

// setDuration writes a meta/v1 or a google.protobuf Duration, whichever the
// field is.
func setDuration(t testing.TB, m protoreflect.Message, name string, d time.Duration) {
	t.Helper()
	v := m.Mutable(field(t, m, protoreflect.Name(name))).Message()
	if nanos := v.Descriptor().Fields().ByName("nanos"); nanos != nil {
		v.Set(field(t, v, "seconds"), protoreflect.ValueOfInt64(int64(d/time.Second)))
		v.Set(nanos, protoreflect.ValueOfInt32(int32(d%time.Second)))
		return
	}
	v.Set(field(t, v, "duration"), protoreflect.ValueOfInt64(int64(d)))
}

// duration reads what setDuration writes.
func duration(t testing.TB, m protoreflect.Message, name string) time.Duration {
	t.Helper()
	v := m.Get(field(t, m, protoreflect.Name(name))).Message()
	if nanos := v.Descriptor().Fields().ByName("nanos"); nanos != nil {
		return time.Duration(v.Get(field(t, v, "seconds")).Int())*time.Second + time.Duration(v.Get(nanos).Int())
	}
	return time.Duration(v.Get(field(t, v, "duration")).Int())
}

// A part is one length-delimited field of a message.
type part struct {
	number  protowire.Number
	content []byte
}

// record writes a message by hand.
func record(parts ...part) []byte {
	var raw []byte
	for _, p := range parts {
		raw = protowire.AppendTag(raw, p.number, protowire.BytesType)
		raw = protowire.AppendBytes(raw, p.content)
	}
	return raw
}

func protoMarshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// marshal writes a Kubernetes object as CA does.
func marshal(t testing.TB, object interface{ Marshal() ([]byte, error) }) []byte {
	t.Helper()
	raw, err := object.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	raw, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func samePod(t testing.TB, raw []byte, want *corev1.Pod) {
	t.Helper()
	got := &corev1.Pod{}
	if err := got.Unmarshal(raw); err != nil {
		t.Fatal(err)
	}
	if !equality.Semantic.DeepEqual(want, got) {
		t.Errorf("another pod came through:\n%s", cmp.Diff(want, got))
	}
}

func exampleNode() *corev1.Node {
	resources := corev1.ResourceList{
		corev1.ResourceCPU:    resource.MustParse("7910m"),
		corev1.ResourceMemory: resource.MustParse("30Gi"),
		corev1.ResourcePods:   resource.MustParse("110"),
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name:   "runners-a-template",
			Labels: map[string]string{corev1.LabelHostname: "runners-a-template", corev1.LabelTopologyZone: "a"},
		},
		Spec: corev1.NodeSpec{
			ProviderID: "kwok://runners-a/template",
			Taints:     []corev1.Taint{{Key: "ci", Value: "runners", Effect: corev1.TaintEffectNoSchedule}},
		},
		Status: corev1.NodeStatus{
			Capacity: resources, Allocatable: resources,
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
		},
	}
}

func examplePod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "ci",
			Annotations: map[string]string{"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
		},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "runner", Image: "runner",
			Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2")}},
		}}},
	}
}
