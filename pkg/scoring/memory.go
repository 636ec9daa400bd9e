package scoring

import (
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// longStart is more than any start takes that will be like others.
const longStart = 15 * time.Minute

// Memory is what a group's policy has learnt. Whoever runs a fleet tells it of
// everything that happens, in order of time; it never looks for itself. It is
// not safe for concurrent use.
type Memory struct {
	Keys     *Keys
	Forecast *Forecast
	Ledger   Ledger
	// Boot and Resume are how long nodes took to start of late.
	Boot, Resume time.Duration

	// inVain: a node was given up although the forecast wants it, and no job has
	// started since.
	inVain bool
}

// NewMemory returns a Memory that has learnt nothing yet, of nodes that start
// as the costs say.
func NewMemory(c Costs) *Memory {
	return &Memory{Keys: NewKeys(c.ColdPenalty), Forecast: NewForecast(c.Resume), Boot: c.Boot, Resume: c.Resume}
}

// Started takes in how long a node took to boot or to resume; the mean goes
// back about five of them.
func (m *Memory) Started(resume bool, took time.Duration) {
	if took <= 0 || took > longStart {
		return
	}
	usual := &m.Boot
	if resume {
		usual = &m.Resume
	}
	*usual += (took - *usual) / 5
}

// JobArrived takes in a new job, which made needed the number of nodes that the
// jobs running and waiting need; slots of them share a node.
func (m *Memory) JobArrived(key Key, needed, slots int, at time.Time) {
	m.Keys.Arrived(key, at)
	m.Forecast.Arrived(needed, slots, at)
}

// JobStarted takes in the start of a job, and whether it waited for a node to
// boot or to resume.
func (m *Memory) JobStarted(waited bool) {
	m.Ledger.Job(waited)
	m.inVain = false
}

// Decided takes in a plan that is carried out: a node that goes although the
// forecast wants it has waited in vain, and none is brought back in its place
// before a job has come.
func (m *Memory) Decided(verdicts []model.Verdict) {
	for _, v := range verdicts {
		if v.Decision == model.DecisionKeep {
			continue
		}
		for _, r := range v.Reasons {
			m.inVain = m.inVain || r.Code == spent || r.Code == tooLong
		}
	}
}
