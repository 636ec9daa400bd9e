package scoring_test

import (
	"math"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/scoring"
)

// TestForecastLearnsTheHour: a burst of three jobs every Monday at noon is
// expected then, and hardly at other times.
func TestForecastLearnsTheHour(t *testing.T) {
	f := scoring.NewForecast(45 * time.Second)
	if f.Rate(1, now) != 0 || f.Mean(1) != 0 || len(f.Uses()) != 0 {
		t.Error("something is expected before anything was seen")
	}
	const weeks = 8
	for week := range weeks {
		at := now.Add(time.Duration(week-weeks) * 7 * 24 * time.Hour) // now is a Monday's noon
		for i := range 3 {
			f.Arrived(i+1, 1, at.Add(time.Duration(i)*10*time.Second))
		}
	}
	noon, night := f.Rate(3, now), f.Rate(3, now.Add(12*time.Hour))
	if noon < 0.2 || noon > 1 || night > noon/20 {
		t.Errorf("three at once are expected %.3f times an hour on Monday at noon and %.3f at midnight", noon, night)
	}
	if f.Rate(4, now) != 0 || f.Rate(0, now) != 0 {
		t.Error("a batch is expected that was never seen")
	}
	if got, want := f.Mean(3), 1.0/scoring.HoursOfWeek; math.Abs(got-want) > want/3 {
		t.Errorf("over all hours %.5f times an hour, want about %.5f", got, want)
	}
	if uses := f.Uses(); len(uses) != 3 || uses[2] == 0 || uses[0] < uses[2] {
		t.Errorf("the nodes are used %v times an hour", uses)
	}
}

// TestForecastBatches: jobs further apart than the window are batches of their
// own, and what is old fades.
func TestForecastBatches(t *testing.T) {
	f := scoring.NewForecast(45 * time.Second)
	at := now
	for range 10 {
		f.Arrived(1, 1, at)
		at = at.Add(time.Minute)
	}
	if f.Needed() != 1 {
		t.Errorf("%d nodes were needed at once by jobs a minute apart", f.Needed())
	}
	before := f.Mean(1) * 24 // a day counts at least
	f.Arrived(1, 1, at.Add(365*24*time.Hour))
	if after := f.Mean(1); after > before/100 {
		t.Errorf("after a year of silence %.5f batches an hour are expected", after)
	}
}

// TestForecastFollowsTheHour: after a busy hour more is expected than usually,
// and after a quiet one less.
func TestForecastFollowsTheHour(t *testing.T) {
	steady := func(last int) *scoring.Forecast {
		f := scoring.NewForecast(45 * time.Second)
		for at := now.Add(-3 * 7 * 24 * time.Hour); at.Before(now.Add(-2 * time.Hour)); at = at.Add(15 * time.Minute) {
			f.Arrived(1, 1, at)
		}
		for i := range last {
			f.Arrived(1, 1, now.Add(-time.Hour+time.Duration(i)*time.Hour/time.Duration(last)))
		}
		return f
	}
	busy, usual, quiet := steady(12).Rate(1, now), steady(4).Rate(1, now), steady(0).Rate(1, now)
	if usual < 3 || usual > 5 {
		t.Errorf("usually four come in an hour, and %.2f are expected", usual)
	}
	if busy < 1.5*usual || quiet > usual/1.5 {
		t.Errorf("%.2f expected after a busy hour, %.2f after a usual one, %.2f after a quiet one", busy, usual, quiet)
	}
}
