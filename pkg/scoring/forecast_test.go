package scoring_test

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// TestForecastLearnsTheHour: a burst of three jobs every Monday at noon is
// expected then, and hardly at other times.
func TestForecastLearnsTheHour(t *testing.T) {
	f := scoring.NewForecast(45 * time.Second)
	if f.Rate(1, now) != 0 || f.Mean(1) != 0 || f.Uses(1) != 0 {
		t.Error("something is expected before anything was seen")
	}
	const weeks = 8
	for week := range weeks {
		at := now.Add(time.Duration(week-weeks) * 7 * 24 * time.Hour) // now is a Monday's noon
		for i := range 3 {
			f.Observe(model.CacheKey(fmt.Sprint("k", i)), i+1, at.Add(time.Duration(i)*10*time.Second))
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
	if f.Uses(3) == 0 || f.Uses(4) != 0 {
		t.Errorf("the third node is used %.5f times an hour, the fourth %.5f", f.Uses(3), f.Uses(4))
	}
	shares := f.Shares(now)
	for key, share := range shares {
		if math.Abs(share-1.0/3) > 1e-6 {
			t.Errorf("the share of %s is %.3f of three that came equally often", key, share)
		}
	}
}

// TestForecastBatches: jobs further apart than the window are batches of their
// own, and what is old fades.
func TestForecastBatches(t *testing.T) {
	f := scoring.NewForecast(45 * time.Second)
	at := now
	for range 10 {
		f.Observe("k", 1, at)
		at = at.Add(time.Minute)
	}
	if f.Needed() != 1 {
		t.Errorf("%d nodes were needed at once by jobs a minute apart", f.Needed())
	}
	before := f.Mean(1) * 24 // a day counts at least
	f.Observe("other", 1, at.Add(365*24*time.Hour))
	if after := f.Mean(1); after > before/100 {
		t.Errorf("after a year of silence %.5f batches an hour are expected", after)
	}
}
