package ci

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
)

// jobEvent is what matters of Buildkite's job events
// (https://buildkite.com/docs/apis/webhooks/pipelines/job-events). Its Go client
// has no types for webhooks.
type jobEvent struct {
	Event string `json:"event"`
	Job   struct {
		ID          string    `json:"id"`
		Type        string    `json:"type"`
		Rules       []string  `json:"agent_query_rules"`
		CreatedAt   time.Time `json:"created_at"`
		ScheduledAt time.Time `json:"scheduled_at"`
		RunnableAt  time.Time `json:"runnable_at"`
		StartedAt   time.Time `json:"started_at"`
		FinishedAt  time.Time `json:"finished_at"`
		Agent       struct {
			Name string `json:"name"`
		} `json:"agent"`
	} `json:"job"`
	Pipeline struct {
		Slug string `json:"slug"`
	} `json:"pipeline"`
}

// buildkite reads job events. They bear a token, or a signature that covers the
// time; a webhook is set up for one of them, with the same secret.
func buildkite(secret Secret) source {
	return source{
		system: demand.Buildkite,
		verify: func(m message) error {
			given := m.header.Get("X-Buildkite-Signature")
			if given == "" {
				if !sameText(m.header.Get("X-Buildkite-Token"), secret()) {
					return errForeign
				}
				return nil
			}
			at, text, _ := strings.Cut(given, ",")
			at, one := strings.CutPrefix(at, "timestamp=")
			text, two := strings.CutPrefix(strings.TrimSpace(text), "signature=")
			mac, err := hex.DecodeString(text)
			if !one || !two || err != nil || !signed(mac, secret(), []byte(at), []byte("."), m.body) {
				return errForeign
			}
			return fresh(at, m.now)
		},
		read: func(m message) (demand.Job, error) {
			var e jobEvent
			if err := json.Unmarshal(m.body, &e); err != nil || e.Event == "" {
				return demand.Job{}, errMalformed
			}
			if !strings.HasPrefix(e.Event, "job.") || e.Job.Type != "script" {
				return demand.Job{}, errIgnored
			}
			if e.Job.ID == "" || e.Pipeline.Slug == "" {
				return demand.Job{}, errMalformed
			}
			j := demand.Job{
				ID: demand.JobID(fmt.Sprintf("buildkite/%s", e.Job.ID)), System: demand.Buildkite, Scope: e.Pipeline.Slug,
				Key: model.CacheKey("buildkite/" + e.Pipeline.Slug), Labels: e.Job.Rules, QueuedAt: e.Job.CreatedAt, Runner: e.Job.Agent.Name,
			}
			for _, at := range []time.Time{e.Job.ScheduledAt, e.Job.RunnableAt} {
				if !at.IsZero() {
					j.QueuedAt = at
				}
			}
			switch e.Event {
			case "job.scheduled":
				j.State, j.At, j.Runner = demand.Queued, j.QueuedAt, ""
			case "job.started":
				j.State, j.At = demand.Running, e.Job.StartedAt
			case "job.finished":
				j.State, j.At = demand.Ended, e.Job.FinishedAt
			default:
				return demand.Job{}, errIgnored
			}
			return j, nil
		},
	}
}
