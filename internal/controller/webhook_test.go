package controller

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/ci"
	"github.com/hearth-ci/hearth/pkg/demand"
)

// TestWebhookToLaunch measures, in real time and in one process, how long after a
// webhook the cloud is asked for a node: HTTP, signature, the owner's gathering,
// the plan, the record's write and the call, the last two of 5 ms each. -v prints it;
// it is no assertion.
func TestWebhookToLaunch(t *testing.T) {
	const jobs = 50
	l := newLab(t, linux("prescale-max", fmt.Sprint(jobs)))
	l.groups[0].Max = jobs
	l.cloud.setLatency(5 * time.Millisecond)
	l.store.setLatency(5 * time.Millisecond)
	l.change = func(c *Config) {
		c.Tick, c.PlanEvery, c.SnapshotFast = 50*time.Millisecond, 100*time.Millisecond, 50*time.Millisecond
	}
	defer l.close()
	l.start()
	receiver, err := ci.NewReceiver(ci.Config{
		GitHub: func() []byte { return []byte("secret") }, Sink: l.world, Leading: func() bool { return true },
		Requests: l.metrics.WebhookRequests, Logger: slog.New(slog.DiscardHandler), Now: time.Now,
	})
	l.must(err)
	server := httptest.NewServer(receiver)
	defer server.Close()
	defer server.Client().CloseIdleConnections()
	var took []time.Duration
	for i := range jobs {
		body := fmt.Appendf(nil, `{"action":"queued","workflow_job":{"id":%d,"run_id":1,"status":"queued","labels":["linux"],"created_at":%q},"repository":{"full_name":"acme/shop"}}`,
			i+1, time.Now().UTC().Format(time.RFC3339))
		mac := hmac.New(sha256.New, []byte("secret"))
		mac.Write(body)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/webhooks/github", bytes.NewReader(body))
		l.must(err)
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("X-GitHub-Event", "workflow_job")
		r.Header.Set("X-GitHub-Delivery", fmt.Sprint(i))
		r.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac.Sum(nil)))
		began := time.Now()
		answer, err := server.Client().Do(r)
		l.must(err)
		_ = answer.Body.Close()
		if answer.StatusCode != http.StatusAccepted {
			t.Fatalf("the webhook was answered with %s", answer.Status)
		}
		for l.cloud.desired(runners) < i+1 {
			if time.Since(began) > 20*time.Second {
				t.Fatalf("no launch for job %d\n%s", i, l.state())
			}
			time.Sleep(time.Millisecond) // polls a condition
		}
		took = append(took, time.Since(began))
		// Else it would measure how often a cloud is read while it launches.
		l.within(20*time.Second, "instance in a reading", func() bool { return len(l.explained(runners).Nodes) == i+1 })
	}
	slices.Sort(took)
	t.Logf("webhook to launch: median %s, p99 %s of %d", took[jobs/2].Round(time.Millisecond), took[jobs*99/100].Round(time.Millisecond), jobs)
	if queued := l.pending(string(demand.GitHub)); queued != jobs {
		t.Errorf("%g jobs are queued, want %d", queued, jobs)
	}
}
