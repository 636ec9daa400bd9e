package model

import "time"

// EngineReading is one look at the engine of one node.
type EngineReading struct {
	Node NodeName
	// Pod is the engine's pod, as namespace/name; empty when there is none.
	Pod string
	At  time.Time
	// Unknown says why nothing else is known: no metrics, no answer in time,
	// two engines on the node. It is empty when the fields below hold.
	Unknown string
	// Clients are the sessions connected at that moment. A probe counts too,
	// so one reading alone says little.
	Clients int
	// CacheBytes is the size of the local cache; -1 when the engine does not
	// say.
	CacheBytes int64
	// Version of the engine as it names itself; empty when it does not.
	Version string
}

// EngineContainer is what an engine's pod says of the container in it that runs
// the engine.
type EngineContainer struct {
	// Image as the pod asks for it.
	Image string
	// Grace is how long the container may take to stop before it is killed.
	Grace time.Duration
	// Exit says how the container ended; nil while it runs, waits for its
	// start, or nothing is known.
	Exit *ContainerExit
}

// ContainerExit is the end of a container, as its kubelet reports it.
type ContainerExit struct {
	Code int32 // 128 + the signal when one killed it
	At   time.Time
}
