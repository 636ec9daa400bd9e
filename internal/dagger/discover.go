package dagger

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Found is what the pods of a cluster say of its engines, ordered by node.
type Found struct {
	// Targets are the engines that can be read: one on a node.
	Targets []Target
	// Unknown has a reading for every other node with an engine pod: why its
	// engine cannot be read.
	Unknown []model.EngineReading
	// Stray are the engine pods on nodes of no group, which are ignored.
	Stray []model.Pod
}

// Discover finds the engines among pods: engine pods that are bound to a node and
// not over. grouped says whether a node is of a node group; port is where all
// engines serve their metrics.
//
// Two pods that have an address on one node are two engines, or an old one and
// its successor: neither is read, because neither speaks for the node. The same
// goes for pods that share an address across nodes, as the old and the new pod
// of a node that came back under another name may for a while.
func Discover(pods []model.Pod, grouped func(model.NodeName) bool, port uint16, now time.Time) Found {
	var found Found
	engines := map[model.NodeName][]model.Pod{}
	for _, p := range pods {
		switch {
		case p.Kind != model.PodEngine || p.Node == "" || !p.Finished.IsZero():
		case !grouped(p.Node):
			found.Stray = append(found.Stray, p)
		default:
			engines[p.Node] = append(engines[p.Node], p)
		}
	}
	at := map[netip.AddrPort][]model.NodeName{}
	for node, here := range engines {
		t, why := choose(here, port)
		if why != "" {
			found.Unknown = append(found.Unknown, unknown(node, t.Pod, now, why))
			continue
		}
		found.Targets = append(found.Targets, t)
		at[t.Addr] = append(at[t.Addr], node)
	}
	found.Targets = slices.DeleteFunc(found.Targets, func(t Target) bool {
		nodes := at[t.Addr]
		if len(nodes) == 1 {
			return false
		}
		slices.Sort(nodes)
		why := fmt.Sprintf("its engine has the same address as that of another node: %s on %q", t.Addr, nodes)
		found.Unknown = append(found.Unknown, unknown(t.Node, t.Pod, now, why))
		return true
	})
	slices.SortFunc(found.Targets, func(a, b Target) int { return cmp.Compare(a.Node, b.Node) })
	slices.SortFunc(found.Unknown, func(a, b model.EngineReading) int { return cmp.Compare(a.Node, b.Node) })
	slices.SortFunc(found.Stray, func(a, b model.Pod) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(podName(a), podName(b)))
	})
	return found
}

func unknown(node model.NodeName, pod string, at time.Time, why string) model.EngineReading {
	return model.EngineReading{Node: node, Pod: pod, At: at, CacheBytes: -1, Unknown: why}
}

// choose returns the engine to read among the engine pods of one node, or why
// there is none.
func choose(pods []model.Pod, port uint16) (t Target, why string) {
	addressed := slices.DeleteFunc(slices.Clone(pods), func(p model.Pod) bool { return p.IP == "" })
	switch len(addressed) {
	case 0:
		return Target{}, "its engine's pod has no address yet"
	case 1:
	default:
		var names []string
		for _, p := range addressed {
			names = append(names, podName(p))
		}
		slices.Sort(names)
		return Target{}, "it has more than one engine: " + strings.Join(names, ", ")
	}
	p := addressed[0]
	t = Target{Node: p.Node, Pod: podName(p)}
	if p.Engine != nil {
		t.Version = tag(p.Engine.Image)
	}
	ip, err := netip.ParseAddr(p.IP)
	if err != nil || ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() {
		// Link-local addresses are where clouds serve credentials.
		return t, fmt.Sprintf("its engine's address %.50q is not one of a pod", p.IP)
	}
	t.Addr = netip.AddrPortFrom(ip.Unmap(), port)
	return t, ""
}

func podName(p model.Pod) string { return p.Namespace + "/" + p.Name }

// tag returns the tag of an image, empty when it has none. Dagger's images are
// tagged with the engine's version.
func tag(image string) string {
	image, _, _ = strings.Cut(image, "@")
	_, tag, _ := strings.Cut(image[strings.LastIndexByte(image, '/')+1:], ":")
	return tag
}
