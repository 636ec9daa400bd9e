package scoring

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/hearth-ci/hearth/pkg/model"
)

// MaxSaved bounds what Save returns, in bytes: half of what fits a ConfigMap.
const MaxSaved = 512 << 10

const (
	// savedVersion is that of the form below. Another one is not read.
	savedVersion = 1
	// maxUnpacked bounds what is unpacked, several times what Save packs.
	maxUnpacked = 8 << 20
	// maxKeyName bounds a key's name, in bytes.
	maxKeyName = 1024
	// skew is how far the clock that saved may be ahead of the one that loads.
	skew = 10 * time.Minute
	// oldest is how far back a saved time may lie: weights grow with it.
	oldest = 30 * 365 * 24 * time.Hour
	// plenty bounds counts and node-hours.
	plenty = 1e12
)

// saved is a Memory as it is written: gzipped JSON. Weights of batches and
// levels are rounded to float32, which is far finer than anything that was
// learnt. What follows from the rest is not written.
type saved struct {
	Version      int
	At           time.Time
	Boot, Resume time.Duration
	KeysBegan    time.Time
	Keys         []savedKey
	Forecast     savedForecast
	Ledger       savedLedger
}

type savedKey struct {
	Name       string    `json:"k"`
	Weight     float64   `json:"w"`
	Warm, Cold savedMean `json:",omitzero"`
}

type savedMean struct {
	N     int     `json:"n"`
	Value float64 `json:"v"`
}

type savedForecast struct {
	Began, Last, OpenAt, SeenTo, DecayedAt time.Time
	Open                                   int
	Need                                   [][]float32 // each of HoursOfWeek
	Levels                                 []float32
	Exposure                               []float64 // of HoursOfWeek
	Came, Usual                            float64
}

type savedLedger struct {
	At                    time.Time
	Busy, Idle, Peak      int
	IdleHours, SpareHours float64
	Jobs, Waits           float64
}

// CopyAt counts what m has seen up to now, and returns a copy that is safe to
// save beside whoever goes on learning.
func (m *Memory) CopyAt(now time.Time) *Memory {
	if f := m.Forecast; !f.began.IsZero() {
		f.expose(now)
	}
	if l := &m.Ledger; !l.at.IsZero() {
		l.Nodes(l.busy, l.idle, now)
	}
	out := *m
	keys := *m.Keys
	keys.known = make(map[Key]*keyStats, len(m.Keys.known))
	all := make([]keyStats, 0, len(m.Keys.known))
	for key, s := range m.Keys.known {
		all = append(all, *s)
		keys.known[key] = &all[len(all)-1]
	}
	forecast := *m.Forecast
	forecast.need = slices.Clone(forecast.need)
	forecast.all = slices.Clone(forecast.all)
	forecast.levels = slices.Clone(forecast.levels)
	out.Keys, out.Forecast = &keys, &forecast
	return &out
}

// Save returns what m has learnt up to a time, at most MaxSaved bytes. Where
// that is not enough, and beyond MaxKeys, the rarest keys are left out.
func (m *Memory) Save(at time.Time) ([]byte, error) {
	s := saved{
		Version: savedVersion, At: at.UTC(), Boot: m.Boot, Resume: m.Resume,
		KeysBegan: m.Keys.began, Keys: m.Keys.save(), Forecast: m.Forecast.save(), Ledger: m.Ledger.save(),
	}
	for {
		data, err := s.pack()
		if err != nil {
			return nil, fmt.Errorf("saving what was learnt: %w", err)
		}
		if len(data) <= MaxSaved {
			return data, nil
		}
		if len(s.Keys) == 0 {
			return nil, fmt.Errorf("saving what was learnt: %d bytes without any key", len(data))
		}
		s.Keys = s.Keys[:len(s.Keys)*7/8]
	}
}

func (s *saved) pack() ([]byte, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := errors.Join(json.NewEncoder(z).Encode(s), z.Close()); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// save returns the keys, the most frequent first.
func (k *Keys) save() []savedKey {
	order := slices.SortedFunc(maps.Keys(k.known), func(a, b Key) int {
		return cmp.Or(cmp.Compare(k.known[b].weight, k.known[a].weight), cmp.Compare(a.Value(), b.Value()))
	})
	var out []savedKey
	for _, key := range order {
		name, s := string(key.Value()), k.known[key]
		if len(out) == MaxKeys {
			break
		}
		if len(name) > maxKeyName || !utf8.ValidString(name) {
			continue
		}
		out = append(out, savedKey{name, s.weight, savedMean{s.warm.n, s.warm.value}, savedMean{s.cold.n, s.cold.value}})
	}
	return out
}

func (f *Forecast) save() savedForecast {
	s := savedForecast{
		Began: f.began, Last: f.last, OpenAt: f.openAt, SeenTo: f.seenTo, DecayedAt: f.decayedAt, Open: f.open,
		Levels: rounded(f.levels), Exposure: f.exposure[:], Came: f.came, Usual: f.usual,
	}
	for n := range f.need {
		s.Need = append(s.Need, rounded(f.need[n][:]))
	}
	return s
}

func rounded(values []float64) []float32 {
	out := make([]float32, len(values))
	for i, v := range values {
		out[i] = float32(v)
	}
	return out
}

func (l *Ledger) save() savedLedger {
	return savedLedger{l.at, l.busy, l.idle, l.peak, l.idleHours, l.spareHours, l.jobs, l.waits}
}

// Load returns what an earlier life has saved and when that was; c are the
// costs of today. The time since then counts as not observed. It checks
// everything: whatever cannot have come from Save is an error.
func Load(data []byte, c Costs, now time.Time) (m *Memory, at time.Time, err error) {
	s, err := unpack(data)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("reading what was learnt: %w", err)
	}
	m = NewMemory(c)
	check := checker{from: now.Add(-oldest), to: now.Add(skew)}
	check.time("the time of saving", s.At)
	check.to = s.At.Add(skew) // nothing is later than that
	m.Boot, m.Resume = s.Boot, s.Resume
	check.number("boot", s.Boot.Hours(), 24)
	check.number("resume", s.Resume.Hours(), 24)
	m.Keys.load(s, &check)
	m.Forecast.load(s.Forecast, &check)
	m.Ledger = s.Ledger.load(&check)
	if check.problem != nil {
		return nil, time.Time{}, fmt.Errorf("reading what was learnt: %w", check.problem)
	}
	m.Forecast.skip(now)
	m.Ledger.skip(now)
	return m, s.At, nil
}

func unpack(data []byte) (s saved, err error) {
	if len(data) > MaxSaved {
		return s, fmt.Errorf("%d bytes are too many", len(data))
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return s, err
	}
	text, err := io.ReadAll(io.LimitReader(z, maxUnpacked+1))
	switch {
	case err != nil:
		return s, err
	case len(text) > maxUnpacked:
		return s, fmt.Errorf("more than %d bytes unpacked", maxUnpacked)
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, err
	}
	if s.Version != savedVersion {
		return s, fmt.Errorf("version %d, want %d", s.Version, savedVersion)
	}
	return s, nil
}

// checker remembers the first thing that is out of bounds.
type checker struct {
	from, to time.Time
	problem  error
}

func (c *checker) that(ok bool, format string, args ...any) {
	if !ok && c.problem == nil {
		c.problem = fmt.Errorf(format, args...)
	}
}

// number checks that v is from 0 to most; NaN is not.
func (c *checker) number(what string, v, most float64) {
	c.that(v >= 0 && v <= most, "%s is %v", what, v)
}

func (c *checker) time(what string, t time.Time) {
	c.that(!t.Before(c.from) && !t.After(c.to), "%s is %s", what, t)
}

func (k *Keys) load(s saved, check *checker) {
	check.that(len(s.Keys) <= MaxKeys, "%d keys", len(s.Keys))
	if check.problem != nil {
		return
	}
	if !s.KeysBegan.IsZero() {
		check.time("the first job", s.KeysBegan)
	}
	k.began = s.KeysBegan
	for _, e := range s.Keys {
		key := KeyOf(model.CacheKey(e.Name))
		check.that(len(e.Name) <= maxKeyName, "a key of %d bytes", len(e.Name))
		check.number("a key's weight", e.Weight, 1e101)
		check.that(e.Weight == 0 || !k.began.IsZero(), "a key has a weight before the first job")
		check.that(k.known[key] == nil, "a key is there twice")
		stats := &keyStats{weight: e.Weight, warm: e.Warm.load(check), cold: e.Cold.load(check)}
		k.known[key] = stats
		k.total += e.Weight
		k.count(stats, +1)
	}
}

func (m savedMean) load(check *checker) mean {
	check.that(m.N >= 0 && m.N <= recently, "a mean of %d jobs", m.N)
	check.number("a mean", m.Value, oldest.Seconds())
	return mean{m.N, m.Value}
}

func (f *Forecast) load(s savedForecast, check *checker) {
	check.that(len(s.Need) <= MaxBatch, "batches of %d nodes", len(s.Need))
	check.that(len(s.Levels) <= MaxLevel, "%d nodes needed", len(s.Levels))
	check.that(len(s.Exposure) == HoursOfWeek, "a week of %d hours", len(s.Exposure))
	check.number("the open batch", float64(s.Open), plenty)
	check.number("the batches of late", s.Came, plenty)
	check.number("the usual batches", s.Usual, plenty)
	if s.Began.IsZero() {
		empty := len(s.Need) == 0 && len(s.Levels) == 0 && s.Open == 0 && s.Came == 0 && s.Usual == 0
		check.that(empty, "jobs arrived before the first did")
		return
	}
	check.time("the first arrival", s.Began)
	check.time("the last arrival", s.Last)
	check.time("the end of what was seen", s.SeenTo)
	check.time("the last decay", s.DecayedAt)
	check.that(!s.Last.Before(s.Began), "the last arrival came before the first")
	if s.Open > 0 {
		check.time("the open batch", s.OpenAt)
	}
	if check.problem != nil {
		return
	}
	f.began, f.last, f.openAt, f.seenTo, f.decayedAt = s.Began, s.Last, s.OpenAt, s.SeenTo, s.DecayedAt
	f.open, f.came, f.usual = s.Open, s.Came, s.Usual
	f.need = make([][HoursOfWeek]float64, len(s.Need))
	f.all = make([]float64, len(s.Need))
	for n, row := range s.Need {
		check.that(len(row) == HoursOfWeek, "a week of %d hours", len(row))
		for h, v := range row[:min(len(row), HoursOfWeek)] {
			check.number("the weight of batches", float64(v), plenty)
			f.need[n][h] = float64(v)
			f.all[n] += float64(v)
		}
	}
	f.levels = make([]float64, len(s.Levels))
	for m, v := range s.Levels {
		check.number("the weight of a level", float64(v), plenty)
		f.levels[m] = float64(v)
	}
	for h, v := range s.Exposure {
		check.number("the hours seen", v, plenty)
		f.exposure[h] = v
		f.observed += v
	}
}

// skip leaves the time up to now out of what was observed.
func (f *Forecast) skip(now time.Time) {
	if gap := now.Sub(f.seenTo); !f.began.IsZero() && gap > 0 {
		left := math.Exp(-gap.Hours() / lately)
		f.came, f.usual, f.seenTo = f.came*left, f.usual*left, now
	}
}

func (s savedLedger) load(check *checker) Ledger {
	if !s.At.IsZero() {
		check.time("the ledger's time", s.At)
	}
	for what, v := range map[string]float64{
		"busy nodes": float64(s.Busy), "idle nodes": float64(s.Idle), "most busy nodes": float64(s.Peak),
		"idle hours": s.IdleHours, "spare hours": s.SpareHours, "jobs": s.Jobs, "jobs that waited": s.Waits,
	} {
		check.number(what, v, plenty)
	}
	check.that(s.Busy <= s.Peak, "%d nodes are busy, at most %d were", s.Busy, s.Peak)
	check.that(s.Waits <= s.Jobs, "%v of %v jobs waited", s.Waits, s.Jobs)
	return Ledger{s.At, s.Busy, s.Idle, s.Peak, s.IdleHours, s.SpareHours, s.Jobs, s.Waits}
}

func (l *Ledger) skip(now time.Time) {
	if !l.at.IsZero() && l.at.Before(now) {
		l.at = now
	}
}
