// Package demand turns CI jobs into the runner slots that each node group should
// have: which jobs wait, which group may run them, and how many nodes are
// missing. It is pure: time comes in as values, and nothing is read or written.
package demand

import (
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// System is where a job was queued.
type System string

// Systems.
const (
	GitHub    System = "github"
	GitLab    System = "gitlab"
	Buildkite System = "buildkite"
)

// State is how far a job has come. A job only ever moves on: an event that
// tells of an earlier state than is known arrived late.
type State int

// States, in the order of a life.
const (
	Queued  State = iota + 1 // waits for a runner
	Running                  // a runner has taken it
	Ended                    // finished, failed, cancelled or skipped
)

// JobID names a job among all systems, as in "github/acme/shop/29679449"; a job
// that is run again has another one.
type JobID string

// Job is what one message of a CI system says of one job.
type Job struct {
	ID     JobID
	System System
	// Scope is what a listing of the system covers as a whole: GitHub's
	// "owner/name", GitLab's project path, Buildkite's organisation.
	Scope string
	// Key is the cache key of its pipeline, in the form in which the key of
	// the runner's pod is known; empty when the system does not tell.
	Key model.CacheKey
	// Labels are the runner labels or tags that the job demands, as written.
	Labels []string
	State  State
	// At is when the job came into that state by the system's clock, QueuedAt
	// when it was queued; zero when the message does not say.
	At, QueuedAt time.Time
	// Runner is the name of the runner that took it, which on
	// actions-runner-controller is its pod's name; empty until known.
	Runner string
}

// Listing is what a CI system answers when asked which jobs of a scope have not
// ended. A job of the scope that was queued before At and is not in it has
// ended, whether or not an event said so.
type Listing struct {
	System System
	Scope  string
	At     time.Time // when it was asked for
	Jobs   []Job
}
