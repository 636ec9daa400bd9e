package ci

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
)

// lead puts a URL into every text of a message, and a field with one into every
// object.
func lead(v any, url string) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			v[key] = lead(value, url)
		}
		for _, key := range []string{"url", "html_url", "jobs_url", "api_url", "web_url", "callback"} {
			v[key] = url
		}
	case []any:
		for i := range v {
			v[i] = lead(v[i], url)
		}
	case string:
		if strings.HasPrefix(v, "http") || strings.Contains(v, "/") {
			return url
		}
	}
	return v
}

// TestDeliveriesLeadNowhere: whatever addresses a signed message has in it, they
// are not asked; GitLab's server is, at a path made of two numbers.
func TestDeliveriesLeadNowhere(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("asked for %s", r.URL) }))
	defer elsewhere.Close()
	asked := make(chan string, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
		_, _ = w.Write([]byte(`{"tag_list":["linux"],"web_url":"` + elsewhere.URL + `"}`))
	}))
	defer server.Close()
	var tagger *Tagger
	tagged := make(chan demand.Job, 1)
	d := newDesk(t, func(c *Config) { c.Tag = func(j demand.Job) bool { tagged <- j; return tagger.Tag(j) } })
	var err error
	tagger, err = NewTagger(TaggerConfig{URL: server.URL, Token: secret("token"), Sink: d, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for _, file := range files {
		var message any
		if err := json.Unmarshal([]byte(recorded(t, filepath.Base(file))), &message); err != nil {
			t.Fatal(err)
		}
		body, err := json.Marshal(lead(message, elsewhere.URL+"/a"))
		if err != nil {
			t.Fatal(err)
		}
		system, _, _ := strings.Cut(filepath.Base(file), "_")
		if code, _ := d.send(post(system, string(body), nil)); code == http.StatusAccepted {
			taken++
		}
	}
	if taken < 3 {
		t.Errorf("%d messages were taken: the rest shows little", taken)
	}
	tagger.tag(t.Context(), <-tagged)
	close(asked)
	for path := range asked {
		if path != "/api/v4/projects/380/jobs/1977" {
			t.Errorf("asked for %s", path)
		}
	}
}

// TestTagTokenIsNotGivenAway: an answer of GitLab's that leads elsewhere is not
// followed: Go would send our token along.
func TestTagTokenIsNotGivenAway(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("another host was given %q", r.Header.Get("PRIVATE-TOKEN"))
	}))
	defer elsewhere.Close()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusFound)
	}))
	defer server.Close()
	tagger, err := NewTagger(TaggerConfig{URL: server.URL, Token: secret("token"), Sink: nobody{}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer tagger.client.CloseIdleConnections()
	if _, err := tagger.ask(context.Background(), demand.Job{ID: "gitlab/1/2"}); err == nil || !strings.Contains(err.Error(), "302") {
		t.Errorf("got %v, want that it answered 302", err)
	}
}

// TestNoSecretIsLogged: with everything logged, no secret, signature or token is
// in it, whoever sent what.
func TestNoSecretIsLogged(t *testing.T) {
	const canary = "canary-7d1f"
	var mu sync.Mutex
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(writer(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(p)
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	d := newDesk(t, func(c *Config) {
		c.Logger = logger
		c.GitHub, c.GitLab, c.Buildkite = secret(canary+"-github"), secret(canary+"-gitlab"), secret(canary+"-buildkite")
	})
	var answers strings.Builder
	for _, system := range []string{"github", "gitlab", "buildkite"} {
		_, text := d.send(post(system, `{"secret":"`+canary+`-body"}`, func(h http.Header) {
			for _, header := range []string{"X-Hub-Signature-256", "X-Gitlab-Token", "X-Buildkite-Token", "X-Buildkite-Signature", "Authorization"} {
				h.Set(header, canary+"-header")
			}
		}))
		answers.WriteString(text)
	}
	tagger, err := NewTagger(TaggerConfig{URL: server.URL, Token: secret(canary + "-token"), Sink: nobody{}, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	defer tagger.client.CloseIdleConnections()
	tagger.tag(t.Context(), demand.Job{ID: "gitlab/1/2"})
	p, err := NewPoller(PollerConfig{Repositories: []string{"acme/shop"}, Token: secret(canary + "-token"), API: server.URL, Every: 1, Sink: nobody{}, Logger: logger, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer p.transport.CloseIdleConnections()
	if failed, _ := p.round(t.Context()); !failed {
		t.Error("the repository was read")
	}
	if n := strings.Count(log.String(), "level="); n < 5 {
		t.Fatalf("%d lines are little to look at:\n%s", n, log.String())
	}
	for what, text := range map[string]string{"log": log.String(), "answers": answers.String()} {
		if strings.Contains(text, canary) {
			t.Errorf("the %s has a secret in it:\n%s", what, text)
		}
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }
