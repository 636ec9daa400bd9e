package ci

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
)

// jobHook is what matters of GitLab's Job Hook
// (https://docs.gitlab.com/user/project/integrations/webhook_events/#job-events).
// GitLab's own client would bring its HTTP client and OAuth along for these.
type jobHook struct {
	Kind       string `json:"object_kind"`
	ID         int64  `json:"build_id"`
	Status     string `json:"build_status"`
	CreatedAt  when   `json:"build_created_at"`
	StartedAt  when   `json:"build_started_at"`
	FinishedAt when   `json:"build_finished_at"`
	ProjectID  int64  `json:"project_id"`
	Project    struct {
		Path string `json:"path_with_namespace"`
	} `json:"project"`
	// Runner is null until one has taken the job; then its tags are told, and
	// not those of the job.
	Runner *struct {
		Description string   `json:"description"`
		Tags        []string `json:"tags"`
	} `json:"runner"`
	// Tags of the job, where a server tells them.
	Tags []string `json:"build_tags"`
}

// when is a time of GitLab's: "2026-01-05 08:00:00 UTC", or as in RFC 3339 on
// newer servers.
type when struct{ time.Time }

func (w *when) UnmarshalJSON(text []byte) error {
	var s *string
	if err := json.Unmarshal(text, &s); err != nil {
		return err
	}
	if s == nil || *s == "" {
		return nil
	}
	var err error
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05 MST", "2006-01-02 15:04:05 -0700"} {
		if w.Time, err = time.Parse(layout, *s); err == nil {
			return nil
		}
	}
	return err
}

// gitlab reads Job Hooks. The token is a plain text in a header; where GitLab
// signs too (webhook-signature, as standardwebhooks.com has it) that covers the
// time.
func gitlab(token, signing Secret) source {
	return source{
		system: demand.GitLab,
		verify: func(m message) error {
			if !sameText(m.header.Get("X-Gitlab-Token"), token()) {
				return errForeign
			}
			if signing == nil {
				return nil
			}
			return standardWebhook(m, signing())
		},
		read: func(m message) (demand.Job, error) {
			if m.header.Get("X-Gitlab-Event") != "Job Hook" {
				return demand.Job{}, errIgnored
			}
			var h jobHook
			if err := json.Unmarshal(m.body, &h); err != nil || h.Kind != "build" || h.ID <= 0 || h.ProjectID <= 0 {
				return demand.Job{}, errMalformed
			}
			j := demand.Job{
				ID: demand.JobID(fmt.Sprintf("gitlab/%d/%d", h.ProjectID, h.ID)), System: demand.GitLab, Scope: h.Project.Path,
				Key: model.CacheKey("gitlab/" + strconv.FormatInt(h.ProjectID, 10)), Labels: h.Tags, QueuedAt: h.CreatedAt.Time,
			}
			if j.Scope == "" {
				j.Scope = strconv.FormatInt(h.ProjectID, 10)
			}
			switch h.Status {
			case "pending":
				// How long it was only created does not count as waiting.
				j.State, j.At, j.QueuedAt = demand.Queued, m.now, m.now
			case "running":
				j.State, j.At = demand.Running, h.StartedAt.Time
			case "success", "failed", "canceled", "skipped":
				j.State, j.At = demand.Ended, h.FinishedAt.Time
			default:
				return demand.Job{}, errIgnored
			}
			return j, nil
		},
	}
}

// standardWebhook checks the headers webhook-id, webhook-timestamp and
// webhook-signature: base64 of the HMAC over "id.timestamp.body", one of several.
func standardWebhook(m message, secret []byte) error {
	if text, ok := strings.CutPrefix(string(secret), "whsec_"); ok {
		key, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return errForeign
		}
		secret = key
	}
	id, at := m.header.Get("webhook-id"), m.header.Get("webhook-timestamp")
	for given := range strings.FieldsSeq(m.header.Get("webhook-signature")) {
		text, ok := strings.CutPrefix(given, "v1,")
		mac, err := base64.StdEncoding.DecodeString(text)
		if ok && err == nil && signed(mac, secret, []byte(id), []byte("."), []byte(at), []byte("."), m.body) {
			return fresh(at, m.now)
		}
	}
	return errForeign
}

// fresh checks the Unix time of a signature.
func fresh(text string, now time.Time) error {
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return errForeign
	}
	if age := now.Sub(time.Unix(seconds, 0)); age > skew || age < -skew {
		return errClock
	}
	return nil
}
