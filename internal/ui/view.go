package ui

import (
	"cmp"
	"fmt"
	"html/template"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/savings"
)

const (
	// cellsShown of a lane at most, rowsShown on a page of the table, and
	// lanesShown open: the lanes of a larger fleet are closed at first.
	cellsShown, rowsShown, lanesShown = 240, 50, 12
	groupsShown                       = 100
)

// view is one page.
type view struct {
	filter
	At     time.Time
	Stall  int // milliseconds without a sign after which a page connects anew
	Totals totals
	Lanes  []lane
	// MoreLanes are not shown.
	MoreLanes int
	GroupIDs  []string
	Rows      []row
	AllRows   int
	Pages     int
	Queue     explain.Queue
	Timeline  []explain.Event
	More      bool
	Savings   *savings.Report
	Saved     saved
	Kinds     []explain.Kind
}

type totals struct{ Nodes, Busy, Idle, Parked, Starting, Leaving, NotReady int }

// lane is one group.
type lane struct {
	*explain.Group
	totals
	Cells     []explain.Node
	MoreCells int
	Open      bool
	Link      string
}

// row of the table of nodes.
type row struct {
	explain.Node
	Group string
}

// saved adds the groups' savings up.
type saved struct {
	Minutes          float64
	Jobs, Hits       int
	Hearth, Baseline savings.Cost
	// DryRun is nil unless Hearth only watches.
	DryRun   *savings.Cost
	Compared bool // every group with jobs has a comparison
	Since    time.Time
}

func newView(r *explain.Report, events []explain.Event, s *savings.Report, f filter) *view {
	v := &view{filter: f, At: r.At, Queue: r.Queue, Savings: s, Kinds: explain.Kinds()}
	var rows []row
	for i := range r.Groups {
		g := &r.Groups[i]
		t := totals{len(g.Nodes), g.Busy, g.Idle, g.Parked, g.Starting, g.Leaving, g.NotReady}
		v.Totals.add(t)
		v.GroupIDs = append(v.GroupIDs, g.ID)
		if f.Group != "" && f.Group != g.ID {
			continue
		}
		for _, n := range g.Nodes {
			rows = append(rows, row{n, g.ID})
		}
		if len(v.Lanes) == groupsShown {
			v.MoreLanes++
			continue
		}
		l := lane{Group: g, totals: t, Cells: g.Nodes[:min(len(g.Nodes), cellsShown)], Link: f.link("group", g.ID, "page", "", "before", "")}
		l.MoreCells = len(g.Nodes) - len(l.Cells)
		v.Lanes = append(v.Lanes, l)
	}
	for i := range v.Lanes {
		v.Lanes[i].Open = len(v.Lanes) <= lanesShown
	}
	v.AllRows, v.Pages = len(rows), max(1, (len(rows)+rowsShown-1)/rowsShown)
	v.Page = min(v.Page, v.Pages)
	from := (v.Page - 1) * rowsShown
	v.Rows = rows[from:min(len(rows), from+rowsShown)]
	v.Timeline, v.More = f.events(events)
	if s != nil {
		v.Saved = add(s)
	}
	return v
}

func (t *totals) add(o totals) {
	t.Nodes += o.Nodes
	t.Busy += o.Busy
	t.Idle += o.Idle
	t.Parked += o.Parked
	t.Starting += o.Starting
	t.Leaving += o.Leaving
	t.NotReady += o.NotReady
}

func add(r *savings.Report) (s saved) {
	s.Compared = true
	for _, g := range r.Groups {
		s.Minutes += g.SavedMinutes
		s.Jobs += g.Jobs
		s.Hits += g.WarmHits
		if s.Since.IsZero() || g.Since.Before(s.Since) {
			s.Since = g.Since
		}
		if g.Jobs == 0 {
			continue
		}
		s.Hearth.Nodes += g.Hearth.Nodes
		s.Hearth.Delay += g.Hearth.Delay
		if g.Baseline == nil {
			s.Compared = false
			continue
		}
		s.Baseline.Nodes += g.Baseline.Nodes
		s.Baseline.Delay += g.Baseline.Delay
		if g.DryRun != nil {
			if s.DryRun == nil {
				s.DryRun = &savings.Cost{}
			}
			s.DryRun.Nodes += g.DryRun.Nodes
			s.DryRun.Delay += g.DryRun.Delay
		}
	}
	s.Compared = s.Compared && s.Jobs > 0
	return s
}

// Older is the link to what the timeline shows next.
func (v *view) Older() string {
	return v.link("before", strconv.FormatUint(v.Timeline[len(v.Timeline)-1].Seq, 10)) + "#timeline"
}

// Newest is the link back to the newest.
func (v *view) Newest() string { return v.link("before", "") + "#timeline" }

// PageLink is the link to another page of the table.
func (v *view) PageLink(by int) string { return v.link("page", strconv.Itoa(v.Page+by)) + "#nodes" }

// All is the link without filters.
func (v *view) All() string { return "/ui" }

// words are the functions of the templates.
func words() template.FuncMap {
	return template.FuncMap{
		"ago":     ago,
		"clock":   func(t time.Time) string { return t.UTC().Format("15:04:05") },
		"iso":     func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"day":     func(t time.Time) string { return t.UTC().Format("2 Jan 15:04") },
		"dollars": dollars,
		"percent": func(part, whole int) int { return 100 * part / max(1, whole) },
		"warmth":  warmth,
		"fill":    func(n explain.Node) int { return int(10*warmth(n) + 0.5) },
		"keys":    keys,
		"why":     why,
		"cell":    cell,
		"sub":     func(a, b float64) float64 { return a - b },
		"neg":     func(a float64) float64 { return -a },
		"minutes": func(m float64) string {
			if m >= 120 {
				return fmt.Sprintf("%.1f h", m/60)
			}
			return fmt.Sprintf("%.0f min", m)
		},
		"span": func(seconds float64) string { return brief(time.Duration(seconds * float64(time.Second))) },
	}
}

func dollars(d float64) string {
	if d < 0 {
		return "−" + dollars(-d)
	}
	if d >= 1000 {
		return fmt.Sprintf("$%.0f", d)
	}
	return fmt.Sprintf("$%.2f", d)
}

// warmth of a node is that of its warmest key.
func warmth(n explain.Node) float64 {
	if len(n.Keys) == 0 {
		return 0
	}
	return slices.MaxFunc(n.Keys, func(a, b explain.Key) int { return cmp.Compare(a.Warmth, b.Warmth) }).Warmth
}

func keys(n explain.Node) string {
	if n.WarmKeys == 0 {
		return "cold"
	}
	names := make([]string, 0, len(n.Keys))
	for _, k := range n.Keys[:min(len(n.Keys), 3)] {
		names = append(names, k.Key)
	}
	text := strings.Join(names, ", ")
	if more := n.WarmKeys - len(names); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

func why(n explain.Node) string {
	texts := make([]string, 0, len(n.Reasons))
	for _, r := range n.Reasons {
		texts = append(texts, r.Text)
	}
	return strings.Join(texts, "; ")
}

// cell is a node in one sentence, for the label of its cell.
func cell(n explain.Node, now time.Time) string {
	text := n.Label() + ": " + string(n.State)
	if n.Jobs > 0 {
		text += fmt.Sprintf(", %d running", n.Jobs)
	}
	if n.Since != nil {
		text += " for " + ago(n.Since, now)
	}
	text += fmt.Sprintf("; %.0f%% warm (%s)", 100*warmth(n), keys(n))
	if n.Decision != "" {
		text += "; " + n.Decision
	}
	if reasons := why(n); reasons != "" {
		text += ": " + reasons
	}
	return text
}

// ago is how long before now a time was, empty when there is none.
func ago(t any, now time.Time) string {
	switch t := t.(type) {
	case *time.Time:
		if t == nil {
			return ""
		}
		return brief(now.Sub(*t))
	case time.Time:
		return brief(now.Sub(t))
	}
	return ""
}

func brief(d time.Duration) string {
	switch d = max(0, d); {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %02d", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}
