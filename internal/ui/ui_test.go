package ui_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/html"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/savings"
	"github.com/hearth-ci/hearth/internal/ui"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var at = time.Date(2026, 1, 5, 9, 0, 0, 0, time.UTC)

// source answers with what it was last given.
type source struct {
	report  atomic.Pointer[explain.Report]
	events  []explain.Event
	savings *savings.Report
}

func (s *source) Report() *explain.Report           { return s.report.Load() }
func (s *source) Events() []explain.Event           { return s.events }
func (s *source) Savings(time.Time) *savings.Report { return s.savings }

// scene is a small fleet with every state, whose names are all name.
func scene(name string) *source {
	since := at.Add(-time.Hour)
	s := &source{}
	var nodes []explain.Node
	for i, state := range explain.States() {
		nodes = append(nodes, explain.Node{
			Name: fmt.Sprint(name, i), Instance: name, State: state, Phase: "Ready", Since: &since, Decision: "keep", Jobs: 1, WarmKeys: 4,
			Reasons: []explain.Reason{{Code: "warm", Text: "warm for " + name}},
			Keys:    []explain.Key{{Key: name, Warmth: 0.7, LastUsed: since}, {Key: "b", Warmth: 0.2, LastUsed: since}},
		})
	}
	s.report.Store(&explain.Report{
		At:    at,
		Queue: explain.Queue{Waiting: 1, Jobs: []explain.Wait{{Namespace: name, Name: name, Key: name, Group: name, Since: since}}},
		Groups: []explain.Group{{
			ID: name, At: at, Role: "runner", Busy: 1, Idle: 1, NotReady: 1, Starting: 1, Leaving: 1, Parked: 1, Problems: []string{name}, Nodes: nodes,
		}},
	})
	for i := range 3 {
		s.events = append(s.events, explain.Event{
			Seq: uint64(3 - i), At: at, Kind: explain.Kinds()[i%2], Group: name, Node: name, Action: name, Text: name, Count: 2, Warning: i == 0,
		})
	}
	s.savings = &savings.Report{At: at, Assumptions: []string{name}, Groups: []savings.Group{{
		ID: name, Since: since, Until: at, Jobs: 10, WarmHits: 9, SavedMinutes: 180, Hearth: savings.Cost{Nodes: 1.5, Delay: 2, WarmHitRate: 0.9},
		Baseline: &savings.Cost{Nodes: 2.5, Delay: 20, WarmHitRate: 0.1},
	}}}
	return s
}

// serve starts a status page.
func serve(t testing.TB, s ui.Source, change func(*ui.Config)) *httptest.Server {
	t.Helper()
	cfg := ui.Config{Source: s, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Leader: func() string { return "hearth-0" }}
	if change != nil {
		change(&cfg)
	}
	u, err := ui.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); u.Run(ctx) }()
	server := httptest.NewServer(u)
	t.Cleanup(func() { cancel(); <-done; server.Close() })
	return server
}

func get(t testing.TB, server *httptest.Server, path string) (int, http.Header, string) {
	t.Helper()
	answer, err := server.Client().Get(server.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, answer.Header, string(body)
}

// settled waits until the savings are on the page.
func settled(t testing.TB, server *httptest.Server, path, text string) string {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		code, _, body := get(t, server, path)
		if code == http.StatusOK && strings.Contains(body, text) {
			return body
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %d, and %q is not there:\n%s", path, code, text, body)
		}
	}
}

// elements walks a page.
func elements(t testing.TB, page string) (all []*html.Node) {
	t.Helper()
	root, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	for n := range root.Descendants() {
		if n.Type == html.ElementNode {
			all = append(all, n)
		}
	}
	return all
}

func attribute(n *html.Node, key string) (string, bool) {
	for _, a := range n.Attr {
		if a.Key == key {
			return a.Val, true
		}
	}
	return "", false
}

func textOf(n *html.Node) string {
	var b strings.Builder
	for d := range n.Descendants() {
		if d.Type == html.TextNode {
			b.WriteString(d.Data)
		}
	}
	return strings.TrimSpace(b.String())
}

func TestPageSaysWhatThereIs(t *testing.T) {
	server := serve(t, scene("acme"), nil)
	page := settled(t, server, "/ui", "Nodes cost")
	for _, want := range []string{
		"1 busy", "1 idle", "1 starting", "1 leaving", "1 not ready", "acme/acme", "warm for acme", "Problem: acme", "longest 1 h 00", "90 %", "3.0 h",
		"$1.50", "$2.50", "$3.50", "$22.50", "warning: acme × 2", "70% warm (acme, b and 2 more)",
	} {
		if !strings.Contains(html.UnescapeString(page), want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	states := map[string]int{}
	for _, n := range elements(t, page) {
		if class, _ := attribute(n, "class"); n.Data == "button" && strings.HasPrefix(class, "cell ") {
			states[strings.Fields(class)[1]]++
		}
	}
	for _, state := range explain.States() {
		if states[string(state)] != 1 {
			t.Errorf("%d cells are %s", states[string(state)], state)
		}
	}
}

// TestDryRun: a Hearth that only watches says what it would have cost.
func TestDryRun(t *testing.T) {
	s := scene("acme")
	s.savings.Groups[0].DryRun = &savings.Cost{Nodes: 0.75, Delay: 0.5}
	page := settled(t, serve(t, s, nil), "/ui", "Hearth only watches")
	for _, want := range []string{"they would have cost <b>$0.75</b>", "$3.50 against <b>$1.25</b>"} {
		if !strings.Contains(page, want) || strings.Contains(page, "Nodes cost <b>") {
			t.Errorf("the page does not say %q", want)
		}
	}
}

// TestHostileNames: names are shown as they are, and never become markup.
func TestHostileNames(t *testing.T) {
	for _, name := range []string{
		`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`, `javascript:alert(1)`, `</title></style>{{.}}`, "\u202eevil\x00", `&lt;b&gt;`,
	} {
		server := serve(t, scene(name), nil)
		for _, path := range []string{"/ui", "/ui?group=" + url.QueryEscape(name) + "&text=" + url.QueryEscape(name)} {
			page := settled(t, server, path, "What “CA alone” assumes")
			seen := false
			for _, n := range elements(t, page) {
				seen = seen || n.Data == "th" && textOf(n) == strings.ReplaceAll(name, "\x00", "\ufffd")
				if src, _ := attribute(n, "src"); n.Data == "script" && (src != "/ui/ui.js" || n.FirstChild != nil) || n.Data == "img" || n.Data == "b" && strings.Contains(textOf(n), name) {
					t.Errorf("%s: %q became <%s>", path, name, n.Data)
				}
				for _, a := range n.Attr {
					if strings.HasPrefix(a.Key, "on") || a.Key == "style" || (a.Key == "href" || a.Key == "src") && !strings.HasPrefix(a.Val, "/") && !strings.HasPrefix(a.Val, "#") && a.Val != "data:," {
						t.Errorf("%s: %q became %s=%q", path, name, a.Key, a.Val)
					}
				}
			}
			if !seen {
				t.Errorf("%s: %q is not shown", path, name)
			}
		}
	}
}

// large is a fleet of groups × nodes.
func large(groups, nodes int) *source {
	s := scene("a")
	one := s.report.Load().Groups[0]
	r := &explain.Report{At: at}
	for g := range groups {
		group := one
		group.ID, group.Nodes = fmt.Sprintf("group-%03d", g), nil
		for n := range nodes {
			node := one.Nodes[n%len(one.Nodes)]
			node.Name = fmt.Sprintf("node-%03d-%04d", g, n)
			group.Nodes = append(group.Nodes, node)
		}
		r.Groups = append(r.Groups, group)
	}
	for i := range explain.MaxQueue {
		r.Queue.Jobs = append(r.Queue.Jobs, explain.Wait{Namespace: "ci", Name: fmt.Sprint("pod-", i), Since: at})
	}
	s.report.Store(r)
	s.events = nil
	for i := range 2000 {
		s.events = append(s.events, explain.Event{Seq: uint64(2000 - i), At: at, Kind: explain.KindScale, Group: "group-001", Action: "launch", Text: strings.Repeat("x", 600), Count: 1})
	}
	return s
}

// TestPageIsBounded: however large the fleet, a page stays one that a browser
// and a person can take.
func TestPageIsBounded(t *testing.T) {
	server := serve(t, large(300, 50), nil)
	code, _, page := get(t, server, "/ui")
	if code != http.StatusOK || len(page) > 4<<20 {
		t.Fatalf("%d with %d bytes", code, len(page))
	}
	count := map[string]int{}
	for _, n := range elements(t, page) {
		count[n.Data]++
	}
	if count["details"] > 101 || count["li"] > 70 || count["tr"] > 160 || count["button"] > 100*50+3 {
		t.Errorf("elements: %v", count)
	}
	if !strings.Contains(page, "200 more groups are not shown") || !strings.Contains(page, "page 1 of 300, 15000 nodes") {
		t.Error("it does not say what is left out")
	}
	_, _, one := get(t, server, "/ui?group=group-299&page=9")
	if !strings.Contains(one, "node-299-0049") || strings.Contains(one, "node-298-") {
		t.Error("one group is not shown alone")
	}
	t.Logf("300 groups of 50 nodes: %d KiB", len(page)>>10)
}

// TestAccessible: what a screen reader and a keyboard need is there.
func TestAccessible(t *testing.T) {
	server := serve(t, scene("acme"), nil)
	page := settled(t, server, "/ui", "Nodes cost")
	ids, headings := map[string]int{}, map[string]int{}
	all := elements(t, page)
	for _, n := range all {
		if id, ok := attribute(n, "id"); ok {
			ids[id]++
		}
		headings[n.Data]++
	}
	for id, n := range ids {
		if n != 1 {
			t.Errorf("the id %q is there %d times", id, n)
		}
	}
	if headings["h1"] != 1 || headings["main"] != 1 || headings["title"] != 1 {
		t.Errorf("want one h1, one main and one title: %v", headings)
	}
	for _, n := range all {
		label, labelled := attribute(n, "aria-label")
		by, refers := attribute(n, "aria-labelledby")
		if refers && ids[by] != 1 {
			t.Errorf("<%s> is labelled by %q, which is not there", n.Data, by)
		}
		hidden, _ := attribute(n, "hidden")
		switch n.Data {
		case "html":
			if lang, _ := attribute(n, "lang"); lang != "en" {
				t.Errorf("the language is %q", lang)
			}
		case "button", "a", "summary":
			if !labelled && textOf(n) == "" && hidden == "" || labelled && label == "" {
				t.Errorf("a <%s> has no name: %v", n.Data, n.Attr)
			}
		case "section":
			if !labelled && !refers {
				t.Errorf("a section has no name: %v", n.Attr)
			}
		case "input", "select":
			if n.Parent.Data != "label" && !labelled {
				t.Errorf("a field has no label: %v", n.Attr)
			}
		case "th":
			if _, ok := attribute(n, "scope"); !ok {
				t.Errorf("a th has no scope: %s", textOf(n))
			}
		}
	}
}

func TestParameters(t *testing.T) {
	s := scene("acme")
	server := serve(t, s, nil)
	settled(t, server, "/api/v1/savings", "ca_default")
	for path, want := range map[string]string{
		"/ui?colour=red":                          "want one of group, kind, text, before, page",
		"/ui?page=0":                              "a whole number from 1 to 100000",
		"/ui?group=a&group=b":                     "want it once, got it 2 times",
		"/ui?text=" + strings.Repeat("x", 300):    "at most 256 bytes",
		"/ui?text=%ff":                            "UTF-8",
		"/api/v1/timeline?kind=job":               "want one of [decision scale], got",
		"/api/v1/timeline?limit=501":              "a whole number from 1 to 500",
		"/api/v1/timeline?before=-1":              "want a seq of an event",
		"/api/v1/timeline?page=1":                 "want one of group, kind, text, before, limit",
		"/api/v1/savings?since=yesterday":         "none is accepted",
		"/ui/events?x=1":                          "none is accepted",
		"/ui?%3Cscript%3Ealert(1)%3C/script%3E=1": "unknown parameter",
	} {
		code, _, body := get(t, server, path)
		if code != http.StatusBadRequest || !strings.Contains(html.UnescapeString(body), want) || strings.Contains(body, "<script>alert") {
			t.Errorf("%.60s: %d %s, want %q", path, code, body, want)
		}
	}
	var timeline struct {
		Events []explain.Event
		More   bool
	}
	for path, want := range map[string][]uint64{
		"":                          {3, 2, 1},
		"?limit=2":                  {3, 2},
		"?limit=2&before=2":         {1},
		"?kind=decision":            {3, 1},
		"?group=other":              {},
		"?text=ACME&kind=scale":     {2},
		"?group=acme&kind=decision": {3, 1},
	} {
		_, _, body := get(t, server, "/api/v1/timeline"+path)
		if err := json.Unmarshal([]byte(body), &timeline); err != nil {
			t.Fatalf("%s: %v in %s", path, err, body)
		}
		var got []uint64
		for _, e := range timeline.Events {
			got = append(got, e.Seq)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || timeline.More != (path == "?limit=2") {
			t.Errorf("%s: %v, more %v; want %v", path, got, timeline.More, want)
		}
	}
	for _, path := range []string{"/ui", "/ui/events", "/api/v1/timeline", "/api/v1/savings"} {
		answer, err := server.Client().Post(server.URL+path, "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
		if answer.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, answer.StatusCode)
		}
	}
}

func TestStandBy(t *testing.T) {
	server := serve(t, &source{}, nil)
	code, header, page := get(t, server, "/ui")
	if code != http.StatusServiceUnavailable || !strings.Contains(page, "The leader is hearth-0.") {
		t.Errorf("%d %s", code, page)
	}
	policy := header.Get("Content-Security-Policy")
	if !strings.Contains(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") || header.Get("X-Content-Type-Options") != "nosniff" || header.Get("Cache-Control") != "no-store" {
		t.Errorf("headers: %v", header)
	}
	for _, path := range []string{"/api/v1/timeline", "/api/v1/savings"} {
		if code, _, body := get(t, server, path); code != http.StatusServiceUnavailable || !strings.Contains(body, "does not lead") {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
}

// stream opens a stream and returns its next event; end closes it.
func stream(t *testing.T, server *httptest.Server) (code int, next func() string, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/ui/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := server.Client().Do(q)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(answer.Body)
	next = func() string {
		for lines.Scan() {
			if what, ok := strings.CutPrefix(lines.Text(), "event: "); ok {
				return what
			}
		}
		return "the end"
	}
	return answer.StatusCode, next, func() { cancel(); _ = answer.Body.Close() }
}

// TestStream: a page hears that it lives, that there is something new, and the
// end of the server; and no more pages are kept live than there are places.
func TestStream(t *testing.T) {
	s := scene("acme")
	cfg := ui.Config{Source: s, Logger: slog.New(slog.DiscardHandler), Heartbeat: 50 * time.Millisecond}
	u, err := ui.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(u)
	defer server.Close()
	_, next, end := stream(t, server)
	defer end()
	for range 3 {
		if what := next(); what != "alive" {
			t.Fatalf("heard %q", what)
		}
	}
	s.report.Store(&explain.Report{At: at.Add(time.Second)})
	for what := next(); what != "changed"; what = next() {
		if what != "alive" {
			t.Fatalf("heard %q", what)
		}
	}
	var ends []func()
	refused := 0
	for range 64 {
		code, _, end := stream(t, server)
		ends = append(ends, end)
		if code == http.StatusServiceUnavailable {
			refused++
		}
	}
	if refused != 1 {
		t.Errorf("%d of 65 pages were refused, want 1", refused)
	}
	for _, end := range ends {
		end()
	}
	u.Close()
	for what := next(); what != "the end"; what = next() {
		if what != "alive" && what != "changed" {
			t.Fatalf("heard %q", what)
		}
	}
}

func BenchmarkPage(b *testing.B) {
	server := serve(b, large(20, 100), nil)
	for b.Loop() {
		if code, _, _ := get(b, server, "/ui"); code != http.StatusOK {
			b.Fatal(code)
		}
	}
}

// FuzzParameters: whatever a link asks for, the page answers it or refuses it.
func FuzzParameters(f *testing.F) {
	for _, q := range []string{"", "group=acme&kind=scale&text=x&before=3&page=2", "page=99999", "before=18446744073709551615", "text=%00%ff", "group=%3Cscript%3E"} {
		f.Add(q)
	}
	u, err := ui.New(ui.Config{Source: scene("acme"), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, query string) {
		for _, path := range []string{"/ui", "/api/v1/timeline", "/api/v1/savings"} {
			q := httptest.NewRequest(http.MethodGet, path, nil)
			q.URL.RawQuery = query
			w := httptest.NewRecorder()
			u.ServeHTTP(w, q)
			if w.Code != http.StatusOK && w.Code != http.StatusBadRequest && w.Code != http.StatusServiceUnavailable {
				t.Errorf("%s?%s: %d", path, query, w.Code)
			}
		}
	})
}
