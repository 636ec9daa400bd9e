package main

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/internal/explain"
)

// morning is a report of a parking group, one that does not park, and a plain
// one.
func morning() *explain.Report {
	at := time.Date(2026, 1, 5, 9, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) *time.Time { return new(at.Add(-d)) }
	because := func(codeText ...string) (reasons []explain.Reason) {
		for i := 0; i < len(codeText); i += 2 {
			reasons = append(reasons, explain.Reason{Code: codeText[i], Text: codeText[i+1]})
		}
		return reasons
	}
	key := func(name string, warmth float64, used time.Duration, jobs int) explain.Key {
		return explain.Key{Key: name, Warmth: warmth, LastUsed: *ago(used), Jobs: jobs}
	}
	node := func(i int, state explain.State, phase, decision string, score float64, reasons []explain.Reason) explain.Node {
		return explain.Node{
			Name: fmt.Sprintf("ip-10-0-12-%d.eu-central-1.compute.internal", i), Instance: fmt.Sprintf("aws:///eu-central-1a/i-%017d", i),
			State: state, Phase: phase, Decision: decision, Score: score, Reasons: reasons,
		}
	}
	going := node(17, explain.StateIdle, "Ready", "park", 0.4, because("idle", "idle for 14m2s, and only 0.31 times an hour jobs need 3 nodes at once: its rent of $0.39/h does not pay"))
	going.Since, going.LastUsed, going.WarmKeys = ago(14*time.Minute+2*time.Second), ago(14*time.Minute+2*time.Second), 1
	going.Keys = []explain.Key{key("acme/docs/build", 0.99, 14*time.Minute+2*time.Second, 3)}
	later := node(4, explain.StateIdle, "Ready", "keep", 7, because(
		"idle", "idle for 20m0s, and only 0.62 times an hour jobs need 2 nodes at once: its rent of $0.39/h does not pay",
		"later", "colder nodes go first"))
	later.Since, later.LastUsed, later.WarmKeys = ago(20*time.Minute), ago(20*time.Minute), 12
	later.Keys = []explain.Key{
		key("acme/shop/test", 0.99, 20*time.Minute, 41), key("acme/shop/build", 0.97, time.Hour, 40), key("acme/api/test", 0.5, 24*time.Hour, 7),
		key("acme/infrastructure-as-code-for-everything-and-all/integration-test-on-arm64", 0.4, 32*time.Hour, 2), key("acme/\x1b[31mred", 0.13, 71*time.Hour, 1),
	}
	kept := node(9, explain.StateIdle, "Ready", "keep", 31, because("min-warm", "it is among the 1 most valuable idle nodes, which min-warm keeps"))
	kept.Since, kept.LastUsed = ago(3*time.Second), ago(3*time.Second)
	busy := node(21, explain.StateBusy, "Ready", "keep", 2, because("busy", "it runs a CI job"))
	starting := explain.Node{
		Instance: "aws:///eu-central-1a/i-00000000000000033", State: explain.StateStarting, Phase: "Launching", Hidden: true, Since: ago(40 * time.Second),
		Reasons: because("launching", "it has not been Ready yet"),
	}
	parked := explain.Node{
		Instance: "aws:///eu-central-1a/i-00000000000000005", State: explain.StateParked, Phase: "Parked", Since: ago(50 * time.Hour), LastUsed: ago(51 * time.Hour),
		Decision: "keep", Score: 120, Reasons: because("forecast", "4.2 times a week jobs need 6 nodes, which pays its storage"),
	}
	draining := node(2, explain.StateLeaving, "Draining", "", 0, because("draining", "it was given up, and no new job may start on it", "earlier", "before: idle for 12m, max-idle is 10m"))
	draining.Since = ago(8 * time.Second)
	return &explain.Report{At: at, Groups: []explain.Group{
		{
			ID: "plain", At: at, Role: "plain", Target: 1, Busy: 1,
			Nodes: []explain.Node{node(77, explain.StateBusy, "Ready", "", 0, because("plain", "its group is plain: cluster-autoscaler alone decides"))},
		},
		{
			ID: "runners-a", At: at, Role: "runner", Target: 4, Hidden: 1, Busy: 1, Idle: 3, Starting: 1, Leaving: 1, Parked: 1,
			Settings: explain.Settings{MinWarm: 1, MaxWarm: 20, Park: "stop", MaxParked: 20, MaxParkedSeconds: 604800, JobsPerNode: 1, TimeValue: 30, NodePrice: 0.4, ParkedPrice: 0.012},
			Forecast: explain.Forecast{BatchesPerHour: 2.5, IdleNodes: 3, IdleBatchesPerHour: 0.31, Weeks: 1.3},
			Learnt:   explain.Learnt{BootSeconds: 131, ResumeSeconds: 45, ColdPenaltySeconds: 180},
			Problems: []string{`annotation hearth.dev/prescale="maybe": want off or on; the default is used`},
			Nodes:    []explain.Node{draining, going, later, kept, busy, starting, parked},
		},
		{
			ID: "runners-b", At: at, Role: "runner", Nodes: []explain.Node{},
			Settings: explain.Settings{MaxWarm: 5, MaxIdleSeconds: new(600.0), Park: "off", JobsPerNode: 2, TimeValue: 30, NodePrice: 1.25},
			Learnt:   explain.Learnt{BootSeconds: 120, ResumeSeconds: 45, ColdPenaltySeconds: 180},
		},
	}}
}

// TestExplain compares what the command writes with files in testdata/explain;
// with -update it writes them.
func TestExplain(t *testing.T) {
	server := httptest.NewServer(explain.Handler(morning))
	defer server.Close()
	for file, args := range map[string][]string{
		"all.txt":        nil,
		"group.txt":      {"runners-a"},
		"empty.txt":      {"runners-b"},
		"plain.txt":      {"plain"},
		"going.txt":      {"ip-10-0-12-17.eu-central-1.compute.internal"},
		"later.txt":      {"ip-10-0-12-4"},
		"kept.txt":       {"ip-10-0-12-9.eu-central-1.compute.internal"},
		"busy.txt":       {"ip-10-0-12-21.eu-central-1.compute.internal"},
		"leaving.txt":    {"ip-10-0-12-2.eu-central-1.compute.internal"},
		"starting.txt":   {"aws:///eu-central-1a/i-00000000000000033"},
		"parked.txt":     {"aws:///eu-central-1a/i-00000000000000005"},
		"node.json":      {"ip-10-0-12-17.eu-central-1.compute.internal", "-o", "json"},
		"group.json":     {"runners-b", "-o", "json"},
		"report.json":    {"--output", "json"},
		"plain_node.txt": {"ip-10-0-12-77.eu-central-1.compute.internal"},
	} {
		t.Run(file, func(t *testing.T) {
			var out, errOut bytes.Buffer
			if code := run(t.Context(), append([]string{"explain", "--address", server.URL}, args...), &out, &errOut); code != 0 {
				t.Fatalf("exit code %d: %s", code, errOut.String())
			}
			path := filepath.Join("testdata", "explain", file)
			if *update {
				if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), out.String()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if filepath.Ext(file) != ".txt" {
				return
			}
			for line := range strings.Lines(out.String()) {
				line = strings.TrimSuffix(line, "\n")
				if utf8.RuneCountInString(line) > 100 || strings.TrimRight(line, " ") != line || strings.ContainsRune(line, '\x1b') {
					t.Errorf("line %q", line)
				}
			}
		})
	}
}

func TestExplainMistakes(t *testing.T) {
	server := httptest.NewServer(explain.Handler(morning))
	defer server.Close()
	standby := httptest.NewServer(explain.Handler(func() *explain.Report { return nil }))
	defer standby.Close()
	closed := httptest.NewServer(nil)
	closed.Close()
	for _, tc := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"unknown name", []string{"runner-a", "--address", server.URL}, 1, `no node group, node or instance is called "runner-a"; similar are runners-a, runners-b`},
		{"nobody there", []string{"--address", closed.URL}, 1, "kubectl -n hearth port-forward deploy/hearth 8087"},
		{"a stand-by", []string{"--address", standby.URL}, 1, "503 Service Unavailable: no plan here: this replica does not lead (the pod labelled hearth.dev/leader=true does)"},
		{"bad address", []string{"--address", "ftp://x"}, 2, "--address: want an address such as http://127.0.0.1:8087, not \"ftp://x\""},
		{"bad format", []string{"-o", "yaml", "--address", server.URL}, 2, `unknown output format "yaml", known are table, json`},
		{"two names", []string{"a", "b"}, 2, "accepts at most 1 arg(s)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, errOut bytes.Buffer
			if code := run(t.Context(), append([]string{"explain"}, tc.args...), &out, &errOut); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if !strings.Contains(errOut.String(), tc.says) || out.Len() > 0 {
				t.Errorf("it said %q and wrote %q, want %q", errOut.String(), out.String(), tc.says)
			}
		})
	}
}
