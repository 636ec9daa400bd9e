package ci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
)

const (
	// mostUntagged bounds the jobs whose tags are not known yet, taggers the
	// requests at a time, tagTries how often one is tried.
	mostUntagged = 1000
	taggers      = 4
	tagTries     = 3
)

// TaggerConfig is what a Tagger needs. All fields are required.
type TaggerConfig struct {
	// URL is the address of the GitLab server.
	URL string
	// Token may read the API (scope read_api).
	Token  Secret
	Sink   Sink
	Logger *slog.Logger
}

// Tagger asks GitLab for the tags of pending jobs, which its Job Hook does not
// tell, and passes the jobs on with them.
type Tagger struct {
	cfg    TaggerConfig
	client *http.Client
	jobs   chan demand.Job
}

// NewTagger returns a Tagger; an error means that the configuration cannot be
// used.
func NewTagger(cfg TaggerConfig) (*Tagger, error) {
	if cfg.URL == "" || cfg.Token == nil || cfg.Sink == nil || cfg.Logger == nil {
		return nil, errors.New("making the reader of GitLab's tags: a field of its configuration is missing")
	}
	transport := http.DefaultTransport.(*http.Transport).Clone() // always one
	transport.ResponseHeaderTimeout = answerWithin
	client := &http.Client{
		Transport: transport,
		// Go would take our header along to wherever an answer leads, token and all.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &Tagger{cfg: cfg, client: client, jobs: make(chan demand.Job, mostUntagged)}, nil
}

// Tag takes a job without tags. It returns false when too many wait, and never
// blocks.
func (t *Tagger) Tag(j demand.Job) bool {
	select {
	case t.jobs <- j:
		return true
	default:
		return false
	}
}

// Run asks until ctx ends.
func (t *Tagger) Run(ctx context.Context) {
	defer t.client.CloseIdleConnections()
	var running sync.WaitGroup
	defer running.Wait()
	for range taggers {
		running.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case j := <-t.jobs:
					t.tag(ctx, j)
				}
			}
		})
	}
}

// tag passes a job on with its tags. What cannot be asked is given up: its pod
// will tell.
func (t *Tagger) tag(ctx context.Context, j demand.Job) {
	var err error
	for try := range tagTries {
		if try > 0 {
			timer := time.NewTimer(time.Duration(try) * time.Second)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
		}
		if j.Labels, err = t.ask(ctx, j); err == nil {
			if len(j.Labels) > 0 && bounded(&j, j.At) == nil {
				t.cfg.Sink.JobObserved(j)
			}
			return
		}
	}
	if ctx.Err() == nil {
		t.cfg.Logger.Warn("asking GitLab for the tags of a job failed; no node is started for it ahead of its pod", "job", j.ID, "err", err)
	}
}

func (t *Tagger) ask(ctx context.Context, j demand.Job) ([]string, error) {
	project, job, _ := strings.Cut(strings.TrimPrefix(string(j.ID), "gitlab/"), "/")
	address, err := url.JoinPath(t.cfg.URL, "api/v4/projects", project, "jobs", job)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("PRIVATE-TOKEN", string(t.cfg.Token()))
	response, err := t.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answered %s", response.Status)
	}
	var answer struct {
		Tags []string `json:"tag_list"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, maxBody)).Decode(&answer); err != nil {
		return nil, fmt.Errorf("reading its answer: %w", err)
	}
	return answer.Tags, nil
}
