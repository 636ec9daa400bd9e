package ui

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/hearth-ci/hearth/internal/explain"
)

const (
	// longest a parameter may be, in bytes.
	longest = 256
	// eventsShown of the timeline unless limit says otherwise, mostShown at
	// most.
	eventsShown, mostShown = 50, 500
)

func pageParameters() []string     { return []string{"group", "kind", "text", "before", "page"} }
func timelineParameters() []string { return []string{"group", "kind", "text", "before", "limit"} }

// filter is what a link asks for. Its zero value asks for everything.
type filter struct {
	Group, Text string
	Kind        explain.Kind
	Before      uint64 // only events with a lower Seq; 0: all
	Limit       int
	Page        int // of the table of nodes, from 1
}

// parseFilter reads the parameters of a link; the error names what is accepted.
func parseFilter(q url.Values, accepted []string) (filter, error) {
	f := filter{Limit: eventsShown, Page: 1}
	for name, values := range q {
		if !slices.Contains(accepted, name) {
			if len(accepted) == 0 {
				return filter{}, fmt.Errorf("unknown parameter %.40q: none is accepted", name)
			}
			return filter{}, fmt.Errorf("unknown parameter %.40q: want one of %s", name, strings.Join(accepted, ", "))
		}
		if len(values) != 1 {
			return filter{}, fmt.Errorf("parameter %s: want it once, got it %d times", name, len(values))
		}
		value := values[0]
		if len(value) > longest || !utf8.ValidString(value) {
			return filter{}, fmt.Errorf("parameter %s: want at most %d bytes of UTF-8", name, longest)
		}
		if value == "" {
			continue // as a form sends a field that was left empty
		}
		var err error
		switch name {
		case "group":
			f.Group = value
		case "text":
			f.Text = value
		case "kind":
			if f.Kind = explain.Kind(value); !slices.Contains(explain.Kinds(), f.Kind) {
				return filter{}, fmt.Errorf("parameter kind: want one of %v, got %.40q", explain.Kinds(), value)
			}
		case "before":
			f.Before, err = strconv.ParseUint(value, 10, 64)
			if err != nil || f.Before == 0 {
				return filter{}, fmt.Errorf("parameter before: want a seq of an event, got %.40q", value)
			}
		case "limit":
			if f.Limit, err = number(name, value, mostShown); err != nil {
				return filter{}, err
			}
		case "page":
			if f.Page, err = number(name, value, 100_000); err != nil {
				return filter{}, err
			}
		}
	}
	return f, nil
}

func number(name, value string, most int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("parameter %s: want a whole number from 1 to %d, got %.40q", name, most, value)
	}
	return n, nil
}

// events returns those that match, and whether there are more.
func (f filter) events(all []explain.Event) (events []explain.Event, more bool) {
	events = []explain.Event{}
	text := strings.ToLower(f.Text)
	for _, e := range all {
		if f.Before > 0 && e.Seq >= f.Before || f.Group != "" && e.Group != f.Group || f.Kind != "" && e.Kind != f.Kind {
			continue
		}
		if text != "" && !strings.Contains(strings.ToLower(e.Group+" "+e.Node+" "+e.Instance+" "+e.Action+" "+e.Text), text) {
			continue
		}
		if len(events) == f.Limit {
			return events, true
		}
		events = append(events, e)
	}
	return events, false
}

// link is the page with other parameters: pairs of name and value, an empty
// value takes the parameter away.
func (f filter) link(pairs ...string) string {
	q := url.Values{}
	set := func(name, value string) {
		if q.Del(name); value != "" {
			q.Set(name, value)
		}
	}
	set("group", f.Group)
	set("kind", string(f.Kind))
	set("text", f.Text)
	if f.Page > 1 {
		set("page", strconv.Itoa(f.Page))
	}
	if f.Before > 0 {
		set("before", strconv.FormatUint(f.Before, 10))
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		set(pairs[i], pairs[i+1])
	}
	if len(q) == 0 {
		return "/ui"
	}
	return "/ui?" + q.Encode()
}
