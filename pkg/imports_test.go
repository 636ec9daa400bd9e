package pkg_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/hearth-ci/hearth/"

// ranks is the one way in which imports point: a package of pkg may import those
// of lower rank. The simulator drives everything, so it comes last.
func ranks() map[string]int {
	return map[string]int{"model": 0, "scoring": 1, "nodegroups": 2, "demand": 2, "simulate": 3}
}

// forTests are the modules that tests of pure packages may import.
func forTests() []string {
	return []string{"github.com/cockroachdb/datadriven", "github.com/google/go-cmp", "go.uber.org/goleak", "golang.org/x/net/html", "pgregory.net/rapid"}
}

// Decisions return their reasons, and get what they need as arguments: no
// logger, clock or source of randomness of their own.
func impureImport(pkg string) bool {
	return slices.Contains([]string{"crypto/rand", "log", "log/slog"}, pkg)
}

func impureName(pkg, name string) bool {
	switch pkg {
	case "time":
		return slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, name)
	case "math/rand", "math/rand/v2": // all but what makes a generator from a given source
		pure := []string{"New", "NewSource", "NewPCG", "NewChaCha8", "NewZipf", "Rand", "Source", "Source64", "PCG", "ChaCha8", "Zipf"}
		return !slices.Contains(pure, name)
	}
	return false
}

func TestPurePackages(t *testing.T) {
	files := 0
	err := fs.WalkDir(os.DirFS("."), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || path.Ext(name) != ".go" || path.Dir(name) == "." {
			return err
		}
		files++
		source, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		broken, err := check(name, source)
		for _, b := range broken {
			t.Error(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Error("found no Go files in pkg")
	}
}

// check returns what breaks the rules in the file of that name below pkg.
func check(name string, source []byte) ([]string, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var broken []string
	report := func(at token.Pos, format string, args ...any) {
		broken = append(broken, fmt.Sprintf("%s: %s", set.Position(at), fmt.Sprintf(format, args...)))
	}
	isTest := strings.HasSuffix(name, "_test.go")
	from, _, _ := strings.Cut(name, "/")
	rank, ok := ranks()[from]
	if !ok {
		report(file.Package, "package %s has no rank", from)
	}

	imported := map[string]string{} // path by name in the file
	for _, spec := range file.Imports {
		target, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, err
		}
		local := path.Base(strings.TrimSuffix(target, "/v2"))
		if spec.Name != nil {
			local = spec.Name.Name
		}
		imported[local] = target

		first, _, _ := strings.Cut(target, "/")
		within, isOurs := strings.CutPrefix(target, module+"pkg/")
		switch {
		case isOurs:
			to, _, _ := strings.Cut(within, "/")
			if lower, ok := ranks()[to]; to != from && (!ok || lower >= rank) {
				report(spec.Pos(), "%s must not import %s: imports point to lower ranks", from, to)
			}
		case strings.Contains(first, "."):
			if !isTest || !slices.ContainsFunc(forTests(), func(m string) bool { return target == m || strings.HasPrefix(target, m+"/") }) {
				report(spec.Pos(), "imports %s, which is neither the standard library nor pkg", target)
			}
		case !isTest && impureImport(target):
			report(spec.Pos(), "imports %s: decisions are pure", target)
		}
	}
	if isTest {
		return broken, nil
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if use, ok := n.(*ast.SelectorExpr); ok {
			if qualifier, ok := use.X.(*ast.Ident); ok {
				if target := imported[qualifier.Name]; impureName(target, use.Sel.Name) {
					report(use.Pos(), "uses %s.%s: decisions are pure", target, use.Sel.Name)
				}
			}
		}
		return true
	})
	return broken, nil
}

func TestCheck(t *testing.T) {
	for _, test := range []struct {
		name, file, source string
		want               []string
	}{
		{
			name: "pure", file: "scoring/a.go",
			source: `package scoring
import ("math/rand/v2"; "time"; "github.com/hearth-ci/hearth/pkg/model")
func f(r *rand.Rand, now time.Time, g model.GroupID) (int, *rand.Rand) { return r.IntN(2), rand.New(rand.NewPCG(1, 2)) }`,
		},
		{
			name: "clock and randomness", file: "scoring/a.go",
			source: `package scoring
import (r "math/rand/v2"; "time")
var now = time.Now
func f() int { return r.IntN(2) }`,
			want: []string{
				"scoring/a.go:3:11: uses time.Now: decisions are pure",
				"scoring/a.go:4:23: uses math/rand/v2.IntN: decisions are pure",
			},
		},
		{
			name: "logger", file: "demand/a.go",
			source: "package demand\nimport \"log/slog\"\nvar l *slog.Logger",
			want:   []string{"demand/a.go:2:8: imports log/slog: decisions are pure"},
		},
		{
			name: "module", file: "demand/a.go",
			source: "package demand\nimport _ \"k8s.io/api/core/v1\"",
			want:   []string{"demand/a.go:2:8: imports k8s.io/api/core/v1, which is neither the standard library nor pkg"},
		},
		{
			name: "test's module in the product", file: "demand/a.go",
			source: "package demand\nimport _ \"pgregory.net/rapid\"",
			want:   []string{"demand/a.go:2:8: imports pgregory.net/rapid, which is neither the standard library nor pkg"},
		},
		{
			name: "test's module in a test", file: "demand/a_test.go",
			source: "package demand\nimport (_ \"pgregory.net/rapid\"; _ \"github.com/google/go-cmp/cmp\")",
		},
		{
			name: "other module in a test", file: "demand/a_test.go",
			source: "package demand\nimport _ \"pgregory.net/rapidly\"",
			want:   []string{"demand/a_test.go:2:8: imports pgregory.net/rapidly, which is neither the standard library nor pkg"},
		},
		{
			name: "adapter", file: "demand/a.go",
			source: "package demand\nimport _ \"github.com/hearth-ci/hearth/internal/kube\"",
			want:   []string{"demand/a.go:2:8: imports github.com/hearth-ci/hearth/internal/kube, which is neither the standard library nor pkg"},
		},
		{
			name: "against the order", file: "scoring/a.go",
			source: "package scoring\nimport _ \"github.com/hearth-ci/hearth/pkg/nodegroups\"",
			want:   []string{"scoring/a.go:2:8: scoring must not import nodegroups: imports point to lower ranks"},
		},
		{
			name: "same rank", file: "demand/a.go",
			source: "package demand\nimport _ \"github.com/hearth-ci/hearth/pkg/nodegroups\"",
			want:   []string{"demand/a.go:2:8: demand must not import nodegroups: imports point to lower ranks"},
		},
		{
			name: "own parts", file: "simulate/report/a.go",
			source: "package report\nimport _ \"github.com/hearth-ci/hearth/pkg/simulate\"",
		},
		{
			name: "no rank", file: "helpers/a.go", source: "package helpers",
			want: []string{"helpers/a.go:1:1: package helpers has no rank"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := check(test.file, []byte(test.source))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
