package explain

import "time"

// Kind is what an Event tells of.
type Kind string

// Kinds of events.
const (
	KindDecision Kind = "decision" // the plan thinks otherwise of a node than before
	KindScale    Kind = "scale"    // nodes come, go, are parked or resumed
)

// Kinds returns every kind once.
func Kinds() []Kind { return []Kind{KindDecision, KindScale} }

// Event is one line of the timeline.
type Event struct {
	// Seq grows by one with each event of a process's life.
	Seq   uint64    `json:"seq"`
	At    time.Time `json:"at"`
	Kind  Kind      `json:"kind"`
	Group string    `json:"node_group"`
	// Node and Instance are empty when the event is about the group.
	Node     string `json:"node,omitempty"`
	Instance string `json:"instance,omitempty"`
	// Action is a stable word: keep, park or release of a decision, else what
	// hearth_scale_events_total counts.
	Action string `json:"action"`
	// Text says why, for people.
	Text    string `json:"text"`
	Count   int    `json:"count"`
	Warning bool   `json:"warning,omitempty"`
}

// MaxQueue is how many waiting jobs a Queue lists.
const MaxQueue = 100

// Queue is what waits for a node: runner pods that are not bound yet.
type Queue struct {
	Waiting int    `json:"waiting"`
	Jobs    []Wait `json:"jobs,omitempty"` // the longest waiting MaxQueue
}

// Wait is one job that waits.
type Wait struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	Key       string    `json:"key,omitempty"`
	Group     string    `json:"asked_node_group,omitempty"`
	Since     time.Time `json:"since"`
}
