package simulate

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Generated describes a trace that is made up: runs of pipelines arrive by the
// hour of the week, each run is a burst of jobs, and few pipelines make most
// of the runs.
type Generated struct {
	// Jobs to make, over about that many Weeks, with that many cache Keys.
	Jobs, Weeks, Keys int
	// Burst is the average number of jobs in a run, each with a key of its
	// own. bitcoin-core-ci has 18 jobs a run.
	Burst int
	// Typical is the median duration of a job with a warm cache, in seconds.
	Typical int64
}

// DefaultGenerated is a project of that size, busier.
func DefaultGenerated() Generated {
	return Generated{Jobs: 10_000, Weeks: 6, Keys: 200, Burst: 18, Typical: 480}
}

// Validate names what makes no trace.
func (g Generated) Validate() error {
	if g.Jobs < 1 || g.Weeks < 1 || g.Keys < 1 || g.Burst < 1 || g.Typical < 1 ||
		g.Jobs > 1e8 || g.Weeks > 1000 || g.Keys > 1e6 || g.Burst > 1e4 || g.Typical > maxDuration/100 {
		return errors.New("a generated trace needs 1 to 1e8 jobs, 1 to 1000 weeks, 1 to 1e6 keys, 1 to 1e4 jobs a burst")
	}
	return nil
}

// Generate makes the trace up; the same random source makes the same trace.
// It begins on Monday, 5 January 2026.
func Generate(g Generated, random *rand.Rand) (Trace, error) {
	if err := g.Validate(); err != nil {
		return Trace{}, err
	}
	const monday = 1767571200
	t := Trace{Name: fmt.Sprintf("generated-%d", g.Jobs), Rows: g.Jobs, Jobs: make([]Job, 0, g.Jobs)}
	pipelines := g.pipelines(random)
	zipf := rand.NewZipf(random, 1.2, 4, uint64(len(pipelines)-1))
	// Runs arrive as a Poisson process whose rate follows the hour of the
	// week: candidates at the highest rate, of which some are left out.
	var sum, highest float64
	for h := range int64(7 * 24) {
		sum += activity(h)
		highest = max(highest, activity(h))
	}
	jobsPerRun := 0.0
	for _, p := range pipelines {
		jobsPerRun += float64(len(p)) / float64(len(pipelines))
	}
	runs := float64(g.Jobs) / jobsPerRun
	perHour := runs / float64(g.Weeks) / sum * highest
	for now := 0.0; len(t.Jobs) < g.Jobs; {
		now += random.ExpFloat64() / perHour * float64(hour)
		if random.Float64()*highest > activity(int64(now)/hour%(7*24)) {
			continue
		}
		for _, k := range pipelines[zipf.Uint64()] {
			if len(t.Jobs) == g.Jobs {
				break
			}
			t.Jobs = append(t.Jobs, Job{
				ID:      fmt.Sprintf("%09d", len(t.Jobs)),
				Arrival: monday + int64(now),
				// A tenth up or down from run to run.
				Duration: max(1, int64(float64(k.typical)*math.Exp(0.1*random.NormFloat64()))),
				Key:      k.key, Group: k.group,
			})
		}
	}
	t.Sort()
	return t, nil
}

type generatedKey struct {
	key     model.CacheKey
	group   string
	typical int64
}

// pipelines divides the keys into pipelines of half to one and a half bursts,
// whose jobs' durations differ as those of real pipelines do: log-normal.
func (g Generated) pipelines(random *rand.Rand) [][]generatedKey {
	var pipelines [][]generatedKey
	for made := 0; made < g.Keys; {
		size := min(g.Keys-made, max(1, g.Burst/2+random.IntN(g.Burst+1)))
		group := "pipeline-" + strconv.Itoa(len(pipelines))
		var p []generatedKey
		for i := range size {
			typical := float64(g.Typical) * math.Exp(min(3, 0.6*random.NormFloat64()))
			p = append(p, generatedKey{model.CacheKey(group + "/job-" + strconv.Itoa(i)), group, int64(max(1, typical))})
		}
		pipelines = append(pipelines, p)
		made += size
	}
	return pipelines
}

// activity is how busy an hour of the week is, from Monday at midnight: office
// hours with their lunch, evenings, nights with what is scheduled, weekends.
func activity(hourOfWeek int64) float64 {
	day, h := hourOfWeek/24, hourOfWeek%24
	busy := 0.08
	switch {
	case h >= 8 && h < 19 && h != 12:
		busy = 1
	case h == 12:
		busy = 0.7
	case h >= 6 && h < 23:
		busy = 0.3
	}
	if day >= 5 {
		busy *= 0.2
	}
	return busy
}
