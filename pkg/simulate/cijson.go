package simulate

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// ciJob is what matters of a job in the REST APIs of
//   - GitHub: /repos/{owner}/{repo}/actions/runs/{id}/jobs
//   - GitLab: /projects/{id}/jobs
//   - Buildkite: /organizations/{org}/builds and the jobs in them
type ciJob struct {
	ID        json.RawMessage `json:"id"`
	Name      string          `json:"name"`
	CreatedAt string          `json:"created_at"`
	StartedAt string          `json:"started_at"`
	WebURL    string          `json:"web_url"`     // GitLab, Buildkite
	Finished  string          `json:"finished_at"` // GitLab, Buildkite

	RunURL      string   `json:"run_url"` // GitHub
	Workflow    string   `json:"workflow_name"`
	Status      string   `json:"status"` // GitHub, GitLab
	Conclusion  string   `json:"conclusion"`
	CompletedAt string   `json:"completed_at"`
	Labels      []string `json:"labels"`

	Pipeline       *struct{} `json:"pipeline"` // GitLab
	QueuedDuration *float64  `json:"queued_duration"`
	TagList        []string  `json:"tag_list"`

	Type        string   `json:"type"` // Buildkite
	StepKey     string   `json:"step_key"`
	ScheduledAt string   `json:"scheduled_at"`
	RunnableAt  string   `json:"runnable_at"`
	AgentRules  []string `json:"agent_query_rules"`
}

// job makes a job of it, or says why it is none.
func (j ciJob) job() (Job, string) {
	job := Job{ID: strings.Trim(string(j.ID), `"`)}
	if job.ID == "null" {
		job.ID = ""
	}
	arrived, finished := j.CreatedAt, j.Finished
	var key, group []string
	var queued float64
	switch {
	case j.RunURL != "":
		if j.Status != "completed" || j.Conclusion == "skipped" {
			return job, fmt.Sprintf("status %s, conclusion %s: it did not run to an end", quoted(j.Status), quoted(j.Conclusion))
		}
		_, repo, _ := strings.Cut(j.RunURL, "/repos/")
		repo, _, _ = strings.Cut(repo, "/actions/")
		finished = j.CompletedAt
		key, group = []string{repo, j.Workflow, j.Name}, j.Labels
	case j.Pipeline != nil:
		project, _, _ := strings.Cut(afterHost(j.WebURL), "/-/")
		if j.QueuedDuration != nil {
			// A job is created with its pipeline and waits for earlier stages;
			// only then it is queued.
			arrived, queued = j.StartedAt, *j.QueuedDuration
		}
		key, group = []string{project, j.Name}, j.TagList
	case j.Type != "":
		if j.Type != "script" {
			return job, fmt.Sprintf("a step of type %s runs nothing", quoted(j.Type))
		}
		pipeline, _, _ := strings.Cut(afterHost(j.WebURL), "/builds/")
		for _, later := range []string{j.ScheduledAt, j.RunnableAt} { // when its turn came
			if later != "" {
				arrived = later
			}
		}
		name := j.StepKey
		if name == "" {
			name = j.Name
		}
		key, group = []string{pipeline, name}, j.AgentRules
	default:
		return job, "neither a job of GitHub (run_url), of GitLab (pipeline) nor of Buildkite (type)"
	}
	if j.StartedAt == "" || finished == "" {
		return job, "it never started, or has not finished"
	}
	var times [3]time.Time
	for i, value := range []string{arrived, j.StartedAt, finished} {
		name := []string{"arrival", "started_at", "end"}[i]
		if value == "" {
			return job, name + " is missing"
		}
		t, err := time.Parse(time.RFC3339, value)
		if err != nil {
			return job, fmt.Sprintf("%s is %s, want a time as 2006-01-02T15:04:05Z", name, quoted(value))
		}
		times[i] = t
	}
	if queued < 0 || queued > 366*24*float64(hour) || math.IsNaN(queued) {
		return job, fmt.Sprintf("queued_duration is %v s", queued)
	}
	arrival := times[0].Add(-time.Duration(queued * float64(time.Second)))
	job.Arrival = arrival.Unix()
	var reason string
	_, reason = span(job.Arrival, times[1].Unix(), times[2].Unix(), 24*hour, maxDuration)
	// Parts of a second hold a runner too.
	job.Duration = int64(math.Ceil(times[2].Sub(times[1]).Seconds()))
	job.Key = model.CacheKey(strings.Join(slices.DeleteFunc(key, func(s string) bool { return s == "" }), "/"))
	group = slices.Clone(group)
	slices.Sort(group)
	job.Group = strings.Join(group, ",")
	return job, reason
}

func afterHost(url string) string {
	_, rest, _ := strings.Cut(url, "://")
	_, path, _ := strings.Cut(rest, "/")
	return path
}

func readJSON(in *objects, c *collector) error {
	for {
		raw, line, err := in.next()
		var broken brokenObject
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.As(err, &broken):
			c.bad(line, "%s", string(broken))
			continue
		case err != nil:
			return err
		}
		var j ciJob
		if err := json.Unmarshal(raw, &j); err != nil {
			var wrong *json.UnmarshalTypeError
			if errors.As(err, &wrong) {
				err = fmt.Errorf("%s is a JSON %s, want %s", wrong.Field, wrong.Value, wrong.Type)
			}
			c.bad(line, "%v", err)
			continue
		}
		job, reason := j.job()
		if reason != "" {
			c.bad(line, "%s", reason)
			continue
		}
		c.row(line, job)
	}
}

// objects finds the job objects in JSON, however they are wrapped: alone or
// concatenated, in arrays, or in the "jobs" or "items" array of an object (a
// page of GitHub's, a build of Buildkite's), whose other fields are passed
// over. It reads byte by byte and never holds more than maxRecord of them, and
// goes on behind what is broken.
type objects struct {
	in   *bufio.Reader
	line int

	stack  []byte // what is open: see below
	failed bool   // something was broken: stray closing brackets are to be expected
	junk   int    // the last line on which junk was reported
}

// What is open. Records are sought in arrays and at the top; a wrapper is an
// object whose array of jobs was found, and the rest of it is passed over.
const (
	openArray   = '['
	openWrapper = 'w'
	openRest    = 'x'
)

// brokenObject says what is wrong where an object should be.
type brokenObject string

func (b brokenObject) Error() string { return string(b) }

// next returns the next object and the line it begins on.
func (o *objects) next() ([]byte, int, error) {
	for {
		b, err := o.read()
		if err != nil {
			if errors.Is(err, io.EOF) && len(o.stack) > 0 {
				o.stack = nil
				return nil, o.line, brokenObject("the file ends inside an array or an object")
			}
			return nil, o.line, err
		}
		top := byte(openArray)
		if n := len(o.stack); n > 0 {
			top = o.stack[n-1]
		}
		switch {
		case b == ' ' || b == '\t' || b == '\r' || b == '\n' || b == ',':
		case b == '{' && top == openArray:
			raw, line, err := o.object()
			if raw == nil && err == nil {
				continue // it was a wrapper
			}
			return raw, line, err
		case b == '[' && top == openArray:
			o.stack = append(o.stack, openArray)
		case b == '{' || b == '[':
			o.stack = append(o.stack, openRest)
		case (b == '}' || b == ']') && len(o.stack) > 0:
			o.stack = o.stack[:len(o.stack)-1]
		case (b == '}' || b == ']') && o.failed:
		case top != openArray:
			if b == '"' {
				if err := o.skipString(); err != nil {
					return nil, o.line, err
				}
			}
		case o.junk != o.line:
			o.junk, o.failed = o.line, true
			return nil, o.line, brokenObject(fmt.Sprintf("%q is not JSON here", b))
		}
		if len(o.stack) > maxDepth {
			o.stack, o.failed = nil, true
			return nil, o.line, brokenObject("too deep")
		}
	}
}

const maxDepth = 1000

func (o *objects) read() (byte, error) {
	b, err := o.in.ReadByte()
	if b == '\n' && err == nil {
		o.line++
	}
	return b, err
}

func (o *objects) skipString() error {
	for escaped := false; ; {
		b, err := o.read()
		switch {
		case err != nil:
			return err
		case escaped:
			escaped = false
		case b == '\\':
			escaped = true
		case b == '"':
			return nil
		}
	}
}

// object reads on from behind the opening brace. It returns nothing when the
// object turns out to wrap an array of jobs.
func (o *objects) object() (raw []byte, line int, err error) {
	line = o.line
	raw = []byte{'{'}
	open := []byte{'{'}
	var inString, escaped, tooLong bool
	from := 0 // where the last string begins
	var last, key string
	before := byte('{') // the last byte that was no white space
	begins := false     // nothing but that has been on this line
	fail := func(reason string) ([]byte, int, error) {
		o.stack, o.failed = nil, true
		return nil, line, brokenObject(reason)
	}
	for len(open) > 0 {
		b, err := o.read()
		switch {
		case errors.Is(err, io.EOF):
			return fail("an object that is not closed")
		case err != nil:
			return nil, line, err
		}
		if len(raw) < maxRecord {
			raw = append(raw, b)
		} else {
			tooLong = true
		}
		if inString {
			switch {
			case escaped:
				escaped = false
			case b == '\\':
				escaped = true
			case b == '\n':
				return fail("a string that is not closed on its line")
			case b == '"':
				inString, before = false, '"'
				last = ""
				if len(open) == 1 && !tooLong {
					last = string(raw[from : len(raw)-1])
				}
			}
			continue
		}
		switch b {
		case '"':
			inString, from = true, len(raw)
		case ':':
			if len(open) == 1 {
				key = last
			}
		case '{':
			// In JSON lines, one that is cut off must not take the next along.
			inArray := open[len(open)-1] == '['
			if inArray && before != '[' && before != ',' || !inArray && (before != ':' || begins) {
				if err := o.in.UnreadByte(); err != nil {
					return nil, line, err
				}
				return fail("an object that is not closed")
			}
			open = append(open, '{')
		case '[':
			if len(open) == 1 && (key == "jobs" || key == "items") {
				o.stack = append(o.stack, openWrapper, openArray)
				return nil, line, nil
			}
			open = append(open, '[')
		case '}', ']':
			if opening := open[len(open)-1]; opening == '{' != (b == '}') {
				return fail("a bracket that does not fit")
			}
			open = open[:len(open)-1]
		case '\n':
			begins = true
		}
		if b != ' ' && b != '\t' && b != '\r' && b != '\n' {
			before, begins = b, false
		}
		if len(open) > maxDepth {
			return fail("too deep")
		}
	}
	if tooLong {
		return nil, line, brokenObject(fmt.Sprintf("an object longer than %d bytes", maxRecord))
	}
	return raw, line, nil
}
