// Package dagger watches Dagger engines from outside: [Discover] finds them
// among a cluster's pods, [Scraper] reads their metrics, and [Tracker] says from
// one reading after another which engine works, which is idle and which has lost
// its cache. It owns what Hearth knows of the metrics' names and habits.
//
// It never talks to an engine's API, which locks the cache and opens a session
// that counts as a client; never stops anything; and never reports what it could
// not read as idle or cold: an engine is unknown then, with a reason.
package dagger
