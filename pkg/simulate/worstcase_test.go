package simulate

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

// The two rules that the trust in a forecast is measured by: give every node up
// as soon as it is idle, and never give one up.
func alwaysRelease(Trace, World, *rand.Rand) Policy { return &keeper{placement: warmestFirst{}} }
func neverRelease(Trace, World, *rand.Rand) Policy {
	return &keeper{placement: warmestFirst{}, idle: 1 << 40}
}

// promise fails when hearth costs more than (1 + trust) times the better rule,
// 10 % for its ticks aside.
func promise(t interface {
	Helper()
	Fatalf(string, ...any)
}, trace Trace, w World, k Knobs,
) {
	t.Helper()
	total := func(name string, policy func(Trace, World, *rand.Rand) Policy) float64 {
		r, err := Run(trace, w, NamedPolicy{Name: name, New: policy}, Options{})
		if err != nil {
			t.Fatalf("%v", err)
		}
		return r.Total()
	}
	always, never := total("always-release", alwaysRelease), total("never-release", neverRelease)
	hearth := total("hearth", func(_ Trace, w World, _ *rand.Rand) Policy { return newHearth(w, k) })
	if most := 1.1 * (1 + k.Trust) * min(always, never); hearth > most {
		t.Fatalf("%s with trust %v, parking %v: $%.2f, more than $%.2f; always releasing costs $%.2f, never $%.2f",
			trace.Name, k.Trust, !k.NoPark, hearth, most, always, never)
	}
}

// arrivals is a trace of jobs whose caches save what the cold penalty says.
func arrivals(name string, at []int64, key func(i int) string) Trace {
	t := Trace{Name: name, Rows: len(at)}
	for i, a := range at {
		t.Jobs = append(t.Jobs, Job{ID: fmt.Sprintf("%06d", i), Arrival: 1767571200 + a, Duration: 300, Key: model.CacheKey(key(i))})
	}
	t.Sort()
	return t
}

func everyGap(n int, gap func(i int) time.Duration) (at []int64) {
	now := int64(0)
	for i := range n {
		at = append(at, now)
		now += seconds(gap(i))
	}
	return at
}

// TestWorstCase plays against the policy.
func TestWorstCase(t *testing.T) {
	one := func(int) string { return "k" }
	w := DefaultWorld()
	day := 24 * time.Hour
	for _, trust := range []float64{1, 2, 3} {
		for _, parking := range []bool{false, true} {
			k := Knobs{Trust: trust, NoPark: !parking}
			h := newHearth(w, k)
			var gaps []time.Duration
			// Just beyond every time at which a node may be given up, with
			// parking and without, for a cache that matters and for one that
			// does not.
			for _, bound := range []time.Duration{
				time.Duration(float64(w.Resume) / 3600 / float64(time.Second) * w.DelayPrice / (w.Price - w.ParkedPrice) * float64(time.Hour)),
				time.Duration(float64(w.Boot) / 3600 / float64(time.Second) * w.DelayPrice / w.Price * float64(time.Hour)),
				time.Duration(float64(w.Boot+defaultPenalty) / 3600 / float64(time.Second) * w.DelayPrice / w.Price * float64(time.Hour)),
				time.Duration(float64(w.Boot-w.Resume+defaultPenalty) / 3600 / float64(time.Second) * w.DelayPrice / w.ParkedPrice * float64(time.Hour)),
			} {
				for _, by := range []float64{1 / trust, 1, trust} {
					gaps = append(gaps, time.Duration(float64(bound)*by).Truncate(time.Second)+5*time.Minute+5*time.Second)
				}
			}
			gaps = append(gaps, h.costs.Resume+30*time.Second+5*time.Minute, 7*time.Minute)
			for _, gap := range gaps {
				promise(t, arrivals("every "+gap.String(), everyGap(200, func(int) time.Duration { return gap }), one), w, k)
			}
			promise(t, arrivals("one-off keys", everyGap(300, func(int) time.Duration { return time.Hour }), func(i int) string { return fmt.Sprint(i) }), w, k)
			promise(t, arrivals("all keys at once, daily", everyGap(600, func(i int) time.Duration {
				if i%30 == 29 {
					return day
				}
				return 0
			}), func(i int) string { return fmt.Sprint(i % 30) }), w, k)
			promise(t, arrivals("a key that dies", everyGap(400, func(int) time.Duration { return 40 * time.Minute }), func(i int) string { return fmt.Sprint(i / 200) }), w, k)
			promise(t, arrivals("a year of silence", everyGap(400, func(i int) time.Duration {
				if i == 200 {
					return 365 * day
				}
				return 20 * time.Minute
			}), one), w, k)
			promise(t, arrivals("two jobs a week", everyGap(104, func(i int) time.Duration {
				if i%2 == 0 {
					return 2 * day
				}
				return 5 * day
			}), one), w, k)
			promise(t, arrivals("the clock jumps", everyGap(300, func(i int) time.Duration {
				if i%50 == 49 {
					return 30 * day
				}
				return 15 * time.Minute
			}), one), w, k)
			// A habit that changes whenever it has been learnt.
			promise(t, arrivals("a habit that changes", everyGap(1500, func(i int) time.Duration {
				if i/250%2 == 0 {
					return 10 * time.Minute
				}
				return 8 * time.Hour
			}), one), w, k)
		}
	}
}

// TestWorstCaseProperty plays at random: stretches of steady gaps, of bursts
// and of silence, of few keys and of many.
func TestWorstCaseProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var at []int64
		var keys []string
		now := int64(0)
		for range rapid.IntRange(1, 6).Draw(t, "stretches") {
			gap := int64(rapid.IntRange(10, 200_000).Draw(t, "gap"))
			burst, known := rapid.IntRange(1, 5).Draw(t, "burst"), rapid.IntRange(1, 8).Draw(t, "keys")
			for i := range rapid.IntRange(20, 100).Draw(t, "runs") {
				for b := range burst {
					at, keys = append(at, now), append(keys, fmt.Sprint((i+b)%known))
				}
				now += gap
			}
			now += int64(rapid.IntRange(0, 40).Draw(t, "silence")) * 86400
		}
		k := Knobs{
			Trust:  float64(rapid.IntRange(1, 3).Draw(t, "trust")),
			NoPark: rapid.Bool().Draw(t, "no park"), NoPrewarm: rapid.Bool().Draw(t, "no prewarm"),
		}
		promise(t, arrivals("random", at, func(i int) string { return keys[i] }), DefaultWorld(), k)
	})
}
