// Package ci hears from CI systems which jobs are queued, run and have ended: by
// their webhooks, and by asking GitHub what no webhook said. It owns the wire:
// signatures, bounds and the shape of messages. It decides nothing, remembers no
// job, and passes on what it was told.
package ci
