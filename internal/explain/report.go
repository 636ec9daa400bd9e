// Package explain is how a running Hearth answers "why does this node stay or
// go": the report that the controller makes after each plan, the read-only HTTP
// API that serves it, the client that asks for it, and the words in which the
// command line shows it. It owns the JSON; it decides nothing, and knows neither
// the fleet nor the cluster.
package explain

import "time"

// MaxKeys is how many of its warmest keys a Node lists.
const MaxKeys = 5

// Report is one moment of all groups, sorted by id. It never changes once
// made, so it may be read by many at once.
type Report struct {
	At     time.Time `json:"at"`
	Queue  Queue     `json:"queue"`
	Groups []Group   `json:"node_groups"`
}

// Group is one node group as the plan saw it.
type Group struct {
	ID   string    `json:"id"`
	At   time.Time `json:"at"`
	Role string    `json:"role"`
	// Target is the size that cluster-autoscaler was told; Hidden are nodes
	// beyond it that it does not know yet.
	Target int `json:"target"`
	Hidden int `json:"hidden"`
	// Busy, Idle and NotReady are the nodes that run; those that start, that
	// were given up, and that are parked are beside them.
	Busy     int      `json:"busy"`
	Idle     int      `json:"idle"`
	NotReady int      `json:"not_ready"`
	Starting int      `json:"starting"`
	Leaving  int      `json:"leaving"`
	Parked   int      `json:"parked"`
	Settings Settings `json:"settings"`
	Forecast Forecast `json:"forecast"`
	Learnt   Learnt   `json:"learnt"`
	// Problems are annotations that could not be used, and what the cloud
	// refuses.
	Problems []string `json:"problems,omitempty"`
	// Nodes in the order of States, and in each state in the order of the plan:
	// the first to go first.
	Nodes []Node `json:"nodes"`
}

// Settings are the annotations that a plan rests on, as they hold now.
type Settings struct {
	MinWarm int `json:"min_warm"` // with the schedule
	MaxWarm int `json:"max_warm"`
	// MaxIdleSeconds is nil when the policy alone decides.
	MaxIdleSeconds   *float64 `json:"max_idle_seconds,omitempty"`
	Park             string   `json:"park"`
	MaxParked        int      `json:"max_parked"`
	MaxParkedSeconds float64  `json:"max_parked_age_seconds"`
	JobsPerNode      int      `json:"jobs_per_node"`
	// Prices in dollars an hour.
	TimeValue   float64 `json:"time_value"`
	NodePrice   float64 `json:"node_price"`
	ParkedPrice float64 `json:"parked_price"`
}

// Parks says whether nodes that go are parked.
func (s Settings) Parks() bool { return s.Park != "" && s.Park != "off" }

// Forecast is how many batches of jobs are expected an hour around now.
type Forecast struct {
	// BatchesPerHour need at least one node, IdleBatchesPerHour at least as
	// many at once as IdleNodes run idle.
	BatchesPerHour     float64 `json:"batches_per_hour"`
	IdleNodes          int     `json:"idle_nodes"`
	IdleBatchesPerHour float64 `json:"idle_batches_per_hour"`
	// Weeks is how long jobs have been observed.
	Weeks float64 `json:"weeks"`
}

// Learnt is what was measured in the group, or is assumed until it was.
type Learnt struct {
	BootSeconds        float64 `json:"boot_seconds"`
	ResumeSeconds      float64 `json:"resume_seconds"`
	ColdPenaltySeconds float64 `json:"cold_penalty_seconds"` // what a cold job loses
}

// State is what a node is to the plan, in one word.
type State string

// States, in the order in which a Group lists its nodes.
const (
	StateLeaving  State = "leaving"  // given up: draining, parking or terminating
	StateIdle     State = "idle"     // runs no job: the plan decides
	StateNotReady State = "notready" // its Node is not Ready
	StateBusy     State = "busy"     // runs a job
	StateStarting State = "starting" // launching or resuming
	StateParked   State = "parked"   // stopped, its cache intact
)

// States returns every state once, in order.
func States() []State {
	return []State{StateLeaving, StateIdle, StateNotReady, StateBusy, StateStarting, StateParked}
}

// Node is one instance as the plan saw it.
type Node struct {
	Name     string `json:"name,omitempty"` // of the Node, if one is registered
	Instance string `json:"instance"`
	State    State  `json:"state"`
	Phase    string `json:"phase"`
	Hidden   bool   `json:"hidden,omitempty"` // cluster-autoscaler does not know it yet
	// Since is when an idle node became idle, or when the phase of one that
	// does not run began; nil for others.
	Since *time.Time `json:"since,omitempty"`
	// LastUsed is when a job last ran here, as far as is known.
	LastUsed *time.Time `json:"last_used,omitempty"`
	// Jobs are the runner pods that are bound to it and have not ended.
	Jobs int `json:"jobs,omitempty"`
	// Decision is keep, park or release; empty where there is none to take.
	Decision string `json:"decision,omitempty"`
	// Score orders the nodes of a state: the lowest goes first.
	Score   float64  `json:"score"`
	Reasons []Reason `json:"reasons"`
	// Keys are the warmest MaxKeys of the WarmKeys that it is warm for.
	WarmKeys int   `json:"warm_keys"`
	Keys     []Key `json:"keys,omitempty"`
}

// Label is the node's name, or what else it is known by.
func (n Node) Label() string {
	if n.Name != "" {
		return n.Name
	}
	return n.Instance
}

// Reason is one fact behind a decision: Code is a stable word, Text what people
// read.
type Reason struct {
	Code string `json:"code"`
	Text string `json:"text"`
}

// Key is a cache key that a node is warm for, from 0 to 1.
type Key struct {
	Key      string    `json:"key"`
	Warmth   float64   `json:"warmth"`
	LastUsed time.Time `json:"last_used"`
	Jobs     int       `json:"jobs"` // that ran here
}
