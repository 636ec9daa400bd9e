package simulate

import (
	"cmp"
	"slices"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Job is one CI job of a trace.
type Job struct {
	// ID is unique within the trace.
	ID string
	// Arrival is when the job was created, in epoch seconds: never when it was
	// observed to start, which embeds the capacity of that time.
	Arrival int64
	// Duration is how long the job runs with a warm cache, in seconds, at
	// least 1.
	Duration int64
	// Key is the cache that the job uses.
	Key model.CacheKey
	// Group is what placement knows of the job when it knows no more than the
	// runner scale set that asked for it; may be empty.
	Group string
}

// Rejection is one row of a file that is not a usable job.
type Rejection struct {
	// Line of the file the row begins at, counted from 1.
	Line   int
	Reason string
}

// Trace is a list of jobs, sorted by arrival, then id, and what was left out
// of it.
type Trace struct {
	Name     string
	Jobs     []Job
	Rejected []Rejection // sorted by line
	// Rows counts the rows that were read, used and rejected.
	Rows int
}

// Sort brings the jobs into the order that every Trace has: by arrival, then
// id.
func (t *Trace) Sort() { slices.SortFunc(t.Jobs, compareJobs) }

// compareJobs goes on where arrival and id are equal, so that the order of the
// input never shows.
func compareJobs(a, b Job) int {
	return cmp.Or(
		cmp.Compare(a.Arrival, b.Arrival), cmp.Compare(a.ID, b.ID),
		cmp.Compare(a.Key, b.Key), cmp.Compare(a.Duration, b.Duration), cmp.Compare(a.Group, b.Group))
}

// Keys counts the distinct cache keys.
func (t *Trace) Keys() int {
	keys := map[model.CacheKey]struct{}{}
	for _, j := range t.Jobs {
		keys[j.Key] = struct{}{}
	}
	return len(keys)
}
