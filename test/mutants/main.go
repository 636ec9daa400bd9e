// Command mutants puts one deliberate defect after another into Hearth and runs
// the tests that should notice: `make mutants`. One that they do not notice
// survives, and wants a test. It changes no file of the repository: the compiler
// is given the changed one in place of it (go help build, -overlay).
//
// The tests must pass without a defect, or nothing is shown: run `make race`.
//
// Arguments are texts: only defects with one of them in their name are tried.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// within bounds the tests of one mutant: one that makes them hang has been
// noticed.
const within = 10 * time.Minute

func main() {
	survivors, err := run(context.Background(), os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(2)
	}
	if survivors > 0 {
		os.Exit(1)
	}
}

func run(ctx context.Context, names []string) (survivors int, err error) {
	dir, err := os.MkdirTemp("", "hearth-mutants-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	var broken []error
	tried := 0
	for _, m := range mutants() {
		if len(names) > 0 && !slices.ContainsFunc(names, func(n string) bool { return strings.Contains(m.Name, n) }) {
			continue
		}
		tried++
		began := time.Now()
		noticed, by, err := m.try(ctx, dir)
		if err != nil {
			broken = append(broken, fmt.Errorf("%s: %w", m.Name, err))
			continue
		}
		word := "killed"
		if !noticed {
			word = "SURVIVED"
			survivors++
		}
		fmt.Printf("%-8s %-55s %5.1f s  %s\n", word, m.Name, time.Since(began).Seconds(), by)
	}
	fmt.Printf("%d of %d killed\n", tried-survivors-len(broken), tried)
	return survivors, errors.Join(broken...)
}

// changed returns the mutant's file as it would be. An error means that the
// source has moved, and the mutant must follow.
func (m mutant) changed() (string, error) {
	text, err := os.ReadFile(m.File)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(text), m.Old); n != 1 {
		return "", fmt.Errorf("%s has %d times what is to be replaced, want once:\n%s", m.File, n, m.Old)
	}
	return strings.Replace(string(text), m.Old, m.New, 1), nil
}

// try runs the tests with the defect, and says which noticed. A defect that
// does not compile, as when it leaves a variable unused, is an error.
func (m mutant) try(ctx context.Context, dir string) (noticed bool, by string, err error) {
	text, err := m.changed()
	if err != nil {
		return false, "", err
	}
	original, err := filepath.Abs(m.File)
	if err != nil {
		return false, "", err
	}
	changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]map[string]string{"Replace": {original: changed}})
	if err != nil {
		return false, "", err
	}
	if err := errors.Join(os.WriteFile(changed, []byte(text), 0o600), os.WriteFile(overlay, list, 0o600)); err != nil {
		return false, "", err
	}
	args := []string{"-overlay", overlay}
	if out, err := exec.CommandContext(ctx, "go", append([]string{"build"}, append(args, "./"+filepath.Dir(m.File))...)...).CombinedOutput(); err != nil {
		return false, "", fmt.Errorf("it does not compile: %w\n%s", err, out)
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	test := exec.CommandContext(limited, "go", slices.Concat([]string{"test", "-vet=off", "-failfast"}, args, m.Tests)...)
	test.WaitDelay = time.Minute
	out, err := test.CombinedOutput()
	if err == nil {
		return false, strings.Join(m.Tests, " "), nil
	}
	if _, failed := errors.AsType[*exec.ExitError](err); !failed && limited.Err() == nil {
		return false, "", err
	}
	for line := range strings.SplitSeq(string(out), "\n") {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "--- FAIL: "); ok {
			name, _, _ = strings.Cut(name, " ")
			return true, name, nil
		}
	}
	if limited.Err() != nil || strings.Contains(string(out), "panic:") || strings.Contains(string(out), "DATA RACE") {
		return true, "a panic, a race or a hang", nil
	}
	return false, "", fmt.Errorf("go test failed, but no test did:\n%s", out)
}
