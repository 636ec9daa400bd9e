package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"mvdan.cc/sh/v3/syntax"

	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// elsewhere are programs of others in the pages: their lines are parsed as shell,
// and no more is asked of them, for the reason given.
func elsewhere() map[string]string {
	return map[string]string{
		"helm":    "TestDocs in charts has the chart's own values rendered and its subcommands looked up",
		"kubectl": "kubectl is not built here; what it is asked for is looked at below",
		"git":     "a clone needs the network", "export": "the shell's own", "cd": "the shell's own", "printf": "the shell's own",
		"gh": "needs an account", "glab": "needs an account", "curl": "needs an account", "jq": "works on what these write",
		"read": "the shell's own", "grep": "everywhere", "head": "everywhere", "cat": "everywhere", "date": "everywhere", "seq": "everywhere", "openssl": "everywhere", "echo": "the shell's own", "[": "the shell's own",
		"skopeo": "copies to somewhere", "aws": "needs an account",
		"go": "the commands' packages are looked up",
	}
}

// fence is one fenced block of a page.
type fence struct{ path, kind, text string }

func pages(t *testing.T) (all []fence) {
	t.Helper()
	root := "../.."
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".md" || strings.Contains(path, "CHANGELOG") {
			return nil
		}
		text, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile("(?ms)^```(\\w*)\\n(.*?)^```").FindAllSubmatch(text, -1) {
			all = append(all, fence{strings.TrimPrefix(path, root+"/"), string(m[1]), string(m[2])})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// script is what a person would type of a block.
func (b fence) script() string {
	if b.kind != "console" {
		return b.text
	}
	var script strings.Builder
	more, here := false, ""
	for line := range strings.Lines(b.text) {
		rest, prompt := strings.CutPrefix(line, "$ ")
		switch {
		case here != "":
			script.WriteString(line)
			if strings.TrimSpace(line) == here {
				here = ""
			}
		case prompt || more:
			script.WriteString(rest)
			more = strings.HasSuffix(strings.TrimRight(rest, "\n"), `\`)
			if m := regexp.MustCompile(`<<'?(\w+)'?`).FindStringSubmatch(rest); m != nil {
				here = m[1]
			}
		}
	}
	return script.String()
}

// typed are the commands of a script, as words; what only the shell can tell is "…".
func typed(script string) (all [][]string, err error) {
	file, err := syntax.NewParser().Parse(strings.NewReader(strings.ReplaceAll(script, "…", "X")), "")
	if err != nil {
		return nil, err
	}
	printer := syntax.NewPrinter()
	syntax.Walk(file, func(n syntax.Node) bool {
		call, ok := n.(*syntax.CallExpr)
		if !ok || len(call.Args) == 0 {
			return true
		}
		var words []string
		for _, w := range call.Args {
			var text strings.Builder
			for _, part := range w.Parts {
				switch part := part.(type) {
				case *syntax.Lit:
					text.WriteString(strings.ReplaceAll(part.Value, `\`, ""))
				case *syntax.SglQuoted:
					text.WriteString(part.Value)
				default:
					err = errors.Join(err, printer.Print(&text, part))
				}
			}
			words = append(words, text.String())
		}
		all = append(all, words)
		return true
	})
	return all, err
}

// TestDocs: every command in every page is one that there is, with flags that there
// are, and every YAML and JSON is what it says.
func TestDocs(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	for _, b := range pages(t) {
		switch b.kind {
		case "console", "sh":
			list, err := typed(b.script())
			if err != nil {
				t.Errorf("%s: %v in\n%s", b.path, err, b.text)
			}
			if len(list) == 0 {
				t.Errorf("%s: nothing is typed in\n%s", b.path, b.text)
			}
			for _, words := range list {
				if err := known(words, string(makefile)); err != nil {
					t.Errorf("%s: %q: %v", b.path, strings.Join(words, " "), err)
				}
				n[filepath.Base(words[0])]++
			}
		case "yaml":
			if err := readable(b.text); err != nil {
				t.Errorf("%s: %v in\n%s", b.path, err, b.text)
			}
			n["yaml"]++
		case "json":
			if !json.Valid([]byte(b.text)) {
				t.Errorf("%s: no JSON:\n%s", b.path, b.text)
			}
		}
	}
	for what, least := range map[string]int{"hearth": 10, "make": 3, "kubectl": 15, "helm": 4, "yaml": 8} {
		if n[what] < least {
			t.Errorf("only %d of %s were found: %v", n[what], what, n)
		}
	}
	// It can fail.
	for _, wrong := range []string{"hearth serve --configs x", "hearth explained", "make everything", "kubectl get runnernodepools", "kubectl annotate rng a hearth.dev/min-worm=2", "frobnicate"} {
		list, err := typed(wrong)
		if err != nil || known(list[0], string(makefile)) == nil {
			t.Errorf("%q is taken, %v", wrong, err)
		}
	}
}

// known says why a command cannot be typed.
func known(words []string, makefile string) error {
	switch name := filepath.Base(words[0]); name {
	case "hearth":
		root := rootCommand()
		root.SetOut(io.Discard)
		cmd, rest, err := root.Find(words[1:])
		if err != nil {
			return err
		}
		if cmd == root && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
			return fmt.Errorf("there is no command %q", rest[0])
		}
		return cmd.ParseFlags(rest)
	case "make":
		for _, target := range words[1:] {
			if !strings.Contains(target, "=") && !strings.Contains(makefile, "\n"+target+":") {
				return fmt.Errorf("there is no target %q", target)
			}
		}
		return nil
	case "kubectl":
		return kubectl(words[1:])
	case "go":
		for _, w := range words[1:] {
			if dir := strings.TrimSuffix(w, "/..."); strings.HasPrefix(w, "./") {
				if _, err := os.Stat(filepath.Join("../..", dir)); err != nil {
					return err
				}
			}
		}
		return nil
	default:
		if _, known := elsewhere()[name]; !known {
			return errors.New("nobody has looked at this program")
		}
		return nil
	}
}

// kubectl looks at the verb, at kinds of Hearth's and at annotations.
func kubectl(words []string) error {
	var plain []string
	for i := 0; i < len(words); i++ {
		w := words[i]
		if strings.HasPrefix(w, "-") {
			switch w {
			case "-n", "-l", "-o", "-f", "-L", "--tail", "--replicas", "--namespace", "--field-selector", "--server-side":
				if w != "--server-side" {
					i++
				}
			}
			continue
		}
		plain = append(plain, w)
	}
	if len(plain) == 0 {
		return errors.New("it is asked nothing")
	}
	const verbs = " get describe annotate label apply create delete logs port-forward rollout scale edit patch explain top "
	if !strings.Contains(verbs, " "+plain[0]+" ") {
		return fmt.Errorf("the verb %q", plain[0])
	}
	if (plain[0] == "get" || plain[0] == "describe") && len(plain) > 1 {
		const kinds = " rng rn runnernodegroups runnernodes nodes node pods pod events lease service services deploy configmap configmaps secret secrets namespace ephemeralrunners "
		for kind := range strings.SplitSeq(plain[1], ",") {
			kind, _, _ = strings.Cut(kind, "/")
			if !strings.Contains(kinds, " "+kind+" ") {
				return fmt.Errorf("the kind %q", kind)
			}
		}
	}
	for _, w := range plain[1:] {
		key, value, set := strings.Cut(w, "=")
		option, ours := strings.CutPrefix(key, "hearth.dev/")
		if !set || !ours || plain[0] != "annotate" {
			continue
		}
		if !slices.ContainsFunc(nodegroups.Annotations(), func(a nodegroups.Annotation) bool { return a.Key == option }) {
			return fmt.Errorf("the annotation %s (%s)", key, value)
		}
	}
	return nil
}

// readable says what is wrong with YAML; with a config file of Hearth's, by
// Hearth's own reader.
func readable(text string) error {
	decoder := yaml.NewDecoder(bufio.NewReader(strings.NewReader(text)))
	for {
		var doc map[string]any
		err := decoder.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if doc["kind"] == "ProviderConfig" {
			if _, err := config.Parse([]byte(text), "doc"); err != nil && !strings.Contains(err.Error(), "want a file that can be read") {
				return err
			}
		}
	}
}
