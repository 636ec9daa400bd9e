package model

import "time"

// EngineState is what matters of the pod of a Dagger engine when its node is to
// go, beside what matters of its container.
type EngineState struct {
	// Deleting: the pod has been told to stop. Guarded: our finalizer keeps the
	// pod's object until its exit code has been recorded.
	Deleting, Guarded bool
	// ToleratesDrain: our drain taint does not keep such a pod away from a
	// node: when it is deleted, its controller makes another one there.
	ToleratesDrain bool
	// Restarts counts how often the engine was started again within the pod,
	// LastExit is the exit code that it ended with before the last time.
	Restarts, LastExit int
}

// Activity is whether somebody uses an engine.
type Activity string

// Activities. The zero value is not known: the engine has no metrics, or has
// not been asked often enough yet.
const (
	ActivityUnknown Activity = ""
	ActivityIdle    Activity = "idle" // no session in several samples in a row
	ActivityBusy    Activity = "busy" // sessions in several samples in a row
)

// EngineUse is what the samples of the engine on a node come to.
type EngineUse struct {
	Node NodeName
	// Pod is the engine's pod, as namespace/name.
	Pod      string
	At       time.Time // of the newest sample
	Activity Activity
	// Clients are the sessions at the newest sample.
	Clients int
	// CacheBytes is the size of the local cache; zero or less when it is not
	// known: the engine measures it minutes after its start.
	CacheBytes int64
	// Wiped: the cache has shrunk so much since the sample before that it must
	// have been lost.
	Wiped bool
}
