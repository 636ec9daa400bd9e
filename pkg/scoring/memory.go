package scoring

import "time"

// Memory is what a group's policy has learnt. Whoever runs a fleet tells it of
// everything that happens, in order of time; it never looks for itself. It is
// not safe for concurrent use.
type Memory struct {
	Keys     *Keys
	Forecast *Forecast
	Ledger   Ledger
}

// NewMemory returns a Memory that has learnt nothing yet, of nodes that resume
// within that time.
func NewMemory(c Costs) *Memory {
	return &Memory{Keys: NewKeys(c.ColdPenalty), Forecast: NewForecast(c.Resume)}
}

// JobArrived takes in a new job, which made needed the number of nodes that the
// jobs running and waiting need.
func (m *Memory) JobArrived(key Key, needed int, at time.Time) {
	m.Keys.Arrived(key, at)
	m.Forecast.Arrived(needed, at)
}
