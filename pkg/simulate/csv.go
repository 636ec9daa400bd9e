package simulate

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/hearth-ci/hearth/pkg/model"
)

// layout is one kind of CSV file, told from others by its header.
type layout struct {
	name               string
	required, optional []string
	// job makes a job of a row's fields, or says why it is none.
	job func(field func(string) string) (Job, string)
}

func layouts() []layout {
	return []layout{{
		name:     "normalised",
		required: []string{"job_id", "arrival", "duration", "key"},
		optional: []string{"group"},
		job: func(field func(string) string) (Job, string) {
			times, reason := numbers(field, "arrival", "duration")
			if reason != "" {
				return Job{}, reason
			}
			return Job{
				ID: field("job_id"), Arrival: times[0], Duration: times[1],
				Key: model.CacheKey(field("key")), Group: field("group"),
			}, ""
		},
	}, {
		// One project's jobs: only those of its self-hosted pool are Hearth's
		// business. created is the run's for all its jobs, and stays when they
		// are run again.
		name:     "bitcoin-core-ci",
		required: []string{"job_id", "job_name", "runner", "created", "started", "finished"},
		optional: []string{
			"run_id", "branch", "sha", "status", "docker_cached", "docker_build_s", "depends_s",
			"configure_s", "build_s", "unit_s", "functional_s",
		},
		job: func(field func(string) string) (Job, string) {
			if runner := field("runner"); runner != "cirrus" {
				return Job{}, fmt.Sprintf("runner %s is not of the self-hosted pool (cirrus)", quoted(runner))
			}
			times, reason := numbers(field, "created", "started", "finished")
			if reason != "" {
				return Job{}, reason
			}
			took, reason := span(times[0], times[1], times[2], 6*hour, maxDuration)
			return Job{
				ID: field("job_id"), Arrival: times[0], Duration: took,
				Key: model.CacheKey(field("job_name")), Group: field("runner"),
			}, reason
		},
	}, {
		// Jobs that ran for more than 6 h waited for a person's approval;
		// those that waited for a day are re-runs.
		name:     "multi-repo-gha",
		required: []string{"repo", "job_name", "run_id", "run_attempt", "run_created", "started", "completed"},
		optional: []string{"workflow_id", "branch", "sha", "event", "result", "cache_restore_s", "cache_save_s"},
		job: func(field func(string) string) (Job, string) {
			times, reason := numbers(field, "run_created", "started", "completed")
			if reason != "" {
				return Job{}, reason
			}
			took, reason := span(times[0], times[1], times[2], 24*hour, 6*hour)
			return Job{
				ID:      field("run_id") + "/" + field("run_attempt") + "/" + field("job_name"),
				Arrival: times[0], Duration: took,
				Key: model.CacheKey(field("repo") + "/" + field("job_name")), Group: field("repo"),
			}, reason
		},
	}}
}

// numbers reads fields that are whole seconds, or nearly: parts of a second
// are cut.
func numbers(field func(string) string, names ...string) ([]int64, string) {
	values := make([]int64, len(names))
	for i, name := range names {
		s := field(name)
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			f, floatErr := strconv.ParseFloat(s, 64)
			switch {
			case s == "":
				return nil, name + " is missing"
			case floatErr != nil || math.IsNaN(f):
				return nil, fmt.Sprintf("%s is %s, want seconds", name, quoted(s))
			}
			v = int64(max(-1e15, min(f, 1e15)))
		}
		values[i] = max(-1e15, min(v, 1e15)) // far from overflow, and absurd
	}
	return values, ""
}

func readCSV(in *lines, c *collector) error {
	text, line, err := in.next()
	if err != nil {
		return err
	}
	columns, err := splitCSV(string(text))
	if err != nil {
		return fmt.Errorf("line %d: the header %s: %w", line, quoted(string(text)), err)
	}
	at := map[string]int{}
	for i, name := range columns {
		columns[i] = strings.ToLower(strings.TrimSpace(name))
		if _, twice := at[columns[i]]; twice {
			return fmt.Errorf("line %d: column %s is there twice", line, quoted(columns[i]))
		}
		at[columns[i]] = i
	}
	l, err := findLayout(at)
	if err != nil {
		return fmt.Errorf("line %d: %w", line, err)
	}
	for _, name := range columns {
		if !slices.Contains(l.required, name) && !slices.Contains(l.optional, name) {
			c.reject(line, "column %s is not known and not used", quoted(name))
		}
	}
	for {
		text, line, err := in.next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, errTooLong):
			c.bad(line, "the line is longer than %d bytes", maxRecord)
			continue
		case err != nil:
			return err
		case len(bytes.TrimSpace(text)) == 0:
			continue
		}
		fields, err := splitCSV(string(text))
		if err != nil {
			c.bad(line, "%v", err)
			continue
		}
		if len(fields) != len(columns) {
			c.bad(line, "%d fields, the header has %d", len(fields), len(columns))
			continue
		}
		j, reason := l.job(func(name string) string {
			if i, ok := at[name]; ok {
				return strings.TrimSpace(fields[i])
			}
			return ""
		})
		if reason != "" {
			c.bad(line, "%s", reason)
			continue
		}
		c.row(line, j)
	}
}

func findLayout(at map[string]int) (layout, error) {
	var known []string
	for _, l := range layouts() {
		if !slices.ContainsFunc(l.required, func(name string) bool { _, ok := at[name]; return !ok }) {
			return l, nil
		}
		known = append(known, fmt.Sprintf("%s (%s)", l.name, strings.Join(l.required, ",")))
	}
	return layout{}, fmt.Errorf("neither JSON nor CSV with the columns of %s", strings.Join(known, " or "))
}

// splitCSV splits one line. A quoted field ends on its line, so that one bad
// quote spoils no more than that.
func splitCSV(line string) ([]string, error) {
	if !strings.Contains(line, `"`) {
		return strings.Split(line, ","), nil
	}
	fields, err := csv.NewReader(strings.NewReader(line)).Read()
	var wrong *csv.ParseError
	if errors.As(err, &wrong) {
		return nil, fmt.Errorf("column %d: %w", wrong.Column, wrong.Err)
	}
	return fields, err
}

// lines reads lines of bounded length.
type lines struct {
	in   *bufio.Reader
	line int // of the last one read
}

var errTooLong = errors.New("the line is too long")

// next returns the next line without its end and its number; the line is valid
// until the call after. After errTooLong it goes on behind that line.
func (l *lines) next() ([]byte, int, error) {
	l.line++
	text, err := l.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		long := slices.Clone(text)
		for errors.Is(err, bufio.ErrBufferFull) {
			text, err = l.in.ReadSlice('\n')
			if len(long) <= maxRecord {
				long = append(long, text...)
			}
		}
		text = long
	}
	switch {
	case errors.Is(err, io.EOF) && len(text) > 0: // the last line needs no end
	case err != nil:
		return nil, l.line, err
	}
	if len(text) > maxRecord {
		return nil, l.line, errTooLong
	}
	return bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r")), l.line, nil
}
