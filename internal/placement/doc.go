// Package placement is the admission webhook that leads a job to the engine
// that knows it: a new runner pod of a known cache key gets a preference, never
// a requirement, for the nodes that are warm for the key. It owns what it knows
// of them ([Index], told by the watches, the same on every replica), the
// webhook's answers ([Handler]), its HTTPS server ([Server]) and its
// certificates. It never keeps a pod from being created, never changes one that
// says itself where to run, and needs neither the leader nor the API server to
// answer.
package placement
