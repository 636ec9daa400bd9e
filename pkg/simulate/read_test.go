package simulate_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

// TestImports reads tiny files: "read [crlf] [bom] [gzip]" prints the jobs and
// what was rejected.
func TestImports(t *testing.T) {
	datadriven.Walk(t, "testdata/imports", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			input := d.Input
			for _, arg := range d.CmdArgs {
				switch arg.Key {
				case "crlf":
					input = strings.ReplaceAll(input, "\n", "\r\n")
				case "bom":
					input = "\ufeff" + input
				case "gzip":
					input = string(gzipped(t, input))
				case "empty":
					input = ""
				default:
					d.Fatalf(t, "unknown argument %q", arg.Key)
				}
			}
			trace, err := simulate.Read("test", strings.NewReader(input))
			if err != nil {
				return err.Error() + "\n"
			}
			return describe(trace)
		})
	})
}

func describe(trace simulate.Trace) string {
	var b strings.Builder
	for _, j := range trace.Jobs {
		fmt.Fprintf(&b, "%s arrives %d, %d s, key %q", j.ID, j.Arrival, j.Duration, j.Key)
		if j.Group != "" {
			fmt.Fprintf(&b, ", group %q", j.Group)
		}
		b.WriteString("\n")
	}
	for _, r := range trace.Rejected {
		fmt.Fprintf(&b, "line %d: %s\n", r.Line, r.Reason)
	}
	fmt.Fprintf(&b, "%d rows\n", trace.Rows)
	return b.String()
}

func gzipped(t *testing.T, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write([]byte(text))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// repeated is a reader of one byte many times over.
type repeated struct {
	b    byte
	left int
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), r.left)
	for i := range n {
		p[i] = r.b
	}
	r.left -= n
	return n, nil
}

// TestLongLine: a line of 100 MB costs neither memory nor the rows beside it.
func TestLongLine(t *testing.T) {
	const long = 100 << 20
	job := `{"id":%d,"name":"a","run_url":"https://api.github.com/repos/o/r/actions/runs/1","status":"completed",` +
		`"created_at":"2026-01-05T09:00:00Z","started_at":"2026-01-05T09:00:05Z","completed_at":"2026-01-05T09:10:05Z"}` + "\n"
	for _, test := range []struct {
		name  string
		parts []io.Reader
		lines []int // rejected
	}{
		{"csv", []io.Reader{
			strings.NewReader("job_id,arrival,duration,key\na,1767603600,60,k\n"), &repeated{'x', long},
			strings.NewReader("\nb,1767603660,60,k\n"),
		}, []int{3}},
		{"json", []io.Reader{
			strings.NewReader(fmt.Sprintf(job, 1) + `{"name":"`), &repeated{'x', long},
			strings.NewReader("\"}\n" + fmt.Sprintf(job, 2)),
		}, []int{2}},
		{"json without an end", []io.Reader{
			strings.NewReader(fmt.Sprintf(job, 1) + fmt.Sprintf(job, 2) + `[{"name":"`), &repeated{'x', long / 20},
		}, []int{3}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			trace, err := simulate.Read(test.name, io.MultiReader(test.parts...))
			runtime.ReadMemStats(&after)
			if err != nil {
				t.Fatal(err)
			}
			var lines []int
			for _, r := range trace.Rejected {
				lines = append(lines, r.Line)
			}
			if diff := cmp.Diff(test.lines, lines); diff != "" {
				t.Errorf("rejected lines: %s", diff)
			}
			if len(trace.Jobs) != 2 || trace.Rows != 3 {
				t.Errorf("%d jobs in %d rows, want 2 in 3", len(trace.Jobs), trace.Rows)
			}
			if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 16<<20 {
				t.Errorf("%d MiB allocated", allocated>>20)
			}
		})
	}
}

func TestReadFails(t *testing.T) {
	whole := gzipped(t, "job_id,arrival,duration,key\na,1767603600,60,k\n")
	for name, input := range map[string]string{
		"cut gzip":  string(whole[:len(whole)-12]),
		"not gzip":  "\x1f\x8b\x00nothing of the kind",
		"utf-16":    "\xff\xfej\x00o\x00",
		"spaces":    " \n\t\r\n ",
		"no header": "a,1767603600,60,k\n",
	} {
		if trace, err := simulate.Read(name, strings.NewReader(input)); err == nil {
			t.Errorf("%s: no error, %d rows", name, trace.Rows)
		} else if !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %q does not name the trace", name, err)
		}
	}
}

// FuzzRead: whatever a file holds, every row is used or named, and what is used
// can be simulated.
func FuzzRead(f *testing.F) {
	files, err := filepath.Glob("testdata/imports/*")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		for _, test := range strings.Split(string(text), "\n\n") {
			_, test, _ = strings.Cut(test, "read\n")
			input, _, _ := strings.Cut(test, "\n----")
			f.Add([]byte(input))
		}
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		trace, err := simulate.Read("fuzz", bytes.NewReader(input))
		if err != nil {
			return
		}
		rejected := 0
		for _, r := range trace.Rejected {
			if r.Line < 1 || r.Line > bytes.Count(input, []byte("\n"))+1 && !bytes.HasPrefix(input, []byte{0x1f, 0x8b}) {
				t.Fatalf("rejected line %d of %d", r.Line, bytes.Count(input, []byte("\n"))+1)
			}
			if !strings.HasPrefix(r.Reason, "column ") || !strings.HasSuffix(r.Reason, "is not known and not used") {
				rejected++
			}
		}
		if trace.Rows != len(trace.Jobs)+rejected {
			t.Fatalf("%d rows are %d jobs and %d rejected", trace.Rows, len(trace.Jobs), rejected)
		}
		ids := map[string]bool{}
		for _, j := range trace.Jobs {
			if j.ID == "" || j.Key == "" || j.Duration < 1 || j.Duration > 7*24*3600 || ids[j.ID] {
				t.Fatalf("job %+v was let in", j)
			}
			ids[j.ID] = true
		}
		sorted := trace
		sorted.Jobs = slices.Clone(trace.Jobs)
		sorted.Sort()
		if diff := cmp.Diff(sorted.Jobs, trace.Jobs); diff != "" {
			t.Fatalf("not sorted: %s", diff)
		}
	})
}
