// Package nodegroups is the fleet as a state machine: what cluster-autoscaler
// (CA) was told, what was promised, what exists, and what has to be done about
// the difference. It owns the sizes, the hidden nodes, the life of every
// instance and the interpretation of annotations. It never reads a clock, does
// no I/O, starts no goroutine and imports only the standard library and
// pkg/model.
//
// # One group
//
// A [Group] keeps two things apart. Its [Record] is what Hearth has promised:
// the target size as told to CA, the hidden nodes beyond it, and the instances
// that are to be parked, resumed or gone. The record is persisted; everything
// else is observed and can be lost at any moment. What must be done is always
// derived from the difference between the two, so a restart needs no path of
// its own.
//
// # Duties of the caller
//
// A Group is not safe for concurrent use: one goroutine owns it. For every
// event the owner does, in this order:
//
//  1. Clone the group (observations, which never commit, may skip this) and
//     call Step on the clone. On an error nothing happened: drop the clone.
//  2. Call Ready for the effects. When Step or Ready say [CommitFirst], write
//     the record; when that fails drop the clone and answer Unavailable.
//     [CommitSoon] may be written later: it can be derived again.
//  3. Keep the clone, publish View, answer.
//  4. Carry out the effects, in any order, each once; report every one with a
//     [Done] event, failed ones too; Confirm, Look and StopEngine have answers
//     of their own besides ([Confirmed], [Looked], [EngineGone]). What is watched must have
//     been told as it was at the start. After a cloud effect read the cloud anew:
//     Ready holds back further cloud effects of the group until a snapshot
//     that began after the last one ended has been observed.
//
// The owner also calls Ready now and then without an event: some transitions
// wait for time alone.
package nodegroups
