package simulate_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/html"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

// standIn is a policy under hearth's name whose results do not change when
// hearth does.
func standIn(t *testing.T) simulate.NamedPolicy {
	t.Helper()
	p, err := simulate.FindPolicy("simple-park-10m")
	if err != nil {
		t.Fatal(err)
	}
	p.Name = "hearth"
	return p
}

// pageReport has everything that a page can show.
func pageReport(t *testing.T) simulate.Report {
	t.Helper()
	report := tinyReport(t)
	report.Results = nil
	policies := []simulate.NamedPolicy{standIn(t)}
	for _, name := range []string{"ca-default", "always-on", "simple-park-5m"} {
		p, err := simulate.FindPolicy(name)
		if err != nil {
			t.Fatal(err)
		}
		policies = append(policies, p)
	}
	for _, p := range policies {
		r, err := simulate.Run(report.Trace, report.World, p, simulate.Options{Seed: 1, Halves: p.Name == "hearth", Samples: 50})
		if err != nil {
			t.Fatal(err)
		}
		report.Results = append(report.Results, r)
	}
	var err error
	if report.Sensitivity, err = simulate.Sensitivity(report.Trace, report.World, policies, simulate.Options{Seed: 1}); err != nil {
		t.Fatal(err)
	}
	return report
}

func pageOf(t *testing.T, r simulate.Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteHTML(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestPageNeedsNothing: nothing is fetched, whatever the page's own policy
// forbids besides.
func TestPageNeedsNothing(t *testing.T) {
	page := pageOf(t, pageReport(t))
	outside := regexp.MustCompile(`(?i)(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:[a-z]+:|//)|url\(|@import|\bfetch\(|XMLHttpRequest|<link|https?:`)
	if found := outside.FindAllString(page, -1); len(found) > 0 {
		t.Errorf("the page reaches outside: %q", found)
	}
	if !strings.Contains(page, `content="default-src 'none';`) {
		t.Error("the page does not forbid itself to fetch")
	}
}

func TestPageIsDeterministic(t *testing.T) {
	report := pageReport(t)
	if first, second := pageOf(t, report), pageOf(t, pageReport(t)); first != second {
		t.Error("the same report makes another page")
	}
}

// elements parses a page and walks it.
func elements(t *testing.T, page string) []*html.Node {
	t.Helper()
	doc, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	var all []*html.Node
	for n := range doc.Descendants() {
		if n.Type == html.ElementNode {
			all = append(all, n)
		}
	}
	return all
}

func attribute(n *html.Node, key string) string {
	for _, a := range n.Attr {
		if a.Key == key {
			return a.Val
		}
	}
	return ""
}

func textOf(n *html.Node) string {
	var b strings.Builder
	for d := range n.Descendants() {
		if d.Type == html.TextNode {
			b.WriteString(d.Data)
		}
	}
	return b.String()
}

// TestPageIsSound: tags are balanced, names are used once and exist where they
// are referred to, drawings and tables say what they are.
func TestPageIsSound(t *testing.T) {
	page := pageOf(t, pageReport(t))
	checkBalanced(t, page)
	ids := map[string]bool{}
	all := elements(t, page)
	for _, n := range all {
		id := attribute(n, "id")
		if id != "" && ids[id] {
			t.Errorf("id %q is used twice", id)
		}
		ids[id] = true
	}
	count := map[string]int{}
	for _, n := range all {
		count[n.Data]++
		if target, ok := strings.CutPrefix(attribute(n, "href"), "#"); ok && !ids[target] {
			t.Errorf("a link leads to %q, which is not there", target)
		}
		for name := range strings.FieldsSeq(attribute(n, "aria-labelledby")) {
			if !ids[name] {
				t.Errorf("<%s> is labelled by %q, which is not there", n.Data, name)
			}
		}
		var children []string
		for c := range n.ChildNodes() {
			if c.Type == html.ElementNode {
				children = append(children, c.Data)
			}
		}
		switch {
		case n.Data == "svg" && (!slices.Contains(children, "title") || !slices.Contains(children, "desc")):
			t.Error("a drawing has no title or no description")
		case n.Data == "table" && !slices.Contains(children, "caption"):
			t.Error("a table has no caption")
		}
	}
	// Both plots for wide and narrow screens, and two timelines.
	for name, want := range map[string]int{"svg": 6, "h1": 1, "main": 1, "table": 6} {
		if count[name] != want {
			t.Errorf("%d <%s>, want %d", count[name], name, want)
		}
	}
}

func checkBalanced(t *testing.T, page string) {
	t.Helper()
	void := []string{"meta", "br", "img", "link", "input", "hr"}
	var open []string
	tokens := html.NewTokenizer(strings.NewReader(page))
	for {
		switch kind := tokens.Next(); kind {
		case html.ErrorToken:
			if err := tokens.Err(); !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if len(open) > 0 {
				t.Errorf("never closed: %q", open)
			}
			return
		case html.StartTagToken:
			if name, _ := tokens.TagName(); !slices.Contains(void, string(name)) {
				open = append(open, string(name))
			}
		case html.EndTagToken:
			name, _ := tokens.TagName()
			if len(open) == 0 || open[len(open)-1] != string(name) {
				t.Fatalf("</%s> closes %q", name, open)
			}
			open = open[:len(open)-1]
		}
	}
}

func TestPageEscapes(t *testing.T) {
	tame := pageReport(t)
	hostile := pageReport(t)
	const evil = `</title></script></style>--><img src=x onerror=alert(1)> " ' {{.}} javascript:alert(1) ]]>`
	hostile.Trace.Name = evil
	hostile.Trace.Rejected[0].Reason = evil
	for i := range hostile.Results {
		if name := hostile.Results[i].Name; name != "ca-default" && name != "hearth" {
			hostile.Results[i].Name += evil
		}
	}
	for i := range hostile.Sensitivity {
		hostile.Sensitivity[i].Best.Policy = evil
	}
	shape := func(r simulate.Report) (tags []string) {
		page := pageOf(t, r)
		checkBalanced(t, page)
		for _, n := range elements(t, page) {
			for _, a := range n.Attr {
				if strings.HasPrefix(a.Key, "on") || strings.HasPrefix(a.Val, "javascript:") {
					t.Errorf("<%s %s=%q>", n.Data, a.Key, a.Val)
				}
			}
			// Policies whose names are unknown have no explanation, and labels
			// too long for a plot are left out.
			switch n.Data {
			case "dt", "dd", "div", "text", "line":
			default:
				tags = append(tags, n.Data)
			}
		}
		return tags
	}
	// Once more than the losses are the same list, the elements are the same.
	without := func(tags []string) []string {
		return slices.DeleteFunc(tags, func(tag string) bool { return tag == "li" || tag == "ul" })
	}
	if got, want := without(shape(hostile)), without(shape(tame)); !slices.Equal(got, want) {
		t.Errorf("hostile names change the page's elements:\n%v\n%v", got, want)
	}
	var found int
	for _, n := range elements(t, pageOf(t, hostile)) {
		if text := textOf(n); (n.Data == "p" || n.Data == "td" || n.Data == "th") && strings.Contains(text, evil) {
			found++
		}
	}
	if found < 4 {
		t.Errorf("the names are shown %d times as they are, want the trace, a reason and policies", found)
	}
}

// TestPageStaysSmall: samples are merged, and a result without them has no
// timeline.
func TestPageStaysSmall(t *testing.T) {
	report := pageReport(t)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range report.Results {
		r := &report.Results[i]
		r.Samples = make([]simulate.Sample, 100_000)
		r.End = r.Begin + 60*int64(len(r.Samples))
		for j := range r.Samples {
			r.Samples[j].At = r.Begin + 60*int64(j)
			r.Samples[j].Nodes[simulate.Busy] = float64(random.IntN(500))
			r.Samples[j].Nodes[simulate.Parked] = float64(random.IntN(500))
		}
	}
	page := pageOf(t, report)
	if len(page) > 250_000 {
		t.Errorf("the page has %d bytes", len(page))
	}
	if !strings.Contains(page, `id="timelines"`) {
		t.Error("there is no timeline")
	}
	for i := range report.Results {
		report.Results[i].Samples = nil
	}
	if page := pageOf(t, report); strings.Contains(page, `id="timeline`) || strings.Contains(page, `id="nodes"`) {
		t.Error("there is a timeline without samples")
	}
}

func TestPageHeadline(t *testing.T) {
	result := func(name string, infrastructure, delay float64, waited int64, warm int) simulate.Result {
		return simulate.Result{Name: name, Summary: simulate.Summary{
			Jobs: 1000, Warm: warm, Waited: waited, Infrastructure: infrastructure, Delay: delay,
		}}
	}
	base := result("ca-default", 2000, 10_000, 60_000, 25)
	for _, test := range []struct {
		name    string
		results []simulate.Result
		want    []string
	}{
		{"cheaper", []simulate.Result{base, result("hearth", 1500, 2500, 30_000, 960)}, []string{
			"Hearth costs $4,000 where the autoscaler’s default costs $12,000",
			"That is $8,000 less (67\u202f%)", "The nodes cost $500 less (25\u202f%)", "developers wait 500 minutes less (50\u202f%)",
			"96.0\u202f% of the jobs find a warm cache instead of 2.5\u202f%", "The next best of the other policies, ca-default, costs $12,000.",
		}},
		{"dearer", []simulate.Result{base, result("hearth", 3000, 9500, 90_000, 960)}, []string{
			"Hearth costs $12,500", "That is $500 more (4\u202f%)", "The nodes cost $1,000 more (50\u202f%)",
			"developers wait 500 minutes more", "Cheaper still is ca-default, by $500.",
		}},
		{"the same", []simulate.Result{base, result("hearth", 2000, 10_000, 60_000, 25)}, []string{"That is the same over", "The nodes cost the same; developers wait the same"}},
		{"another of hearth’s", []simulate.Result{base, result("hearth@45", 4.5, 4.25, 0, 960)}, []string{"Hearth costs $8.75 where"}},
		{"no hearth", []simulate.Result{base, result("always-on", 9000, 0, 0, 500)}, []string{"60 CI jobs, 2 ways to keep nodes for them", "always-on costs least: $9,000"}},
		{"nothing to compare", []simulate.Result{base}, []string{"60 CI jobs under ca-default", "ca-default costs least: $12,000"}},
		{"nothing at all", nil, []string{"60 CI jobs, 0 ways"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			report := tinyReport(t)
			report.Results = test.results
			var header string
			for _, n := range elements(t, pageOf(t, report)) {
				if n.Data == "header" {
					header = textOf(n)
				}
			}
			for _, want := range test.want {
				if !strings.Contains(header, want) {
					t.Errorf("%q does not say %q", header, want)
				}
			}
		})
	}
}

// TestPageOfAnyWorld: nothing is drawn at a place that is no number.
func TestPageOfAnyWorld(t *testing.T) {
	for i, change := range []func(*simulate.World){
		func(w *simulate.World) { w.Price, w.ParkedPrice = 0, 0 },
		func(w *simulate.World) { w.DelayPrice = 0 },
		func(w *simulate.World) { w.Price, w.ParkedPrice, w.DelayPrice = 0, 0, 0 },
		func(w *simulate.World) { w.Boot, w.Resume, w.ReleaseLag, w.ColdFactor = 0, 0, 0, 0 },
		func(w *simulate.World) { w.Price, w.DelayPrice = 1e6, 1e6 },
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			report := pageReport(t)
			change(&report.World)
			trace := report.Trace
			trace.Jobs = trace.Jobs[:1]
			var results []simulate.Result
			for _, name := range []string{"ca-default", "always-on"} {
				p, err := simulate.FindPolicy(name)
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range []simulate.NamedPolicy{p, standIn(t)} {
					r, err := simulate.Run(trace, report.World, p, simulate.Options{Samples: 10})
					if err != nil {
						t.Fatal(err)
					}
					results = append(results, r)
				}
			}
			report = simulate.NewReport(trace, report.World, results[:3])
			page := pageOf(t, report)
			if bad := regexp.MustCompile(`="[^"]*(NaN|Inf)`).FindString(page); bad != "" {
				t.Errorf("the page has %s", bad)
			}
		})
	}
}
