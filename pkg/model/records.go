package model

import (
	"errors"
	"time"
)

// MaxWarmKeys is how many keys a NodeRecord keeps, the warmest first.
const MaxWarmKeys = 32

// ErrSuperseded says that someone else has written a group's record since it
// was read: another process leads. Whoever gets it must stop acting and read
// everything anew.
var ErrSuperseded = errors.New("the record was written by another process")

// ErrRefused says that the API server has answered, and will not do what it was
// asked: a right is missing, or an admission policy forbids it.
var ErrRefused = errors.New("the API server refuses it")

// ErrDryRun says that a cloud is only watched: nothing is changed.
var ErrDryRun = errors.New("this is a dry run: nothing is changed")

// ErrUnderWay says that a cloud has been asked for a part of what is to be
// done, and must get on with it before it can be asked for the rest.
var ErrUnderWay = errors.New("the cloud is still at it")

// NodeRecord is what is kept of one instance between two lives of Hearth
// (RunnerNode). Times are kept to the second.
type NodeRecord struct {
	ID               InstanceID
	Group            GroupID
	Node             NodeName // empty when no Node is registered
	Desired          Desired
	Phase            Phase
	Hidden           bool
	Since            time.Time   // when the present phase began
	Warmth           []KeyWarmth // the warmest first; those beyond MaxWarmKeys are dropped
	CacheBytes       int64       // of the engine, kept to the MiB; zero when not known
	ConnectedClients int         // of the engine
	Score            float64     // kept to six digits
	Decision         Decision
	Reason           string // for people; long ones are cut
	Conditions       []Condition
}

// KeyWarmth is what an engine is believed to hold of one key. LastUsed and
// Uses are facts; Warmth, 0 to 1 and kept to two decimals, follows from them.
type KeyWarmth struct {
	Key      CacheKey
	Warmth   float64
	LastUsed time.Time
	Uses     int
}

// GroupSummary is what people see of a group beside its record.
type GroupSummary struct {
	Min, Max int
	// Warm is the number of idle nodes that are kept running.
	Ready, Parked, Warm int
	Phases              map[Phase]int
	Conditions          []Condition
}

// Condition is one standing observation about a group or node.
type Condition struct {
	Type    string // a CamelCase word, unique within its object
	True    bool
	Reason  string // a CamelCase word
	Message string // for people; long ones are cut
	Since   time.Time
}

// Severity says whether an event asks for attention, in the words of the
// Kubernetes API.
type Severity string

// Severities.
const (
	SeverityNormal  Severity = "Normal"
	SeverityWarning Severity = "Warning"
)
