package explain

import (
	"fmt"
	"io"
	"time"
)

// Pod is what is known of where one runner pod went, or waits to go.
type Pod struct {
	At        time.Time `json:"at"`
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	State     PodState  `json:"state"`
	// Key is the cache key of the pod, empty when it has none; Job that of the
	// job which its runner has picked up, where that says more.
	Key string `json:"key,omitempty"`
	Job string `json:"job,omitempty"`
	// Asked is the node group that the pod asks for, empty when it does not.
	Asked string `json:"asked_node_group,omitempty"`
	// Hint is what the placement webhook did, empty when it did not see the pod.
	Hint    string    `json:"hint,omitempty"`
	Created time.Time `json:"created"`
	// Node and Group are where it went; empty while it waits.
	Node  string `json:"node,omitempty"`
	Group string `json:"node_group,omitempty"`
	// Placement is what there was to choose from when it was bound, or is now
	// while it waits; nil when it was bound before this process led.
	Placement *Placement `json:"placement,omitempty"`
}

// PodState is how far a pod has come.
type PodState string

// States of pods.
const (
	PodWaiting PodState = "waiting" // it has no node yet
	PodRunning PodState = "running"
	PodEnded   PodState = "ended"
)

// Placement is what a pod could choose from at one moment.
type Placement struct {
	At time.Time `json:"at"`
	// Warmth is that of the pod's own node for its key, 0 when it was cold or
	// the pod waits.
	Warmth float64 `json:"warmth"`
	// Warm is how many other nodes were warm for the key, Others the warmest
	// MaxOthers of them.
	Warm   int     `json:"other_warm_nodes"`
	Others []Other `json:"others,omitempty"`
}

// MaxOthers is how many other nodes a Placement lists.
const MaxOthers = 5

// Other is a node that was warm for a pod's key and did not get it.
type Other struct {
	Name     string  `json:"name,omitempty"`
	Instance string  `json:"instance"`
	Group    string  `json:"node_group"`
	Warmth   float64 `json:"warmth"`
	// Why it did not get the pod. Code is one of parked, leaving, starting,
	// not-ready, cordoned, full, other-group and room.
	Why Reason `json:"why"`
}

// WriteText writes where the pod went and why not elsewhere. label is the name
// of the label of nodes that are warm for its key.
func (d *Pod) WriteText(w io.Writer, label string) error {
	return printed(w, d.At, func(p printer) {
		p.linef("pod %s/%s", d.Namespace, d.Name)
		if d.Key == "" {
			p.item("key", "none: it bears no label or annotation that makes one; set the label hearth.dev/cache-key, or hearth.dev/cache-keys of its node group")
		} else {
			p.item("key", "%s (node label %s)", d.Key, label)
		}
		if d.Job != "" {
			p.item("job", "%s, known only since its runner picked it up: it counts as a second key of the node", d.Job)
		}
		if d.Asked != "" {
			p.item("asks for", "node group %s", d.Asked)
		}
		switch {
		case d.Hint != "":
			p.item("webhook", "%s", d.Hint)
		case d.Key != "":
			p.item("webhook", "it did not see this pod: is the namespace labelled hearth.dev/placement=enabled, and placement in the config?")
		}
		d.went(p)
		d.others(p)
	})
}

// went writes where the pod is.
func (d *Pod) went(p printer) {
	if d.State == PodWaiting {
		p.item("node", "none yet, for %s", span(d.At.Sub(d.Created)))
		return
	}
	text := d.Node
	if d.Group != "" {
		text += " of node group " + d.Group
	} else {
		text += ", which is of no node group"
	}
	switch {
	case d.Placement == nil:
		text += "; it was bound before this process led, so that nothing is known of the choice"
	case d.Key == "":
	case d.Placement.Warmth > 0:
		text += fmt.Sprintf("; warm for the key (%.2f) when it was bound, %s ago", d.Placement.Warmth, p.since(&d.Placement.At))
	default:
		text += fmt.Sprintf("; cold for the key when it was bound, %s ago", p.since(&d.Placement.At))
	}
	if d.State == PodEnded {
		text += "; it has ended"
	}
	p.item("node", "%s", text)
}

// others writes the nodes that were warm too.
func (d *Pod) others(p printer) {
	if d.Placement == nil || d.Key == "" {
		return
	}
	verb := "was"
	if d.State == PodWaiting {
		verb = "is"
	}
	if d.Placement.Warm == 0 {
		p.item("elsewhere", "no other node %s warm for the key", verb)
		return
	}
	more := ""
	if d.Placement.Warm > len(d.Placement.Others) {
		more = fmt.Sprintf("; the warmest %d", len(d.Placement.Others))
	}
	p.item("elsewhere", "%s %s warm for the key%s:", count(d.Placement.Warm, "other node"), plural(d.Placement.Warm, verb), more)
	width := len("NODE")
	for _, o := range d.Placement.Others {
		width = max(width, min(len([]rune(o.short())), 40))
	}
	p.linef("      %-*s  WARMTH  WHY NOT", width, "NODE")
	for _, o := range d.Placement.Others {
		start := fmt.Sprintf("      %-*s    %.2f  ", width, cut(o.short(), width), o.Warmth)
		p.linef("%s%s", start, cut(o.Why.Text, columns-len([]rune(start))))
	}
}

func (o Other) short() string { return Node{Name: o.Name, Instance: o.Instance}.short() }

// plural is a verb for so many.
func plural(n int, verb string) string {
	if n == 1 {
		return verb
	}
	return map[string]string{"was": "were", "is": "are"}[verb]
}
