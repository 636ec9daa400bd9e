package demand

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// QueuedFor is how long a job that nothing more is heard of is believed to
	// wait. CI systems lose events, and do not send them again.
	QueuedFor = time.Hour
	// endedFor is how long it is remembered that a job has ended or runs, so
	// that an event that comes late does not have it queued again.
	endedFor = time.Hour
	// MaxJobs bounds the jobs that a Book remembers.
	MaxJobs = 50000
)

// Book knows the jobs that CI systems have told of. Messages may come twice,
// late, in any order or never: a job only ever moves on, and a listing says what
// no event did. A Book is for one goroutine.
type Book struct {
	jobs    map[JobID]*entry
	guesses map[string]JobID // by runner
	runners map[string]int   // how many jobs name a runner
	// Forgotten counts the queued jobs of which nothing was heard for QueuedFor,
	// Refused the messages about new jobs when MaxJobs were remembered.
	Forgotten, Refused int
	swept              time.Time
}

type entry struct {
	Job
	heard time.Time // when it was last told of
	// missed says that it has ended because a listing left it out, as far as
	// known.
	missed bool
}

// NewBook returns a Book that knows no jobs.
func NewBook() *Book {
	return &Book{jobs: map[JobID]*entry{}, guesses: map[string]JobID{}, runners: map[string]int{}}
}

// Observe takes a message. It returns whether anything is another way now.
func (b *Book) Observe(j Job, now time.Time) (changed bool) {
	e := b.jobs[j.ID]
	if e == nil {
		if b.sweep(now); len(b.jobs) >= MaxJobs {
			b.Refused++
			return false
		}
		if j.QueuedAt.IsZero() || j.QueuedAt.After(now) {
			j.QueuedAt = now // a clock that is ahead does not make a job younger
		}
		runner := j.Runner
		j.Runner = ""
		e = &entry{Job: j, heard: now}
		b.jobs[j.ID] = e
		j.Runner = runner
		b.name(e, runner)
		b.settle(j)
		return true
	}
	e.heard = now
	before := e.State
	if j.State > e.State || j.State == Ended {
		e.State, e.At, e.missed = j.State, j.At, false
	}
	b.name(e, cmp.Or(j.Runner, e.Runner))
	if len(j.Key) > len(e.Key) { // a listing knows the workflow, an event only the repository
		e.Key = j.Key
	}
	if len(e.Labels) == 0 {
		e.Labels = j.Labels
	}
	if !j.QueuedAt.IsZero() && j.QueuedAt.Before(e.QueuedAt) {
		e.QueuedAt = j.QueuedAt
	}
	b.settle(j)
	return e.State != before
}

// settle ends a guess: the runner that a message names is that of its job, and
// of no other.
func (b *Book) settle(j Job) {
	id, guessed := b.guesses[j.Runner]
	if j.Runner == "" || !guessed {
		return
	}
	delete(b.guesses, j.Runner)
	if e := b.jobs[id]; e != nil && id != j.ID && e.Runner == j.Runner && e.State == Running {
		e.State = Queued
		b.name(e, "")
	}
}

// Reconcile takes a listing: it says what has not ended, and what has. What one
// left out by mistake the next brings back.
func (b *Book) Reconcile(l Listing, now time.Time) (changed bool) {
	listed := make(map[JobID]bool, len(l.Jobs))
	for _, j := range l.Jobs {
		listed[j.ID] = true
		if e := b.jobs[j.ID]; e != nil && j.State == Queued && b.guesses[e.Runner] == j.ID {
			delete(b.guesses, e.Runner)
			e.State = Queued
			b.name(e, "")
			changed = true
		}
		if e := b.jobs[j.ID]; e != nil && e.missed && l.At.After(e.At) && j.State != Ended {
			e.State, e.At, e.missed = j.State, j.At, false
			changed = true
		}
		changed = b.Observe(j, now) || changed
	}
	for id, e := range b.jobs {
		if !listed[id] && e.System == l.System && e.Scope == l.Scope && e.State != Ended && e.QueuedAt.Before(l.At) {
			e.State, e.At, e.heard, e.missed = Ended, l.At, now, true
			changed = true
		}
	}
	return changed
}

// PickedUp takes in that a runner was seen to have picked up a job of a key: the
// one of that key that has waited longest, unless a message said which.
func (b *Book) PickedUp(runner string, key model.CacheKey, now time.Time) (changed bool) {
	return b.took(runner, now, func(j Job) bool { return under(key, j.Key) })
}

// Took takes in that a runner with these labels has been up since a time, and
// that nothing said what it does: the one that has waited longest of the jobs
// that it may run and that were queued before.
func (b *Book) Took(runner string, labels []string, since, now time.Time) (changed bool) {
	return b.took(runner, now, func(j Job) bool { return !j.QueuedAt.After(since) && Matches(j, labels) })
}

func (b *Book) took(runner string, now time.Time, may func(Job) bool) bool {
	if b.Runs(runner) {
		return false
	}
	var oldest *entry
	for _, e := range b.jobs {
		if e.State == Queued && may(e.Job) && (oldest == nil || older(e.Job, oldest.Job) < 0) {
			oldest = e
		}
	}
	if oldest == nil {
		return false
	}
	oldest.State, oldest.heard = Running, now
	b.name(oldest, runner)
	b.guesses[runner] = oldest.ID
	return true
}

// Runs says whether a job is known that the runner has taken.
func (b *Book) Runs(runner string) bool { return b.runners[runner] > 0 }

// name says which runner a job is on, none for an empty name.
func (b *Book) name(e *entry, runner string) {
	if e.Runner == runner {
		return
	}
	if e.Runner != "" {
		if b.runners[e.Runner]--; b.runners[e.Runner] == 0 {
			delete(b.runners, e.Runner)
		}
	}
	if e.Runner = runner; runner != "" {
		b.runners[runner]++
	}
}

func (b *Book) drop(id JobID, e *entry) {
	b.name(e, "")
	delete(b.jobs, id)
}

// under says whether a pipeline's key is what a job's says, or begins with it.
func under(key, job model.CacheKey) bool {
	rest, ok := strings.CutPrefix(string(key), string(job))
	return ok && job != "" && (rest == "" || rest[0] == '/')
}

// Queued returns the jobs that wait, those that have waited longest first. It
// lets go of what is too old.
func (b *Book) Queued(now time.Time) (jobs []Job) {
	b.sweep(now)
	for _, e := range b.jobs {
		if e.State == Queued {
			jobs = append(jobs, e.Job)
		}
	}
	slices.SortFunc(jobs, older)
	return jobs
}

func older(a, b Job) int { return cmp.Or(a.QueuedAt.Compare(b.QueuedAt), cmp.Compare(a.ID, b.ID)) }

// sweep forgets what has not been told of for too long.
func (b *Book) sweep(now time.Time) {
	if now.Sub(b.swept) < time.Minute && len(b.jobs) < MaxJobs {
		return
	}
	b.swept = now
	for id, e := range b.jobs {
		switch age := now.Sub(e.heard); {
		case e.State == Queued && age >= QueuedFor:
			b.Forgotten++
			b.drop(id, e)
		case e.State != Queued && age >= endedFor:
			delete(b.guesses, e.Runner)
			b.drop(id, e)
		}
	}
}
