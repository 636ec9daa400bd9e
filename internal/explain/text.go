package explain

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// columns is how wide text is at most, but for a single word that is wider.
const columns = 100

// printer writes lines; the first error sticks in the bufio.Writer.
type printer struct {
	*bufio.Writer
	now time.Time
}

func printed(w io.Writer, now time.Time, write func(p printer)) error {
	p := printer{bufio.NewWriter(w), now}
	write(p)
	return p.Flush()
}

func (p printer) linef(format string, args ...any) {
	fmt.Fprintln(p, strings.TrimRight(clean(fmt.Sprintf(format, args...)), " "))
}

// clean keeps what others named from steering the terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// item writes a heading and text beside it, wrapped.
func (p printer) item(heading, format string, args ...any) {
	const indent = 14
	line := fmt.Sprintf("  %-*s", indent-2, heading)
	width := len(line)
	for word := range strings.FieldsSeq(fmt.Sprintf(format, args...)) {
		if n := len([]rune(word)); width+n > columns && width > indent {
			p.linef("%s", line)
			line, width = strings.Repeat(" ", indent), indent
		}
		line += word + " "
		width += len([]rune(word)) + 1
	}
	p.linef("%s", line)
}

// WriteTable writes a line for each group and one for each of its nodes.
func (r *Report) WriteTable(w io.Writer) error {
	return printed(w, r.At, func(p printer) {
		p.linef("plan of %s", moment(r.At))
		if len(r.Groups) == 0 {
			p.linef("no node groups")
		}
		for i := range r.Groups {
			if i > 0 {
				p.linef("")
			}
			p.linef("%s", r.Groups[i].headline())
			for _, problem := range r.Groups[i].Problems {
				p.item("problem", "%s", problem)
			}
			p.nodes(r.Groups[i].Nodes)
		}
	})
}

// headline is a group in one line.
func (g *Group) headline() string {
	if g.Role != "runner" {
		return fmt.Sprintf("%s (%s): target size %d; %s", g.ID, g.Role, g.Target, g.counts())
	}
	return fmt.Sprintf("%s: target size %d, hidden %d; %s", g.ID, g.Target, g.Hidden, g.counts())
}

func (g *Group) counts() string {
	var parts []string
	for _, c := range []struct {
		n    int
		what string
	}{{g.Busy, "busy"}, {g.Idle, "idle"}, {g.NotReady, "not ready"}, {g.Starting, "starting"}, {g.Leaving, "leaving"}, {g.Parked, "parked"}} {
		if c.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	if len(parts) == 0 {
		return "no nodes"
	}
	return strings.Join(parts, ", ")
}

// nodes writes a table in which only the reasons are cut.
func (p printer) nodes(nodes []Node) {
	if len(nodes) == 0 {
		return
	}
	const least = 24 // letters of a reason
	name, shorts := len("NODE"), map[string]int{}
	for _, n := range nodes {
		name = max(name, len([]rune(n.short())))
		shorts[n.short()]++
	}
	name = min(name, 40)
	row := func(label, state, since, warm, decision, why string) {
		start := fmt.Sprintf("  %-*s %-8s %6s %4s %-8s ", name, label, state, since, warm, decision)
		p.linef("%s%s", start, cut(why, max(columns-len([]rune(start)), least)))
	}
	row("NODE", "STATE", "FOR", "WARM", "DECISION", "WHY")
	for _, n := range nodes {
		label := n.short()
		if shorts[label] > 1 {
			label = n.Label()
		}
		row(label, string(n.State), p.since(n.Since), strconv.Itoa(n.WarmKeys), orDash(n.Decision), n.why())
	}
}

// short is a label without the domain of a name or the path of an instance id.
func (n Node) short() string {
	if n.Name != "" {
		head, _, _ := strings.Cut(n.Name, ".")
		return head
	}
	return n.Instance[strings.LastIndex(n.Instance, "/")+1:]
}

// why is all reasons in one line. What came on top of a decision, and turned
// it, comes first.
func (n Node) why() string {
	var texts []string
	for _, r := range n.Reasons {
		if r.Code == "later" || r.Code == "released" {
			texts = append([]string{r.Text}, texts...)
		} else {
			texts = append(texts, r.Text)
		}
	}
	return strings.Join(texts, "; ")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// cut shortens a text to that many letters.
func cut(s string, most int) string {
	letters := []rune(s)
	if len(letters) <= most {
		return s
	}
	return strings.TrimRight(string(letters[:most-1]), " ,;:") + "…"
}

// since is how long ago a time was, short.
func (p printer) since(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return span(p.now.Sub(*t))
}

func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// span is a duration in at most two units.
func span(d time.Duration) string {
	d = max(d, 0).Round(time.Second)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return trim(fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60), "0s")
	case d < 48*time.Hour:
		return trim(fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60), "0m")
	default:
		return trim(fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24), "0h")
	}
}

// trim takes a second unit that is zero off: "5m0s" becomes "5m".
func trim(s, zero string) string {
	if head, ok := strings.CutSuffix(s, zero); ok && strings.TrimRight(head, "mhd") != head {
		return head
	}
	return s
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// dollars an hour, to the cent or, of small amounts, to three digits.
func dollars(perHour float64) string {
	if perHour < 0.1 {
		return fmt.Sprintf("$%.3g/h", perHour)
	}
	return fmt.Sprintf("$%.2f/h", perHour)
}

// count is a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
