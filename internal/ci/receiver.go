package ci

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-ci/hearth/pkg/demand"
)

const (
	// maxBody is far more than a message about a job takes: some 30 kB.
	maxBody = 256 << 10
	// readWithin bounds how long a body may take, atOnce how many are read at
	// the same time, ofOne how many of these from one address; whoever comes then
	// is told to come again. Who a body is from is known only once it has been
	// read, so that there are places for many, and for others than who is slow.
	readWithin = 5 * time.Second
	atOnce     = 256
	ofOne      = atOnce / 4
	// skew is how far a sender's clock may be away from ours.
	skew = 5 * time.Minute
	// remembered is how many deliveries are known again.
	remembered = 20000
	// Longer names and more labels are nobody's.
	maxName, maxLabels = 512, 100
)

// Sink takes what was heard. Its methods return false when it cannot be taken
// in now, never block, and are called by many at once.
type Sink interface {
	JobObserved(demand.Job) bool
	JobsListed(demand.Listing) bool
}

// Config is what a Receiver needs. Sink, Leading, Requests, Logger and Now are
// required. A system without a secret has no endpoint.
type Config struct {
	GitHub, GitLab, Buildkite Secret
	// GitLabSigning is the key of GitLab's signatures, where it signs; then a
	// message needs both.
	GitLabSigning Secret
	Sink          Sink
	// Tag takes the pending jobs of GitLab whose tags are not known, on the terms
	// of Sink; nil: nobody can say.
	Tag func(demand.Job) bool
	// Leading says whether this process takes jobs in.
	Leading func() bool
	// Requests counts answers by source and result.
	Requests *prometheus.CounterVec
	Logger   *slog.Logger
	Now      func() time.Time
}

// Receiver answers webhooks: POST /webhooks/github, …/gitlab and …/buildkite. It
// is safe for concurrent use.
type Receiver struct {
	cfg    Config
	mux    *http.ServeMux
	places chan struct{}

	mu     sync.Mutex
	held   map[string]int // places by address
	seen   map[[sha256.Size]byte]bool
	recent [][sha256.Size]byte // a ring of seen
	next   int
}

// message is one request, its body read.
type message struct {
	header http.Header
	body   []byte
	now    time.Time
}

// source is one CI system's way of speaking.
type source struct {
	system demand.System
	// verify returns an error when the message is not from who it says.
	verify func(message) error
	// read returns the job that the message is about; errIgnored when it is
	// about something else.
	read func(message) (demand.Job, error)
}

var (
	errIgnored   = errors.New("not about a job that is queued, runs or has ended")
	errForeign   = errors.New("the signature or token is missing or wrong")
	errStale     = errors.New("the message is too old, or from the future")
	errClock     = errors.New("the time that is signed is more than five minutes off")
	errMalformed = errors.New("the message cannot be read")
)

// NewReceiver returns a Receiver, and an error when a field is missing.
func NewReceiver(cfg Config) (*Receiver, error) {
	if cfg.Sink == nil || cfg.Leading == nil || cfg.Requests == nil || cfg.Logger == nil || cfg.Now == nil {
		return nil, errors.New("making the CI webhooks: a field of their configuration is missing")
	}
	r := &Receiver{cfg: cfg, mux: http.NewServeMux(), places: make(chan struct{}, atOnce), held: map[string]int{}, seen: map[[sha256.Size]byte]bool{}, recent: make([][sha256.Size]byte, remembered)}
	if cfg.GitHub != nil {
		r.serve("/webhooks/github", github(cfg.GitHub))
	}
	if cfg.GitLab != nil {
		r.serve("/webhooks/gitlab", gitlab(cfg.GitLab, cfg.GitLabSigning))
	}
	if cfg.Buildkite != nil {
		r.serve("/webhooks/buildkite", buildkite(cfg.Buildkite))
	}
	return r, nil
}

// ServeHTTP implements http.Handler.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, q *http.Request) { r.mux.ServeHTTP(w, q) }

func (r *Receiver) serve(path string, s source) {
	r.mux.HandleFunc("POST "+path, func(w http.ResponseWriter, q *http.Request) {
		code, result, text := r.answer(w, q, s)
		r.cfg.Requests.WithLabelValues(string(s.system), result).Inc()
		if code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "5")
		}
		if code >= http.StatusBadRequest {
			r.cfg.Logger.Debug("a webhook was not taken", "source", s.system, "result", result)
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, text+"\n")
	})
}

// answer takes one request in. What is said of one that is not authentic does
// not depend on anything in it.
func (r *Receiver) answer(w http.ResponseWriter, q *http.Request, s source) (code int, result, text string) {
	select {
	case r.places <- struct{}{}:
		defer func() { <-r.places }()
	default:
		return http.StatusTooManyRequests, "busy", fmt.Sprintf("%d messages are being read already", atOnce)
	}
	from, _, _ := net.SplitHostPort(q.RemoteAddr) // without a port: all from one place
	if !r.hold(from) {
		return http.StatusTooManyRequests, "busy", fmt.Sprintf("%d messages from there are being read already", ofOne)
	}
	defer r.release(from)
	if kind, _, err := mime.ParseMediaType(q.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return http.StatusUnsupportedMediaType, "malformed", "want Content-Type application/json"
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readWithin)) // the system's clock, and not every writer can
	body, err := io.ReadAll(http.MaxBytesReader(w, q.Body, maxBody))
	if tooBig := (*http.MaxBytesError)(nil); errors.As(err, &tooBig) {
		return http.StatusRequestEntityTooLarge, "too-large", "want at most " + strconv.Itoa(maxBody) + " bytes"
	}
	if err != nil {
		return http.StatusRequestTimeout, "malformed", "the body did not come"
	}
	m := message{q.Header, body, r.cfg.Now()}
	if err := s.verify(m); err != nil {
		return refusal(err)
	}
	if !r.cfg.Leading() {
		return http.StatusServiceUnavailable, "not-leading", "another replica takes messages"
	}
	// Over the body, since nothing signs a delivery's id.
	id := sha256.Sum256(append([]byte(s.system+" "), body...))
	if r.known(id) {
		return http.StatusOK, "duplicate", "known"
	}
	j, err := s.read(m)
	if err == nil {
		err = bounded(&j, m.now)
	}
	if err != nil {
		return refusal(err)
	}
	take := r.cfg.Sink.JobObserved
	if j.System == demand.GitLab && j.State == demand.Queued && len(j.Labels) == 0 && r.cfg.Tag != nil {
		take = r.cfg.Tag
	}
	if !take(j) {
		return http.StatusTooManyRequests, "busy", "too many messages wait already"
	}
	r.remember(id)
	return http.StatusAccepted, "accepted", "taken"
}

func refusal(err error) (code int, result, text string) {
	switch {
	case errors.Is(err, errIgnored):
		return http.StatusOK, "ignored", err.Error()
	case errors.Is(err, errForeign):
		return http.StatusUnauthorized, "unauthorized", errForeign.Error()
	case errors.Is(err, errClock): // a replay, or a clock to mend: its sender should show it
		return http.StatusUnauthorized, "stale", err.Error()
	case errors.Is(err, errStale):
		return http.StatusOK, "stale", err.Error() // to send it again would not help
	default:
		return http.StatusBadRequest, "malformed", errMalformed.Error()
	}
}

// bounded refuses what would not fit, and what is too old to matter: a message
// that somebody has kept does not queue its job again.
func bounded(j *demand.Job, now time.Time) error {
	if err := fits(j); err != nil {
		return err
	}
	for _, at := range []time.Time{j.At, j.QueuedAt} {
		if at.After(now.Add(skew)) {
			return errStale
		}
	}
	if j.State == demand.Queued && !j.QueuedAt.IsZero() && now.Sub(j.QueuedAt) > demand.QueuedFor {
		return errStale
	}
	return nil
}

// fits refuses names that are nobody's.
func fits(j *demand.Job) error {
	if len(j.Labels) > maxLabels || !named(j.Scope) || !named(string(j.ID)) || len(j.Runner) > maxName || len(j.Key) > maxName {
		return errMalformed
	}
	for _, l := range j.Labels {
		if !named(l) {
			return errMalformed
		}
	}
	return nil
}

func named(s string) bool { return s != "" && len(s) <= maxName && utf8.ValidString(s) }

// hold takes a place for an address, if it has not too many.
func (r *Receiver) hold(from string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held[from] >= ofOne {
		return false
	}
	r.held[from]++
	return true
}

func (r *Receiver) release(from string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held[from]--; r.held[from] == 0 {
		delete(r.held, from)
	}
}

func (r *Receiver) known(id [sha256.Size]byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[id]
}

func (r *Receiver) remember(id [sha256.Size]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.seen, r.recent[r.next])
	r.recent[r.next] = id
	r.seen[id] = true
	r.next = (r.next + 1) % len(r.recent)
}
