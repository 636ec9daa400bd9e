package ci

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	gh "github.com/google/go-github/v88/github"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
)

// github reads webhooks of the event workflow_job
// (https://docs.github.com/en/webhooks/webhook-events-and-payloads#workflow_job).
// Its signature covers the body alone; deliveries come twice, late, out of order
// or never.
func github(secret Secret) source {
	return source{
		system: demand.GitHub,
		verify: func(m message) error {
			text, ok := strings.CutPrefix(m.header.Get("X-Hub-Signature-256"), "sha256=")
			mac, err := hex.DecodeString(text)
			if !ok || err != nil || !signed(mac, secret(), m.body) {
				return errForeign
			}
			return nil
		},
		read: func(m message) (demand.Job, error) {
			if m.header.Get("X-GitHub-Event") != "workflow_job" {
				return demand.Job{}, errIgnored
			}
			var e gh.WorkflowJobEvent
			if err := json.Unmarshal(m.body, &e); err != nil || e.GetWorkflowJob() == nil || e.GetRepo().GetFullName() == "" {
				return demand.Job{}, errMalformed
			}
			return githubJob(e.GetRepo().GetFullName(), e.GetAction(), e.GetWorkflowJob())
		},
	}
}

// githubJob is a job as GitHub tells of it. Status waiting is one that waits for
// an approval, requested and pending one that waits for others of its run: it is
// queued when its event says so.
func githubJob(repository, status string, w *gh.WorkflowJob) (demand.Job, error) {
	scope := githubScope(repository)
	j := demand.Job{
		ID: demand.JobID(fmt.Sprintf("github/%s/%d", scope, w.GetID())), System: demand.GitHub, Scope: scope,
		// Which workflow is told by its title alone, not by its file.
		Key: model.CacheKey("github/" + repository), Labels: w.Labels,
		QueuedAt: w.GetCreatedAt().Time, Runner: w.GetRunnerName(),
	}
	if w.GetID() <= 0 {
		return demand.Job{}, errMalformed
	}
	var at time.Time
	switch status {
	case "queued":
		j.State, at = demand.Queued, j.QueuedAt
		j.Runner = ""
	case "in_progress":
		j.State, at = demand.Running, w.GetStartedAt().Time
	case "completed":
		j.State, at = demand.Ended, w.GetCompletedAt().Time
	default:
		return demand.Job{}, errIgnored
	}
	j.At = at
	return j, nil
}

// githubScope is a repository as jobs are known by it: people write it in another
// case than GitHub does, which takes both for the same.
func githubScope(repository string) string { return strings.ToLower(repository) }
