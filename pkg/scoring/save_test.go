package scoring_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// nearly compares what is rounded to float32.
var nearly = cmpopts.EquateApprox(1e-6, 1e-12)

func saved(t interface {
	Helper()
	Fatal(args ...any)
}, m *scoring.Memory, at time.Time,
) []byte {
	t.Helper()
	data, err := m.Save(at)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestSavedMemoryDecidesTheSame(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := scoring.NewMemory(costs())
		at := now.Add(-time.Duration(rapid.IntRange(0, 100).Draw(rt, "days")) * 24 * time.Hour)
		for range rapid.IntRange(0, 200).Draw(rt, "events") {
			at = at.Add(time.Duration(rapid.IntRange(0, 20_000).Draw(rt, "seconds")) * time.Second)
			key := scoring.KeyOf(model.CacheKey(fmt.Sprint("k", rapid.IntRange(0, 9).Draw(rt, "key"))))
			nodes := rapid.IntRange(1, 5).Draw(rt, "nodes")
			switch rapid.IntRange(0, 4).Draw(rt, "event") {
			case 0, 1:
				m.JobArrived(key, nodes, 1, at)
			case 2:
				m.Keys.Finished(key, rapid.Bool().Draw(rt, "warm"), time.Duration(nodes)*time.Minute)
			case 3:
				m.Ledger.Nodes(nodes, rapid.IntRange(0, 5).Draw(rt, "idle"), at)
				m.Ledger.Job(rapid.Bool().Draw(rt, "waited"))
			case 4:
				m.Started(rapid.Bool().Draw(rt, "resume"), time.Duration(nodes)*time.Minute)
			}
		}
		c := m.CopyAt(at)
		got, when, err := scoring.Load(saved(rt, c, at), costs(), at)
		if err != nil || !when.Equal(at) {
			rt.Fatalf("Load: %v, of %s; want of %s", err, when, at)
		}
		if c.Boot != got.Boot || c.Resume != got.Resume || c.Forecast.Needed() != got.Forecast.Needed() {
			rt.Fatalf("got %v, %v, %d", got.Boot, got.Resume, got.Forecast.Needed())
		}
		// They go on to learn the same, too.
		at = at.Add(time.Duration(rapid.IntRange(0, 100_000).Draw(rt, "later")) * time.Second)
		for _, each := range []*scoring.Memory{m, c, got} {
			each.JobArrived(scoring.KeyOf("k0"), 2, 1, at)
			each.Ledger.Nodes(0, 3, at)
		}
		for _, want := range []*scoring.Memory{m, c} {
			if diff := cmp.Diff(believed(want, at), believed(got, at), nearly); diff != "" {
				rt.Fatalf("(-before +loaded):\n%s", diff)
			}
			if diff := cmp.Diff(planned(want, at), planned(got, at), nearly); diff != "" {
				rt.Fatalf("(-before +loaded):\n%s", diff)
			}
		}
	})
}

// believed is what a memory answers.
func believed(m *scoring.Memory, at time.Time) (out []float64) {
	for n := 1; n <= 6; n++ {
		for h := range 10 {
			out = append(out, m.Forecast.Rate(n, at.Add(time.Duration(h*h)*time.Hour)))
		}
	}
	out = append(out, m.Forecast.Uses()...)
	for k := range 11 {
		share, saves := m.Keys.Of(scoring.KeyOf(model.CacheKey(fmt.Sprint("k", k))))
		out = append(out, share, saves)
	}
	return append(out, m.Forecast.Weeks())
}

func planned(m *scoring.Memory, at time.Time) (out []any) {
	r := scoring.Request{Costs: costs(), Memory: m, Now: at, Terse: true}
	r.Bounds = scoring.Bounds{MaxWarm: 10, Park: true, Prewarm: true}
	for i := range 8 {
		n := node(fmt.Sprint("n", i), 0, fmt.Sprint("k", i))
		n.Parked, n.IdleSince = i >= 4, at.Add(-time.Duration(i*i+1)*10*time.Minute)
		r.Nodes = append(r.Nodes, n)
	}
	a := scoring.Decide(r)
	for _, v := range a.Verdicts {
		out = append(out, v.Instance, v.Decision)
	}
	return append(out, a.Resume)
}

// rich is a memory of as much as can be remembered. No two numbers are alike.
func rich(keys, name int) *scoring.Memory {
	dice := rand.New(rand.NewPCG(1, 2))
	m := scoring.NewMemory(costs())
	letters := []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/")
	names := make([]scoring.Key, keys)
	for i := range names {
		b := make([]byte, name)
		for j := range b {
			b[j] = letters[dice.IntN(len(letters))]
		}
		names[i] = scoring.KeyOf(model.CacheKey(b))
	}
	at := now.Add(-104 * 7 * 24 * time.Hour)
	for at.Before(now.Add(-time.Hour)) {
		at = at.Add(time.Duration(5+dice.IntN(40)) * time.Minute)
		m.Forecast.Arrived(1+dice.IntN(1024), 1, at)
		for size := 1 + dice.IntN(scoring.MaxBatch); size > 1; size-- {
			m.Forecast.Arrived(1+dice.IntN(1024), 1, at)
		}
		for range 4 {
			key := names[dice.IntN(keys)]
			m.Keys.Arrived(key, at)
			m.Keys.Finished(key, dice.IntN(2) == 0, time.Duration(dice.Int64N(int64(time.Hour))))
		}
		m.Ledger.Nodes(dice.IntN(100), dice.IntN(10), at)
	}
	return m
}

func TestSavedIsBounded(t *testing.T) {
	for _, tc := range []struct{ keys, name int }{{100, 60}, {4096, 60}, {8192, 253}} {
		m := rich(tc.keys, tc.name)
		data := saved(t, m, now)
		got, _, err := scoring.Load(data, costs(), now)
		if err != nil {
			t.Fatalf("%d keys: %v", tc.keys, err)
		}
		kept := got.Keys.Len()
		t.Logf("%d nodes deep, %d keys of %d bytes: %d bytes saved, %d keys in them", m.Forecast.Needed(), m.Keys.Len(), tc.name, len(data), kept)
		if len(data) > scoring.MaxSaved || m.Forecast.Needed() != scoring.MaxBatch || kept == 0 {
			t.Errorf("%d bytes, %d keys, %d nodes deep", len(data), kept, m.Forecast.Needed())
		}
		if diff := cmp.Diff(m.Forecast.Uses(), got.Forecast.Uses(), nearly); diff != "" {
			t.Errorf("uses (-before +loaded):\n%s", diff)
		}
	}
}

// TestTimeAwayIsNotObserved: nobody looked, so that no job came says nothing.
func TestTimeAwayIsNotObserved(t *testing.T) {
	m := experienced(2, 1, true)
	data := saved(t, m.CopyAt(now), now)
	later := now.Add(4 * 7 * 24 * time.Hour)
	got, _, err := scoring.Load(data, costs(), later)
	if err != nil {
		t.Fatal(err)
	}
	if before, after := m.Forecast.Mean(1), got.Forecast.Mean(1); math.Abs(before-after) > 1e-6 {
		t.Errorf("%v batches an hour before, %v after", before, after)
	}
	if as := got.Forecast.Rate(1, later) / m.Forecast.Mean(1); as < 0.9 || as > 1.1 {
		t.Errorf("%v times the usual rate right after the time away", as)
	}
	// The decay goes on, but for both sides of the rate.
	got.JobArrived(scoring.KeyOf("k0"), 1, 1, later)
	if before, after := m.Forecast.Mean(1), got.Forecast.Mean(1); math.Abs(before-after) > 0.01 {
		t.Errorf("%v batches an hour before, %v after the next job", before, after)
	}
}

func repack(t testing.TB, change func(fields map[string]any)) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(saved(t, experienced(2, 1, true).CopyAt(now), now)))
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]any{}
	if err := json.NewDecoder(z).Decode(&fields); err != nil {
		t.Fatal(err)
	}
	change(fields)
	text, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return zipped(t, text)
}

func zipped(t testing.TB, text []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := io.Copy(z, bytes.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// broken are changes that Load must notice.
func broken() map[string]func(map[string]any) {
	set := func(path ...any) func(map[string]any) {
		return func(fields map[string]any) {
			for _, p := range path[:len(path)-2] {
				fields = fields[p.(string)].(map[string]any)
			}
			fields[path[len(path)-2].(string)] = path[len(path)-1]
		}
	}
	key := func(name string, weight float64) map[string]any { return map[string]any{"k": name, "w": weight} }
	week := make([]float64, scoring.HoursOfWeek)
	return map[string]func(map[string]any){
		"another version":           set("Version", 2),
		"from the future":           set("At", now.Add(time.Hour)),
		"a negative boot":           set("Boot", -1),
		"an arrival in the future":  set("Forecast", "Last", now.Add(time.Hour)),
		"a first arrival long ago":  set("Forecast", "Began", "1901-01-01T00:00:00Z"),
		"a first arrival too late":  set("Forecast", "Began", now),
		"a negative weight":         set("Forecast", "Levels", []float64{-1}),
		"a weight beyond all":       set("Forecast", "Levels", []float64{1e30}),
		"too many levels":           set("Forecast", "Levels", make([]float64, scoring.MaxLevel+1)),
		"a short week":              set("Forecast", "Exposure", week[1:]),
		"a short week of batches":   set("Forecast", "Need", [][]float64{week[1:]}),
		"too large batches":         set("Forecast", "Need", slices.Repeat([][]float64{week}, scoring.MaxBatch+1)),
		"a negative open batch":     set("Forecast", "Open", -1),
		"jobs before the first":     set("Forecast", "Began", time.Time{}),
		"a key twice":               set("Keys", []any{key("a", 1), key("a", 1)}),
		"a negative key":            set("Keys", []any{key("a", -1)}),
		"a key without a beginning": func(f map[string]any) { f["KeysBegan"] = time.Time{} },
		"a long mean":               set("Keys", []any{map[string]any{"k": "a", "Warm": map[string]any{"n": 1e6}}}),
		"too many keys": func(f map[string]any) {
			var all []any
			for i := range scoring.MaxKeys + 1 {
				all = append(all, key(fmt.Sprint(i), 1))
			}
			f["Keys"] = all
		},
		"more busy than ever":  set("Ledger", "Busy", 1000),
		"more waits than jobs": set("Ledger", "Waits", 1e9),
		"a negative rent":      set("Ledger", "IdleHours", -1),
	}
}

func TestLoadRefuses(t *testing.T) {
	if _, _, err := scoring.Load(repack(t, func(map[string]any) {}), costs(), now); err != nil {
		t.Fatalf("what is unchanged: %v", err)
	}
	for name, change := range broken() {
		if m, _, err := scoring.Load(repack(t, change), costs(), now); err == nil || m != nil {
			t.Errorf("%s: got %v and no error", name, m)
		}
	}
	whole := repack(t, func(map[string]any) {})
	for name, data := range map[string][]byte{
		"nothing": nil, "text": []byte("hello"), "half": whole[:len(whole)/2], "too long": make([]byte, scoring.MaxSaved+1),
		"null": zipped(t, []byte("null")), "a number": zipped(t, []byte("1e999")), "a bomb": zipped(t, make([]byte, 64<<20)),
	} {
		if m, _, err := scoring.Load(data, costs(), now); err == nil || m != nil {
			t.Errorf("%s: got %v and no error", name, m)
		}
	}
}

// FuzzLoad: whatever is loaded goes on to work and can be saved again.
func FuzzLoad(f *testing.F) {
	f.Add(repack(f, func(map[string]any) {}), false)
	f.Add(saved(f, scoring.NewMemory(costs()), now), false)
	for _, name := range slices.Sorted(maps.Keys(broken())) {
		data := repack(f, broken()[name])
		if len(data) < 2048 {
			f.Add(data, false)
		}
	}
	f.Add([]byte(`{"Version":1,"At":"2026-01-01T00:00:00Z","Forecast":{"Exposure":[1]}}`), true)
	f.Fuzz(func(t *testing.T, data []byte, text bool) {
		if text {
			data = zipped(t, data)
		}
		m, _, err := scoring.Load(data, costs(), now)
		if err != nil {
			return
		}
		m.JobArrived(scoring.KeyOf("k"), 3, 1, now)
		m.Ledger.Nodes(1, 1, now)
		for _, v := range believed(m, now) {
			if math.IsNaN(v) || math.IsInf(v, 0) || v < 0 {
				t.Fatalf("it believes %v", v)
			}
		}
		planned(m, now)
		if _, _, err := scoring.Load(saved(t, m.CopyAt(now), now), costs(), now); err != nil {
			t.Fatalf("loading what was saved again: %v", err)
		}
	})
}

func BenchmarkCopyAt(b *testing.B) {
	m := rich(scoring.MaxKeys, 60)
	for b.Loop() {
		m.CopyAt(now)
	}
}

func BenchmarkSave(b *testing.B) {
	m := rich(scoring.MaxKeys, 60)
	for b.Loop() {
		saved(b, m, now)
	}
}

func BenchmarkLoad(b *testing.B) {
	data := saved(b, rich(scoring.MaxKeys, 60), now)
	for b.Loop() {
		if _, _, err := scoring.Load(data, costs(), now); err != nil {
			b.Fatal(err)
		}
	}
}
