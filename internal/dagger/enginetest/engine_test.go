package enginetest_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/internal/dagger"
	"github.com/hearth-ci/hearth/internal/dagger/enginetest"
	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMain(m *testing.M) {
	enginetest.Main()
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		http.DefaultClient.CloseIdleConnections()
		os.Exit(code)
	}))
}

const gib = 1 << 30

func start(t *testing.T, dir string) *enginetest.Engine {
	t.Helper()
	e, err := enginetest.Start(t.Context(), enginetest.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Kill)
	return e
}

func connect(t *testing.T, e *enginetest.Engine, key string, bytes int64) *enginetest.Session {
	t.Helper()
	s, err := e.Connect(t.Context(), key, bytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// run runs a job and leaves; it says whether the job was warm.
func run(t *testing.T, e *enginetest.Engine, key string, bytes int64) bool {
	t.Helper()
	s := connect(t, e, key, bytes)
	s.Close()
	return s.Warm
}

func exit(t *testing.T, e *enginetest.Engine) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	code, err := e.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

func scrape(t *testing.T, e *enginetest.Engine) string {
	t.Helper()
	resp, err := http.Get(e.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// until scrapes an engine until it says so.
func until(t *testing.T, e *enginetest.Engine, clients int, bytes int64) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		gotClients, gotBytes, err := dagger.Parse(strings.NewReader(scrape(t, e)))
		if err != nil {
			t.Fatal(err)
		}
		if gotClients == clients && gotBytes == bytes {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d clients, %d bytes; want %d, %d", gotClients, gotBytes, clients, bytes)
		}
	}
}

func TestJobsFillTheCache(t *testing.T) {
	dir := t.TempDir()
	e := start(t, dir)
	for _, tt := range []struct {
		key  string
		warm bool
	}{{"a", false}, {"a", true}, {"dagger/../..", false}, {"dagger/../..", true}} {
		if warm := run(t, e, tt.key, gib); warm != tt.warm {
			t.Errorf("job of %q: warm %v; want %v", tt.key, warm, tt.warm)
		}
	}
	until(t, e, 0, 2*gib)
	run(t, e, "a", 3*gib)
	until(t, e, 0, 4*gib)
	if got := enginetest.Bytes(dir, "a"); got != 3*gib {
		t.Errorf("%d bytes of a", got)
	}
}

func TestClientsAreCounted(t *testing.T) {
	e := start(t, t.TempDir())
	until(t, e, 0, 0)
	probe, job := connect(t, e, "", 0), connect(t, e, "a", gib)
	until(t, e, 2, gib)
	probe.Close()
	until(t, e, 1, gib)
	job.Close()
	until(t, e, 0, gib)
}

func TestCleanStopKeepsTheCache(t *testing.T) {
	dir := t.TempDir()
	for round := range 3 {
		e := start(t, dir)
		if warm := run(t, e, "a", gib); warm != (round > 0) {
			t.Errorf("start %d: warm %v", round, warm)
		}
		begun := time.Now()
		e.Stop()
		if code := exit(t, e); code != 0 {
			t.Fatalf("exit code %d; want 0", code)
		}
		t.Logf("stopped in %v", time.Since(begun))
	}
}

func TestKillWipesAtTheNextStart(t *testing.T) {
	dir := t.TempDir()
	e := start(t, dir)
	run(t, e, "a", gib)
	e.Kill()
	if code := exit(t, e); code != 137 {
		t.Errorf("exit code %d; want 137", code)
	}
	if enginetest.Bytes(dir, "a") != gib {
		t.Error("wiped before the next start")
	}
	e = start(t, dir)
	until(t, e, 0, 0)
	if enginetest.Bytes(dir, "a") != 0 || run(t, e, "a", gib) {
		t.Error("the cache survived")
	}
	if !strings.Contains(scrape(t, e), "\ndagger_local_cache_corrupt_db_reset 0\n") {
		t.Error("a metric tells of the wipe")
	}
}

// stopBesideClient asks an engine to stop that has a client, and returns when the
// stop has begun.
func stopBesideClient(t *testing.T, e *enginetest.Engine) *enginetest.Session {
	t.Helper()
	client := connect(t, e, "a", gib)
	until(t, e, 1, gib)
	e.Stop()
	until(t, e, 0, gib) // though the client is still there
	return client
}

func TestStopWaitsForClients(t *testing.T) {
	dir := t.TempDir()
	e := start(t, dir)
	client := stopBesideClient(t, e)
	if s, err := e.Connect(t.Context(), "b", gib); err == nil {
		s.Close()
		t.Error("a new client was let in")
	}
	select {
	case <-e.Ended():
		t.Fatal("it ended before its client had left")
	default:
	}
	client.Close()
	if code := exit(t, e); code != 0 {
		t.Errorf("exit code %d; want 0", code)
	}
	if !run(t, start(t, dir), "a", gib) {
		t.Error("the cache was lost")
	}
}

func TestKillWhileItWaitsForClients(t *testing.T) {
	dir := t.TempDir()
	e := start(t, dir)
	stopBesideClient(t, e)
	e.Kill()
	if run(t, start(t, dir), "a", gib) {
		t.Error("the cache survived")
	}
}

func TestOneEnginePerFolder(t *testing.T) {
	dir := t.TempDir()
	e := start(t, dir)
	run(t, e, "a", gib)
	if _, err := enginetest.Start(t.Context(), enginetest.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "it exited with 1: locking") {
		t.Errorf("error %v; want a refusal", err)
	}
	if !run(t, e, "a", gib) {
		t.Error("the second engine erased the first one's cache")
	}
}

func TestEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	e, err := enginetest.Start(ctx, enginetest.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if code := exit(t, e); code != 137 {
		t.Errorf("exit code %d; want 137", code)
	}
}

func TestKeepsItsAddress(t *testing.T) {
	dir := t.TempDir()
	e := start(t, dir)
	e.Kill()
	again, err := enginetest.Start(t.Context(), enginetest.Config{Dir: dir, MetricsAddr: e.Metrics.String()})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Kill()
	if again.Metrics != e.Metrics {
		t.Errorf("serves at %v; want %v", again.Metrics, e.Metrics)
	}
}

// TestMetricsAreThoseOfARealEngine compares names and types with what v0.21.8 gave.
func TestMetricsAreThoseOfARealEngine(t *testing.T) {
	captured, err := os.ReadFile("../testdata/dagger-engine-0.21.8-idle.txt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(described(string(captured)), described(scrape(t, start(t, t.TempDir())))); diff != "" {
		t.Errorf("(-real +ours):\n%s", diff)
	}
}

// described returns the help and type lines of dagger's metrics, and the types of the
// metrics handler's. Those of Go and of the process change with versions and systems.
func described(text string) []string {
	lines := regexp.MustCompile(`(?m)^# (HELP dagger_|TYPE (dagger|promhttp)_).*$`).FindAllString(text, -1)
	slices.Sort(lines)
	return lines
}

// TestReadAndTracked reads an engine as Hearth does, half a minute apart on a clock
// of its own: a job, a clean stop with a start, and a kill.
func TestReadAndTracked(t *testing.T) {
	now := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	scraper, err := dagger.NewScraper(time.Minute, 1, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	defer scraper.Close()
	tracker := dagger.NewTracker()
	pod := 0
	told := "" // the changes
	read := func(e *enginetest.Engine, times int) {
		for range times {
			now = now.Add(30 * time.Second)
			target := dagger.Target{Node: "n", Pod: fmt.Sprint("dagger/", pod), Addr: e.Metrics}
			scraper.Read(t.Context(), []dagger.Target{target}, func(r model.EngineReading) {
				if c := tracker.Observe(r); c != (dagger.Change{}) {
					told += fmt.Sprintf("%+v", c)
				}
			})
		}
	}
	want := func(activity dagger.Activity, bytes int64, verified bool) {
		t.Helper()
		if s := tracker.State("n", now); s.Activity != activity || s.CacheBytes != bytes || s.Verified != verified {
			t.Fatalf("%+v; want %v, %d bytes, verified %v", s, activity, bytes, verified)
		}
	}
	dir := t.TempDir()
	e := start(t, dir)
	job := connect(t, e, "a", gib)
	until(t, e, 1, gib)
	read(e, 2)
	want(dagger.Busy, gib, true)
	job.Close()
	until(t, e, 0, gib)
	read(e, 3)
	want(dagger.Idle, gib, true)

	e.Stop()
	exit(t, e)
	read(e, 1)
	if s := tracker.State("n", now); s.Quiet != 0 || !strings.Contains(s.Reason, "connection refused") {
		t.Errorf("stopped: %+v", s)
	}
	e, pod = start(t, dir), pod+1
	until(t, e, 0, gib)
	read(e, 1)
	want(dagger.Unknown, gib, true)

	e.Kill()
	e, pod = start(t, dir), pod+1
	until(t, e, 0, 0)
	read(e, 2)
	want(dagger.Unknown, gib, false)
	if told != "" {
		t.Errorf("told %s before it was sure", told)
	}
	read(e, 1)
	want(dagger.Idle, 0, true)
	if want := fmt.Sprintf("%+v", dagger.Change{Lost: true, Before: gib}); told != want {
		t.Errorf("told %q; want %q", told, want)
	}
}

// TestSchedules drives engines through random jobs, stops, kills and starts, and
// compares what is left with what v0.21.8 would leave: all after exit 0, nothing after a
// kill, and never a part.
func TestSchedules(t *testing.T) {
	keys := []string{"a", "b", "c"}
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 0))
		dir := t.TempDir()
		e := start(t, dir)
		held := map[string]int64{}
		story := ""
		for range 20 {
			step := random.IntN(6)
			switch story += fmt.Sprint(step); step {
			default: // a job
				key, bytes := keys[random.IntN(len(keys))], 1+random.Int64N(1000)
				if warm := run(t, e, key, bytes); warm != (held[key] > 0) {
					t.Fatalf("seed %d, steps %s: job of %s: warm %v; it holds %v", seed, story, key, warm, held)
				}
				held[key] = max(held[key], bytes)
			case 0, 1: // a stop, half of them beside a client that leaves
				client := connect(t, e, "", 0)
				if step == 0 {
					client.Close()
				}
				e.Stop()
				client.Close()
				if code := exit(t, e); code != 0 {
					t.Fatalf("seed %d, steps %s: exit code %d", seed, story, code)
				}
				e = start(t, dir)
			case 2: // a kill, half of them during a stop, which may be faster
				stopping := random.IntN(2) == 0
				if stopping {
					e.Stop()
				}
				e.Kill()
				clean := exit(t, e) == 0
				e = start(t, dir)
				// One that was killed between marking its data clean and its end
				// keeps them: then it keeps all.
				marked := stopping && slices.ContainsFunc(keys, func(key string) bool { return enginetest.Bytes(dir, key) > 0 })
				if !clean && !marked {
					clear(held)
				}
			}
			for _, key := range keys {
				if got := enginetest.Bytes(dir, key); got != held[key] {
					t.Fatalf("seed %d, steps %s: %d bytes of %s; want %d", seed, story, got, key, held[key])
				}
			}
		}
		e.Kill()
	}
}
