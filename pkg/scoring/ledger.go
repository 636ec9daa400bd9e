package scoring

import "time"

// Ledger compares what a group's idle nodes have cost so far with the two
// simple rules in hindsight: a node is given up as soon as it is idle, so that
// every job waits for one; and no node is ever given up, so that as many run as
// were ever busy at once. While its own cost stays below 1 + trust times the
// cheaper rule, the policy may follow the forecast; else it keeps to the
// rent-or-buy bound, of which each time costs at most 1 + trust times either
// rule's share. So the whole never costs more than that (but for what is on its
// way when the account is used up).
//
// The zero value has seen nothing. It is not safe for concurrent use.
type Ledger struct {
	at         time.Time
	busy, idle int // nodes since then
	peak       int // most busy nodes so far

	idleHours  float64 // node-hours that ran without a job
	spareHours float64 // those that would have, if no node had ever gone
	jobs       float64 // that started
	waits      float64 // those that waited for a node of their own
}

// Nodes takes in how many nodes are busy and how many run idle from now on.
func (l *Ledger) Nodes(busy, idle int, now time.Time) {
	if now.Before(l.at) || l.at.IsZero() {
		l.at = now
	}
	left := decay(now.Sub(l.at), fades) // of all alike, so the comparison stays what it is
	l.idleHours, l.spareHours, l.jobs, l.waits = l.idleHours*left, l.spareHours*left, l.jobs*left, l.waits*left
	hours := now.Sub(l.at).Hours()
	l.idleHours += hours * float64(l.idle)
	l.spareHours += hours * float64(l.peak-l.busy)
	l.at, l.busy, l.idle, l.peak = now, busy, idle, max(l.peak, busy)
}

// Job takes in the start of a job, and whether it waited for a node to boot or
// to resume.
func (l *Ledger) Job(waited bool) {
	l.jobs++
	if waited {
		l.waits++
	}
}

// affords says whether the account bears more rent, in dollars, and more jobs
// that wait.
func (l *Ledger) affords(s step, trust, rent float64, waits int) bool {
	own := l.idleHours*s.rent + rent + (l.waits+float64(waits))*s.buy
	return own <= (1+trust)*min(l.jobs*s.buy, l.spareHours*s.rent)
}
