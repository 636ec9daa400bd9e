package dagger

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/pkg/model"
)

// envFleet makes this binary a fleet of engines instead of a test, see fleet.
const envFleet = "HEARTH_TEST_FLEET"

func TestMain(m *testing.M) {
	if size, ok := os.LookupEnv(envFleet); ok {
		serveFleet(size)
		return
	}
	goleak.VerifyTestMain(m)
}

var start = time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)

// ticking is a clock that is a second later whenever it is read.
func ticking() func() time.Time {
	var reads atomic.Int64
	return func() time.Time { return start.Add(time.Duration(reads.Add(1)) * time.Second) }
}

func newScraper(t testing.TB, timeout time.Duration, parallel int) *Scraper {
	t.Helper()
	s, err := NewScraper(timeout, parallel, ticking())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// serve serves one engine and returns it as the target of a node.
func serve(t testing.TB, node model.NodeName, handler http.HandlerFunc) Target {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return Target{Node: node, Pod: "dagger/" + string(node), Addr: netip.MustParseAddrPort(server.Listener.Addr().String()), Version: "v0.21.8"}
}

func healthy(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, idle) }

func TestRead(t *testing.T) {
	var asked *http.Request
	target := serve(t, "n", func(w http.ResponseWriter, r *http.Request) { asked = r; healthy(w, r) })
	var got []model.EngineReading
	newScraper(t, time.Minute, 1).Read(t.Context(), []Target{target}, func(r model.EngineReading) { got = append(got, r) })
	want := model.EngineReading{Node: "n", Pod: "dagger/n", At: start.Add(time.Second), CacheBytes: 428e9, Version: "v0.21.8"}
	if len(got) != 1 || got[0] != want {
		t.Errorf("got %+v; want %+v", got, want)
	}
	if asked.Method != http.MethodGet || asked.URL.String() != "/metrics" || asked.Host != target.Addr.String() || asked.Header.Get("Accept-Encoding") != "" {
		t.Errorf("asked %+v", asked)
	}
}

// TestReadBadEngines: whatever an engine answers it is unknown, with a reason, and
// the one beside it is read.
func TestReadBadEngines(t *testing.T) {
	elsewhere := serve(t, "elsewhere", func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") })
	closed := serve(t, "closed", healthy)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Addr = netip.MustParseAddrPort(listener.Addr().String())
	listener.Close()
	answer := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
	}
	raw := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, text)
			conn.Close()
		}
	}
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		reason  string // how it begins
	}{
		"hangs": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "no answer in time"},
		"slow": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, "go_goroutines 50\n")
				_ = http.NewResponseController(w).Flush()
				time.Sleep(10 * time.Millisecond)
			}
		}, "no answer in time"},
		"redirects": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+elsewhere.Addr.String(), http.StatusFound)
		}, "it answered 302 Found"},
		"refuses":     {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, idle, http.StatusServiceUnavailable) }, "it answered 503 Service Unavailable"},
		"no metrics":  {http.NotFound, "it answered 404 Not Found"},
		"HTML":        {answer("<html>dagger_connected_clients 0</html>"), "line 1 is not Prometheus text"},
		"truncated":   {answer(strings.TrimSuffix(idle, "8e+11\n")), "line 5 is cut off"},
		"cut off":     {raw("HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + idle), "reading line 6: unexpected EOF"},
		"duplicated":  {answer(idle + idle), "line 8: dagger_connected_clients is there twice"},
		"NaN":         {answer("dagger_connected_clients NaN\n"), "dagger_connected_clients is NaN"},
		"negative":    {answer("dagger_connected_clients -1\n"), "dagger_connected_clients is -1"},
		"other names": {answer("go_goroutines 50\n"), "no dagger_connected_clients among the metrics"},
		"huge": {func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := io.WriteString(w, strings.Repeat("go_goroutines 50\n", 1000)); err != nil {
					return
				}
			}
		}, "more than 1048576 bytes of metrics"},
		"huge header": {raw("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20)), "net/http: HTTP/1.x transport connection broken: net/http: server response headers exceeded"},
		"not HTTP":    {raw(strings.Repeat("\xff", 1000) + "\r\n"), "net/http: HTTP/1.x transport connection broken: malformed HTTP"},
		"compressed": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write([]byte("\x1f\x8b\x08\x00"))
		}, "line 1 is not Prometheus text"},
		"nobody there":  {nil, "dial tcp " + closed.Addr.String() + ": connect: connection refused"},
		"nothing there": {raw(""), "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bad := closed
			if tt.handler != nil {
				bad = serve(t, "bad", tt.handler)
			}
			timeout := time.Minute
			if tt.reason == "no answer in time" {
				timeout = time.Second
			}
			var got []model.EngineReading
			newScraper(t, timeout, 1).Read(t.Context(), []Target{bad, serve(t, "good", healthy)}, func(r model.EngineReading) { got = append(got, r) })
			if len(got) != 2 || got[1].Node != "good" || got[1].Unknown != "" || got[1].CacheBytes != 428e9 {
				t.Errorf("read %+v; want both, the good one whole", got)
			}
			if r := got[0]; r.Node != bad.Node || !strings.HasPrefix(r.Unknown, tt.reason) || len(r.Unknown) > 200 || r.Clients != 0 || r.CacheBytes != -1 {
				t.Errorf("read %+v; want it unknown: %s", r, tt.reason)
			}
		})
	}
}

func TestScraperUsesNoProxy(t *testing.T) {
	// The environment's proxy is never used for loopback, so that a test by
	// behaviour could not fail.
	if newScraper(t, 1, 1).client.Transport.(*http.Transport).Proxy != nil {
		t.Error("metrics would be read through a proxy")
	}
}

func TestNewScraperRefuses(t *testing.T) {
	for _, err := range []error{
		func() error { _, err := NewScraper(0, 1, time.Now); return err }(),
		func() error { _, err := NewScraper(1, 0, time.Now); return err }(),
		func() error { _, err := NewScraper(1, 1, nil); return err }(),
	} {
		if err == nil {
			t.Error("accepted")
		}
	}
}

// TestHungDelayNobody: engines that never answer, with no deadline but the round's,
// do not keep the others from being read, neither at first nor when they are more
// than are read at once; and each of them gets its turn.
func TestHungDelayNobody(t *testing.T) {
	const wellCount, hungCount = 300, 30
	entered := make(chan struct{}, 10*hungCount) // a place for each time one is asked
	var targets []Target
	for i := range wellCount + hungCount {
		name := model.NodeName(fmt.Sprintf("well-%d", i))
		handler := http.HandlerFunc(healthy)
		if i%11 == 0 {
			name = model.NodeName(fmt.Sprintf("hung-%d", i))
			handler = func(_ http.ResponseWriter, r *http.Request) {
				entered <- struct{}{}
				<-r.Context().Done()
			}
		}
		targets = append(targets, serve(t, name, handler))
	}
	s := newScraper(t, time.Hour, hungCount+10)

	// round ends when all that are well have been read and so many others asked,
	// and returns those others.
	round := func(hungAsked int) map[model.NodeName]bool {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		wellRead := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			<-wellRead
			for range hungAsked {
				<-entered
			}
			cancel()
		}()
		well, asked := 0, map[model.NodeName]bool{}
		s.Read(ctx, targets, func(r model.EngineReading) {
			switch {
			case r.Unknown == "":
				if well++; well == wellCount {
					close(wellRead)
				}
			case well < wellCount:
				t.Errorf("%s was given up before all others were read: %s", r.Node, r.Unknown)
			case r.Unknown == "no answer in time":
				asked[r.Node] = true
			case r.Unknown != "not read: there was no time left":
				t.Errorf("%s: %s", r.Node, r.Unknown)
			}
		})
		<-ended
		if well != wellCount || len(asked) != hungAsked {
			t.Fatalf("read %d engines and asked %d that hang; want %d and %d", well, len(asked), wellCount, hungAsked)
		}
		return asked
	}
	round(hungCount)
	s.parallel = 10
	all := map[model.NodeName]bool{}
	for range hungCount / s.parallel {
		for node := range round(s.parallel) {
			if all[node] {
				t.Errorf("%s was asked again before others had their turn", node)
			}
			all[node] = true
		}
	}
}

// TestHungIsForgiven: an engine that answers again is one like all others.
func TestHungIsForgiven(t *testing.T) {
	s := newScraper(t, time.Minute, 1)
	a, b := serve(t, "a", healthy), serve(t, "b", healthy)
	s.hung = map[netip.AddrPort]time.Time{a.Addr: start}
	for _, want := range []string{"ba", "ab"} {
		got := ""
		s.Read(t.Context(), []Target{a, b}, func(r model.EngineReading) { got += string(r.Node) })
		if got != want {
			t.Errorf("read in the order %s; want %s", got, want)
		}
	}
	s.hung[netip.MustParseAddrPort("127.0.0.1:1")] = start
	s.Read(t.Context(), []Target{a, b}, func(model.EngineReading) {})
	if len(s.hung) != 0 {
		t.Errorf("remembers %v", s.hung)
	}
}

// BenchmarkRound reads 5,000 engines in another process, of which 200 hang, with the
// bounds of production. It reports how long the first round and the later ones take
// until all that do not hang have been read, how long until the end, and the most
// memory that this process used for it.
func BenchmarkRound(b *testing.B) {
	const wellCount, hungCount = 4800, 200
	targets := fleet(b, wellCount, hungCount)
	s, err := NewScraper(ReadTimeout, ReadParallel, time.Now)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	round := func() (well, all time.Duration) {
		ctx, cancel := context.WithTimeout(b.Context(), 30*time.Second)
		defer cancel()
		begin, read := time.Now(), 0
		s.Read(ctx, targets, func(r model.EngineReading) {
			if r.Unknown == "" {
				read, well = read+1, time.Since(begin)
			}
		})
		if read != wellCount {
			b.Fatalf("read %d engines; want %d", read, wellCount)
		}
		return well, time.Since(begin)
	}
	memory := watchMemory(b)
	first, _ := round()
	var well, all time.Duration
	for b.Loop() {
		w, a := round()
		well, all = well+w, all+a
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(first.Seconds(), "s-well-first")
	b.ReportMetric(well.Seconds()/float64(b.N), "s-well")
	b.ReportMetric(all.Seconds()/float64(b.N), "s-all")
	b.ReportMetric(float64(memory())/(1<<20), "MiB-most")
}

// watchMemory returns a function that says by how much the heap and the stacks of
// this process have grown at most.
func watchMemory(b *testing.B) func() uint64 {
	used := func() uint64 {
		samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
		metrics.Read(samples)
		return samples[0].Value.Uint64() + samples[1].Value.Uint64()
	}
	before, most := used(), uint64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-time.After(5 * time.Millisecond):
				most = max(most, used())
			case <-stop:
				return
			}
		}
	}()
	return func() uint64 {
		close(stop)
		<-stopped
		return most - min(before, most)
	}
}

// fleet starts a process that serves so many engines, each on a port of its own,
// the ones that hang evenly among the others.
func fleet(b *testing.B, well, hung int) []Target {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d,%d", envFleet, well, hung))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { stdin.Close(); _ = cmd.Wait() })
	var targets []Target
	for lines := bufio.NewScanner(stdout); len(targets) < well+hung && lines.Scan(); {
		targets = append(targets, Target{Node: model.NodeName(strconv.Itoa(len(targets))), Addr: netip.MustParseAddrPort(lines.Text())})
	}
	if len(targets) != well+hung {
		b.Fatalf("%d engines were started; want %d", len(targets), well+hung)
	}
	return targets
}

// serveFleet is the other side of fleet. It ends with its standard input.
func serveFleet(size string) {
	text, err := os.ReadFile("testdata/dagger-engine-0.21.8-busy.txt")
	if err != nil {
		panic(err)
	}
	var well, hung int
	if _, err := fmt.Sscanf(size, "%d,%d", &well, &hung); err != nil {
		panic(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(text) })}
	every := (well + hung) / max(hung, 1)
	var silent []net.Listener // would be closed if nothing referred to them
	for i := range well + hung {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		fmt.Println(listener.Addr())
		if i%every == 0 { // the kernel lets clients connect, and that is all
			silent = append(silent, listener)
			continue
		}
		go func() { _ = server.Serve(listener) }()
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(silent)
}
