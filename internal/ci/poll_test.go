package ci

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
)

// hub is GitHub's REST API as far as the poller asks: runs of repositories with
// jobs, pages, ETags, and a rate limit. Requests that are answered 304 do not
// count against it (https://docs.github.com/en/rest/using-the-rest-api/best-practices-for-using-the-rest-api).
type hub struct {
	*httptest.Server
	mu     sync.Mutex
	runs   map[string][]*hubRun // by repository
	broken map[string]bool
	left   int
	asked  int // requests that counted
	same   int // that did not
	tokens map[string]int
}

type hubRun struct {
	ID     int64  `json:"id"`
	Status string `json:"status"`
	Path   string `json:"path"`
	jobs   []hubJob
}

type hubJob struct {
	ID        int64     `json:"id"`
	Status    string    `json:"status"`
	CreatedAt time.Time `json:"created_at"`
	Labels    []string  `json:"labels"`
	Runner    string    `json:"runner_name,omitempty"`
}

func newHub(t *testing.T) *hub {
	h := &hub{runs: map[string][]*hubRun{}, broken: map[string]bool{}, left: 5000, tokens: map[string]int{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /repos/{owner}/{name}/actions/runs", func(w http.ResponseWriter, r *http.Request) {
		var found []*hubRun
		for _, run := range h.runs[r.PathValue("owner")+"/"+r.PathValue("name")] {
			if run.Status == r.URL.Query().Get("status") {
				found = append(found, run)
			}
		}
		page(h, w, r, "workflow_runs", found)
	})
	mux.HandleFunc("GET /repos/{owner}/{name}/actions/runs/{run}/jobs", func(w http.ResponseWriter, r *http.Request) {
		id, _ := strconv.ParseInt(r.PathValue("run"), 10, 64)
		for _, run := range h.runs[r.PathValue("owner")+"/"+r.PathValue("name")] {
			if run.ID == id {
				page(h, w, r, "jobs", run.jobs)
				return
			}
		}
		http.NotFound(w, r)
	})
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.tokens[r.Header.Get("Authorization")]++
		if h.broken[strings.Join(strings.Split(r.URL.Path, "/")[2:4], "/")] {
			http.Error(w, `{"message":"Not Found"}`, http.StatusNotFound)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(h.Close)
	return h
}

// page answers with a page of a list.
func page[T any](h *hub, w http.ResponseWriter, r *http.Request, name string, all []T) {
	n, _ := strconv.Atoi(r.URL.Query().Get("page"))
	n = max(n, 1)
	from, to := min((n-1)*100, len(all)), min(n*100, len(all))
	body, _ := json.Marshal(map[string]any{"total_count": len(all), name: all[from:to]})
	etag := fmt.Sprintf("%q", fmt.Sprint(len(body), string(body)))
	etag = fmt.Sprintf(`"%x"`, mac("etag", etag)[:8])
	w.Header().Set("ETag", etag)
	w.Header().Set("Content-Type", "application/json")
	if same := r.Header.Get("If-None-Match") == etag; same {
		h.same++
	} else {
		h.asked++
		h.left--
	}
	w.Header().Set("X-RateLimit-Limit", "5000")
	w.Header().Set("X-RateLimit-Remaining", strconv.Itoa(max(h.left, 0)))
	w.Header().Set("X-RateLimit-Reset", strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10))
	if to < len(all) {
		next := *r.URL
		q := next.Query()
		q.Set("page", strconv.Itoa(n+1))
		next.RawQuery = q.Encode()
		w.Header().Set("Link", fmt.Sprintf(`<http://%s%s>; rel="next"`, r.Host, next.String()))
	}
	if r.Header.Get("If-None-Match") == etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	_, _ = w.Write(body)
}

func (h *hub) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

func (h *hub) poller(t *testing.T, sink Sink, repositories ...string) *Poller {
	t.Helper()
	p, err := NewPoller(PollerConfig{
		Repositories: repositories, Token: secret("token"), API: h.URL, Every: 10 * time.Millisecond, Sink: sink, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.transport.CloseIdleConnections)
	return p
}

func TestPollerLists(t *testing.T) {
	h, now := newHub(t), time.Now().UTC().Truncate(time.Second)
	job := func(id int64, status, runner string) hubJob {
		return hubJob{ID: id, Status: status, CreatedAt: now, Labels: []string{"linux"}, Runner: runner}
	}
	many := &hubRun{ID: 3, Status: "in_progress", Path: ".github/workflows/matrix.yml@refs/heads/main"}
	for i := range 250 {
		many.jobs = append(many.jobs, job(int64(1000+i), "queued", ""))
	}
	h.runs["acme/shop"] = []*hubRun{
		{ID: 1, Status: "queued", Path: ".github/workflows/ci.yml", jobs: []hubJob{job(11, "queued", ""), job(12, "waiting", "")}},
		{ID: 2, Status: "in_progress", Path: ".github/workflows/ci.yml", jobs: []hubJob{job(21, "in_progress", "runner-1"), job(22, "completed", "runner-2")}},
		many,
		{ID: 4, Status: "completed", jobs: []hubJob{job(41, "completed", "")}},
	}
	p := h.poller(t, nobody{}, "acme/shop")
	jobs, rest, err := p.list(t.Context(), "acme/shop")
	if err != nil || rest != 0 || len(jobs) != 252 {
		t.Fatalf("%d jobs, rest %s, %v", len(jobs), rest, err)
	}
	find := func(id demand.JobID) demand.Job {
		return jobs[slices.IndexFunc(jobs, func(j demand.Job) bool { return j.ID == id })]
	}
	if j := find("github/acme/shop/11"); j.State != demand.Queued || j.Key != "github/acme/shop/.github/workflows/ci.yml" || !j.QueuedAt.Equal(now) {
		t.Errorf("%+v", j)
	}
	if j := find("github/acme/shop/21"); j.State != demand.Running || j.Runner != "runner-1" {
		t.Errorf("%+v", j)
	}
	if j := find("github/acme/shop/1249"); j.Key != "github/acme/shop/.github/workflows/matrix.yml" {
		t.Errorf("%+v", j)
	}
	// What has not changed is not counted.
	asked := h.asked
	again, _, err := p.list(t.Context(), "acme/shop")
	if err != nil || len(again) != 252 || h.asked != asked || h.same == 0 {
		t.Errorf("once more: %d jobs, %d requests counted, %d did not; %v", len(again), h.asked-asked, h.same, err)
	}
	h.change(func() { h.runs["acme/shop"] = h.runs["acme/shop"][:1] })
	if jobs, _, err := p.list(t.Context(), "acme/shop"); err != nil || len(jobs) != 1 {
		t.Errorf("after a change: %d jobs, %v", len(jobs), err)
	}
	if len(h.tokens) != 1 || h.tokens["Bearer token"] == 0 {
		t.Errorf("tokens %v", h.tokens)
	}
	h.change(func() { h.left = 100 })
	if _, rest, _ := p.list(t.Context(), "acme/shop"); rest < time.Minute {
		t.Errorf("with a limit nearly used up it rests %s", rest)
	}
}

// nobody takes everything and keeps nothing.
type nobody struct{}

func (nobody) JobObserved(demand.Job) bool    { return true }
func (nobody) JobsListed(demand.Listing) bool { return true }

// One repository that cannot be read holds up no other, and too long a list is
// not taken for a whole one.
func TestPollerRuns(t *testing.T) {
	h := newHub(t)
	h.broken["acme/gone"] = true
	for i := range 1001 {
		h.runs["acme/huge"] = append(h.runs["acme/huge"], &hubRun{ID: int64(i + 1), Status: "queued"})
	}
	h.runs["acme/shop"] = []*hubRun{{ID: 1, Status: "queued", jobs: []hubJob{{ID: 11, Status: "queued", CreatedAt: time.Now(), Labels: []string{"linux"}}}}}
	d := newDesk(t, nil)
	p := h.poller(t, d, "acme/gone", "acme/huge", "acme/shop")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); p.Run(ctx) }()
	deadline := time.Now().Add(20 * time.Second)
	for n := 0; n < 2 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) { // polls a condition
		d.mu.Lock()
		n = len(d.listing)
		d.mu.Unlock()
	}
	cancel()
	<-done
	if len(d.listing) < 2 {
		t.Fatalf("%d listings", len(d.listing))
	}
	for _, l := range d.listing {
		if l.Scope != "acme/shop" || len(l.Jobs) != 1 || l.At.IsZero() {
			t.Errorf("listed %+v", l)
		}
	}
	if _, err := NewPoller(PollerConfig{}); err == nil {
		t.Error("an empty configuration was taken")
	}
}
