// Package protos_test holds both generated packages to the contract that
// cluster-autoscaler (CA) speaks: contract.txt lists every name, number and type
// of both generations of the wire, and everything here is built from that list.
package protos_test

import (
	_ "embed"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/hearth-ci/hearth/protos/expander"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// A dialect is one way to write contract.txt down as a schema.
type dialect string

const (
	oldCA  dialect = "old"    // CA before 1.34: embedded Kubernetes messages
	newCA  dialect = "new"    // CA from 1.35: bytes and google.protobuf types
	hearth dialect = "hearth" // ours: both at once, the embedded messages as bytes
)

// The packages of contract.txt.
const (
	cloudProvider = "clusterautoscaler.cloudprovider.v1.externalgrpc"
	grpcPlugin    = "grpcplugin"
)

// generated is the proto under test that is meant to be a package of contract.txt.
func generated(pkg string) protoreflect.FileDescriptor {
	switch pkg {
	case cloudProvider:
		return externalgrpc.File_externalgrpc_externalgrpc_proto
	case grpcPlugin:
		return expander.File_expander_expander_proto
	}
	return nil
}

// TestSchema compares the whole descriptors, so that it also fails for a
// message, field, method or service too many.
func TestSchema(t *testing.T) {
	for _, pkg := range []string{cloudProvider, grpcPlugin} {
		t.Run(pkg, func(t *testing.T) {
			got := protodesc.ToFileDescriptorProto(generated(pkg))
			want := schema(t, pkg, hearth)
			for _, f := range []*descriptorpb.FileDescriptorProto{got, want} {
				f.Name, f.Options, f.Dependency = nil, nil, nil // no part of the wire
			}
			opts := cmp.Options{
				protocmp.Transform(),
				protocmp.IgnoreFields(&descriptorpb.FieldDescriptorProto{}, "json_name"),
				protocmp.SortRepeated(func(a, b *descriptorpb.DescriptorProto) bool { return a.GetName() < b.GetName() }),
				protocmp.SortRepeated(func(a, b *descriptorpb.FieldDescriptorProto) bool { return a.GetNumber() < b.GetNumber() }),
			}
			if diff := cmp.Diff(want, got, opts); diff != "" {
				t.Errorf("the proto is not the contract (-contract +proto):\n%s", diff)
			}
		})
	}
}

// TestServiceNames checks what grpc-go registers, which is generated apart from
// the descriptors.
func TestServiceNames(t *testing.T) {
	for _, desc := range []grpc.ServiceDesc{externalgrpc.CloudProvider_ServiceDesc, expander.Expander_ServiceDesc} {
		i := strings.LastIndex(desc.ServiceName, ".")
		file := generated(desc.ServiceName[:i])
		if file == nil {
			t.Fatalf("service %q is of no package of the contract", desc.ServiceName)
		}
		service := file.Services().ByName(protoreflect.Name(desc.ServiceName[i+1:]))
		if service == nil {
			t.Fatalf("service %q is not in its proto", desc.ServiceName)
		}
		if len(desc.Streams) != 0 || len(desc.Methods) != service.Methods().Len() {
			t.Errorf("%s has %d methods and %d streams, want %d and 0",
				desc.ServiceName, len(desc.Methods), len(desc.Streams), service.Methods().Len())
		}
		for _, m := range desc.Methods {
			if service.Methods().ByName(protoreflect.Name(m.MethodName)) == nil {
				t.Errorf("%s has a method %q that its proto has not", desc.ServiceName, m.MethodName)
			}
		}
	}
}

//go:embed contract.txt
var contract string

// schema reads one package of contract.txt as a dialect.
func schema(t testing.TB, pkg string, d dialect) *descriptorpb.FileDescriptorProto {
	t.Helper()
	b := builder{dialect: d, file: &descriptorpb.FileDescriptorProto{
		Syntax:     proto.String("proto3"),
		Name:       proto.String(string(d) + ".proto"),
		Package:    proto.String(pkg),
		Dependency: []string{"google/protobuf/any.proto", "google/protobuf/duration.proto", "google/protobuf/timestamp.proto", "kubernetes.proto"},
	}}
	current := ""
	for n, line := range strings.Split(contract, "\n") {
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || words[0] == "#":
		case words[0] == "package":
			current = words[1]
		case current == pkg:
			if err := b.add(words); err != nil {
				t.Fatalf("contract.txt:%d: %v", n+1, err)
			}
		}
	}
	return b.file
}

// A builder turns the lines of contract.txt into a schema.
type builder struct {
	dialect dialect
	file    *descriptorpb.FileDescriptorProto
	enum    *descriptorpb.EnumDescriptorProto // of the last message, while its values are read
}

func (b *builder) add(words []string) error {
	last := func() *descriptorpb.DescriptorProto { return b.file.MessageType[len(b.file.MessageType)-1] }
	switch {
	case words[0] == "service" && len(words) == 2:
		b.file.Service = append(b.file.Service, &descriptorpb.ServiceDescriptorProto{Name: &words[1]})
	case words[0] == "rpc" && len(words) == 5: // rpc NAME REQUEST -> RESPONSE
		s := b.file.Service[len(b.file.Service)-1]
		s.Method = append(s.Method, &descriptorpb.MethodDescriptorProto{
			Name: &words[1], InputType: b.name(words[2]), OutputType: b.name(words[4]),
		})
	case words[0] == "message" && len(words) == 2:
		b.file.MessageType = append(b.file.MessageType, &descriptorpb.DescriptorProto{Name: &words[1]})
		b.enum = nil
	case words[0] == "enum" && len(words) == 2:
		b.enum = &descriptorpb.EnumDescriptorProto{Name: &words[1]}
		last().EnumType = append(last().EnumType, b.enum)
	case words[0] == "value" && len(words) == 3 && b.enum != nil:
		number, err := strconv.ParseInt(words[2], 10, 32)
		if err != nil {
			return err
		}
		b.enum.Value = append(b.enum.Value, &descriptorpb.EnumValueDescriptorProto{Name: &words[1], Number: proto.Int32(int32(number))})
	case (words[0] == "all" || words[0] == "old" || words[0] == "new") && len(words) >= 4: // GENERATION TYPE NAME NUMBER
		if words[0] != "all" && b.dialect != hearth && string(b.dialect) != words[0] {
			return nil
		}
		return b.field(last(), strings.Join(words[1:len(words)-2], " "), words[len(words)-2], words[len(words)-1])
	default:
		return fmt.Errorf("unknown line %q", words)
	}
	return nil
}

// name is the full name of a message of this package.
func (b *builder) name(message string) *string {
	return proto.String("." + b.file.GetPackage() + "." + message)
}

// field adds a field whose type is written as in a .proto file.
func (b *builder) field(m *descriptorpb.DescriptorProto, typ, name, number string) error {
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil {
		return err
	}
	f := &descriptorpb.FieldDescriptorProto{
		Name: &name, Number: proto.Int32(int32(n)), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
	}
	m.Field = append(m.Field, f)
	switch {
	case strings.HasPrefix(typ, "repeated "):
		f.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
		typ = strings.TrimPrefix(typ, "repeated ")
	case strings.HasPrefix(typ, "map<string,"):
		// A map is a repeated message of keys and values; its name is fixed by
		// the protobuf language.
		entry := &descriptorpb.DescriptorProto{
			Name:    proto.String(strings.ToUpper(name[:1]) + name[1:] + "Entry"),
			Options: &descriptorpb.MessageOptions{MapEntry: proto.Bool(true)},
		}
		if err := b.field(entry, "string", "key", "1"); err != nil {
			return err
		}
		if err := b.field(entry, strings.TrimSuffix(strings.TrimPrefix(typ, "map<string,"), ">"), "value", "2"); err != nil {
			return err
		}
		m.NestedType = append(m.NestedType, entry)
		f.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
		typ = m.GetName() + "." + entry.GetName()
	}
	b.setType(m, f, typ)
	return nil
}

func (b *builder) setType(m *descriptorpb.DescriptorProto, f *descriptorpb.FieldDescriptorProto, typ string) {
	scalars := map[string]descriptorpb.FieldDescriptorProto_Type{
		"string": descriptorpb.FieldDescriptorProto_TYPE_STRING,
		"bytes":  descriptorpb.FieldDescriptorProto_TYPE_BYTES,
		"bool":   descriptorpb.FieldDescriptorProto_TYPE_BOOL,
		"double": descriptorpb.FieldDescriptorProto_TYPE_DOUBLE,
		"int32":  descriptorpb.FieldDescriptorProto_TYPE_INT32,
		"int64":  descriptorpb.FieldDescriptorProto_TYPE_INT64,
	}
	foreign := map[string]string{ // as CA declares it
		"v1.Node":       ".kubernetes.Node",
		"v1.Pod":        ".kubernetes.Pod",
		"meta.Time":     ".kubernetes.Time",
		"meta.Duration": ".kubernetes.Duration",
		"Any":           ".google.protobuf.Any",
		"Timestamp":     ".google.protobuf.Timestamp",
		"Duration":      ".google.protobuf.Duration",
	}
	if b.dialect == hearth { // as we declare it
		scalars["v1.Node"] = descriptorpb.FieldDescriptorProto_TYPE_BYTES
		scalars["v1.Pod"] = descriptorpb.FieldDescriptorProto_TYPE_BYTES
		foreign["meta.Time"] = *b.name("LegacyTime")
		foreign["meta.Duration"] = *b.name("LegacyDuration")
	}
	if scalar, ok := scalars[typ]; ok {
		f.Type = scalar.Enum()
		return
	}
	f.Type = descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum()
	if name, ok := foreign[typ]; ok {
		f.TypeName = proto.String(name)
		return
	}
	for _, e := range m.GetEnumType() {
		if e.GetName() == typ {
			f.Type = descriptorpb.FieldDescriptorProto_TYPE_ENUM.Enum()
			typ = m.GetName() + "." + typ
		}
	}
	f.TypeName = b.name(typ)
}
