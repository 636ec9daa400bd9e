package ci

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
)

// A pending job of GitLab's is passed on once its tags are known, be it at the
// second try.
func TestTagger(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != "/gitlab/api/v4/projects/380/jobs/1977" || r.Header.Get("PRIVATE-TOKEN") != "token":
			http.Error(w, r.URL.Path, http.StatusNotFound)
		case asked.Add(1) == 1:
			http.Error(w, "try again", http.StatusBadGateway)
		default:
			_, _ = io.WriteString(w, `{"id":1977,"status":"pending","tag_list":["linux","docker"]}`)
		}
	}))
	defer server.Close()
	var tagger *Tagger
	d := newDesk(t, func(c *Config) {
		c.Tag = func(j demand.Job) bool { return tagger.Tag(j) }
	})
	var err error
	tagger, err = NewTagger(TaggerConfig{URL: server.URL + "/gitlab", Token: secret("token"), Sink: d, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); tagger.Run(ctx) }()
	if code, _ := d.send(post("gitlab", recorded(t, "gitlab_pending.json"), nil)); code != http.StatusAccepted {
		t.Fatalf("answered %d", code)
	}
	for deadline := time.Now().Add(20 * time.Second); len(d.taken()) == 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond) // polls a condition
	}
	cancel()
	<-done
	if jobs := d.taken(); len(jobs) != 1 || jobs[0].ID != "gitlab/380/1977" || !slices.Equal(jobs[0].Labels, []string{"linux", "docker"}) {
		t.Errorf("passed on %+v after %d requests", jobs, asked.Load())
	}
	for tagger.Tag(demand.Job{}) { // nobody asks any more
	}
	if code, _ := d.send(post("gitlab", recorded(t, "gitlab_pending.json")+" ", nil)); code != http.StatusTooManyRequests {
		t.Errorf("with too many waiting: %d", code)
	}
}
