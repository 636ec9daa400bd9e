package simulate

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// figure is a drawing. What is drawn later lies above.
type figure struct {
	Class, ID, Title, Desc string
	Width, Height          tenth
	Areas                  []area
	Lines                  []line
	Marks                  []mark
	Texts                  []label
}

type area struct{ Class, Path string }

type line struct {
	Class, Policy  string
	X1, Y1, X2, Y2 tenth
}

// mark is a policy's point.
type mark struct {
	Class, Policy, Title, Row string
	X, Y, R                   tenth
}

type label struct {
	Class, Policy, Anchor, Text string
	X, Y                        tenth
}

func newFigure(id string, width, height float64, title string) figure {
	class := "wide"
	if width == narrow {
		class = "narrow"
	}
	return figure{Class: class, ID: id + "-" + class, Title: title, Width: tenth(width), Height: tenth(height)}
}

// plot is the part of a figure that has axes.
type plot struct {
	*figure
	x, y axis
}

// axis maps values to coordinates.
type axis struct {
	lo, hi   float64 // values
	from, to float64 // coordinates
	log      bool
}

// newAxis takes in all values, with some room. It is logarithmic where they
// differ by much.
func newAxis(from, to float64, values ...float64) axis {
	lo, hi := slices.Min(values), slices.Max(values)
	if lo > 0 && hi/lo > 6 {
		return axis{lo: lo / 1.25, hi: hi * 1.25, from: from, to: to, log: true}
	}
	room := (hi - lo) * 0.08
	if room == 0 {
		room = max(1, math.Abs(hi)*0.08)
	}
	return axis{lo: lo - min(room, max(lo, 0)), hi: hi + room, from: from, to: to}
}

func (a axis) at(v float64) float64 {
	share := (v - a.lo) / (a.hi - a.lo)
	if a.log {
		share = math.Log(v/a.lo) / math.Log(a.hi/a.lo)
	}
	return a.from + share*(a.to-a.from)
}

// ticks are round values that lie at least apart from each other.
func (a axis) ticks(apart float64) []float64 {
	if a.log {
		for _, digits := range [][]float64{{1, 2, 5}, {1, 3}, {1}} {
			var ticks []float64
			crowded := false
			for e := math.Floor(math.Log10(a.lo)); e <= math.Log10(a.hi); e++ {
				for _, d := range digits {
					v := d * math.Pow(10, e)
					if v < a.lo || v > a.hi {
						continue
					}
					if n := len(ticks); n > 0 && math.Abs(a.at(v)-a.at(ticks[n-1])) < apart {
						crowded = true
					}
					ticks = append(ticks, v)
				}
			}
			if !crowded {
				return ticks
			}
		}
	}
	step := niceStep((a.hi - a.lo) * apart / math.Abs(a.to-a.from))
	var ticks []float64
	for i := math.Ceil(a.lo / step); i*step <= a.hi; i++ {
		ticks = append(ticks, i*step)
	}
	return ticks
}

// niceStep is the next of 1, 2, 5, 10, 20, 50 and so on.
func niceStep(least float64) float64 {
	if least <= 0 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(least)))
	for _, m := range []float64{1, 2, 5} {
		if m*unit >= least {
			return m * unit
		}
	}
	return 10 * unit
}

// axes draws the grid and names both axes: the vertical one above the plot.
func (p plot) axes(xName, yName string, xText, yText func(float64) string) {
	left, right := tenth(p.x.from), tenth(p.x.to)
	bottom, top := tenth(p.y.from), tenth(p.y.to)
	for _, v := range p.y.ticks(34) {
		y := tenth(p.y.at(v))
		p.Lines = append(p.Lines, line{Class: "grid", X1: left, Y1: y, X2: right, Y2: y})
		p.Texts = append(p.Texts, label{Class: "tick", Anchor: "end", X: left - 8, Y: y + 4, Text: yText(v)})
	}
	for _, v := range p.x.ticks(56) {
		x := tenth(p.x.at(v))
		p.Lines = append(p.Lines, line{Class: "grid", X1: x, Y1: bottom, X2: x, Y2: top})
		p.Texts = append(p.Texts, label{Class: "tick", Anchor: "middle", X: x, Y: bottom + 18, Text: xText(v)})
	}
	p.Lines = append(p.Lines, line{Class: "axis", X1: left, Y1: bottom, X2: right, Y2: bottom})
	p.Texts = append(p.Texts,
		label{Class: "axis-name", Anchor: "start", X: 0, Y: top - 14, Text: yName},
		label{Class: "axis-name", Anchor: "end", X: right, Y: bottom + 38, Text: xName})
}

func logName(a axis) string {
	if a.log {
		return " (log)"
	}
	return ""
}

// dot is a policy in a plot.
type dot struct {
	name, title string
	x, y        float64
	low         float64 // where its stem ends, if it has one
	stem        bool
}

// dots draws policies and writes their names beside them, the important ones
// first; where there is no room at all the name is left to the title.
func (p plot) dots(dots []dot) {
	var taken []box
	for _, l := range p.Texts {
		if l.Class == "bound" {
			taken = append(taken, textBox(l, len([]rune(l.Text))))
		}
	}
	for _, l := range p.Lines {
		if l.Class == "bound" {
			taken = append(taken, box{float64(l.X1), float64(l.Y1) - 2, float64(l.X2), float64(l.Y2) + 2})
		}
	}
	for _, d := range dots {
		taken = append(taken, around(p.x.at(d.x), p.y.at(d.y), 6))
		if d.stem {
			taken = append(taken, around(p.x.at(d.x), p.y.at(d.low), 5))
		}
	}
	rank := map[string]int{"ours": 0, "base": 1, "other": 2}
	dots = slices.Clone(dots)
	slices.SortStableFunc(dots, func(a, b dot) int { return cmp.Compare(rank[kind(a.name)], rank[kind(b.name)]) })
	for _, d := range dots {
		x, y := p.x.at(d.x), p.y.at(d.y)
		if l, ok := p.room(d.name, x, y, taken); ok {
			taken = append(taken, textBox(l.label, len([]rune(d.name))))
			p.Texts = append(p.Texts, l.label)
			if l.leader {
				p.Lines = append(p.Lines, line{Class: "leader", Policy: d.name, X1: tenth(x), Y1: tenth(y), X2: tenth(l.x), Y2: tenth(l.y)})
			}
		}
	}
	slices.Reverse(dots) // the important ones on top
	for _, d := range dots {
		x, y := tenth(p.x.at(d.x)), tenth(p.y.at(d.y))
		if d.stem {
			low := tenth(p.y.at(d.low))
			p.Lines = append(p.Lines, line{Class: "stem " + kind(d.name), Policy: d.name, X1: x, Y1: y, X2: x, Y2: low})
			p.Marks = append(p.Marks, mark{Class: "ring " + kind(d.name), Policy: d.name, X: x, Y: low, R: 3.5})
		}
		p.Marks = append(p.Marks, mark{Class: "dot " + kind(d.name), Policy: d.name, Title: d.title, Row: rowID(d.name), X: x, Y: y, R: 5})
	}
}

// placed is a name beside its point, or further off at the end of a line.
type placed struct {
	label
	leader bool
	x, y   float64 // where the line ends
}

// room finds a place for a name in which it covers nothing.
func (p plot) room(name string, x, y float64, taken []box) (placed, bool) {
	inside := box{p.x.from + 2, p.y.to - 6, float64(p.Width), p.y.from - 2}
	for _, radius := range []float64{9, 13, 24, 38, 54, 72, 92, 114} {
		for _, degrees := range []float64{0, 180, 270, 90, 315, 45, 225, 135, 292, 337, 247, 202, 22, 67, 112, 157} {
			sin, cos := math.Sincos(degrees * math.Pi / 180)
			l := placed{x: x + radius*cos, y: y + radius*sin, leader: radius > 13}
			l.label = label{Class: "name " + kind(name), Policy: name, Anchor: "start", Text: name, X: tenth(l.x + 1), Y: tenth(l.y + 4)}
			switch {
			case math.Abs(cos) < 0.5:
				l.Anchor, l.X = "middle", tenth(l.x)
				l.Y = tenth(l.y + 4 + 5*sin)
			case cos < 0:
				l.Anchor, l.X = "end", tenth(l.x-1)
			}
			b := textBox(l.label, len([]rune(name)))
			if b.within(inside) && !slices.ContainsFunc(taken, b.overlaps) {
				return l, true
			}
		}
	}
	return placed{}, false
}

type box struct{ left, top, right, bottom float64 }

func around(x, y, r float64) box { return box{x - r, y - r, x + r, y + r} }

// textBox is about what a text of 12 px covers.
func textBox(l label, runes int) box {
	width := 6.5 * float64(runes)
	b := box{left: float64(l.X), top: float64(l.Y) - 11, bottom: float64(l.Y) + 4}
	switch l.Anchor {
	case "middle":
		b.left -= width / 2
	case "end":
		b.left -= width
	}
	b.right = b.left + width
	return b
}

func (b box) overlaps(c box) bool {
	return b.left < c.right && c.left < b.right && b.top < c.bottom && c.top < b.bottom
}

func (b box) within(c box) bool {
	return b.left >= c.left && b.right <= c.right && b.top >= c.top && b.bottom <= c.bottom
}

func (r Report) newPlot(f *figure, y axis) plot {
	infrastructure := make([]float64, 0, len(r.Results))
	for _, res := range r.Results {
		infrastructure = append(infrastructure, res.Infrastructure)
	}
	if len(infrastructure) == 0 {
		infrastructure = []float64{0, 1}
	}
	right := float64(f.Width) - 16
	y.from, y.to = float64(f.Height)-46, 34
	return plot{f, newAxis(60, right, infrastructure...), y}
}

// frontierFigure shows what warmth costs.
func (r Report) frontierFigure(width float64) figure {
	f := newFigure("frontier", width, 430, "Cost against warmth")
	p := r.newPlot(&f, axis{lo: 0, hi: 1.04})
	p.axes("infrastructure $"+logName(p.x), "warm hits", dollars, func(v float64) string { return fmt.Sprintf("%.0f\u202f%%", 100*v) })
	var best []string
	dots := make([]dot, 0, len(r.Results))
	for _, res := range r.Results {
		dots = append(dots, dot{name: res.Name, x: res.Infrastructure, y: res.WarmHitRate(),
			title: fmt.Sprintf("%s: %s for nodes, %s warm hits", res.Name, dollars(res.Infrastructure), percent(res.WarmHitRate()))})
	}
	sorted := slices.SortedFunc(slices.Values(r.Results), func(a, b Result) int {
		return cmp.Or(cmp.Compare(a.Infrastructure, b.Infrastructure), cmp.Compare(b.WarmHitRate(), a.WarmHitRate()), cmp.Compare(a.Name, b.Name))
	})
	height, x := 0.0, 0.0
	for _, res := range sorted {
		if res.WarmHitRate() <= height {
			continue
		}
		next := p.x.at(res.Infrastructure)
		if len(best) > 0 {
			y := tenth(p.y.at(height))
			f.Lines = append(f.Lines, line{Class: "frontier", X1: tenth(x), Y1: y, X2: tenth(next), Y2: y},
				line{Class: "frontier", X1: tenth(next), Y1: y, X2: tenth(next), Y2: tenth(p.y.at(res.WarmHitRate()))})
		}
		best = append(best, res.Name)
		height, x = res.WarmHitRate(), next
	}
	if len(best) > 0 {
		y := tenth(p.y.at(height))
		f.Lines = append(f.Lines, line{Class: "frontier", X1: tenth(x), Y1: y, X2: tenth(p.x.to), Y2: y})
	}
	p.dots(dots)
	f.Desc = fmt.Sprintf("Each policy’s infrastructure dollars against its warm-hit rate. Nothing is both cheaper and warmer than %s. The table of all figures has the numbers.", strings.Join(best, ", "))
	return f
}

// moneyFigure shows what policies cost in total, and how near that comes to
// the bounds.
func (r Report) moneyFigure(width float64) figure {
	f := newFigure("money", width, 470, "Total cost and the clairvoyant bounds")
	var values []float64
	for _, bound := range []float64{r.Reactive, r.Prescient} {
		if bound > 0 {
			values = append(values, bound)
		}
	}
	for _, res := range r.Results {
		values = append(values, res.Total(), res.Delay)
	}
	if len(values) == 0 {
		values = []float64{0, 1}
	}
	p := r.newPlot(&f, newAxis(0, 1, values...))
	p.axes("infrastructure $"+logName(p.x), "total $, and delay $ below it"+logName(p.y), dollars, dollars)
	for _, bound := range []struct {
		name  string
		value float64
	}{{"reactive", r.Reactive}, {"prescient", r.Prescient}} {
		if bound.value <= 0 {
			continue
		}
		y := tenth(p.y.at(bound.value))
		f.Lines = append(f.Lines, line{Class: "bound", X1: tenth(p.x.from), Y1: y, X2: tenth(p.x.to), Y2: y})
		f.Texts = append(f.Texts, label{Class: "bound", Anchor: "end", X: tenth(p.x.to), Y: y - 6, Text: bound.name + " bound " + dollars(bound.value)})
	}
	dots := make([]dot, 0, len(r.Results))
	for _, res := range r.Results {
		dots = append(dots, dot{name: res.Name, x: res.Infrastructure, y: res.Total(), low: res.Delay, stem: true,
			title: fmt.Sprintf("%s: %s in total, %s of it for nodes and %s for delay", res.Name, dollars(res.Total()), dollars(res.Infrastructure), dollars(res.Delay))})
	}
	p.dots(dots)
	f.Desc = fmt.Sprintf("Each policy’s infrastructure dollars against its total and its delay dollars, with two lower bounds as lines: reactive %s and prescient %s. The table of all figures has the numbers.",
		dollars(r.Reactive), dollars(r.Prescient))
	return f
}

// timeline is a policy's nodes over time.
type timeline struct {
	Name, Kind string
	Figures    []figure
	Data       timelineData
}

// timelineData is for the script that reads the drawing out.
type timelineData struct {
	Begin  int64        `json:"begin"`
	Width  int64        `json:"width"` // seconds of a sample
	Nodes  [][4]float64 `json:"nodes"` // busy, idle, starting or stopping, parked
	Left   float64      `json:"left"`  // where the plot lies, as a share of the drawing
	Right  float64      `json:"right"`
	Span   int64        `json:"span"` // seconds of the plot
	Stride string       `json:"-"`
}

// mostSamples are drawn of a policy: somewhat more than one asks for, since a
// run goes on after the last arrival.
const mostSamples = 480

// timelines draws both policies on the same scales.
func timelines(results ...*Result) []timeline {
	var all []timeline
	running, parked := 0.0, 0.0
	var end int64
	for _, res := range results {
		if res == nil || len(res.Samples) < 2 {
			continue
		}
		layers, width := layersOf(res.Samples, res.End, mostSamples)
		for _, l := range layers {
			running, parked = max(running, l[0]+l[1]+l[2]), max(parked, l[3])
		}
		end = max(end, res.End)
		all = append(all, timeline{Name: res.Name, Kind: kind(res.Name), Data: timelineData{
			Begin: res.Begin, Width: width, Nodes: layers, Stride: strideText(width),
		}})
	}
	for i := range all {
		t := &all[i]
		t.Data.Left, t.Data.Right = float64(timelineLeft)/timelineWidth, float64(timelineEnds)/timelineWidth
		t.Data.Span = max(end-t.Data.Begin, 1)
		t.Figures = []figure{t.draw(running, parked, end)}
	}
	return all
}

// layersOf merges samples until there are at most so many. The last one is of
// less time than the others: what is missing counts as no nodes.
func layersOf(samples []Sample, end int64, most int) (layers [][4]float64, width int64) {
	width = samples[1].At - samples[0].At
	merge := (len(samples) + most - 1) / most
	for chunk := range slices.Chunk(samples, merge) {
		var l [4]float64
		for _, s := range chunk {
			weight := float64(min(width, end-s.At)) / float64(width)
			l[0] += weight * s.Nodes[Busy]
			l[1] += weight * s.Nodes[Idle]
			l[2] += weight * (s.Nodes[Booting] + s.Nodes[Resuming] + s.Nodes[Stopping])
			l[3] += weight * s.Nodes[Parked]
		}
		for i := range l {
			l[i] = math.Round(100*l[i]/float64(merge)) / 100
		}
		layers = append(layers, l)
	}
	return layers, int64(merge) * width
}

func strideText(seconds int64) string {
	switch {
	case seconds >= 2*hour:
		return fmt.Sprintf("%.1f hours", float64(seconds)/float64(hour))
	case seconds >= 120:
		return fmt.Sprintf("%.0f minutes", float64(seconds)/60)
	}
	return fmt.Sprintf("%d seconds", seconds)
}

// A timeline is as wide as half a wide page or a whole narrow one. Parked nodes
// cost a fraction of the others and may be many more: they have a strip of
// their own below.
const (
	timelineWidth                = 448
	timelineLeft, timelineRight  = 34, 6
	runningTop, runningBottom    = 12, 190
	parkedTop, parkedBottom      = 222, 282
	timelineHeight, timelineEnds = 310, timelineWidth - timelineRight
)

func (t timeline) draw(running, parked float64, end int64) figure {
	f := figure{Class: "timeline", ID: "timeline-" + t.Kind, Title: "Nodes over time under " + t.Name, Width: timelineWidth, Height: timelineHeight}
	x := axis{lo: float64(t.Data.Begin), hi: float64(max(end, t.Data.Begin+1)), from: timelineLeft, to: timelineEnds}
	p := plot{&f, x, axis{lo: 0, hi: max(1, running*1.05), from: runningBottom, to: runningTop}}
	var sums [4]float64
	for _, n := range t.Data.Nodes {
		for i, v := range n {
			sums[i] += v / float64(len(t.Data.Nodes))
		}
	}
	f.Desc = fmt.Sprintf("On average %s busy, %s idle, %s starting or stopping, %s parked.", tenth(sums[0]), tenth(sums[1]), tenth(sums[2]), tenth(sums[3]))
	// From the top: each layer is painted over the sum of itself and all below.
	for layer := 2; layer >= 0; layer-- {
		f.Areas = append(f.Areas, area{[...]string{"busy", "idle", "moving"}[layer], p.outline(t.Data, 0, layer)})
	}
	p.nodeAxis(34)
	bottom := tenth(runningBottom)
	if parked > 0 {
		p.y = axis{lo: 0, hi: max(1, parked*1.05), from: parkedBottom, to: parkedTop}
		f.Areas = append(f.Areas, area{"parked", p.outline(t.Data, 3, 3)})
		p.nodeAxis(24)
		bottom = parkedBottom
	} else {
		f.Height -= parkedBottom - runningBottom
	}
	for _, tick := range timeTicks(t.Data.Begin, end, 6) {
		x := tenth(p.x.at(float64(tick.at)))
		f.Lines = append(f.Lines, line{Class: "axis", X1: x, Y1: bottom, X2: x, Y2: bottom + 4})
		f.Texts = append(f.Texts, label{Class: "tick", Anchor: "middle", X: x, Y: bottom + 19, Text: tick.text})
	}
	return f
}

func (p plot) nodeAxis(apart float64) {
	for _, v := range p.y.ticks(apart) {
		if v != math.Trunc(v) {
			continue
		}
		y := tenth(p.y.at(v))
		class := "grid"
		if v == 0 {
			class = "axis"
		}
		p.Lines = append(p.Lines, line{Class: class, X1: timelineLeft, Y1: y, X2: timelineEnds, Y2: y})
		p.Texts = append(p.Texts, label{Class: "tick", Anchor: "end", X: timelineLeft - 6, Y: y + 4, Text: thousands(int(v))})
	}
}

// outline of the nodes in some layers together.
func (p plot) outline(d timelineData, first, last int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "M%s %s", tenth(p.x.from), tenth(p.y.from))
	before := ""
	for i, n := range d.Nodes {
		sum := 0.0
		for _, v := range n[first : last+1] {
			sum += v
		}
		if y := tenth(p.y.at(sum)).String(); y != before {
			if i > 0 {
				fmt.Fprintf(&b, "H%s", tenth(p.x.at(float64(d.Begin+int64(i)*d.Width))))
			}
			fmt.Fprintf(&b, "V%s", y)
			before = y
		}
	}
	fmt.Fprintf(&b, "H%sV%sZ", tenth(min(p.x.to, p.x.at(float64(d.Begin+int64(len(d.Nodes))*d.Width)))), tenth(p.y.from))
	return b.String()
}

type timeTick struct {
	at   int64
	text string
}

// timeTicks are round times in UTC, so many at most.
func timeTicks(begin, end int64, most int) []timeTick {
	const day = 24 * hour
	for _, step := range []int64{60, 300, 900, hour, 3 * hour, 6 * hour, 12 * hour, day, 2 * day, 7 * day, 14 * day} {
		if (end-begin)/step > int64(most) {
			continue
		}
		from := begin - begin%step
		if step >= 7*day {
			from = weekOf(begin)
		}
		layout := "2 Jan"
		if step < day {
			layout = "Mon 15:04"
		}
		var ticks []timeTick
		for at := from; at <= end; at += step {
			if at >= begin {
				ticks = append(ticks, timeTick{at, time.Unix(at, 0).UTC().Format(layout)})
			}
		}
		return ticks
	}
	var ticks []timeTick
	first := time.Unix(begin, 0).UTC()
	months := max(1, int((end-begin)/(30*day))/most)
	for at := time.Date(first.Year(), first.Month()+1, 1, 0, 0, 0, 0, time.UTC); at.Unix() <= end; at = at.AddDate(0, months, 0) {
		ticks = append(ticks, timeTick{at.Unix(), at.Format("Jan 06")})
	}
	return ticks
}
