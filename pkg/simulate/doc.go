// Package simulate replays CI job traces against node-keeping policies and
// says what each of them costs: in money, in waiting, in cold caches. It owns
// the traces and their importers, the simulated world, the baseline policies
// and the clairvoyant bounds. It is pure and deterministic: no clock, no
// goroutine that outlives a call, no randomness that was not passed in; the same trace, world and
// policy give the same bytes whatever the order of the input. It never talks
// to a cloud or a cluster.
package simulate
