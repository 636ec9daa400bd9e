// Package ui is Hearth's status page: what a person sees of a running provider,
// rendered on the server from the controller's report, its timeline and its
// savings, and the API of the latter two (docs/api.md). It owns the templates,
// the embedded assets and the streams that keep pages live. It is read only,
// holds no data of its own but the last comparison, and asks neither the cloud
// nor the API server.
package ui

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/internal/savings"
)

const (
	// atOnce bounds the pages that are rendered at the same time, streams the
	// pages that are kept live.
	atOnce, streams = 4, 64
	// compareEvery is how often the savings are computed.
	compareEvery = time.Minute
)

// Source is what a UI shows. Its methods are called by many at once, and answer
// from memory.
type Source interface {
	// Report is nil when this process does not lead or has not planned yet.
	Report() *explain.Report
	// Events are the newest, the newest first.
	Events() []explain.Event
	// Savings may take long.
	Savings(now time.Time) *savings.Report
}

// Config is what a UI needs. Source and Logger are required.
type Config struct {
	Source Source
	Logger *slog.Logger
	// Leader names the pod that leads, empty when that is not known.
	Leader func() string
	// Heartbeat is how often a stream says that it lives. Default 10 s; a page
	// that hears nothing for three of them connects anew.
	Heartbeat time.Duration
}

// UI serves the status page. Run keeps its savings fresh.
type UI struct {
	cfg     Config
	page    *template.Template
	mux     *http.ServeMux
	savings atomic.Pointer[savings.Report]
	places  chan struct{}
	streams chan struct{}
	done    chan struct{} // closed when streams are to end
	once    sync.Once
}

//go:embed assets
var assets embed.FS

// New checks the configuration. It starts nothing.
func New(cfg Config) (*UI, error) {
	if cfg.Source == nil || cfg.Logger == nil {
		return nil, errors.New("making the status page: Source and Logger are required")
	}
	if cfg.Leader == nil {
		cfg.Leader = func() string { return "" }
	}
	if cfg.Heartbeat == 0 {
		cfg.Heartbeat = 10 * time.Second
	}
	page, err := template.New("").Funcs(words()).ParseFS(assets, "assets/*.html")
	if err != nil {
		return nil, fmt.Errorf("reading the status page's templates: %w", err)
	}
	files, err := fs.Sub(assets, "assets")
	if err != nil {
		return nil, fmt.Errorf("reading the status page's assets: %w", err)
	}
	u := &UI{
		cfg: cfg, page: page, mux: http.NewServeMux(),
		places: make(chan struct{}, atOnce), streams: make(chan struct{}, streams), done: make(chan struct{}),
	}
	u.mux.HandleFunc("GET /ui", u.bounded(u.servePage))
	u.mux.Handle("GET /ui/{$}", http.RedirectHandler("/ui", http.StatusMovedPermanently))
	u.mux.HandleFunc("GET /ui/events", u.serveStream)
	for _, name := range []string{"ui.css", "ui.js"} {
		u.mux.HandleFunc("GET /ui/"+name, func(w http.ResponseWriter, q *http.Request) {
			w.Header().Set("Cache-Control", "no-cache")
			http.ServeFileFS(w, q, files, name)
		})
	}
	u.mux.HandleFunc("GET /api/v1/timeline", u.bounded(u.serveTimeline))
	u.mux.HandleFunc("GET /api/v1/savings", u.bounded(u.serveSavings))
	return u, nil
}

// Run computes the savings now and then, while this process leads, until ctx
// ends. Then it ends the streams.
func (u *UI) Run(ctx context.Context) {
	defer u.Close()
	tick := time.NewTicker(compareEvery)
	defer tick.Stop()
	soon := time.NewTicker(5 * time.Second)
	defer soon.Stop()
	for {
		if u.cfg.Source.Report() == nil {
			u.savings.Store(nil)
		} else {
			u.savings.Store(u.cfg.Source.Savings(time.Now()))
			soon.Stop()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-soon.C: // until the first plan
		}
	}
}

// Close ends the streams, so that a server that stops need not wait for them.
func (u *UI) Close() { u.once.Do(func() { close(u.done) }) }

// ServeHTTP serves /ui, what is below it, /api/v1/timeline and /api/v1/savings.
func (u *UI) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "+
		"form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	u.mux.ServeHTTP(w, q)
}

// bounded answers when there is a place.
func (u *UI) bounded(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, q *http.Request) {
		select {
		case u.places <- struct{}{}:
			defer func() { <-u.places }()
			serve(w, q)
		default:
			w.Header().Set("Retry-After", "1")
			refuse(w, http.StatusServiceUnavailable, fmt.Sprintf("%d requests are being answered already", atOnce), nil)
		}
	}
}

func (u *UI) servePage(w http.ResponseWriter, q *http.Request) {
	f, err := parseFilter(q.URL.Query(), pageParameters())
	if err != nil {
		u.render(w, http.StatusBadRequest, "message", message{"This link cannot be read", err.Error()})
		return
	}
	report := u.cfg.Source.Report()
	if report == nil {
		text := "This replica has no plan: it is a stand-by, or has just begun to lead."
		if leader := u.cfg.Leader(); leader != "" {
			text += " The leader is " + leader + "."
		} else {
			text += " The leader's pod has the label hearth.dev/leader=true."
		}
		u.render(w, http.StatusServiceUnavailable, "message", message{"Not the leader", text})
		return
	}
	v := newView(report, u.cfg.Source.Events(), u.savings.Load(), f)
	v.Stall = int((3 * u.cfg.Heartbeat).Milliseconds())
	u.render(w, http.StatusOK, "page", v)
}

// message is a page that says one thing.
type message struct{ Title, Text string }

// render makes the whole page before it answers, so that an error is not half a
// page.
func (u *UI) render(w http.ResponseWriter, code int, name string, data any) {
	var b bytes.Buffer
	if err := u.page.ExecuteTemplate(&b, name, data); err != nil {
		u.cfg.Logger.Error("rendering the status page failed", "err", err)
		http.Error(w, "the page cannot be rendered; the log says why", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write(b.Bytes())
}

func (u *UI) serveTimeline(w http.ResponseWriter, q *http.Request) {
	f, err := parseFilter(q.URL.Query(), timelineParameters())
	if err != nil {
		refuse(w, http.StatusBadRequest, err.Error(), timelineParameters())
		return
	}
	if u.cfg.Source.Report() == nil {
		u.none(w)
		return
	}
	events, more := f.events(u.cfg.Source.Events())
	answer(w, http.StatusOK, struct {
		Events []explain.Event `json:"events"`
		// More older ones match: ask again with before set to the last seq.
		More bool `json:"more"`
	}{events, more})
}

func (u *UI) serveSavings(w http.ResponseWriter, q *http.Request) {
	if _, err := parseFilter(q.URL.Query(), nil); err != nil {
		refuse(w, http.StatusBadRequest, err.Error(), nil)
		return
	}
	s := u.savings.Load()
	if s == nil || u.cfg.Source.Report() == nil {
		u.none(w)
		return
	}
	answer(w, http.StatusOK, s)
}

func (u *UI) none(w http.ResponseWriter) {
	refuse(w, http.StatusServiceUnavailable, "nothing here: this replica does not lead (the pod labelled hearth.dev/leader=true does), or has just begun to", nil)
}

// refuse answers with an error, and the parameters that are accepted.
func refuse(w http.ResponseWriter, code int, text string, accepted []string) {
	answer(w, code, struct {
		Error    string   `json:"error"`
		Accepted []string `json:"accepted,omitempty"`
	}{text, accepted})
}

// answer writes a body as JSON. An error means that the client has gone.
func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
