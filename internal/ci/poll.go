package ci

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	gh "github.com/google/go-github/v88/github"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// pollMost bounds the pause after failures, spareShare is the share of
	// GitHub's rate limit that is left to others, mostPages how many pages of 100
	// are read of one list.
	pollMost   = 10 * time.Minute
	spareShare = 10
	mostPages  = 10
	// answerWithin is how long GitHub may take to begin an answer, listWithin
	// how long a repository may take.
	answerWithin = 20 * time.Second
	listWithin   = 2 * time.Minute
	// mostCached bounds the answers that are kept for conditional requests, which
	// GitHub does not count when nothing has changed; no longer ones are.
	mostCached, cachedBytes = 500, 1 << 20
)

// PollerConfig is what a Poller needs. All fields but API are required.
type PollerConfig struct {
	// Repositories as "owner/name".
	Repositories []string
	// Token may read the actions of all of them.
	Token Secret
	// API is the address of GitHub's REST API; empty for github.com's.
	API    string
	Every  time.Duration
	Sink   Sink
	Logger *slog.Logger
	Now    func() time.Time
}

// Poller asks GitHub which jobs have not ended: for clusters that no webhook
// reaches, and for what webhooks lost.
type Poller struct {
	cfg       PollerConfig
	client    *gh.Client
	transport *http.Transport
	next      int // the repository that is asked first
}

// NewPoller returns a Poller; an error means that the configuration cannot be
// used.
func NewPoller(cfg PollerConfig) (*Poller, error) {
	if len(cfg.Repositories) == 0 || cfg.Token == nil || cfg.Every <= 0 || cfg.Sink == nil || cfg.Logger == nil || cfg.Now == nil {
		return nil, errors.New("making the poller of GitHub: a field of its configuration is missing")
	}
	transport := http.DefaultTransport.(*http.Transport).Clone() // always one
	transport.ResponseHeaderTimeout = answerWithin
	asking := &conditional{token: cfg.Token, next: transport, kept: map[string]answer{}}
	options := []gh.ClientOptionsFunc{gh.WithTransport(asking), gh.WithUserAgent("hearth")}
	if cfg.API != "" {
		base := strings.TrimSuffix(cfg.API, "/") + "/"
		options = append(options, gh.WithURLs(&base, nil))
	}
	client, err := gh.NewClient(options...)
	if err != nil {
		return nil, fmt.Errorf("making a client of GitHub: %w", err)
	}
	asking.base = client.BaseURL()
	return &Poller{cfg: cfg, client: client, transport: transport}, nil
}

// Run asks round after round until ctx ends. A repository that cannot be read
// holds up no other.
func (p *Poller) Run(ctx context.Context) {
	defer p.transport.CloseIdleConnections()
	backoff := p.cfg.Every
	for {
		failed, pause := p.round(ctx)
		if failed {
			backoff = min(2*backoff, max(pollMost, p.cfg.Every))
		} else {
			backoff = p.cfg.Every
		}
		if pause > 0 {
			p.cfg.Logger.Warn("GitHub's rate limit is nearly used up; asking pauses", "for", pause.Round(time.Second))
		}
		timer := time.NewTimer(max(backoff, pause))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// round asks for one repository after the other, until the rate limit wants a
// pause; the next round then goes on with the others. failed says that none
// could be read.
func (p *Poller) round(ctx context.Context) (failed bool, pause time.Duration) {
	failed = true
	for range p.cfg.Repositories {
		repository := p.cfg.Repositories[p.next]
		at := p.cfg.Now()
		jobs, rest, err := p.list(ctx, repository)
		if ctx.Err() != nil {
			return false, 0
		}
		p.next = (p.next + 1) % len(p.cfg.Repositories)
		if err != nil {
			p.cfg.Logger.Warn("asking GitHub for the jobs of a repository failed; it will be tried again", "repository", repository, "err", err)
		} else {
			failed = false
			p.cfg.Sink.JobsListed(demand.Listing{System: demand.GitHub, Scope: githubScope(repository), At: at, Jobs: jobs})
		}
		if rest > 0 {
			return failed, rest
		}
	}
	return failed, 0
}

var errTooMany = errors.New("it has too many runs that have not ended")

// list returns the jobs of a repository that have not ended, and for how long to
// pause for the rate limit's sake.
func (p *Poller) list(ctx context.Context, repository string) (jobs []demand.Job, rest time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, listWithin)
	defer cancel()
	owner, name, _ := strings.Cut(repository, "/")
	runs := map[int64]*gh.WorkflowRun{}
	// A run is what its least advanced job is: waiting when one awaits an approval
	// and others are queued or run, and queued anew when one is queued later. So
	// that is asked for twice, lest a run is missed that goes there meanwhile.
	for _, status := range []string{"queued", "in_progress", "waiting", "queued"} {
		options := &gh.ListWorkflowRunsOptions{Status: status, ExcludePullRequests: true, ListOptions: gh.ListOptions{PerPage: 100}}
		for range mostPages {
			found, response, err := p.client.Actions.ListRepositoryWorkflowRuns(ctx, owner, name, options)
			if err != nil {
				return nil, p.resting(response, err), fmt.Errorf("listing %s runs: %w", status, err)
			}
			for _, run := range found.WorkflowRuns {
				runs[run.GetID()] = run
			}
			rest = max(rest, p.resting(response, nil))
			if options.Page = response.NextPage; options.Page == 0 {
				break
			}
		}
		if options.Page != 0 {
			return nil, rest, errTooMany
		}
	}
	for id, run := range runs {
		options := &gh.ListWorkflowJobsOptions{Filter: "latest", ListOptions: gh.ListOptions{PerPage: 100}}
		for range mostPages {
			found, response, err := p.client.Actions.ListWorkflowJobs(ctx, owner, name, id, options)
			if err != nil {
				return nil, p.resting(response, err), fmt.Errorf("listing the jobs of run %d: %w", id, err)
			}
			for _, w := range found.Jobs {
				j, err := githubJob(cmp.Or(run.GetRepository().GetFullName(), repository), w.GetStatus(), w)
				if err != nil || j.State == demand.Ended || fits(&j) != nil {
					continue // however long it has waited: GitHub says that it does
				}
				if path, _, _ := strings.Cut(run.GetPath(), "@"); path != "" {
					j.Key += model.CacheKey("/" + path)
				}
				jobs = append(jobs, j)
			}
			rest = max(rest, p.resting(response, nil))
			if options.Page = response.NextPage; options.Page == 0 {
				break
			}
		}
		if options.Page != 0 {
			return nil, rest, errTooMany
		}
	}
	return jobs, rest, nil
}

// resting is how long to pause after an answer: until the limit is reset, when
// little of it is left.
func (p *Poller) resting(r *gh.Response, err error) time.Duration {
	if limited := (*gh.AbuseRateLimitError)(nil); errors.As(err, &limited) {
		return max(limited.GetRetryAfter(), time.Minute)
	}
	if r == nil || r.Rate.Limit <= 0 || r.Rate.Remaining > r.Rate.Limit/spareShare {
		return 0
	}
	return min(max(r.Rate.Reset.Sub(p.cfg.Now()), time.Second), time.Hour)
}

// conditional authenticates requests, and asks only for what has changed.
type conditional struct {
	token Secret
	base  string // who is given the token, and nobody else where an answer leads
	next  http.RoundTripper

	mu   sync.Mutex
	kept map[string]answer
}

type answer struct {
	etag   string
	header http.Header
	body   []byte
}

// RoundTrip implements http.RoundTripper.
func (c *conditional) RoundTrip(r *http.Request) (*http.Response, error) {
	url := r.URL.String()
	if !strings.HasPrefix(url, c.base) {
		return c.next.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+string(c.token()))
	c.mu.Lock()
	known, has := c.kept[url]
	c.mu.Unlock()
	if has {
		r.Header.Set("If-None-Match", known.etag)
	}
	response, err := c.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if has && response.StatusCode == http.StatusNotModified {
		_ = response.Body.Close()
		header := known.header.Clone()
		for name, values := range response.Header { // the rate limit is as of now
			header[name] = values
		}
		header.Del("Content-Length")
		response.StatusCode, response.Status, response.Header = http.StatusOK, "200 OK", header
		response.Body, response.ContentLength = io.NopCloser(bytes.NewReader(known.body)), int64(len(known.body))
		return response, nil
	}
	etag := response.Header.Get("ETag")
	if response.StatusCode != http.StatusOK || etag == "" {
		return response, nil
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, cachedBytes+1))
	if err != nil {
		_ = response.Body.Close()
		return nil, err
	}
	rest := response.Body
	response.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(body), rest), rest}
	if len(body) <= cachedBytes {
		c.mu.Lock()
		if len(c.kept) >= mostCached {
			clear(c.kept)
		}
		c.kept[url] = answer{etag, response.Header.Clone(), body}
		c.mu.Unlock()
	}
	return response, nil
}
