package explain

import (
	"fmt"
	"io"
	"time"
)

// WriteText writes a group in words, then its nodes.
func (g *Group) WriteText(w io.Writer) error {
	return printed(w, g.At, func(p printer) {
		p.linef("plan of %s", moment(g.At))
		p.linef("%s", g.headline())
		for _, problem := range g.Problems {
			p.item("problem", "%s", problem)
		}
		if g.Role != "runner" {
			p.item("plan", "none: the group is %s, so cluster-autoscaler alone decides (annotation hearth.dev/role)", g.Role)
		} else {
			g.policy(p)
			g.next(p)
		}
		if len(g.Nodes) > 0 {
			p.linef("")
		}
		p.nodes(g.Nodes)
	})
}

// policy writes what a plan rests on.
func (g *Group) policy(p printer) {
	s, f, l := g.Settings, g.Forecast, g.Learnt
	longest := "for as long as pays (max-idle is not set)"
	if s.MaxIdleSeconds != nil {
		longest = fmt.Sprintf("for %s at most (max-idle)", span(seconds(*s.MaxIdleSeconds)))
	}
	p.item("idle nodes", "at least %d run (min-warm), at most %d (max-warm); beyond min-warm one runs %s", s.MinWarm, s.MaxWarm, longest)
	if s.Parks() {
		p.item("going nodes", "are parked with their cache (park: %s); at most %d are parked, each for %s at most",
			s.Park, s.MaxParked, span(seconds(s.MaxParkedSeconds)))
	} else {
		p.item("going nodes", "are terminated, and their cache with them (park: off)")
	}
	if s.Parks() {
		p.item("prices", "%s a running node, %s a parked one, %s somebody's waiting", dollars(s.NodePrice), dollars(s.ParkedPrice), dollars(s.TimeValue))
	} else {
		p.item("prices", "%s a running node, %s somebody's waiting", dollars(s.NodePrice), dollars(s.TimeValue))
	}
	p.item("a job waits", "%s for a launched node, %s for a resumed one; on a cold node it loses %s",
		span(seconds(l.BootSeconds)), span(seconds(l.ResumeSeconds)), span(seconds(l.ColdPenaltySeconds)))
	p.item("forecast", "%s", g.expects(f))
}

func (g *Group) expects(f Forecast) string {
	if f.BatchesPerHour == 0 {
		return "nothing yet: no whole batch of jobs has come since this process began to lead"
	}
	text := fmt.Sprintf("%.2f batches of jobs an hour now", f.BatchesPerHour)
	if f.IdleNodes > 1 {
		text += fmt.Sprintf(", %.2f that need the %d idle nodes at once", f.IdleBatchesPerHour, f.IdleNodes)
	}
	return text + "; observed for " + span(time.Duration(f.Weeks*7*24*float64(time.Hour)))
}

// next writes who goes next.
func (g *Group) next(p printer) {
	verb := "be released"
	if g.Settings.Parks() {
		verb = "be parked"
	}
	if n := g.first(StateIdle, func(n Node) bool { return n.Decision != "" && n.Decision != "keep" }); n != nil {
		p.item("next", "%s is the first to %s: cluster-autoscaler may remove it now", n.Label(), verb)
	} else if n := g.first(StateIdle, func(n Node) bool { return n.Decision == "keep" && !n.because("person") }); n != nil {
		p.item("next", "no idle node goes now; %s would be the first to %s", n.Label(), verb)
	}
	if n := g.first(StateParked, func(n Node) bool { return n.Decision == "release" }); n != nil {
		p.item("", "parked %s is the first to go for good", n.Label())
	} else if n := g.first(StateParked, func(Node) bool { return true }); n != nil {
		p.item("", "no parked node goes now; %s would be the first to go for good", n.Label())
	}
}

// first returns the first node in the order of the plan that matches.
func (g *Group) first(s State, match func(Node) bool) *Node {
	for i := range g.Nodes {
		if n := &g.Nodes[i]; n.State == s && match(*n) {
			return n
		}
	}
	return nil
}

func (n Node) because(code string) bool {
	for _, r := range n.Reasons {
		if r.Code == code {
			return true
		}
	}
	return false
}

// WriteNode writes one node of the group in words.
func (g *Group) WriteNode(w io.Writer, n *Node) error {
	return printed(w, g.At, func(p printer) {
		p.linef("%s of node group %s", n.Label(), g.ID)
		if n.Name != "" {
			p.item("instance", "%s", n.Instance)
		}
		state := string(n.State)
		if n.State == StateLeaving || n.State == StateStarting {
			state += " (" + n.Phase + ")"
		}
		if n.Since != nil {
			state += fmt.Sprintf(" for %s, since %s", p.since(n.Since), moment(*n.Since))
		}
		if n.LastUsed != nil && n.State != StateBusy {
			state += fmt.Sprintf("; a job last ran here %s ago", p.since(n.LastUsed))
		}
		if n.Hidden {
			state += "; hidden: cluster-autoscaler does not know it yet"
		}
		p.item("state", "%s", state)
		if n.Decision != "" {
			p.item("decision", "%s", n.Decision)
		}
		for i, r := range n.Reasons {
			p.item(first(i, "why"), "%s (%s)", r.Text, r.Code)
		}
		if place, of := g.place(n); of > 1 {
			p.item("place", "%d of %d %s nodes, the first to go first; its score is %.3g", place, of, n.State, n.Score)
		}
		for i, hint := range g.hints(n) {
			p.item(first(i, "then"), "%s", hint)
		}
		p.keys(n)
	})
}

// first is the word on the first of several lines.
func first(i int, word string) string {
	if i == 0 {
		return word
	}
	return ""
}

// place of a node among those of its state, from 1; of none when the order says
// nothing.
func (g *Group) place(n *Node) (place, of int) {
	if g.Role != "runner" || n.State != StateIdle && n.State != StateParked {
		return 0, 0
	}
	for i := range g.Nodes {
		if g.Nodes[i].State == n.State {
			of++
		}
		if g.Nodes[i].Instance == n.Instance {
			place = of
		}
	}
	return place, of
}

func (p printer) keys(n *Node) {
	if n.WarmKeys == 0 {
		p.item("cache", "cold: no job with a cache key is known to have run here of late")
		return
	}
	more := ""
	if n.WarmKeys > len(n.Keys) {
		more = fmt.Sprintf("; the warmest %d", len(n.Keys))
	}
	p.item("cache", "warm for %s%s:", count(n.WarmKeys, "key"), more)
	width := len("KEY")
	for _, k := range n.Keys {
		width = max(width, min(len([]rune(k.Key)), 48))
	}
	p.linef("      %-*s  WARMTH  LAST USED  JOBS", width, "KEY")
	for _, k := range n.Keys {
		p.linef("      %-*s    %.2f  %9s  %4d", width, cut(k.Key, width), k.Warmth, p.since(&k.LastUsed), k.Jobs)
	}
}

// hints say what would change the decision, by the code of its first reason and
// of those that came on top. The codes are those of the plan.
func (g *Group) hints(n *Node) (hints []string) {
	s := g.Settings
	goes := "goes"
	if s.Parks() && n.State == StateIdle {
		goes = "is parked"
	}
	parked := n.State == StateParked
	for _, r := range n.Reasons {
		switch r.Code {
		case "min-warm":
			hints = append(hints, fmt.Sprintf("it %s at the earliest when %s of more value %s idle, or when hearth.dev/min-warm or the schedule asks for fewer", goes, count(s.MinWarm, "node"), are(s.MinWarm)))
		case "max-warm":
			hints = append(hints, "it stays when one of those gets a job, or with a higher hearth.dev/max-warm")
		case "max-idle":
			hints = append(hints, "it stays when a job starts on it, or with a longer hearth.dev/max-idle")
		case "recent":
			if parked {
				hints = append(hints, "later it stays while jobs come to need it often enough to pay its storage, else it goes for good")
			} else {
				hints = append(hints, "once going and coming back take less than it has been idle, the forecast decides")
			}
		case "forecast":
			if parked {
				hints = append(hints, "it goes for good when jobs need it less often; it comes back when they wait or are expected")
			} else {
				hints = append(hints, fmt.Sprintf("it %s when fewer jobs are expected or more valuable nodes are idle, and in any case when its rent far exceeds what its absence costs", goes))
			}
		case "bound":
			if n.Decision == "keep" {
				hints = append(hints, fmt.Sprintf("it %s when that time is over and the forecast does not pay for it by then, or sooner once more jobs were observed", goes))
			} else {
				hints = append(hints, "it stays when a job starts on it; a higher hearth.dev/time-value makes such nodes stay longer")
			}
		case "idle":
			hints = append(hints, "it stays when a job starts on it; a higher hearth.dev/time-value or hearth.dev/min-warm makes such nodes stay longer")
		case "parked-too-long":
			hints = append(hints, "a higher hearth.dev/time-value or a lower hearth.dev/parked-price makes such nodes stay longer")
		case "busy":
			hints = append(hints, "the plan decides when its jobs have ended; until then its removal is refused")
		case "not-ready":
			hints = append(hints, "NotReady for five minutes it loses its protection, and cluster-autoscaler may remove it")
		case "person":
			hints = append(hints, "the plan decides when the annotation cluster-autoscaler.kubernetes.io/scale-down-disabled is taken off the Node")
		case "released":
			hints = append(hints, "it is kept again when the forecast has wanted it for a minute and cluster-autoscaler has not removed it")
		case "later":
			hints = append(hints, fmt.Sprintf("it %s in one of the next rounds, each of half of what is left", goes))
		case "draining":
			hints = append(hints, "a scale-up may still take it back")
		case "plain":
			hints = append(hints, "hearth.dev/role: runner has the plan look after the group")
		}
	}
	return hints
}

func are(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}
