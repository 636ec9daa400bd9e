package protos_test

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/hearth-ci/hearth/protos/expander"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

func FuzzExternalgrpc(f *testing.F) { fuzzMessages(f, cloudProvider) }

func FuzzExpander(f *testing.F) { fuzzMessages(f, grpcPlugin) }

// fuzzMessages reads arbitrary bytes as any message of a package. Whatever is
// accepted must survive being written and read again.
func fuzzMessages(f *testing.F, pkg string) {
	messages := generated(pkg).Messages()
	for _, ca := range []dialect{oldCA, newCA} {
		schema := load(f, pkg, ca)
		for i := range messages.Len() {
			m := dynamicpb.NewMessage(schema.Messages().ByName(messages.Get(i).Name()))
			fill(f, m, 1)
			f.Add(uint8(i), protoMarshal(f, m))
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, raw []byte) {
		name := messages.Get(int(which) % messages.Len()).FullName()
		m := newMessage(t, name)
		if proto.Unmarshal(raw, m) != nil {
			return
		}
		read(m)
		written := protoMarshal(t, m)
		again := newMessage(t, name)
		if err := proto.Unmarshal(written, again); err != nil {
			t.Fatalf("reading what was written: %v", err)
		}
		if !proto.Equal(m, again) {
			t.Fatalf("%x\nbecame %x", raw, written)
		}
		if rewritten := protoMarshal(t, again); !bytes.Equal(written, rewritten) {
			t.Fatalf("%x\nwas written differently the second time: %x", written, rewritten)
		}
	})
}

// read runs the hand-written readers over all that m holds.
func read(m proto.Message) {
	switch m := m.(type) {
	case *externalgrpc.NodeGroupAutoscalingOptions:
		externalgrpc.CopyOptions(m)
	case *externalgrpc.NodeGroupAutoscalingOptionsRequest:
		externalgrpc.CopyOptions(m.GetDefaults())
	case *expander.BestOptionsRequest:
		m.Nodes()
		for _, o := range m.GetOptions() {
			o.Pods()
		}
	case *expander.Option:
		m.Pods()
	}
}
