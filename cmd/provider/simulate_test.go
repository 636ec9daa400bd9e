package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const tinyTrace = "job_id,arrival,duration,key\na,1767603600,100,k\nb,1767604600,100,k\n"

// simulated runs the command and returns what it wrote.
func simulated(t *testing.T, args ...string) (out, errOut string, err error) {
	t.Helper()
	var o, e bytes.Buffer
	cmd := simulateCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&o)
	cmd.SetErr(&e)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err = cmd.ExecuteContext(t.Context())
	return o.String(), e.String(), err
}

func traceFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "trace.csv")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSimulateMistakes(t *testing.T) {
	trace := traceFile(t, tinyTrace)
	bad := traceFile(t, tinyTrace+"c,,100,k\n")
	for _, test := range []struct {
		name  string
		args  []string
		usage bool // exit code 2
		want  string
	}{
		{"unknown policy", []string{"--trace", trace, "--policy", "hearth,no-such"}, true, `unknown policy "no-such", known are always-on, ca-60m, ca-default`},
		{"unknown format", []string{"--trace", trace, "--format", "xml"}, true, `unknown format "xml", known are table, csv, json, html, markdown`},
		{"unknown flag", []string{"--no-such"}, false, "the flags are --boot, "}, // main sees that no command began
		{"neither trace nor generate", nil, true, "want either --trace FILE or --generate JOBS"},
		{"both", []string{"--trace", trace, "--generate", "10"}, true, "want either"},
		{"sensitivity of nothing", []string{"--trace", trace, "--sensitivity", "--policy", "ca-default"}, true, "compares hearth with others"},
		{"sensitivity to nothing", []string{"--trace", trace, "--sensitivity", "--policy", "hearth"}, true, "compares hearth with others"},
		{"world", []string{"--trace", trace, "--slots", "0"}, true, "slots 0"},
		{"generate nothing", []string{"--generate", "0"}, true, "1 to 1e8 jobs"},
		{"no file", []string{"--trace", trace + ".not"}, false, "no such file"},
		{"strict", []string{"--trace", bad, "--strict"}, false, "1 rejected; the first on line 4: arrival is missing"},
		{"nothing usable", []string{"--trace", traceFile(t, "job_id,arrival,duration,key\na,,1,k\n")}, false, "none of 1 rows is a usable job; the first on line 2: arrival is missing"},
		{"only a header", []string{"--trace", traceFile(t, "job_id,arrival,duration,key\n")}, false, "none of 0 rows is a usable job"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, _, err := simulated(t, test.args...)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want %q", err, test.want)
			}
			var usage usageError
			if errors.As(err, &usage) != test.usage {
				t.Errorf("%v: usage error %v, want %v", err, !test.usage, test.usage)
			}
		})
	}
}

func TestSimulateWrites(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "report")
	out, errOut, err := simulated(t, "--trace", traceFile(t, tinyTrace), "--policy", "simple-park-1m", "--price", "1",
		"--format", "table,csv,json,html,markdown", "--out", dir)
	if err != nil || errOut != "" {
		t.Fatalf("error %v, %q", err, errOut)
	}
	for _, name := range []string{"report.txt", "report.csv", "report.json", "report.html", "report.md"} {
		if text, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !strings.Contains(string(text), "simple-park-1m") {
			t.Errorf("%s: error %v, %q", name, err, text)
		}
		if !strings.Contains(out, name) {
			t.Errorf("%q does not name %s", out, name)
		}
	}
	var report struct {
		Policies []struct {
			Infrastructure float64 `json:"infrastructure_dollars"`
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err := errors.Join(err, json.Unmarshal(text, &report)); err != nil {
		t.Fatal(err)
	}
	// 505 s at $1/h, and 640 s parked at 3 % of that.
	if got, want := report.Policies[0].Infrastructure, 0.145611; got != want {
		t.Errorf("infrastructure $%v, want %v", got, want)
	}
}

func TestSimulateMixesAndGenerates(t *testing.T) {
	out, _, err := simulated(t, "--trace", traceFile(t, tinyTrace), "--trace", traceFile(t, tinyTrace), "--policy", "ca-default")
	if err != nil || !strings.Contains(out, ": 4 jobs, 2 cache keys, 0 of 4 rows rejected") {
		t.Errorf("two traces: error %v, %s", err, out)
	}
	args := []string{"--generate", "100", "--generate-weeks", "1", "--policy", "ca-default,warm-pool-any", "--halves", "--format", "csv"}
	first, _, err := simulated(t, args...)
	if err != nil || strings.Count(first, "\n") != 7 {
		t.Errorf("generated: error %v, %s", err, first)
	}
	if second, _, err := simulated(t, args...); err != nil || second != first {
		t.Errorf("the same seed: error %v, %s", err, second)
	}
	if other, _, err := simulated(t, append(args, "--seed", "2")...); err != nil || other == first {
		t.Errorf("another seed: error %v, %s", err, other)
	}
}

func TestSimulateSensitivity(t *testing.T) {
	args := []string{"--trace", traceFile(t, tinyTrace), "--sensitivity", "--policy", "ca-default,hearth", "--format"}
	for format, want := range map[string]string{
		"table": "hearth wins by", "markdown": "| hearth wins by |", "json": `"sensitivity": [`, "html": "If the world were different",
	} {
		if out, errOut, err := simulated(t, append(args, format)...); err != nil || errOut != "" || !strings.Contains(out, want) {
			t.Errorf("%s: error %v, %q, %s", format, err, errOut, out)
		}
	}
	// A page has timelines, for which the runs have to be asked.
	if out, _, err := simulated(t, append(args, "html")...); err != nil || !strings.Contains(out, "Nodes over time") {
		t.Errorf("html: error %v, without timelines", err)
	}
}

func TestSimulateStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cmd := simulateCommand()
	cmd.SetArgs([]string{"--generate", "20000", "--policy", "ca-default"})
	cmd.SetOut(new(bytes.Buffer))
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if err := cmd.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}
