package simulate

import (
	"bytes"
	"cmp"
	"embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// reportFiles are the page's template, style and script.
//
//go:embed report
var reportFiles embed.FS

// WriteHTML writes the report as one page that needs nothing else: no network,
// and no script to be read. Where results have Samples, it draws them.
func (r Report) WriteHTML(w io.Writer) error {
	t, err := template.New("page.html").Funcs(template.FuncMap{
		"thousands": thousands, "dollars": dollars, "wholeDollars": wholeDollars, "hours": hours,
		"percent": func(share float64) string { return fmt.Sprintf("%.1f", 100*share) },
	}).ParseFS(reportFiles, "report/*")
	if err != nil {
		return fmt.Errorf("reading the page's template: %w", err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, r.page()); err != nil {
		return fmt.Errorf("making the page: %w", err)
	}
	_, err = w.Write(b.Bytes())
	return err
}

// Figures are drawn twice, for screens that are wide and narrow: text in them
// keeps its size.
const wide, narrow = 920, 358

// page is what the template shows.
type page struct {
	Report
	Headline, Ours  string
	Jobs, Keys      int
	Rejected        int
	From, To        string
	DelayPrice      string
	Lede            []string
	Tiles           []tile
	Frontier, Money []figure
	Waits           []waits
	Timelines       []timeline
	TimelineData    []timelineData
	Rows            []tableRow
	Policies        []NamedPolicy
	Values          []worldValue
	Worlds          []sensitiveRow
	WorldsWords     []string
	Reasons         []reason
	MoreReasons     int
}

// tile is one figure of ca-default and of hearth side by side. Shares are of
// the greater, in percent.
type tile struct {
	What, From, To      string
	FromShare, ToShare  tenth
	FromPolicy, Because string
}

// waits is what a policy's jobs waited for.
type waits struct {
	Name, Kind    string
	Parts         []part
	P50, P95, P99 int64
}

type part struct {
	Class, What string
	Percent     tenth
	Label       string // where there is room
}

type tableRow struct {
	row
	ID, Kind                      string
	RatioReactive, RatioPrescient string
}

type worldValue struct{ Name, Value, Doc string }

type sensitiveRow struct {
	Sensitive
	Wins  string
	Loses bool
	Bar   tenth // percent of the column
}

func (r Report) page() page {
	p := page{
		Report: r, Jobs: len(r.Trace.Jobs), Keys: r.Trace.Keys(), Rejected: len(r.Trace.Rejected),
		DelayPrice: "$" + priceText(r.World.DelayPrice) + " an hour",
	}
	if p.Jobs > 0 {
		p.From, p.To = dateText(r.Trace.Jobs[0].Arrival), dateText(r.Trace.Jobs[p.Jobs-1].Arrival)
	}
	ours, base := r.ours(), r.find("ca-default")
	if ours != nil {
		p.Ours = ours.Name
	}
	p.headline(ours, base)
	for _, width := range []float64{wide, narrow} {
		p.Frontier = append(p.Frontier, r.frontierFigure(width))
		p.Money = append(p.Money, r.moneyFigure(width))
	}
	for _, res := range r.Results {
		p.Waits = append(p.Waits, waitsOf(res))
		if known, err := FindPolicy(res.Name); err == nil {
			p.Policies = append(p.Policies, known)
		}
	}
	p.Timelines = timelines(ours, base)
	for _, t := range p.Timelines {
		p.TimelineData = append(p.TimelineData, t.Data)
	}
	for _, row := range r.rows() {
		p.Rows = append(p.Rows, tableRow{row, rowID(row.name), kind(row.Policy), row.ratio(r.Reactive), row.ratio(r.Prescient)})
	}
	for _, v := range parameters() {
		p.Values = append(p.Values, worldValue{v.name, v.text(r.World), v.doc})
	}
	most := "no limit"
	if n := r.World.MaxNodes; n > 0 {
		most = thousands(n)
	}
	knows := "its cache key"
	if r.GroupOnly {
		knows = "its group"
	}
	p.Values = append(p.Values, worldValue{"most nodes", most, "that run at once"},
		worldValue{"placement", knows, "what is known of a job before it runs"},
		worldValue{"seed", strconv.FormatUint(r.Seed, 10), "of what is random"})
	greatest := 0.0
	for _, s := range r.Sensitivity {
		greatest = max(greatest, math.Abs(s.margin()))
	}
	for _, s := range r.Sensitivity {
		v := sensitiveRow{Sensitive: s, Wins: s.wins(), Loses: s.margin() < 0}
		if greatest > 0 {
			v.Bar = tenth(100 * math.Abs(s.margin()) / greatest)
		}
		p.Worlds = append(p.Worlds, v)
	}
	p.WorldsWords = sensitivityWords(r.Sensitivity)
	p.Reasons, p.MoreReasons = reasons(r.Trace.Rejected, mostReasons)
	return p
}

// ours is the result of hearth, or of the first of its policies, or nil.
func (r Report) ours() *Result {
	if res := r.find("hearth"); res != nil {
		return res
	}
	if i := slices.IndexFunc(r.Results, func(res Result) bool { return Ours(res.Name) }); i >= 0 {
		return &r.Results[i]
	}
	return nil
}

func (r Report) find(name string) *Result {
	if i := slices.IndexFunc(r.Results, func(res Result) bool { return res.Name == name }); i >= 0 {
		return &r.Results[i]
	}
	return nil
}

// kind is how a policy is coloured.
func kind(name string) string {
	switch {
	case Ours(name):
		return "ours"
	case name == "ca-default":
		return "base"
	}
	return "other"
}

func rowID(name string) string { return "policy-" + strings.ReplaceAll(name, " ", "-") }

// headline says in words what hearth makes of the trace.
func (p *page) headline(ours, base *Result) {
	r, t := p.Report, p.Report.Trace
	span := ""
	if len(t.Jobs) > 0 {
		span = spanText(t.Jobs[len(t.Jobs)-1].Arrival - t.Jobs[0].Arrival)
	}
	jobs := thousands(len(t.Jobs)) + " CI jobs"
	if ours == nil || base == nil {
		p.Headline = fmt.Sprintf("%s, %d ways to keep nodes for them", jobs, len(r.Results))
		if len(r.Results) == 1 {
			p.Headline = jobs + " under " + r.Results[0].Name
		}
		if len(r.Results) > 0 {
			best := slices.MinFunc(r.Results, func(a, b Result) int { return cmp.Compare(a.Total(), b.Total()) })
			p.Lede = append(p.Lede, fmt.Sprintf("Over %s, %s costs least: %s for nodes and the time of developers together. %s of its jobs find a warm cache.",
				span, best.Name, dollars(best.Total()), percent(best.WarmHitRate())))
		}
		return
	}
	p.Headline = fmt.Sprintf("Hearth costs %s where the autoscaler’s default costs %s", dollars(ours.Total()), dollars(base.Total()))
	p.Lede = []string{
		fmt.Sprintf("That is %s over %s and %s. %s; developers wait %s, and %s of the jobs find a warm cache instead of %s.",
			change(base.Total(), ours.Total(), dollars), span, jobs,
			upper("the nodes cost "+change(base.Infrastructure, ours.Infrastructure, dollars)),
			change(float64(base.Waited), float64(ours.Waited), func(s float64) string { return minutes(int64(s)) + " minutes" }),
			percent(ours.WarmHitRate()), percent(base.WarmHitRate())),
		r.standing(*ours),
	}
	p.Tiles = []tile{
		newTile("Total cost", base.Total(), ours.Total(), dollars,
			fmt.Sprintf("nodes at $%s/h, waiting and cold runs at $%s/h", priceText(r.World.Price), priceText(r.World.DelayPrice))),
		newTile("Minutes waited", float64(base.Waited), float64(ours.Waited), func(s float64) string { return minutes(int64(s)) },
			fmt.Sprintf("and %s instead of %s lost to cold caches", minutes(ours.Slowed), minutes(base.Slowed))),
		newTile("Warm hits", base.WarmHitRate(), ours.WarmHitRate(), percent, "jobs on a node that holds their cache"),
	}
}

// standing compares hearth with what else there is, and with what there could
// be at best.
func (r Report) standing(ours Result) string {
	var others []Result
	for _, res := range r.Results {
		if !Ours(res.Name) {
			others = append(others, res)
		}
	}
	best := slices.MinFunc(others, func(a, b Result) int { return cmp.Compare(a.Total(), b.Total()) })
	var text string
	if best.Total() < ours.Total() {
		text = fmt.Sprintf("Cheaper still is %s, by %s.", best.Name, dollars(ours.Total()-best.Total()))
	} else {
		text = fmt.Sprintf("The next best of the other policies, %s, costs %s.", best.Name, dollars(best.Total()))
	}
	return text + fmt.Sprintf(" Whoever knew the future, and still started nodes only when a job is there, would pay at least %s; starting them ahead, %s.",
		dollars(r.Reactive), dollars(r.Prescient))
}

// change says how much less, or more, there is now.
func change(from, to float64, text func(float64) string) string {
	word := " less"
	if to > from {
		word = " more"
	}
	if text(from) == text(to) {
		return "the same"
	}
	difference := text(math.Abs(from-to)) + word
	if percent := 100 * math.Abs(from-to) / from; from > 0 && percent >= 1 && percent < 1000 {
		difference += fmt.Sprintf(" (%.0f\u202f%%)", percent)
	}
	return difference
}

func upper(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

func newTile(what string, from, to float64, text func(float64) string, because string) tile {
	most := max(from, to, 1e-9)
	return tile{
		What: what, From: text(from), To: text(to), FromPolicy: "ca-default",
		FromShare: tenth(100 * from / most), ToShare: tenth(100 * to / most), Because: because,
	}
}

func waitsOf(r Result) waits {
	w := waits{Name: r.Name, Kind: kind(r.Name), P50: r.WaitP50, P95: r.WaitP95, P99: r.WaitP99}
	nothing := r.Jobs - r.AfterBoot - r.AfterResume - r.AfterJob
	for _, p := range []struct {
		class, what string
		jobs        int
	}{{"nothing", "started at once", nothing}, {"queue", "behind a job", r.AfterJob}, {"resume", "for a resume", r.AfterResume}, {"boot", "for a boot", r.AfterBoot}} {
		if p.jobs == 0 {
			continue
		}
		percent := 100 * share(p.jobs, r.Jobs)
		label := ""
		if percent >= 8 {
			label = fmt.Sprintf("%.0f", percent)
		}
		w.Parts = append(w.Parts, part{p.class, p.what, tenth(percent), label})
	}
	return w
}

// tenth is rounded to a tenth, without a needless zero.
type tenth float64

func (n tenth) String() string {
	text := fmt.Sprintf("%.1f", float64(n))
	text = strings.TrimSuffix(text, ".0")
	if text == "-0" {
		return "0"
	}
	return text
}

func dollars(f float64) string {
	if math.Abs(f) >= 10 || f == 0 {
		text, negative := strings.CutPrefix(wholeDollars(f), "−")
		if negative {
			return "−$" + text
		}
		return "$" + text
	}
	if f < 0 {
		return fmt.Sprintf("−$%.2f", -f)
	}
	return fmt.Sprintf("$%.2f", f)
}

func percent(share float64) string { return fmt.Sprintf("%.1f\u202f%%", 100*share) }

func minutes(seconds int64) string { return thousands(int(math.Round(float64(seconds) / 60))) }

func hours(h float64) string { return thousands(int(math.Round(h))) }

func dateText(at int64) string { return time.Unix(at, 0).UTC().Format("2 January 2006") }

func spanText(seconds int64) string {
	switch {
	case seconds >= 2*24*hour:
		return fmt.Sprintf("%d days", (seconds+12*hour)/(24*hour))
	case seconds >= 2*hour:
		return fmt.Sprintf("%d hours", (seconds+hour/2)/hour)
	}
	return fmt.Sprintf("%d minutes", (seconds+59)/60)
}
