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

	"github.com/google/go-cmp/cmp"

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
	after  func(*http.Request) // nil, or what happens after an answer
}

type hubRun struct {
	ID         int64         `json:"id"`
	Status     string        `json:"status"`
	Path       string        `json:"path"`
	Repository hubRepository `json:"repository"`
	jobs       []hubJob
}

type hubRepository struct {
	FullName string `json:"full_name,omitempty"`
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
		for _, run := range h.runs[repositoryOf(r)] {
			if run.Status == r.URL.Query().Get("status") {
				found = append(found, run)
			}
		}
		page(h, w, r, "workflow_runs", found)
	})
	mux.HandleFunc("GET /repos/{owner}/{name}/actions/runs/{run}/jobs", func(w http.ResponseWriter, r *http.Request) {
		id, _ := strconv.ParseInt(r.PathValue("run"), 10, 64)
		for _, run := range h.runs[repositoryOf(r)] {
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
		if h.after != nil {
			h.after(r)
		}
	}))
	t.Cleanup(h.Close)
	return h
}

// repositoryOf is the repository asked about, in whatever case.
func repositoryOf(r *http.Request) string {
	return strings.ToLower(r.PathValue("owner") + "/" + r.PathValue("name"))
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
		Now:          time.Now,
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

// A run's status is that of its least advanced job: it goes back from in progress
// to queued when a further job is queued, and one with a job that awaits an
// approval is waiting, whatever its other jobs do.
func TestPollerFindsRunsThatGoBack(t *testing.T) {
	h, now := newHub(t), time.Now().UTC().Truncate(time.Second)
	back := &hubRun{ID: 1, Status: "in_progress", jobs: []hubJob{{ID: 11, Status: "in_progress", CreatedAt: now, Labels: []string{"linux"}}}}
	approval := &hubRun{ID: 2, Status: "waiting", jobs: []hubJob{
		{ID: 21, Status: "queued", CreatedAt: now, Labels: []string{"linux"}}, {ID: 22, Status: "waiting", CreatedAt: now, Labels: []string{"linux"}},
	}}
	h.runs["acme/shop"] = []*hubRun{back, approval}
	h.after = func(r *http.Request) {
		if r.URL.Query().Get("status") == "queued" && back.Status == "in_progress" {
			back.Status = "queued"
			back.jobs = append(back.jobs, hubJob{ID: 12, Status: "queued", CreatedAt: now, Labels: []string{"linux"}})
		}
	}
	jobs, _, err := h.poller(t, nobody{}, "acme/shop").list(t.Context(), "acme/shop")
	found := map[demand.JobID]demand.State{}
	for _, j := range jobs {
		found[j.ID] = j.State
	}
	if err != nil || len(found) != 3 || found["github/acme/shop/11"] != demand.Running || found["github/acme/shop/12"] != demand.Queued || found["github/acme/shop/21"] != demand.Queued {
		t.Errorf("found %v, %v", found, err)
	}
}

// GitHub does not tell upper from lower case in names: a repository that is
// configured in another case has the same jobs.
func TestPollerAndWebhookMeanTheSameJob(t *testing.T) {
	h := newHub(t)
	h.runs["acme/shop"] = []*hubRun{{
		ID: 1, Status: "queued", Path: ".github/workflows/ci.yml", Repository: hubRepository{"acme/shop"},
		jobs: []hubJob{{ID: 29679449526, Status: "queued", CreatedAt: time.Now(), Labels: []string{"linux"}}},
	}}
	jobs, _, err := h.poller(t, nobody{}, "Acme/Shop").list(t.Context(), "Acme/Shop")
	if err != nil || len(jobs) != 1 {
		t.Fatalf("%d jobs, %v", len(jobs), err)
	}
	d := newDesk(t, nil)
	d.send(post("github", recorded(t, "github_queued.json"), nil))
	told := d.taken()[0]
	if told.ID != jobs[0].ID || told.Scope != jobs[0].Scope || jobs[0].Key != told.Key+"/.github/workflows/ci.yml" {
		t.Errorf("listed %+v\ntold   %+v", jobs[0], told)
	}
}

// A job that GitHub still lists as queued after hours is queued.
func TestPollerListsWhatHasWaitedLong(t *testing.T) {
	h := newHub(t)
	h.runs["acme/shop"] = []*hubRun{{ID: 1, Status: "queued", jobs: []hubJob{{ID: 11, Status: "queued", CreatedAt: time.Now().Add(-3 * time.Hour), Labels: []string{"linux"}}}}}
	if jobs, _, err := h.poller(t, nobody{}, "acme/shop").list(t.Context(), "acme/shop"); err != nil || len(jobs) != 1 {
		t.Errorf("%d jobs, %v", len(jobs), err)
	}
}

// The token goes to GitHub alone, wherever an answer leads.
func TestTokenIsNotGivenAway(t *testing.T) {
	given := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		given <- r.Header.Get("Authorization")
		http.NotFound(w, r)
	}))
	defer other.Close()
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusMovedPermanently)
	}))
	defer h.Close()
	p := (&hub{Server: h}).poller(t, nobody{}, "acme/shop")
	if _, _, err := p.list(t.Context(), "acme/shop"); err == nil {
		t.Error("it was listed")
	}
	close(given)
	for g := range given {
		if g != "" {
			t.Errorf("another host was given %q", g)
		}
	}
}

// When the limit is used up before every repository was asked, the next round
// goes on where this one ended.
func TestPollerGoesOnWhereItEnded(t *testing.T) {
	h := newHub(t)
	h.left = 100 // a pause after every repository
	d := newDesk(t, nil)
	p := h.poller(t, d, "acme/a", "acme/b", "acme/c")
	for range 4 {
		if failed, pause := p.round(t.Context()); failed || pause == 0 {
			t.Fatalf("failed %v, pauses for %s", failed, pause)
		}
	}
	var order []string
	for _, l := range d.listing {
		order = append(order, l.Scope)
	}
	if diff := cmp.Diff([]string{"acme/a", "acme/b", "acme/c", "acme/a"}, order); diff != "" {
		t.Error(diff)
	}
}
