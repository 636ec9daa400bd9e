package ci

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/pkg/demand"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// morning is shortly after the messages in testdata were sent.
var morning = time.Date(2026, 1, 5, 8, 5, 0, 0, time.UTC)

const (
	secretText  = "correct horse"
	signingText = "whsec_c2lnbmluZyBrZXk=" // "signing key"
)

func secret(text string) Secret { return func() []byte { return []byte(text) } }

// desk is a Receiver and what it has passed on.
type desk struct {
	*Receiver
	requests *prometheus.CounterVec
	log      bytes.Buffer

	mu      sync.Mutex
	jobs    []demand.Job
	full    bool
	away    bool
	now     time.Time
	listing []demand.Listing
}

func (d *desk) JobObserved(j demand.Job) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.full {
		d.jobs = append(d.jobs, j)
	}
	return !d.full
}

func (d *desk) JobsListed(l demand.Listing) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.listing = append(d.listing, l)
	return true
}

func (d *desk) taken() []demand.Job {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.jobs)
}

func newDesk(t testing.TB, change func(*Config)) *desk {
	t.Helper()
	d := &desk{now: morning, requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "requests"}, []string{"source", "result"})}
	cfg := Config{
		GitHub: secret(secretText), GitLab: secret(secretText), GitLabSigning: secret(signingText), Buildkite: secret(secretText),
		Sink: d, Leading: func() bool { return !d.away }, Requests: d.requests,
		Logger: slog.New(slog.NewTextHandler(&d.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Now: func() time.Time { return d.now },
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if d.Receiver, err = NewReceiver(cfg); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *desk) count(source, result string) float64 {
	return testutil.ToFloat64(d.requests.WithLabelValues(source, result))
}

func mac(key string, parts ...string) []byte {
	h := hmac.New(sha256.New, []byte(key))
	h.Write([]byte(strings.Join(parts, "")))
	return h.Sum(nil)
}

// post sends a body as its system would, after the request was changed.
func post(system, body string, change func(http.Header)) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/webhooks/"+system, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	at := strconv.FormatInt(morning.Unix(), 10)
	switch system {
	case "github":
		r.Header.Set("X-GitHub-Event", "workflow_job")
		r.Header.Set("X-GitHub-Delivery", "72d3162e-cc78-11e3-81ab-4c9367dc0958")
		r.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac(secretText, body)))
	case "gitlab":
		r.Header.Set("X-Gitlab-Event", "Job Hook")
		r.Header.Set("X-Gitlab-Token", secretText)
		r.Header.Set("Webhook-Id", "msg_1")
		r.Header.Set("Webhook-Timestamp", at)
		r.Header.Set("Webhook-Signature", "v1,bm9uZQ== v1,"+base64.StdEncoding.EncodeToString(mac("signing key", "msg_1.", at, ".", body)))
	case "buildkite":
		r.Header.Set("X-Buildkite-Event", "job.scheduled")
		r.Header.Set("X-Buildkite-Signature", "timestamp="+at+",signature="+hex.EncodeToString(mac(secretText, at, ".", body)))
	}
	if change != nil {
		change(r.Header)
	}
	return r
}

func recorded(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func (d *desk) send(r *http.Request) (code int, text string) {
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// TestDeliveries reads each system's messages in its documented form.
func TestDeliveries(t *testing.T) {
	at := func(text string) time.Time {
		v, err := time.Parse(time.RFC3339, "2026-01-05T"+text+"Z")
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	hub := demand.Job{ID: "github/acme/shop/29679449526", System: demand.GitHub, Scope: "acme/shop", Key: "github/acme/shop", Labels: []string{"self-hosted", "linux"}, QueuedAt: at("08:00:00")}
	lab := demand.Job{ID: "gitlab/380/1977", System: demand.GitLab, Scope: "acme/shop", Key: "gitlab/380", QueuedAt: at("07:59:00")}
	kite := demand.Job{
		ID: "buildkite/0185c5c9-5e0f-4d3a-8a52-6b7c6f4f2d11", System: demand.Buildkite, Scope: "shop", Key: "buildkite/shop",
		Labels: []string{"queue=kubernetes", "size=large"}, QueuedAt: at("08:00:00"),
	}
	job := func(of demand.Job, state demand.State, since time.Time, runner string) demand.Job {
		of.State, of.At, of.Runner = state, since, runner
		return of
	}
	pending := job(lab, demand.Queued, morning, "")
	pending.QueuedAt = morning
	for file, want := range map[string]demand.Job{
		"github_queued.json":       job(hub, demand.Queued, at("08:00:00"), ""),
		"github_in_progress.json":  job(hub, demand.Running, at("08:00:30"), "linux-x7k2p-runner-8fj2q"),
		"github_completed.json":    job(hub, demand.Ended, at("08:04:00"), "linux-x7k2p-runner-8fj2q"),
		"gitlab_pending.json":      pending,
		"gitlab_running.json":      job(lab, demand.Running, at("08:00:20"), ""),
		"gitlab_failed.json":       job(lab, demand.Ended, at("08:03:00"), ""),
		"buildkite_scheduled.json": job(kite, demand.Queued, at("08:00:00"), ""),
		"buildkite_started.json":   job(kite, demand.Running, at("08:00:40"), "buildkite-agent-7"),
		"buildkite_finished.json":  job(kite, demand.Ended, at("08:02:00"), "buildkite-agent-7"),
	} {
		t.Run(file, func(t *testing.T) {
			d := newDesk(t, nil)
			system, _, _ := strings.Cut(file, "_")
			body := recorded(t, file)
			if code, text := d.send(post(system, body, nil)); code != http.StatusAccepted {
				t.Fatalf("answered %d %s", code, text)
			}
			got := d.taken()
			if len(got) != 1 {
				t.Fatalf("%d jobs", len(got))
			}
			if diff := cmp.Diff(want, got[0]); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if code, _ := d.send(post(system, body, nil)); code != http.StatusOK || d.count(system, "duplicate") != 1 || len(d.taken()) != 1 {
				t.Errorf("once more: %d, %d jobs", code, len(d.taken()))
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	hub, lab, kite := recorded(t, "github_queued.json"), recorded(t, "gitlab_pending.json"), recorded(t, "buildkite_scheduled.json")
	set := func(name, value string) func(http.Header) { return func(h http.Header) { h.Set(name, value) } }
	del := func(name string) func(http.Header) { return func(h http.Header) { h.Del(name) } }
	old := strconv.FormatInt(morning.Add(-time.Hour).Unix(), 10)
	edit := func(body, before, after string) string { return strings.Replace(body, before, after, 1) }
	for _, tt := range []struct {
		name, system, body string
		change             func(http.Header)
		code               int
		result             string
	}{
		{"no signature", "github", hub, del("X-Hub-Signature-256"), 401, "unauthorized"},
		{"a wrong signature", "github", hub, set("X-Hub-Signature-256", "sha256="+strings.Repeat("0", 64)), 401, "unauthorized"},
		{"no hex", "github", hub, set("X-Hub-Signature-256", "sha256=zz"), 401, "unauthorized"},
		{"the older signature alone", "github", hub, set("X-Hub-Signature-256", "sha1=00"), 401, "unauthorized"},
		{"a signature over other bytes", "github", hub, set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac(secretText, hub+" "))), 401, "unauthorized"},
		{"a ping", "github", hub, set("X-GitHub-Event", "ping"), 200, "ignored"},
		{"an approval is awaited", "github", edit(hub, `"action": "queued"`, `"action": "waiting"`), nil, 200, "ignored"},
		{"no JSON", "github", "{", nil, 400, "malformed"},
		{"other types", "github", edit(hub, `["self-hosted", "linux"]`, `"linux"`), nil, 400, "malformed"},
		{"no job", "github", `{"action":"queued","repository":{"full_name":"a/b"}}`, nil, 400, "malformed"},
		{"no repository", "github", edit(hub, `"full_name": "acme/shop"`, `"x": 1`), nil, 400, "malformed"},
		{"no id", "github", edit(hub, `"id": 29679449526`, `"id": -1`), nil, 400, "malformed"},
		{"labels by the thousand", "github", edit(hub, `["self-hosted", "linux"]`, `["l"`+strings.Repeat(`,"l"`, 1000)+`]`), nil, 400, "malformed"},
		{"a long label", "github", edit(hub, `"linux"`, `"`+strings.Repeat("l", 10000)+`"`), nil, 400, "malformed"},
		{"a long name", "github", edit(hub, `"acme/shop"`, `"acme/`+strings.Repeat("s", 10000)+`"`), nil, 400, "malformed"},
		{"a unicode name", "github", edit(hub, `"acme/shop"`, `"acme/größe-店"`), nil, 202, "accepted"},
		{"queued long ago", "github", edit(hub, `"created_at": "2026-01-05T08:00:00Z"`, `"created_at": "2026-01-05T06:00:00Z"`), nil, 200, "stale"},
		{"queued tomorrow", "github", edit(hub, `"created_at": "2026-01-05T08:00:00Z"`, `"created_at": "2026-01-06T08:00:00Z"`), nil, 200, "stale"},
		{"a form", "github", "payload=%7B%7D", set("Content-Type", "application/x-www-form-urlencoded"), 415, "malformed"},
		{"30 MB", "github", strings.Repeat(" ", 30<<20), nil, 413, "too-large"},
		{"no token", "gitlab", lab, del("X-Gitlab-Token"), 401, "unauthorized"},
		{"another token", "gitlab", lab, set("X-Gitlab-Token", secretText+"x"), 401, "unauthorized"},
		{"no GitLab signature", "gitlab", lab, del("webhook-signature"), 401, "unauthorized"},
		{"a GitLab signature for another time", "gitlab", lab, set("webhook-timestamp", old), 401, "unauthorized"},
		{"an old GitLab signature", "gitlab", lab, func(h http.Header) {
			h.Set("webhook-timestamp", old)
			h.Set("webhook-signature", "v1,"+base64.StdEncoding.EncodeToString(mac("signing key", "msg_1.", old, ".", lab)))
		}, 401, "stale"},
		{"another hook", "gitlab", lab, set("X-Gitlab-Event", "Push Hook"), 200, "ignored"},
		{"a job that is only created", "gitlab", edit(lab, `"pending"`, `"created"`), nil, 200, "ignored"},
		{"a time that is none", "gitlab", edit(lab, `"2026-01-05 07:59:00 UTC"`, `"yesterday"`), nil, 400, "malformed"},
		{"a GitLab id of another type", "gitlab", edit(lab, `"build_id": 1977`, `"build_id": "x"`), nil, 400, "malformed"},
		{"no Buildkite signature or token", "buildkite", kite, del("X-Buildkite-Signature"), 401, "unauthorized"},
		{"a Buildkite token", "buildkite", kite, func(h http.Header) { h.Del("X-Buildkite-Signature"); h.Set("X-Buildkite-Token", secretText) }, 202, "accepted"},
		{"an empty token", "buildkite", kite, func(h http.Header) { h.Del("X-Buildkite-Signature"); h.Set("X-Buildkite-Token", "") }, 401, "unauthorized"},
		{"a token beside a wrong signature", "buildkite", kite, func(h http.Header) {
			h.Set("X-Buildkite-Signature", "timestamp=1,signature=00")
			h.Set("X-Buildkite-Token", secretText)
		}, 401, "unauthorized"},
		{"an old Buildkite signature", "buildkite", kite, set("X-Buildkite-Signature", "timestamp="+old+",signature="+hex.EncodeToString(mac(secretText, old, ".", kite))), 401, "stale"},
		{"a build event", "buildkite", edit(kite, "job.scheduled", "build.scheduled"), nil, 200, "ignored"},
		{"a manual step", "buildkite", edit(kite, `"type": "script"`, `"type": "manual"`), nil, 200, "ignored"},
		{"null", "buildkite", "null", nil, 400, "malformed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDesk(t, nil)
			code, text := d.send(post(tt.system, tt.body, tt.change))
			if code != tt.code || d.count(tt.system, tt.result) != 1 {
				t.Errorf("answered %d %q", code, text)
			}
			if (len(d.taken()) == 1) != (tt.code == 202) {
				t.Errorf("%d jobs were passed on", len(d.taken()))
			}
			for _, private := range []string{secretText, "octocat", "REDACTED"} {
				if strings.Contains(d.log.String(), private) || strings.Contains(text, private) {
					t.Errorf("%q was told: %s %s", private, d.log.String(), text)
				}
			}
		})
	}
}

func TestEndpoints(t *testing.T) {
	hub := recorded(t, "github_queued.json")
	d := newDesk(t, func(c *Config) { c.GitLab, c.Buildkite = nil, nil })
	for _, tt := range []struct {
		method, path string
		code         int
	}{{"POST", "/webhooks/gitlab", 404}, {"POST", "/webhooks/buildkite", 404}, {"POST", "/webhooks/", 404}, {"GET", "/webhooks/github", 405}} {
		w := httptest.NewRecorder()
		d.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, strings.NewReader(hub)))
		if w.Code != tt.code {
			t.Errorf("%s %s: %d", tt.method, tt.path, w.Code)
		}
	}
	// What cannot be taken in now may come again.
	d.away = true
	if code, _ := d.send(post("github", hub, nil)); code != http.StatusServiceUnavailable {
		t.Errorf("a stand-by answered %d", code)
	}
	d.away, d.full = false, true
	w := httptest.NewRecorder()
	if d.ServeHTTP(w, post("github", hub, nil)); w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") == "" {
		t.Errorf("a full queue answered %d %v", w.Code, w.Header())
	}
	d.full = false
	if code, _ := d.send(post("github", hub, nil)); code != http.StatusAccepted {
		t.Errorf("once there was room: %d", code)
	}
	if _, err := NewReceiver(Config{}); err == nil {
		t.Error("an empty configuration was taken")
	}
}

// A ring of deliveries is remembered, and no more.
func TestRemembersSoMany(t *testing.T) {
	d := newDesk(t, nil)
	for i := range remembered + 10 {
		d.remember(sha256.Sum256([]byte(fmt.Sprint(i))))
	}
	if len(d.seen) != remembered || d.known(sha256.Sum256([]byte("9"))) || !d.known(sha256.Sum256([]byte("10"))) {
		t.Errorf("%d remembered", len(d.seen))
	}
}

func TestSecretFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	log := slog.New(slog.DiscardHandler)
	if _, err := SecretFile(path, time.Now, log); err == nil {
		t.Error("no file was taken")
	}
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(" \n")
	if _, err := SecretFile(path, time.Now, log); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("an empty file: %v", err)
	}
	write("one\n")
	now := time.Now()
	s, err := SecretFile(path, func() time.Time { return now }, log)
	if err != nil || string(s()) != "one" {
		t.Errorf("%q, %v", s(), err)
	}
	write("two\n")
	if string(s()) != "one" {
		t.Error("the file is read for every message")
	}
	now = now.Add(lookAgain)
	if string(s()) != "two" {
		t.Error("a changed file is not noticed")
	}
	for what, spoil := range map[string]func(){"emptied": func() { write("") }, "deleted": func() { _ = os.Remove(path) }} {
		spoil()
		if now = now.Add(lookAgain); string(s()) != "two" {
			t.Errorf("a file that was %s: %q", what, s())
		}
	}
}

// load posts at a rate for a while over real HTTP and returns how long after they
// were due answers came, and how often each code was given.
func load(tb testing.TB, handler http.Handler, rate int, span time.Duration, next func(i int) *http.Request) (took []time.Duration, codes map[int]int) {
	tb.Helper()
	listener, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Second}
	go func() { _ = server.Serve(listener) }()
	defer server.Close()
	transport := &http.Transport{MaxIdleConnsPerHost: 64, MaxConnsPerHost: 64}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	codes = map[int]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := time.Now()
	for i := range int(span.Seconds() * float64(rate)) {
		due := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
		time.Sleep(time.Until(due)) // the rate is the test
		r := next(i)
		r.RequestURI, r.URL.Scheme, r.URL.Host = "", "http", listener.Addr().String()
		wg.Go(func() {
			response, err := client.Do(r)
			if err != nil {
				tb.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, response.Body)
			_ = response.Body.Close()
			mu.Lock()
			defer mu.Unlock()
			took, codes[response.StatusCode] = append(took, time.Since(due)), codes[response.StatusCode]+1
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took, codes
}

// numbered is a queued job of its own.
func numbered(body string, i int) string {
	return strings.Replace(body, "29679449526", strconv.Itoa(1000000+i), 1)
}

// None is lost below the bound.
func TestNoneIsLost(t *testing.T) {
	d := newDesk(t, nil)
	body := recorded(t, "github_queued.json")
	_, codes := load(t, d, 500, 2*time.Second, func(i int) *http.Request { return post("github", numbered(body, i), nil) })
	if len(codes) != 1 || codes[http.StatusAccepted] != 1000 || len(d.taken()) != 1000 {
		t.Errorf("answers %v, %d jobs taken", codes, len(d.taken()))
	}
}

// BenchmarkWebhooks prints what answers take at 500 messages a second for a
// minute, beside a server that only reads them, and how memory grows.
func BenchmarkWebhooks(b *testing.B) {
	body := recorded(b, "github_queued.json")
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc) / (1 << 20)
	}
	for b.Loop() {
		next := func(i int) *http.Request { return post("github", numbered(body, i), nil) }
		none, _ := load(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }), 500, 5*time.Second, next)
		d := newDesk(b, nil)
		before := heap()
		took, codes := load(b, d, 500, time.Minute, next)
		b.ReportMetric(heap()-before, "MiB-grown")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		b.ReportMetric(float64(took[len(took)*99/100])/float64(none[len(none)*99/100]), "p99-ratio")
		if codes[http.StatusAccepted] != len(took) {
			b.Errorf("answers %v", codes)
		}
	}
}

// Bodies that trickle in are given up. They hold up nobody else as long as they
// come from few addresses, and nobody at all for long.
func TestSlowBodies(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as a body may")
	}
	d := newDesk(t, nil)
	server := httptest.NewUnstartedServer(d)
	var err error
	_ = server.Listener.Close()
	if server.Listener, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	server.Start()
	defer server.Close()
	var slow []net.Conn
	trickle := func(from string, n int) {
		for range n {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			c, err := dialer.DialContext(t.Context(), "tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			fmt.Fprintf(c, "POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
			slow = append(slow, c)
		}
		want := len(slow)
		for deadline := time.Now().Add(30 * time.Second); len(d.places) < want && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond) // polls a condition
		}
		if len(d.places) != want {
			t.Fatalf("%d places are taken, want %d", len(d.places), want)
		}
	}
	body := recorded(t, "github_queued.json")
	send := func(from string, i int) int {
		r := post("github", numbered(body, i), nil)
		r.RemoteAddr = from + ":1"
		code, _ := d.send(r)
		return code
	}
	trickle("127.0.0.1", ofOne)
	if one, other := send("127.0.0.1", 1), send("127.0.0.2", 2); one != http.StatusTooManyRequests || other != http.StatusAccepted {
		t.Errorf("with the places of one address taken: %d, another is told %d", one, other)
	}
	for i := 2; i*ofOne <= atOnce; i++ {
		trickle(fmt.Sprint("127.0.0.", i), ofOne)
	}
	if code := send("127.0.0.9", 3); code != http.StatusTooManyRequests {
		t.Errorf("with every place taken: %d", code)
	}
	for _, c := range slow {
		_ = c.SetReadDeadline(time.Now().Add(4 * readWithin))
		answer, err := io.ReadAll(c)
		if err != nil || !bytes.Contains(answer, []byte(" 408 ")) {
			t.Fatalf("a slow one was told %q, %v", answer, err)
		}
	}
	if one, other := send("127.0.0.1", 4), send("127.0.0.9", 5); one != http.StatusAccepted || other != http.StatusAccepted {
		t.Errorf("after they were given up: %d, %d", one, other)
	}
	d.Receiver.mu.Lock()
	defer d.Receiver.mu.Unlock()
	if len(d.held) != 0 {
		t.Errorf("held for ever: %v", d.held)
	}
}

func FuzzWebhooks(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal(err)
	}
	for _, file := range files {
		f.Add(recorded(f, filepath.Base(file)), "v1,x", "1767600300")
	}
	f.Fuzz(func(t *testing.T, body, signature, at string) {
		d := newDesk(t, nil)
		for _, system := range []string{"github", "gitlab", "buildkite"} {
			before := len(d.taken())
			code, _ := d.send(post(system, body, nil)) // signed
			if taken := len(d.taken()) > before; taken != (code == http.StatusAccepted) {
				t.Errorf("%s answered %d, taken %v", system, code, taken)
			}
			if code >= 500 {
				t.Errorf("%s answered %d", system, code)
			}
			before = len(d.taken())
			code, _ = d.send(post(system, body, func(h http.Header) {
				h.Set("X-Hub-Signature-256", signature)
				h.Set("X-Gitlab-Token", at)
				h.Set("X-Buildkite-Signature", signature)
				h.Set("Webhook-Signature", signature)
				h.Set("Webhook-Timestamp", at)
			}))
			if len(d.taken()) > before {
				t.Errorf("%s took what nobody signed (%d)", system, code)
			}
		}
		for _, j := range d.taken() {
			if err := bounded(&j, d.now); err != nil {
				t.Errorf("passed on: %+v", j)
			}
		}
	})
}
