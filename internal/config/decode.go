package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// decoder walks the nodes of a YAML document along the schema. It goes on
// after a problem, so that all of them are reported.
type decoder struct {
	file               string
	lines              map[string]int // by path of the fields met so far
	problems, warnings []Problem
}

// A reader takes the value of the field at a path.
type reader func(d *decoder, at string, n *yaml.Node)

// fields are what a mapping may hold.
type fields map[string]reader

func (d *decoder) problem(at, text string) {
	d.problems = append(d.problems, Problem{File: d.file, Line: d.line(at), Field: at, Text: text})
}

func (d *decoder) warn(at, text string) {
	d.warnings = append(d.warnings, Problem{File: d.file, Line: d.line(at), Field: at, Text: text})
}

// refuse reports a value; got is what stands in the file.
func (d *decoder) refuse(at, want, got string) {
	d.problem(at, fmt.Sprintf("want %s, got %s", want, got))
}

// line returns the line of the field or, when it is not in the file, of the
// nearest field around it.
func (d *decoder) line(at string) int {
	for at != "" {
		if line, ok := d.lines[at]; ok {
			return line
		}
		at = at[:max(strings.LastIndexAny(at, ".["), 0)]
	}
	return 0
}

// document returns the only document's root, nil after a problem.
func (d *decoder) document(data []byte) *yaml.Node {
	if len(data) > MaxBytes {
		d.problem("", fmt.Sprintf("want at most %d bytes", MaxBytes))
		return nil
	}
	var doc, second yaml.Node
	in := yaml.NewDecoder(bytes.NewReader(data))
	switch err := in.Decode(&doc); {
	case errors.Is(err, io.EOF):
		d.problem("", "the file is empty: want a "+Kind)
		return nil
	case err != nil:
		d.syntax(err)
		return nil
	}
	if err := in.Decode(&second); !errors.Is(err, io.EOF) {
		d.problem("", "want one YAML document, got more")
		return nil
	}
	if line := alias(&doc); line > 0 {
		d.problems = append(d.problems, Problem{File: d.file, Line: line, Text: "anchors and aliases are not supported"})
		return nil
	}
	return doc.Content[0]
}

// syntax reports an error of the YAML parser, which has no type that tells the
// line.
func (d *decoder) syntax(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if _, scanned := fmt.Sscanf(text, "line %d: ", &line); scanned == nil {
		_, text, _ = strings.Cut(text, ": ")
	}
	d.problems = append(d.problems, Problem{File: d.file, Line: line, Text: "not valid YAML: " + text})
}

// alias returns the line of the first alias, 0 when there is none.
func alias(n *yaml.Node) int {
	if n.Kind == yaml.AliasNode {
		return n.Line
	}
	for _, child := range n.Content {
		if line := alias(child); line > 0 {
			return line
		}
	}
	return 0
}

// null says whether a field has no value: it then is as if not in the file.
func null(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// found describes a value for people.
func found(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.ShortTag() == "!!str" {
		return quote(n.Value)
	}
	return clip(n.Value)
}

func quote(s string) string { return strconv.Quote(clip(s)) }

// clip bounds what a bad value may put into a message.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// entries yields the keys and values of a mapping, each key once.
func (d *decoder) entries(at string, n *yaml.Node) iter.Seq2[string, *yaml.Node] {
	return func(yield func(string, *yaml.Node) bool) {
		seen := map[string]int{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			if key.Kind != yaml.ScalarNode || key.ShortTag() != "!!str" {
				d.problems = append(d.problems, Problem{File: d.file, Line: key.Line, Field: at, Text: "want a text as key, got " + found(key)})
				continue
			}
			if first, twice := seen[key.Value]; twice {
				d.problems = append(d.problems, Problem{File: d.file, Line: key.Line, Field: at, Text: fmt.Sprintf("%s stands here twice, first on line %d", quote(key.Value), first)})
				continue
			}
			seen[key.Value] = key.Line
			if !yield(key.Value, value) {
				return
			}
		}
	}
}

// required says what is wanted in fields that must have a value.
type required map[string]string

// object reads a mapping of known fields.
func object(known fields, needed required) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		names := strings.Join(slices.Sorted(maps.Keys(known)), ", ")
		if n.Kind != yaml.MappingNode && !null(n) {
			d.refuse(at, "a mapping with fields of "+names, found(n))
			return
		}
		set := map[string]bool{}
		for key, value := range d.entries(at, n) {
			path := join(at, key)
			d.lines[path] = value.Line
			read, ok := known[key]
			if !ok {
				d.problem(path, "unknown field: want one of "+names)
				continue
			}
			set[key] = !null(value)
			read(d, path, value)
		}
		for name, want := range needed {
			if !set[name] {
				d.refuse(join(at, name), want, "nothing")
			}
		}
	}
}

func join(at, key string) string {
	if at == "" {
		return clip(key)
	}
	return at + "." + clip(key)
}

// list reads at most so many items, each with a reader made for it.
func list(most int, item func() reader) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		switch {
		case null(n):
		case n.Kind != yaml.SequenceNode:
			d.refuse(at, "a list", found(n))
		case len(n.Content) > most:
			d.refuse(at, fmt.Sprintf("a list of at most %d items", most), fmt.Sprint(len(n.Content)))
		default:
			for i, child := range n.Content {
				path := fmt.Sprintf("%s[%d]", at, i)
				d.lines[path] = child.Line
				item()(d, path, child)
			}
		}
	}
}

// table reads a mapping of free keys to scalars. check returns what is wanted
// when it does not take an entry, else "".
func table(into *map[string]string, kind string, check func(key, value string) (want string), tags ...string) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		if null(n) {
			return
		}
		if n.Kind != yaml.MappingNode {
			d.refuse(at, "a mapping", found(n))
			return
		}
		read := map[string]string{}
		for key, value := range d.entries(at, n) {
			path := fmt.Sprintf("%s[%s]", at, quote(key))
			d.lines[path] = value.Line
			if value.Kind != yaml.ScalarNode || !slices.Contains(tags, value.ShortTag()) {
				d.refuse(path, kind, found(value))
				continue
			}
			if want := check(key, value.Value); want != "" {
				d.refuse(path, want, found(value))
				continue
			}
			read[key] = value.Value
		}
		*into = read
	}
}

// text reads a text that check takes; want says which those are.
func text(into *string, want string, check func(string) bool) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		switch {
		case null(n):
		case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" || !check(n.Value):
			d.refuse(at, want, found(n))
		default:
			*into = n.Value
		}
	}
}

func anyText(into *string) reader {
	return text(into, "a text", func(string) bool { return true })
}

// exactly reads a text that can have one value only.
func exactly(value string) reader {
	var ignored string
	return text(&ignored, strconv.Quote(value), func(s string) bool { return s == value })
}

// whole reads a whole number.
func whole(into *int, low, high int, want string) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		if null(n) {
			return
		}
		v, err := strconv.Atoi(n.Value)
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil || v < low || v > high {
			d.refuse(at, want, found(n))
			return
		}
		*into = v
	}
}

func boolean(into *bool) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		switch {
		case null(n):
		case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool":
			d.refuse(at, "true or false", found(n))
		default:
			*into = strings.EqualFold(n.Value, "true")
		}
	}
}

// span reads a duration of at most an hour.
func span(into *time.Duration, low time.Duration) reader {
	const high = time.Hour
	return func(d *decoder, at string, n *yaml.Node) {
		if null(n) {
			return
		}
		v, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil || v < low || v > high {
			d.refuse(at, fmt.Sprintf("a duration from %s to %s such as 1m30s", brief(low), brief(high)), found(n))
			return
		}
		*into = v
	}
}

// brief writes 1h rather than 1h0m0s.
func brief(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
