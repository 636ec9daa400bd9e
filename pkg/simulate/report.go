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
	// Seed and GroupOnly of the runs.
	Seed      uint64
	GroupOnly bool
	// Sensitivity, when asked for, is what the policies cost in other worlds.
	Sensitivity []Sensitive
}

// NewReport adds the bounds to the results of a trace.
func NewReport(t Trace, w World, results []Result) Report {
	r := Report{Trace: t, World: w, Results: results}
	r.Reactive, r.Prescient = Bounds(t, w)
	return r
}

// row is one line of a report: a policy, or its half of the trace.
type row struct {
	Policy, Half string // Half is empty for all of the trace: the bounds are for that
	name         string
	Summary
}

func (r Report) rows() []row {
	var rows []row
	for _, res := range r.Results {
		rows = append(rows, row{res.Name, "", res.Name, res.Summary})
		if res.First != nil {
			rows = append(rows,
				row{res.Name, "first half", res.Name + " (first half)", *res.First},
				row{res.Name, "second half", res.Name + " (second half)", *res.Second})
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
	if len(r.Sensitivity) > 0 {
		b.WriteString("\nsensitivity: one value of the world at a time\n")
		b.WriteString(r.sensitivityTable())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// ratio of the total to a bound, empty when there is none to compare with.
func (r row) ratio(bound float64) string {
	if r.Half != "" || bound <= 0 {
		return ""
	}
	return strconv.FormatFloat(r.Total()/bound, 'f', 2, 64)
}

// sensitivityTable is a line for every variation of the world, and in words
// where hearth does not win.
func (r Report) sensitivityTable() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-12s %9s  %-17s %9s %4s  %-16s %9s  %s\n", "parameter", "value", "change", "hearth $", "rank", "best other", "its $", "hearth wins by")
	for _, s := range r.Sensitivity {
		fmt.Fprintf(&b, "%-12s %9s  %-17s %9.0f %4d  %-16s %9.0f  %s\n", cmp.Or(s.Parameter, "as given"), s.Value, s.Change,
			s.Hearth.Total(), s.Rank, s.Best.Policy, s.Best.Total(), s.wins())
	}
	b.WriteString("\n" + strings.Join(sensitivityWords(r.Sensitivity), "\n  ") + "\n")
	return b.String()
}

// reason is why rows were rejected, and of how many.
type reason struct {
	Text         string
	Count, First int // First is the line of the first one
}

// reasons of a trace's rejected rows, the most frequent first; beyond most of
// them only how many more there are.
func reasons(rejected []Rejection, most int) (list []reason, more int) {
	at := map[string]int{}
	for _, r := range rejected {
		i, ok := at[r.Reason]
		if !ok {
			i = len(list)
			at[r.Reason] = i
			list = append(list, reason{Text: r.Reason, First: r.Line})
		}
		list[i].Count++
	}
	slices.SortStableFunc(list, func(a, b reason) int { return cmp.Compare(b.Count, a.Count) })
	n := min(most, len(list))
	return list[:n], len(list) - n
}

// mostReasons are named in a report.
const mostReasons = 10

func writeRejected(b *strings.Builder, rejected []Rejection) {
	list, more := reasons(rejected, mostReasons)
	for _, r := range list {
		fmt.Fprintf(b, "  %d × %s (line %d first)\n", r.Count, r.Text, r.First)
	}
	if more > 0 {
		fmt.Fprintf(b, "  and %d other reasons\n", more)
	}
}

// WriteMarkdown writes the tables for documents. It leaves out the trace's
// name, which is a path of this machine.
func (r Report) WriteMarkdown(w io.Writer) error {
	t := r.Trace
	var b strings.Builder
	fmt.Fprintf(&b, "%s jobs, %s cache keys; %s of %s rows rejected. No policy costs less in total than $%s, and none that starts nothing ahead of need less than $%s.\n\n",
		thousands(len(t.Jobs)), thousands(t.Keys()), thousands(len(t.Rejected)), thousands(t.Rows),
		wholeDollars(r.Prescient), wholeDollars(r.Reactive))
	b.WriteString("| policy | warm | boots | resume waits | p95 | infra $ | delay $ | total $ | × reactive | × prescient |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, row := range r.rows() {
		fmt.Fprintf(&b, "| %s | %.1f %% | %.1f %% | %.1f %% | %d s | %s | %s | %s | %s | %s |\n", markdownCell(row.name),
			100*row.WarmHitRate(), 100*row.BootShare(), 100*row.ResumeShare(), row.WaitP95,
			wholeDollars(row.Infrastructure), wholeDollars(row.Delay), wholeDollars(row.Total()), row.ratio(r.Reactive), row.ratio(r.Prescient))
	}
	if len(r.Sensitivity) > 0 {
		b.WriteString("\n| parameter | value | change | hearth $ | rank | best other | its $ | hearth wins by |\n|---|--:|---|--:|--:|---|--:|--:|\n")
		for _, s := range r.Sensitivity {
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %d | %s | %s | %s |\n", cmp.Or(s.Parameter, "as given"), s.Value, s.Change,
				wholeDollars(s.Hearth.Total()), s.Rank, markdownCell(s.Best.Policy), wholeDollars(s.Best.Total()), s.wins())
		}
		b.WriteString("\n" + strings.Join(sensitivityWords(r.Sensitivity), "\n\n") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func markdownCell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

// thousands separates them by commas.
func thousands(n int) string {
	digits := strconv.Itoa(n)
	sign := ""
	if n < 0 {
		sign, digits = "−", digits[1:]
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}

func wholeDollars(f float64) string { return thousands(int(math.Round(f))) }

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
	type outcome struct {
		Name           string  `json:"name"`
		Infrastructure float64 `json:"infrastructure_dollars"`
		Delay          float64 `json:"delay_dollars"`
		Total          float64 `json:"total_dollars"`
	}
	// Empty parameter, change and value: the world as given.
	type variation struct {
		Parameter string    `json:"parameter"`
		Change    string    `json:"change"`
		Value     string    `json:"value"`
		Hearth    string    `json:"hearth"`
		Rank      int       `json:"rank"`
		Best      string    `json:"best_other"`
		Ratio     float64   `json:"ratio"`
		Policies  []outcome `json:"policies"`
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
		Sensitivity []variation `json:"sensitivity,omitempty"`
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
	for _, s := range r.Sensitivity {
		v := variation{
			Parameter: s.Parameter, Change: s.Change, Value: s.Value,
			Hearth: s.Hearth.Policy, Rank: s.Rank, Best: s.Best.Policy, Ratio: rounded(s.Ratio()),
		}
		for _, o := range s.Outcomes {
			v.Policies = append(v.Policies, outcome{o.Policy, rounded(o.Infrastructure), rounded(o.Delay), rounded(o.Total())})
		}
		out.Sensitivity = append(out.Sensitivity, v)
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(out)
}

// rounded to what anyone can mean.
func rounded(f float64) float64 { return math.Round(f*1e6) / 1e6 }
