// Package observe tests what people see of a running Hearth: dashboards and
// alerts by a real Prometheus, the status page by a real browser. It needs
// prometheus, promtool and chromium (Debian packages prometheus and chromium), and
// the control plane's binaries; `make observe` runs it.
package observe

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/localcluster"
	"github.com/hearth-ci/hearth/internal/playground"
)

// hearth is the binary under test.
var hearth string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "hearth-observe-")
	if err == nil {
		hearth = filepath.Join(dir, "hearth")
		var out []byte
		if out, err = exec.Command("go", "build", "-o", hearth, "github.com/hearth-ci/hearth/cmd/provider").CombinedOutput(); err != nil {
			err = fmt.Errorf("building hearth: %w\n%s", err, out)
		}
	}
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, "observe:", err)
	} else {
		code = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// start runs the whole loop: two groups of the embedded backend, an autoscaler.
func start(t *testing.T) (*playground.Playground, *playground.Provider) {
	t.Helper()
	p, err := playground.Start(t.Context(), playground.Config{
		Hearth: hearth, Autoscaler: os.Getenv("CLUSTER_AUTOSCALER"), Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	must(t, err)
	t.Cleanup(func() { must(t, p.Stop()) })
	groups := "backend:\n  kwok: {bootDelay: 1s, resumeDelay: 1s}\nnodeGroups:\n"
	for _, id := range []string{"runners", "large"} {
		groups += "- id: " + id + `
  max: 10
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}, zone: a, instanceType: kwok.8x}
  annotations: {hearth.dev/role: runner, hearth.dev/park: stop, hearth.dev/max-idle: 3s, hearth.dev/scale-down-unneeded-time: 1s, hearth.dev/node-price: "0.4"}
`
	}
	provider, err := p.StartProvider("provider", groups)
	must(t, err)
	must(t, provider.Serving(t.Context(), 60*time.Second))
	a, err := p.StartAutoscaler(playground.AutoscalerConfig{Flags: playground.DefaultFlags()})
	must(t, err)
	t.Cleanup(a.Kill)
	return p, provider
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok returns nil.
func eventually(t *testing.T, what string, within time.Duration, ok func() error) {
	t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) { // polls a condition
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s: %v", within, what, err)
		}
	}
}

// run has jobs of one key run in a group, each to its end.
func run(t *testing.T, p *playground.Playground, group, key string, names ...string) {
	t.Helper()
	for _, name := range names {
		must(t, p.Submit(t.Context(), playground.Job{Name: name, Group: group, Key: key, CPU: "6"}))
	}
	for _, name := range names {
		eventually(t, name+" to run", 60*time.Second, running(t, p, name))
	}
	must(t, p.Finish(t.Context(), names...))
}

// tool runs a program that must be there.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

const (
	chart     = "../../charts/hearth/files"
	alertFile = chart + "/alerts.yaml"
)

// TestAlerts: Prometheus takes the rules, and each fires on its cause alone.
func TestAlerts(t *testing.T) {
	tool(t, "promtool", "check", "rules", alertFile)
	dir := t.TempDir()
	for from, to := range map[string]string{alertFile: "alerts.yaml", "testdata/alerts.yaml": "test.yaml"} {
		text, err := os.ReadFile(from)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, to), text, 0o600))
	}
	tool(t, "promtool", "test", "rules", filepath.Join(dir, "test.yaml"))
}

// prometheus scrapes Hearth every second until the test ends.
func prometheus(t *testing.T, target string) (base string) {
	t.Helper()
	dir, listen := t.TempDir(), localcluster.FreeAddress()
	rules, err := filepath.Abs(alertFile)
	must(t, err)
	file := filepath.Join(dir, "prometheus.yml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n- job_name: hearth\n  static_configs: [{targets: [%q]}]\n", rules, target), 0o600))
	cmd := exec.Command("prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+listen, "--log.level=error")
	cmd.Stderr = t.Output()
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return "http://" + listen
}

// series asks Prometheus and returns how many series with a number it has.
func series(ctx context.Context, base, expr string) (n int, err error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/api/v1/query?query="+url.QueryEscape(expr), nil)
	if err != nil {
		return 0, err
	}
	answer, err := http.DefaultClient.Do(q)
	if err != nil {
		return 0, err
	}
	defer func() { _ = answer.Body.Close() }()
	var body struct {
		Error string
		Data  struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := json.NewDecoder(answer.Body).Decode(&body); err != nil {
		return 0, err
	}
	if body.Error != "" {
		return 0, fmt.Errorf("%s: %s", expr, body.Error)
	}
	for _, r := range body.Data.Result {
		if r.Value[1] != "NaN" {
			n++
		}
	}
	return n, nil
}

// queries of the dashboard, by panel.
func queries(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile(chart + "/dashboards/hearth.json")
	must(t, err)
	var board struct {
		Panels []struct {
			Type, Title string
			Targets     []struct{ Expr string }
		}
	}
	must(t, json.Unmarshal(text, &board))
	all := map[string][]string{}
	for _, p := range board.Panels {
		for _, q := range p.Targets {
			all[p.Title] = append(all[p.Title], strings.ReplaceAll(q.Expr, "$nodegroup", ".*"))
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("the panel %q asks nothing", p.Title)
		}
	}
	return all
}

// TestPanels: every query of the dashboard has an answer when Hearth has done what
// it does, its metrics pass Prometheus' linter, and no alert fires.
func TestPanels(t *testing.T) {
	p, provider := start(t)
	base := prometheus(t, provider.HTTPAddress)
	// Both groups work, warm and cold; a node is parked and comes back.
	run(t, p, "runners", "acme/api", "a1", "a2")
	run(t, p, "large", "acme/web", "b1")
	run(t, p, "runners", "acme/api", "a3")
	eventually(t, "a parked node", 90*time.Second, func() error {
		n, err := series(t.Context(), base, `sum(hearth_nodegroup_nodes{phase="Parked"}) > 0`)
		if err == nil && n == 0 {
			err = fmt.Errorf("none is parked")
		}
		return err
	})
	run(t, p, "runners", "acme/api", "a4")
	for panel, list := range queries(t) {
		for _, expr := range list {
			eventually(t, fmt.Sprintf("the panel %q: %s", panel, expr), 40*time.Second, func() error {
				n, err := series(t.Context(), base, expr)
				if err == nil && n == 0 {
					err = fmt.Errorf("it is empty")
				}
				return err
			})
		}
	}
	firing, err := series(t.Context(), base, `ALERTS{alertstate="firing"}`)
	if err != nil || firing > 0 {
		t.Errorf("%d alerts fire, %v", firing, err)
	}
	metrics, err := provider.Metrics(t.Context())
	must(t, err)
	lint := exec.CommandContext(t.Context(), "promtool", "check", "metrics")
	var own strings.Builder // those of libraries are named by them
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), "hearth_") {
			own.WriteString(line)
		}
	}
	lint.Stdin = strings.NewReader(own.String())
	if out, err := lint.CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// TestRunbooks: each alert has its runbook and each runbook its alert, and what
// alerts and panels ask for is there.
func TestRunbooks(t *testing.T) {
	rules, err := os.ReadFile(alertFile)
	must(t, err)
	alerts := map[string]bool{}
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllSubmatch(rules, -1) {
		name := string(m[1])
		alerts[name] = true
		if !strings.Contains(string(rules), "docs/runbooks/"+name+".md\n") {
			t.Errorf("%s links to no runbook of its own", name)
		}
		text, err := os.ReadFile("../../docs/runbooks/" + name + ".md")
		if err != nil || !strings.Contains(string(text), "## What it is, and what to do") {
			t.Errorf("the runbook of %s: %v", name, err)
		}
	}
	books, err := filepath.Glob("../../docs/runbooks/*.md")
	must(t, err)
	for _, book := range books {
		if name := strings.TrimSuffix(filepath.Base(book), ".md"); !alerts[name] {
			t.Errorf("%s is about no alert", book)
		}
	}
	known, err := os.ReadFile("../../docs/metrics.md")
	must(t, err)
	asked := string(rules)
	for _, list := range queries(t) {
		asked += strings.Join(list, "\n")
	}
	for _, name := range regexp.MustCompile(`\bhearth_\w+`).FindAllString(asked, -1) {
		plain := regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(name, "")
		if !strings.Contains(string(known), "| "+plain+" |") {
			t.Errorf("%s is no metric of docs/metrics.md", name)
		}
	}
}
