package dagger

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestDiscover(t *testing.T) {
	pod := func(name string, node model.NodeName, ip string, change ...func(*model.Pod)) model.Pod {
		p := model.Pod{
			Namespace: "dagger", Name: name, Node: node, IP: ip, Kind: model.PodEngine,
			Engine: &model.EngineContainer{Image: "registry.dagger.io/engine:v0.21.8"},
		}
		for _, c := range change {
			c(&p)
		}
		return p
	}
	over := func(p *model.Pod) { p.Finished = start }
	target := func(name string, node model.NodeName, addr string) Target {
		return Target{Node: node, Pod: "dagger/" + name, Addr: netip.MustParseAddrPort(addr), Version: "v0.21.8"}
	}
	no := func(node model.NodeName, pod, why string) model.EngineReading {
		return model.EngineReading{Node: node, Pod: pod, At: start, CacheBytes: -1, Unknown: why}
	}
	for _, tt := range []struct {
		name string
		pods []model.Pod
		want Found
	}{
		{"none", nil, Found{}},
		{"one each", []model.Pod{pod("y", "b", "10.0.0.2"), pod("x", "a", "10.0.0.1")},
			Found{Targets: []Target{target("x", "a", "10.0.0.1:9090"), target("y", "b", "10.0.0.2:9090")}}},
		{"IPv6", []model.Pod{pod("x", "a", "fd00::1")}, Found{Targets: []Target{target("x", "a", "[fd00::1]:9090")}}},
		{"other pods", []model.Pod{{Node: "a", IP: "10.0.0.1", Kind: model.PodRunner}, {Node: "a", IP: "10.0.0.1"}}, Found{}},
		{"not bound", []model.Pod{pod("x", "", "")}, Found{}},
		{"over", []model.Pod{pod("x", "a", "10.0.0.1", over)}, Found{}},
		{"over, and its successor", []model.Pod{pod("x", "a", "10.0.0.1", over), pod("y", "a", "10.0.0.2")},
			Found{Targets: []Target{target("y", "a", "10.0.0.2:9090")}}},
		{"its successor waits", []model.Pod{pod("x", "a", "10.0.0.1"), pod("y", "a", "")},
			Found{Targets: []Target{target("x", "a", "10.0.0.1:9090")}}},
		{"no address", []model.Pod{pod("x", "a", "")}, Found{Unknown: []model.EngineReading{no("a", "", "its engine's pod has no address yet")}}},
		{"two on a node", []model.Pod{pod("y", "a", "10.0.0.2"), pod("z", "b", "10.0.0.3"), pod("x", "a", "10.0.0.1")}, Found{
			Targets: []Target{target("z", "b", "10.0.0.3:9090")},
			Unknown: []model.EngineReading{no("a", "", "it has more than one engine: dagger/x, dagger/y")},
		}},
		{"on a node of no group", []model.Pod{pod("x", "support-1", "10.0.0.1"), pod("y", "a", "10.0.0.2")}, Found{
			Targets: []Target{target("y", "a", "10.0.0.2:9090")},
			Stray:   []model.Pod{pod("x", "support-1", "10.0.0.1")},
		}},
		{"a node under two names", []model.Pod{pod("x", "old", "10.0.0.1"), pod("y", "new", "10.0.0.1"), pod("z", "b", "10.0.0.2")}, Found{
			Targets: []Target{target("z", "b", "10.0.0.2:9090")},
			Unknown: []model.EngineReading{
				no("new", "dagger/y", `its engine has the same address as that of another node: 10.0.0.1:9090 on ["new" "old"]`),
				no("old", "dagger/x", `its engine has the same address as that of another node: 10.0.0.1:9090 on ["new" "old"]`),
			},
		}},
		{"one address in two notations", []model.Pod{pod("x", "a", "10.0.0.1"), pod("y", "b", "::ffff:10.0.0.1")}, Found{
			Unknown: []model.EngineReading{
				no("a", "dagger/x", `its engine has the same address as that of another node: 10.0.0.1:9090 on ["a" "b"]`),
				no("b", "dagger/y", `its engine has the same address as that of another node: 10.0.0.1:9090 on ["a" "b"]`),
			},
		}},
		{"where clouds keep credentials", []model.Pod{pod("x", "a", "169.254.169.254")},
			Found{Unknown: []model.EngineReading{no("a", "dagger/x", `its engine's address "169.254.169.254" is not one of a pod`)}}},
		{"the same by IPv6", []model.Pod{pod("x", "a", "::ffff:169.254.169.254")},
			Found{Unknown: []model.EngineReading{no("a", "dagger/x", `its engine's address "::ffff:169.254.169.254" is not one of a pod`)}}},
		{"a name", []model.Pod{pod("x", "a", "metadata.google.internal")},
			Found{Unknown: []model.EngineReading{no("a", "dagger/x", `its engine's address "metadata.google.internal" is not one of a pod`)}}},
		{"an address and a port", []model.Pod{pod("x", "a", "10.0.0.1:80")},
			Found{Unknown: []model.EngineReading{no("a", "dagger/x", `its engine's address "10.0.0.1:80" is not one of a pod`)}}},
		{"everybody", []model.Pod{pod("x", "a", "0.0.0.0")},
			Found{Unknown: []model.EngineReading{no("a", "dagger/x", `its engine's address "0.0.0.0" is not one of a pod`)}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Discover(tt.pods, func(n model.NodeName) bool { return n != "support-1" }, 9090, start)
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestTag(t *testing.T) {
	for image, want := range map[string]string{
		"registry.dagger.io/engine:v0.21.8":                "v0.21.8",
		"registry.dagger.io/engine:v0.21.8@sha256:0123abc": "v0.21.8",
		"registry.dagger.io/engine@sha256:0123abc":         "",
		"localhost:5000/engine":                            "",
		"localhost:5000/engine:v1":                         "v1",
		"engine:v1":                                        "v1",
		"":                                                 "",
	} {
		if got := tag(image); got != want {
			t.Errorf("tag(%q) = %q; want %q", image, got, want)
		}
	}
}
