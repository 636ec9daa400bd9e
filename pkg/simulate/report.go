package simulate

import (
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Report is what several policies made of one trace.
type Report struct {
	Trace   Trace
	World   World
	Results []Result
	// Reactive and Prescient are the clairvoyant lower bounds on total cost.
	Reactive, Prescient float64
}

// NewReport adds the bounds to the results of a trace.
func NewReport(t Trace, w World, results []Result) Report {
	r := Report{Trace: t, World: w, Results: results}
	r.Reactive, r.Prescient = Bounds(t, w)
	return r
}

// row is one line of a report: a policy, or its half of the trace.
type row struct {
	name string
	Summary
	whole bool // the bounds are for the whole trace
}

func (r Report) rows() []row {
	var rows []row
	for _, res := range r.Results {
		rows = append(rows, row{res.Name, res.Summary, true})
		if res.First != nil {
			rows = append(rows, row{res.Name + " (first half)", *res.First, false}, row{res.Name + " (second half)", *res.Second, false})
		}
	}
	return rows
}

// WriteTable writes the report for people.
func (r Report) WriteTable(w io.Writer) error {
	t := r.Trace
	var b strings.Builder
	fmt.Fprintf(&b, "trace %s: %d jobs, %d cache keys, %d of %d rows rejected\n", t.Name, len(t.Jobs), t.Keys(), t.Rows-len(t.Jobs), t.Rows)
	writeRejected(&b, t.Rejected)
	rows := r.rows()
	wide := len("policy")
	for _, row := range rows {
		wide = max(wide, len(row.name))
	}
	fmt.Fprintf(&b, "\n%-*s %6s %6s %6s %6s %14s %9s %9s %8s %9s %9s %9s %7s %7s\n", wide, "policy",
		"warm", "boot", "resume", "queue", "wait 50/95/99", "running h", "parked h", "launches",
		"infra $", "delay $", "total $", "/react.", "/presc.")
	for _, row := range rows {
		line := fmt.Sprintf("%-*s %5.1f%% %5.1f%% %5.1f%% %5.1f%% %14s %9.0f %9.0f %8d %9.0f %9.0f %9.0f %7s %7s", wide, row.name,
			100*row.WarmHitRate(), 100*row.BootShare(), 100*row.ResumeShare(), 100*row.QueueShare(),
			fmt.Sprintf("%d/%d/%d s", row.WaitP50, row.WaitP95, row.WaitP99),
			row.RunningNodeHours(), row.ParkedNodeHours(), row.Launches,
			row.Infrastructure, row.Delay, row.Total(), row.ratio(r.Reactive), row.ratio(r.Prescient))
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	fmt.Fprintf(&b, "\nlower bounds on total $: %.0f reactive, %.0f prescient\n", r.Reactive, r.Prescient)
	_, err := io.WriteString(w, b.String())
	return err
}

// ratio of the total to a bound, empty when there is none to compare with.
func (r row) ratio(bound float64) string {
	if !r.whole || bound <= 0 {
		return ""
	}
	return strconv.FormatFloat(r.Total()/bound, 'f', 2, 64)
}

// writeRejected names what was rejected, reason by reason, the most frequent
// first.
func writeRejected(b *strings.Builder, rejected []Rejection) {
	type reason struct {
		text         string
		count, first int
	}
	at := map[string]int{}
	var reasons []reason
	for _, r := range rejected {
		i, ok := at[r.Reason]
		if !ok {
			i = len(reasons)
			at[r.Reason] = i
			reasons = append(reasons, reason{text: r.Reason, first: r.Line})
		}
		reasons[i].count++
	}
	slices.SortStableFunc(reasons, func(a, b reason) int { return cmp.Compare(b.count, a.count) })
	const most = 10
	for i, r := range reasons {
		if i == most {
			fmt.Fprintf(b, "  and %d other reasons\n", len(reasons)-most)
			return
		}
		fmt.Fprintf(b, "  %d × %s (line %d first)\n", r.count, r.text, r.first)
	}
}

// WriteCSV writes one line for every policy.
func (r Report) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	lines := [][]string{{
		"policy", "jobs", "warm_hit_rate", "boot_share", "resume_share", "queue_share",
		"wait_p50_seconds", "wait_p95_seconds", "wait_p99_seconds", "running_node_hours", "parked_node_hours",
		"launches", "resumes", "infrastructure_dollars", "delay_dollars", "total_dollars",
		"reactive_ratio", "prescient_ratio",
	}}
	number := func(f float64) string { return strconv.FormatFloat(rounded(f), 'f', -1, 64) }
	whole := func(n int64) string { return strconv.FormatInt(n, 10) }
	for _, row := range r.rows() {
		lines = append(lines, []string{
			row.name, whole(int64(row.Jobs)), number(row.WarmHitRate()), number(row.BootShare()), number(row.ResumeShare()), number(row.QueueShare()),
			whole(row.WaitP50), whole(row.WaitP95), whole(row.WaitP99), number(row.RunningNodeHours()), number(row.ParkedNodeHours()),
			whole(int64(row.Launches)), whole(int64(row.Resumes)), number(row.Infrastructure), number(row.Delay), number(row.Total()),
			row.ratio(r.Reactive), row.ratio(r.Prescient),
		})
	}
	return out.WriteAll(lines)
}

// WriteJSON writes the report for programs.
func (r Report) WriteJSON(w io.Writer) error {
	type policy struct {
		Name             string  `json:"name"`
		WarmHitRate      float64 `json:"warm_hit_rate"`
		BootShare        float64 `json:"boot_share"`
		ResumeShare      float64 `json:"resume_share"`
		WaitP95          int64   `json:"wait_p95_seconds"`
		RunningNodeHours float64 `json:"running_node_hours"`
		ParkedNodeHours  float64 `json:"parked_node_hours"`
		Launches         int     `json:"launches"`
		Infrastructure   float64 `json:"infrastructure_dollars"`
		Delay            float64 `json:"delay_dollars"`
		Total            float64 `json:"total_dollars"`
	}
	var out struct {
		Trace struct {
			Jobs     int `json:"jobs"`
			Keys     int `json:"keys"`
			Rejected int `json:"rejected"`
		} `json:"trace"`
		Policies []policy `json:"policies"`
		Bounds   struct {
			Reactive  float64 `json:"reactive_dollars"`
			Prescient float64 `json:"prescient_dollars"`
		} `json:"bounds"`
	}
	out.Trace.Jobs, out.Trace.Keys, out.Trace.Rejected = len(r.Trace.Jobs), r.Trace.Keys(), len(r.Trace.Rejected)
	out.Bounds.Reactive, out.Bounds.Prescient = rounded(r.Reactive), rounded(r.Prescient)
	out.Policies = []policy{}
	for _, row := range r.rows() {
		out.Policies = append(out.Policies, policy{
			row.name, rounded(row.WarmHitRate()), rounded(row.BootShare()), rounded(row.ResumeShare()), row.WaitP95,
			rounded(row.RunningNodeHours()), rounded(row.ParkedNodeHours()), row.Launches,
			rounded(row.Infrastructure), rounded(row.Delay), rounded(row.Total()),
		})
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(out)
}

// rounded to what anyone can mean.
func rounded(f float64) float64 { return math.Round(f*1e6) / 1e6 }
