package dagger

import (
	"fmt"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// busyAfter and idleAfter are how many readings in a row settle what an
	// engine does. A probe of its health counts as a client while it lasts and
	// is caught in 5 to 10 % of the readings of an idle engine: two in a row in
	// less than 1 %. To be wrong about idle costs a running job, to be wrong
	// about busy a minute.
	busyAfter = 2
	idleAfter = 3
	// staleAfter is how old a reading may be: four rounds of 30 s.
	staleAfter = 2 * time.Minute
	// A cache is lost when more than half of it is gone from one count to the
	// next, and more than 16 MiB, which an engine without any job may come and
	// go by. Garbage collection that takes so much has taken the warmth too.
	lostAtLeast = 16 << 20
	// lostFor is how long a fall must be seen before it is believed: an engine
	// that has just started says 0 until it has counted what is on its disk.
	lostFor = time.Minute
)

// Activity is what an engine does, as far as its clients tell.
type Activity int

// Activities. The zero value is safe: nothing may be stopped on it.
const (
	Unknown Activity = iota
	Busy
	Idle
)

func (a Activity) String() string { return [...]string{"unknown", "busy", "idle"}[a] }

// State is what is known of the engine of one node.
type State struct {
	// Activity stays what it was until enough readings in a row settle
	// another, and is unknown when there is no fresh reading.
	Activity Activity
	// Reason says why the newest reading failed or why the activity is not
	// known; empty otherwise.
	Reason string
	// Reading is the newest that held; zero when there was none.
	Reading model.EngineReading
	// Quiet counts the readings without a client in a row, up to the newest.
	// QuietAt is when enough of them in a row last settled that it is idle:
	// whoever is about to stop an engine wants that to be later than whatever
	// kept new clients away.
	Quiet   int
	QuietAt time.Time
	// CacheBytes is what the cache holds as far as is sure; -1 when nothing is.
	CacheBytes int64
	// Verified says that the newest reading agrees with CacheBytes: not so
	// before the first one, and while it is not sure that the cache is lost.
	Verified bool
}

// Change is what a reading tells that is worth an event.
type Change struct {
	// Lost: most of the cache is gone, be it wiped or collected. Before and
	// After are its bytes.
	Lost          bool
	Before, After int64
	// OldVersion is set when the engine's version is another than before.
	OldVersion string
}

// Tracker remembers the engine of every node. It is pure: time comes with the
// readings. It holds some hundred bytes a node until it is told to forget it. A
// Tracker is for one goroutine.
type Tracker struct {
	engines map[model.NodeName]*tracked
}

type tracked struct {
	last        time.Time // of the newest reading, whether it held or not
	reading     model.EngineReading
	failed      string // why the newest reading did not hold
	activity    Activity
	busy, quiet int // readings in a row
	quietAt     time.Time
	version     string
	bytes       int64 // -1: not known
	verified    bool
	fellAt      time.Time // since when less is seen than bytes; zero: not so
}

// NewTracker returns a tracker that knows of no engine.
func NewTracker() *Tracker { return &Tracker{engines: map[model.NodeName]*tracked{}} }

// Expect says what an engine's cache held when it was last seen, by this process
// or one before it: the next readings verify that, or the rest is lost.
func (t *Tracker) Expect(node model.NodeName, cacheBytes int64) {
	e := t.engine(node)
	e.bytes, e.verified, e.fellAt = cacheBytes, false, time.Time{}
}

// Forget drops all that is known of a node's engine: because the node is gone,
// or is another instance that bears its name.
func (t *Tracker) Forget(node model.NodeName) { delete(t.engines, node) }

func (t *Tracker) engine(node model.NodeName) *tracked {
	e, ok := t.engines[node]
	if !ok {
		e = &tracked{bytes: -1}
		t.engines[node] = e
	}
	return e
}

// Observe takes a reading. One that is not newer than the last is ignored.
func (t *Tracker) Observe(r model.EngineReading) Change {
	e := t.engine(r.Node)
	if !r.At.After(e.last) {
		return Change{}
	}
	if r.At.Sub(e.last) > staleAfter {
		e.unsettle() // what came before the gap says nothing of what comes after
	}
	e.last, e.failed = r.At, r.Unknown
	if r.Unknown != "" {
		e.busy, e.quiet = 0, 0
		return Change{}
	}
	if r.Pod != e.reading.Pod {
		e.unsettle() // another process, with clients of its own
	}
	e.reading = r
	e.count(r.Clients)
	return e.compare(r)
}

func (e *tracked) unsettle() { e.activity, e.busy, e.quiet = Unknown, 0, 0 }

func (e *tracked) count(clients int) {
	if clients > 0 {
		e.busy, e.quiet = e.busy+1, 0
	} else {
		e.busy, e.quiet = 0, e.quiet+1
	}
	switch {
	case e.busy >= busyAfter:
		e.activity = Busy
	case e.quiet >= idleAfter:
		e.activity, e.quietAt = Idle, e.last
	}
}

func (e *tracked) compare(r model.EngineReading) (c Change) {
	if r.Version != "" {
		if e.version != "" && e.version != r.Version {
			c.OldVersion = e.version
		}
		e.version = r.Version
	}
	switch {
	case r.CacheBytes < 0:
		e.verified = false
		return c
	case !lost(e.bytes, r.CacheBytes):
	case e.fellAt.IsZero():
		e.fellAt, e.verified = r.At, false
		return c
	case r.At.Sub(e.fellAt) < lostFor:
		return c
	default:
		c.Lost, c.Before, c.After = true, e.bytes, r.CacheBytes
	}
	e.bytes, e.verified, e.fellAt = r.CacheBytes, true, time.Time{}
	return c
}

func lost(before, after int64) bool { return before-after > lostAtLeast && after < before/2 }

// State returns what is known of a node's engine now.
func (t *Tracker) State(node model.NodeName, now time.Time) State {
	e, ok := t.engines[node]
	if !ok {
		return State{Reason: "never read", CacheBytes: -1}
	}
	s := State{
		Activity: e.activity, Reason: e.failed, Reading: e.reading, Quiet: e.quiet, QuietAt: e.quietAt,
		CacheBytes: e.bytes, Verified: e.verified,
	}
	age := now.Sub(e.reading.At)
	switch {
	case e.reading.At.IsZero() || age > staleAfter:
		s.Activity, s.Quiet, s.Verified = Unknown, 0, false
		if s.Reason == "" {
			s.Reason = "never read"
			if !e.reading.At.IsZero() {
				s.Reason = fmt.Sprintf("not read for %v", age.Round(time.Second))
			}
		}
	case s.Activity == Unknown && s.Reason == "":
		s.Reason = "too few readings"
	}
	return s
}
