package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hearth-ci/hearth/internal/ci"
)

// hearing is how a replica hears of CI jobs: webhooks on every one, of which the
// leader alone takes messages in, and asking by the leader.
type hearing struct {
	receiver *ci.Receiver
	poller   *ci.Poller // nil: nobody is asked
	tagger   *ci.Tagger // nil: nobody is asked
}

func (p *provider) newHearing() (*hearing, error) {
	c := p.cfg.CI
	cfg := ci.Config{
		Sink: p.world, Leading: func() bool { return p.controller.View() != nil },
		Requests: p.metrics.WebhookRequests, Logger: p.log, Now: time.Now,
	}
	var token, tags ci.Secret
	for _, s := range []struct {
		field, path string
		into        *ci.Secret
	}{
		{"ci.github.webhookSecretFile", c.GitHub.WebhookSecretFile, &cfg.GitHub},
		{"ci.gitlab.webhookTokenFile", c.GitLab.WebhookTokenFile, &cfg.GitLab},
		{"ci.gitlab.signingSecretFile", c.GitLab.SigningSecretFile, &cfg.GitLabSigning},
		{"ci.buildkite.webhookTokenFile", c.Buildkite.WebhookTokenFile, &cfg.Buildkite},
		{"ci.gitlab.tokenFile", c.GitLab.TokenFile, &tags},
		{"ci.github.tokenFile", c.GitHub.TokenFile, &token},
	} {
		if s.path == "" {
			continue
		}
		secret, err := ci.SecretFile(s.path, time.Now, p.log)
		if err != nil {
			return nil, usageError{fmt.Errorf("%s: %w", s.field, err)}
		}
		*s.into = secret
	}
	h := &hearing{}
	var err error
	if tags != nil {
		if h.tagger, err = ci.NewTagger(ci.TaggerConfig{URL: c.GitLab.URL, Token: tags, Sink: p.world, Logger: p.log}); err != nil {
			return nil, err
		}
		cfg.Tag = h.tagger.Tag
	}
	if h.receiver, err = ci.NewReceiver(cfg); err != nil {
		return nil, err
	}
	if token == nil {
		return h, nil
	}
	h.poller, err = ci.NewPoller(ci.PollerConfig{
		Repositories: c.GitHub.Repositories, Token: token, API: c.GitHub.APIURL, Every: c.GitHub.PollInterval, Sink: p.world, Logger: p.log, Now: time.Now,
	})
	return h, err
}

// lead does what only the leader does.
func (h *hearing) lead(ctx context.Context, group *errgroup.Group) {
	if h.tagger != nil {
		group.Go(func() error { h.tagger.Run(ctx); return nil })
	}
	if h.poller != nil {
		group.Go(func() error { h.poller.Run(ctx); return nil })
	}
}
