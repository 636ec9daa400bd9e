package observe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/savings"
	"github.com/hearth-ci/hearth/internal/ui"
)

// browser is one tab of Chromium. The test fails for whatever the page complains
// of, such as a breach of its own Content-Security-Policy; but not for answers
// that do not come.
func browser(t *testing.T) context.Context {
	t.Helper()
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]), chromedp.NoSandbox, chromedp.WindowSize(1280, 1000))
	ctx, stop := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(stop)
	ctx, cancel := chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	ctx, late := context.WithTimeout(ctx, 8*time.Minute)
	t.Cleanup(late)
	var mu sync.Mutex
	var complaints []string
	chromedp.ListenTarget(ctx, func(event any) {
		mu.Lock()
		defer mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			complaints = append(complaints, e.ExceptionDetails.Error())
		case *cdplog.EventEntryAdded:
			if e.Entry.Source != cdplog.SourceNetwork {
				complaints = append(complaints, e.Entry.Text)
			}
		}
	})
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, text := range complaints {
			t.Errorf("the page complains: %s", text)
		}
	})
	return ctx
}

func do(ctx context.Context, t *testing.T, what string, actions ...chromedp.Action) {
	t.Helper()
	if err := chromedp.Run(ctx, actions...); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// value of an expression on the page.
func value[T any](ctx context.Context, t *testing.T, expression string) (v T) {
	t.Helper()
	do(ctx, t, expression, chromedp.Evaluate(expression, &v))
	return v
}

// shows waits until an expression is true on the page, which is not loaded anew.
func shows(ctx context.Context, t *testing.T, what string, within time.Duration, expression string) {
	t.Helper()
	eventually(t, what, within, func() error {
		var ok bool
		if err := chromedp.Run(ctx, chromedp.Evaluate(expression, &ok)); err != nil {
			return err
		}
		if !ok {
			return errors.New("it does not show")
		}
		return nil
	})
}

// screenshot keeps a picture for people, in the folder HEARTH_SCREENSHOTS.
func screenshot(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	var picture []byte
	do(ctx, t, "a screenshot", chromedp.FullScreenshot(&picture, 100))
	if len(picture) < 10_000 {
		t.Errorf("the picture %s has %d bytes", name, len(picture))
	}
	if dir := os.Getenv("HEARTH_SCREENSHOTS"); dir != "" {
		must(t, os.WriteFile(filepath.Join(dir, name+".png"), picture, 0o600))
	}
}

// named fails for whatever a screen reader would meet without a name.
func named(ctx context.Context, t *testing.T) {
	t.Helper()
	var nodes []*accessibility.Node
	do(ctx, t, "the accessibility tree", chromedp.ActionFunc(func(ctx context.Context) (err error) {
		nodes, err = accessibility.GetFullAXTree().Do(ctx)
		return err
	}))
	want := []string{"button", "link", "combobox", "searchbox", "textbox", "region", "group", "navigation", "search", "heading", "image", "DisclosureTriangle"}
	found := 0
	for _, n := range nodes {
		if n.Ignored || n.Role == nil {
			continue
		}
		role := strings.Trim(string(n.Role.Value), `"`)
		if !slices.Contains(want, role) {
			continue
		}
		found++
		if n.Name == nil || strings.Trim(string(n.Name.Value), `" `) == "" {
			if role == "group" { // a <details> is one, named by its summary
				continue
			}
			t.Errorf("a %s has no name", role)
		}
	}
	if found < 10 {
		t.Errorf("only %d things have a role", found)
	}
}

// wire forwards connections, until it is told to be silent.
type wire struct {
	mu    sync.Mutex
	still *sync.Cond
	quiet bool
}

func newWire(t *testing.T, to string) (w *wire, address string) {
	t.Helper()
	w = &wire{}
	w.still = sync.NewCond(&w.mu)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { _ = l.Close(); cancel(); w.silence(false); running.Wait() })
	running.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := (&net.Dialer{}).DialContext(ctx, "tcp", to)
			if err != nil {
				_ = a.Close()
				continue
			}
			context.AfterFunc(ctx, func() { _ = a.Close(); _ = b.Close() })
			running.Go(func() { w.copy(a, b) })
			running.Go(func() { w.copy(b, a) })
		}
	})
	return w, l.Addr().String()
}

func (w *wire) silence(quiet bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.quiet = quiet
	w.still.Broadcast()
}

func (w *wire) copy(to, from net.Conn) {
	defer func() { _ = to.Close(); _ = from.Close() }()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		w.mu.Lock()
		for w.quiet {
			w.still.Wait()
		}
		w.mu.Unlock()
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// TestPage drives the status page through a day in short, in a browser, and never
// loads it anew but where a person would.
func TestPage(t *testing.T) {
	p, provider := start(t)
	line, address := newWire(t, provider.HTTPAddress)
	page := browser(t)
	do(page, t, "opening the page", chromedp.Navigate("http://"+address+"/ui"), chromedp.WaitVisible("#groups"))
	shows(page, t, "two empty lanes", 20*time.Second, `document.querySelectorAll(".lane").length === 2 && document.querySelectorAll("button.cell").length === 0`)
	value[bool](page, t, `window.same = true`)

	run := func(name string) {
		t.Helper()
		must(t, p.Submit(t.Context(), jobOf(name)))
		shows(page, t, name+" on a busy node", 60*time.Second, `document.querySelector("#lane-runners button.cell.busy") !== null`)
	}
	run("a1")
	must(t, p.Finish(t.Context(), "a1"))
	shows(page, t, "an idle node that is warm", 60*time.Second, `document.querySelector("#lane-runners button.cell.idle")?.ariaLabel.includes("acme/api") === true`)
	shows(page, t, "a parked node", 90*time.Second, `document.querySelector("#lane-runners button.cell.parked") !== null`)
	run("a2")
	shows(page, t, "both jobs' history", 30*time.Second, `document.querySelector("#timeline-list").textContent.includes("resume")`)
	if !value[bool](page, t, `window.same === true`) {
		t.Error("the page was loaded anew")
	}
	named(page, t)
	screenshot(page, t, "light")

	// By keyboard: along the cells of a lane, which say why.
	must(t, p.Submit(t.Context(), jobOf("a3")))
	shows(page, t, "two nodes", 60*time.Second, `document.querySelectorAll("#lane-runners button.cell").length > 1`)
	do(page, t, "walking", chromedp.Focus("#lane-runners button.cell"), chromedp.KeyEvent(kb.ArrowRight))
	if !value[bool](page, t, `document.activeElement === document.querySelectorAll("#lane-runners button.cell")[1] && document.getElementById("detail").textContent === document.activeElement.ariaLabel`) {
		t.Error("the arrow key does not lead to the next node, or nothing is said of it")
	}

	// Colours: by choice, and kept.
	do(page, t, "dark colours", chromedp.Click("#theme"))
	if value[string](page, t, `document.documentElement.dataset.theme`) != "dark" {
		t.Error("the colours do not change")
	}
	do(page, t, "the page again", chromedp.Reload(), chromedp.WaitVisible("#groups"))
	if value[string](page, t, `document.documentElement.dataset.theme`) != "dark" {
		t.Error("the choice is forgotten")
	}
	screenshot(page, t, "dark")

	// The timeline, filtered: another page, so that it is waited for.
	do(page, t, "filtering", chromedp.SetValue(`select[name=kind]`, "scale"), chromedp.SetValue(`input[name=text]`, "launch"),
		chromedp.Click(`form.filter button`))
	shows(page, t, "launches alone", 30*time.Second, `location.search.includes("kind=scale") && document.readyState === "complete" && document.querySelectorAll("#timeline-list .what").length > 0 && [...document.querySelectorAll("#timeline-list li")].every((l) => l.textContent.includes("launch"))`)

	// A network that swallows everything, and comes back.
	line.silence(true)
	shows(page, t, "a warning", 90*time.Second, `document.getElementById("live").className === "stalled"`)
	must(t, p.Finish(t.Context(), "a2", "a3"))
	line.silence(false)
	shows(page, t, "life again", 90*time.Second, `document.getElementById("live").className === ""`)
	shows(page, t, "what happened meanwhile", 60*time.Second, `document.querySelector("#lane-runners button.cell.busy") === null`)

	// On a telephone nothing is cut off.
	do(page, t, "a small screen", emulation.SetDeviceMetricsOverride(390, 800, 2, true), chromedp.Navigate("http://"+address+"/ui"), chromedp.WaitVisible("#groups"))
	if wide := value[int](page, t, `document.documentElement.scrollWidth`); wide > 390 {
		t.Errorf("the page is %d pixels wide on a screen of 390", wide)
	}
	screenshot(page, t, "telephone")
}

// fleet is a report of many nodes.
type fleet struct{ report *explain.Report }

func (f fleet) Report() *explain.Report           { return f.report }
func (f fleet) Events() []explain.Event           { return nil }
func (f fleet) Savings(time.Time) *savings.Report { return nil }

// TestLargePage: 2,000 nodes, their names hostile. How long the browser takes is
// logged, and no assertion.
func TestLargePage(t *testing.T) {
	at := time.Now()
	r := &explain.Report{At: at}
	for g := range 10 {
		group := explain.Group{ID: fmt.Sprintf("runners-%d<script>alert(1)</script>", g), At: at, Role: "runner"}
		for n := range 200 {
			group.Nodes = append(group.Nodes, explain.Node{
				Name: fmt.Sprintf("node-%d-%d\"><img src=x onerror=alert(1)>", g, n), State: explain.States()[n%6], Since: &at, WarmKeys: 1,
				Keys: []explain.Key{{Key: "acme/<b>api</b>", Warmth: float64(n%10) / 10}}, Reasons: []explain.Reason{{Code: "warm", Text: "it is warm"}},
			})
		}
		r.Groups = append(r.Groups, group)
	}
	u, err := ui.New(ui.Config{Source: fleet{r}, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	must(t, err)
	server := httptest.NewServer(u)
	defer server.Close()
	defer u.Close()
	page := browser(t)
	do(page, t, "opening the page", chromedp.Navigate(server.URL+"/ui"), chromedp.WaitVisible("#groups"))
	if n := value[int](page, t, `document.querySelectorAll("button.cell").length`); n != 2000 {
		t.Errorf("%d nodes are shown", n)
	}
	if value[int](page, t, `document.querySelectorAll("img, b, main script").length`) != 0 {
		t.Error("a name became markup")
	}
	t.Logf("2,000 nodes: %.0f ms from asking to the end of loading", value[float64](page, t, `performance.getEntriesByType("navigation")[0].loadEventEnd`))
	screenshot(page, t, "large")
}
