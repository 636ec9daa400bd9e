package simulate

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// maxRecord bounds the memory that one line of CSV or one JSON object can
	// take; real ones are a few kilobytes.
	maxRecord = 1 << 20
	// maxDuration is longer than CI systems let a job run: GitHub's limit on
	// self-hosted runners is 5 days.
	maxDuration = 7 * 24 * hour
	// clockSkew is by how much the clock of a runner may be behind that of the
	// CI system.
	clockSkew = 60
)

// Read reads a trace from whatever it finds: CSV (normalised, or with the
// columns of a known data set), or the JSON of GitHub's workflow jobs,
// GitLab's jobs or Buildkite's builds and jobs; gzipped or not. Rows that
// cannot be used are in the trace's Rejected. The error is for what is no
// trace at all, or could not be read to its end.
func Read(name string, r io.Reader) (Trace, error) {
	t, err := read(name, r)
	if err != nil {
		return Trace{}, fmt.Errorf("reading trace %q: %w", name, err)
	}
	return t, nil
}

func read(name string, r io.Reader) (Trace, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	if magic, _ := in.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(in)
		if err != nil {
			return Trace{}, err
		}
		in = bufio.NewReaderSize(z, 64<<10)
	}
	switch start, _ := in.Peek(3); {
	case bytes.HasPrefix(start, []byte("\xef\xbb\xbf")):
		if _, err := in.Discard(3); err != nil {
			return Trace{}, err
		}
	case bytes.HasPrefix(start, []byte("\xff\xfe")), bytes.HasPrefix(start, []byte("\xfe\xff")):
		return Trace{}, errors.New("it is UTF-16, want UTF-8")
	}
	line := 1
	first, err := skipSpace(in, &line)
	if errors.Is(err, io.EOF) {
		return Trace{}, errors.New("it is empty")
	} else if err != nil {
		return Trace{}, err
	}
	c := &collector{trace: Trace{Name: name}, seen: map[string]int{}, keys: map[string]string{}}
	if first == '{' || first == '[' {
		err = readJSON(&objects{in: in, line: line}, c)
	} else {
		err = readCSV(&lines{in: in, line: line - 1}, c)
	}
	if err != nil {
		return Trace{}, err
	}
	c.trace.Sort()
	slices.SortStableFunc(c.trace.Rejected, func(a, b Rejection) int { return cmp.Compare(a.Line, b.Line) })
	return c.trace, nil
}

// skipSpace reads up to the first byte that is not white space and returns it
// unread.
func skipSpace(in *bufio.Reader, line *int) (byte, error) {
	for {
		b, err := in.ReadByte()
		if err != nil {
			return 0, err
		}
		switch b {
		case '\n':
			*line++
		case ' ', '\t', '\r':
		default:
			return b, in.UnreadByte()
		}
	}
}

// collector takes the rows of one file and judges them.
type collector struct {
	trace Trace
	seen  map[string]int    // line by job id
	keys  map[string]string // one copy of each key and group
}

func (c *collector) reject(line int, reason string, args ...any) {
	c.trace.Rejected = append(c.trace.Rejected, Rejection{line, fmt.Sprintf(reason, args...)})
}

// intern returns one copy of a string that may be part of a whole line.
func (c *collector) intern(s string) string {
	if known, ok := c.keys[s]; ok {
		return known
	}
	s = strings.Clone(s)
	c.keys[s] = s
	return s
}

// row takes one job in, or says why not.
func (c *collector) row(line int, j Job) {
	c.trace.Rows++
	const earliest, latest = 946684800, 4102444800 // 2000, 2100
	switch {
	case j.ID == "":
		c.reject(line, "it has no job id")
	case j.Key == "":
		c.reject(line, "it has no cache key")
	case j.Arrival < earliest || j.Arrival >= latest:
		c.reject(line, "arrival %d is not in the years 2000 to 2099 (epoch seconds)", j.Arrival)
	case j.Duration < 0:
		c.reject(line, "it ends before it starts")
	case j.Duration == 0:
		c.reject(line, "it took no time: it never ran")
	case j.Duration > maxDuration:
		c.reject(line, "it ran for %s, more than a CI job can", time.Duration(min(j.Duration, 1e9))*time.Second)
	case c.seen[j.ID] != 0:
		c.reject(line, "job id %s is the one of line %d", quoted(j.ID), c.seen[j.ID])
	default:
		j.ID = strings.Clone(j.ID)
		j.Key = model.CacheKey(c.intern(string(j.Key)))
		j.Group = c.intern(j.Group)
		c.seen[j.ID] = line
		c.trace.Jobs = append(c.trace.Jobs, j)
	}
}

// bad counts a row that is rejected before it is a job.
func (c *collector) bad(line int, reason string, args ...any) {
	c.trace.Rows++
	c.reject(line, reason, args...)
}

// span checks the times of a row whose job arrived, started and finished then,
// and returns its duration. Real waits were no longer than maxWait.
func span(arrival, started, finished, maxWait, maxRun int64) (duration int64, reason string) {
	switch {
	case started < arrival-clockSkew:
		return 0, fmt.Sprintf("it starts %d s before it arrives", arrival-started)
	case started-arrival > maxWait:
		return 0, fmt.Sprintf("it waited more than %d h: a re-run or an approval", maxWait/hour)
	case finished-started > maxRun:
		return 0, fmt.Sprintf("it ran more than %d h", maxRun/hour)
	}
	return finished - started, ""
}

// quoted is a value in a message, cut short.
func quoted(s string) string {
	const most = 60
	if len(s) > most {
		return fmt.Sprintf("%q…", strings.ToValidUTF8(s[:most], ""))
	}
	return fmt.Sprintf("%q", s)
}
