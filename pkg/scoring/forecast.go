package scoring

import (
	"math"
	"slices"
	"time"
)

const (
	// HoursOfWeek is the resolution of the forecast.
	HoursOfWeek = 7 * 24
	// priorWeeks is how many weeks of the group's own average a single hour of
	// the week is blended with: with fewer weeks observed than this the
	// average weighs more, with many the hour's own history does (the usual
	// shrinkage of a Poisson rate to its Gamma prior).
	priorWeeks = 2
	// MaxBatch bounds what is remembered of a batch's size.
	MaxBatch = 512
	// MaxLevel bounds what is remembered of how many nodes were needed.
	MaxLevel = 1 << 14
	// fades is the half-life of what was observed: pipelines change within a
	// quarter.
	fades = 8 * 7 * 24 * time.Hour
	// lately is over what time the batches that came are compared with those
	// that usually do, in hours: people work for a while, and then do not.
	lately = 1
	// priorBatches blends that comparison with "as usual": one batch more or
	// less says little.
	priorBatches = 1
)

// Forecast learns how a group's jobs arrive: in batches of jobs that need
// nodes at the same moment, by hour of the week. It uses nothing but what it was told, so it can be replayed.
// The zero value has learnt nothing; it is not safe for concurrent use.
type Forecast struct {
	window time.Duration
	began  time.Time // of the first observation
	last   time.Time

	// open is the batch that is still growing.
	open   int // jobs, of which slots share a node
	slots  int
	openAt time.Time

	// need[n-1][hour] is the weight of the batches that needed at least n
	// nodes; all[n-1] is their sum.
	need [][HoursOfWeek]float64
	all  []float64
	// levels[m-1] is the weight of the arrivals that brought the jobs running
	// and waiting from m-1 to m: the uses of the group's m-th node.
	levels []float64

	// decayedAt is when the weights above were last decayed.
	decayedAt time.Time
	exposure  [HoursOfWeek]float64 // hours observed, decayed like the weights
	observed  float64              // their sum
	seenTo    time.Time            // exposure is counted up to here
	// came and usual are the batches of late, and how many usually come in that
	// time; both fade within an hour.
	came, usual float64
}

// NewForecast returns a forecast in which jobs that arrive within window of
// each other need nodes of their own: a node that is started for the first is
// not there yet for the last.
func NewForecast(window time.Duration) *Forecast {
	return &Forecast{window: window}
}

// HourOfWeek returns the hour of the week of t in UTC, from 0 (Sunday,
// midnight).
func HourOfWeek(t time.Time) int {
	t = t.UTC()
	return int(t.Weekday())*24 + t.Hour()
}

// Arrived takes in the arrival of one job, which made nodes the number of nodes
// that the jobs running and waiting need; slots jobs share a node. Arrivals come in order of time; one
// that lies before the last counts as if it arrived with it.
func (f *Forecast) Arrived(nodes, slots int, at time.Time) {
	if at.Before(f.last) {
		at = f.last
	}
	if f.began.IsZero() {
		f.began, f.seenTo, f.decayedAt = at, at, at
	}
	f.last = at
	if f.open > 0 && at.Sub(f.openAt) > f.window {
		f.close()
	}
	f.expose(at)
	if f.open == 0 {
		f.openAt = at
		f.came++
	}
	f.open++
	f.slots = max(slots, 1)
	nodes = min(max(nodes, 1), MaxLevel)
	for len(f.levels) < nodes {
		f.levels = append(f.levels, 0)
	}
	f.levels[nodes-1]++
}

// close counts the batch that has stopped growing.
func (f *Forecast) close() {
	hour := HourOfWeek(f.openAt)
	slots := max(f.slots, 1)
	size := min((f.open+slots-1)/slots, MaxBatch)
	for len(f.all) < size {
		f.need = append(f.need, [HoursOfWeek]float64{})
		f.all = append(f.all, 0)
	}
	for n := range size {
		f.need[n][hour]++
		f.all[n]++
	}
	f.open = 0
}

// expose adds the time since the last observation to the hours that it fell
// into, and lets old observations fade once a week.
func (f *Forecast) expose(to time.Time) {
	const week = HoursOfWeek * time.Hour
	if whole := to.Sub(f.seenTo) / week; whole > 0 {
		for h := range f.exposure {
			f.exposure[h] += float64(whole)
		}
		f.observed += float64(whole) * HoursOfWeek
		f.seenTo = f.seenTo.AddDate(0, 0, 7*int(whole))
		f.came, f.usual = 0, 0
	}
	for f.seenTo.Before(to) {
		end := f.seenTo.Truncate(time.Hour).Add(time.Hour)
		if end.After(to) {
			end = to
		}
		f.came, f.usual = f.fade(end)
		f.exposure[HourOfWeek(f.seenTo)] += end.Sub(f.seenTo).Hours()
		f.observed += end.Sub(f.seenTo).Hours()
		f.seenTo = end
	}
	if since := to.Sub(f.decayedAt); since >= week {
		d := decay(since, fades)
		for n := range f.need {
			for h := range f.need[n] {
				f.need[n][h] *= d
			}
			f.all[n] *= d
		}
		for m := range f.levels {
			f.levels[m] *= d
		}
		for h := range f.exposure {
			f.exposure[h] *= d
		}
		f.observed *= d
		f.decayedAt = to
	}
}

func decay(age, halfLife time.Duration) float64 {
	return math.Exp2(-age.Hours() / halfLife.Hours())
}

// Rate is how many batches an hour are expected around t that need at least n
// nodes at once (n from 1): what is usual at that hour of the week, times how
// the last hour compares with what is usual for it.
func (f *Forecast) Rate(n int, t time.Time) float64 {
	came, usual := f.fade(t)
	return f.atHour(n, t) * (came + priorBatches) / (usual + priorBatches)
}

// atHour is the usual rate at that hour of the week, blended with its
// neighbours' and with the average.
func (f *Forecast) atHour(n int, t time.Time) float64 {
	if n < 1 || n > len(f.all) {
		return 0
	}
	hour := HourOfWeek(t)
	var count, hours float64
	for _, near := range [...]struct {
		offset int
		weight float64
	}{{-1, 0.5}, {0, 1}, {1, 0.5}} {
		h := (hour + near.offset + HoursOfWeek) % HoursOfWeek
		count += near.weight * f.need[n-1][h]
		hours += near.weight * f.exposure[h]
	}
	return (count + priorWeeks*f.Mean(n)) / (hours + priorWeeks)
}

// fade is what came and what usually comes, as they count at t. From seenTo to
// t the rate of one hour is taken for all.
func (f *Forecast) fade(t time.Time) (came, usual float64) {
	left := math.Exp(-max(t.Sub(f.seenTo).Hours(), 0) / lately)
	return f.came * left, f.usual*left + f.atHour(1, f.seenTo)*lately*(1-left)
}

// Needed returns the most nodes that some remembered batch needed at once.
func (f *Forecast) Needed() int { return len(f.all) }

// Mean is how many batches an hour need at least n nodes at once, over all
// hours of the week.
func (f *Forecast) Mean(n int) float64 {
	if n < 1 || n > len(f.all) {
		return 0
	}
	return f.all[n-1] / max(f.observed, 24)
}

// Uses is how many times an hour the group's nodes are used, the m-th at m-1,
// over all hours of the week: how often the jobs running and waiting come to
// need m nodes. It falls with m but for chance, which is smoothed away.
func (f *Forecast) Uses() []float64 {
	uses := make([]float64, len(f.levels))
	hours, most := max(f.observed, 24), 0.0
	for i, u := range slices.Backward(f.levels) {
		most = max(most, u)
		uses[i] = most / hours
	}
	return uses
}

// Weeks is the time since the first observation.
func (f *Forecast) Weeks() float64 { return f.last.Sub(f.began).Hours() / HoursOfWeek }

// Last is the time of the last observation.
func (f *Forecast) Last() time.Time { return f.last }
