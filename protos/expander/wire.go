// Package expander is the wire of cluster-autoscaler's gRPC expander: the
// messages and the service generated from expander.proto, and the readers that
// hide which generation of the wire the other side speaks. It ranks nothing and
// keeps no state.
//
// Readers prefer the new generation and fall back to the old one; they accept
// nil messages, as generated getters do. An answer needs no writer: the client
// reads nothing but the ids of its options.
package expander

// Nodes holds the marshalled v1.Node that is the template of each option's
// group, by group id. The map and its values belong to the message.
func (x *BestOptionsRequest) Nodes() map[string][]byte {
	if nodes := x.GetNodeBytesMap(); len(nodes) > 0 {
		return nodes
	}
	return x.GetNodeMap()
}

// Pods holds the marshalled v1.Pods that the option serves. The slice and its
// elements belong to the message.
func (x *Option) Pods() [][]byte {
	if pods := x.GetPodBytes(); len(pods) > 0 {
		return pods
	}
	return x.GetPod()
}
