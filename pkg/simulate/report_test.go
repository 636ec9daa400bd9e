package simulate_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

var update = flag.Bool("update", false, "write the golden reports anew")

// tinyReport compares three policies on a made-up trace that is small enough
// to be read.
func tinyReport(t *testing.T) simulate.Report {
	t.Helper()
	trace, err := simulate.Generate(simulate.Generated{Jobs: 60, Weeks: 1, Keys: 8, Burst: 4, Typical: 300}, rand.New(rand.NewPCG(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	trace.Rows += 3
	trace.Rejected = []simulate.Rejection{{Line: 4, Reason: "it has no job id"}, {Line: 9, Reason: "started is missing"}, {Line: 12, Reason: "started is missing"}}
	var results []simulate.Result
	for _, name := range []string{"ca-default", "simple-park-5m", "ttl-histogram"} {
		p, err := simulate.FindPolicy(name)
		if err != nil {
			t.Fatal(err)
		}
		r, err := simulate.Run(trace, simulate.DefaultWorld(), p, simulate.Options{Seed: 1, Halves: name == "ca-default"})
		if err != nil {
			t.Fatal(err)
		}
		results = append(results, r)
	}
	return simulate.NewReport(trace, simulate.DefaultWorld(), results)
}

func TestReports(t *testing.T) {
	report := tinyReport(t)
	// The bounds have tests of their own.
	report.Reactive, report.Prescient = 150, 100
	report.Sensitivity = madeUpSensitivity()
	var table, csv, js, markdown bytes.Buffer
	for name, err := range map[string]error{
		"table": report.WriteTable(&table), "csv": report.WriteCSV(&csv), "json": report.WriteJSON(&js), "markdown": report.WriteMarkdown(&markdown),
	} {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	for name, got := range map[string]string{"report.txt": table.String(), "report.csv": csv.String(), "report.json": js.String(), "report.md": markdown.String()} {
		path := filepath.Join("testdata", "reports", name)
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s; -update writes it anew:\n%s", path, diff)
		}
	}
}

// madeUpSensitivity has all that words are found for: won, lost narrowly and
// clearly, and even.
func madeUpSensitivity() []simulate.Sensitive {
	var all []simulate.Sensitive
	for i, v := range simulate.Variations(simulate.DefaultWorld())[:6] {
		hearth := simulate.Outcome{Policy: "hearth", Infrastructure: 400, Delay: []float64{600, 600, 600, 600, 600.4, 600}[i]}
		best := simulate.Outcome{Policy: "simple-park-5m", Infrastructure: 300, Delay: []float64{950, 700, 698, 400, 700, 701}[i]}
		s := simulate.Sensitive{Variation: v, Outcomes: []simulate.Outcome{best, hearth}, Hearth: hearth, Best: best, Rank: 1}
		if best.Total() < hearth.Total() {
			s.Rank = 2
		}
		all = append(all, s)
	}
	return all
}

// TestReportShape holds the JSON to the names that others read.
func TestReportShape(t *testing.T) {
	var b bytes.Buffer
	report := tinyReport(t)
	if err := report.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got, other map[string]any
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	names := func(v any) string {
		var names []string
		for name := range v.(map[string]any) {
			names = append(names, name)
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	if err := json.Unmarshal(withSensitivity(t, report), &other); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ got, want string }{
		{names(other), "bounds policies sensitivity trace"},
		{names(other["sensitivity"].([]any)[0]), "best_other change hearth parameter policies rank ratio value"},
		{names(got), "bounds policies trace"},
		{names(got["trace"]), "jobs keys rejected"},
		{names(got["bounds"]), "prescient_dollars reactive_dollars"},
		{names(got["policies"].([]any)[0]), "boot_share delay_dollars infrastructure_dollars launches name parked_node_hours " +
			"resume_share running_node_hours total_dollars wait_p95_seconds warm_hit_rate"},
	} {
		if c.got != c.want {
			t.Errorf("fields %q, want %q", c.got, c.want)
		}
	}
}

func withSensitivity(t *testing.T, r simulate.Report) []byte {
	t.Helper()
	r.Sensitivity = madeUpSensitivity()
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestGenerate(t *testing.T) {
	g := simulate.DefaultGenerated()
	made := func(seed uint64) simulate.Trace {
		trace, err := simulate.Generate(g, rand.New(rand.NewPCG(seed, 1)))
		if err != nil {
			t.Fatal(err)
		}
		return trace
	}
	trace := made(1)
	if diff := cmp.Diff(trace, made(1)); diff != "" {
		t.Errorf("the same seed makes another trace: %s", diff)
	}
	if cmp.Equal(trace, made(2)) {
		t.Error("another seed makes the same trace")
	}
	if len(trace.Jobs) != g.Jobs {
		t.Errorf("%d jobs, want %d", len(trace.Jobs), g.Jobs)
	}
	last := trace.Jobs[len(trace.Jobs)-1].Arrival
	if weeks := float64(last-trace.Jobs[0].Arrival) / (7 * 24 * 3600); weeks < 4.5 || weeks > 7.5 {
		t.Errorf("%.1f weeks, want about %d", weeks, g.Weeks)
	}
	office, weekend := 0, 0
	runs := map[int64]int{}
	keys := map[string]int{}
	for _, j := range trace.Jobs {
		at := time.Unix(j.Arrival, 0).UTC()
		if day := at.Weekday(); day == time.Saturday || day == time.Sunday {
			weekend++
		} else if at.Hour() >= 8 && at.Hour() < 19 {
			office++
		}
		runs[j.Arrival]++
		keys[j.Group]++
		if j.Duration < 1 {
			t.Fatalf("%+v", j)
		}
	}
	if share := float64(office) / float64(g.Jobs); share < 0.6 || share > 0.9 {
		t.Errorf("%.0f %% of the jobs arrive in office hours", 100*share)
	}
	if share := float64(weekend) / float64(g.Jobs); share == 0 || share > 0.12 {
		t.Errorf("%.0f %% of the jobs arrive at weekends", 100*share)
	}
	if burst := float64(g.Jobs) / float64(len(runs)); burst < 12 || burst > 24 {
		t.Errorf("%.1f jobs in a run, want about %d", burst, g.Burst)
	}
	most := 0
	for _, n := range keys {
		most = max(most, n)
	}
	if average := g.Jobs / len(keys); most < 2*average {
		t.Errorf("the busiest pipeline has %d jobs, the average one %d", most, average)
	}
	for _, bad := range []simulate.Generated{{}, {Jobs: 1, Weeks: 1, Keys: 0, Burst: 1, Typical: 1}, {Jobs: 1e9, Weeks: 1, Keys: 1, Burst: 1, Typical: 1}} {
		if _, err := simulate.Generate(bad, rand.New(rand.NewPCG(1, 1))); err == nil {
			t.Errorf("%+v made a trace", bad)
		}
	}
}

func TestMix(t *testing.T) {
	// A Thursday in 2025 and a Tuesday in 2024.
	a := simulate.Trace{Name: "a", Rows: 3, Jobs: []simulate.Job{
		{ID: "1", Arrival: 1757006747, Duration: 10, Key: "k", Group: "g"}, {ID: "2", Arrival: 1757106747, Duration: 10, Key: "k"},
	}, Rejected: []simulate.Rejection{{Line: 3, Reason: "bad"}}}
	b := simulate.Trace{Name: "b", Rows: 2, Jobs: []simulate.Job{{ID: "1", Arrival: 1719928262, Duration: 20, Key: "k"}},
		Rejected: []simulate.Rejection{{Line: 2, Reason: "worse"}}}
	got := simulate.Mix("both", a, b)
	want := simulate.Trace{Name: "both", Rows: 5, Jobs: []simulate.Job{
		{ID: "b/1", Arrival: 1719928262 + 61*7*24*3600, Duration: 20, Key: "b/k", Group: "b/"},
		{ID: "a/1", Arrival: 1757006747, Duration: 10, Key: "a/k", Group: "a/g"},
		{ID: "a/2", Arrival: 1757106747, Duration: 10, Key: "a/k", Group: "a/"},
	}, Rejected: []simulate.Rejection{{Line: 2, Reason: "b: worse"}, {Line: 3, Reason: "a: bad"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if before, after := time.Unix(1719928262, 0).UTC(), time.Unix(got.Jobs[0].Arrival, 0).UTC(); before.Weekday() != after.Weekday() || before.Hour() != after.Hour() {
		t.Errorf("%s became %s", before, after)
	}
}
