package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// stopWithin is how long requests may take after the server was told to stop.
const stopWithin = 5 * time.Second

// HTTPConfig is what an HTTP server needs. All fields but API, Webhooks, UI and Stopping are required.
type HTTPConfig struct {
	// Listener is where it serves; Run closes it.
	Listener net.Listener
	Gatherer prometheus.Gatherer
	// Ready returns nil when the process can do its work, else why not. It
	// must not block.
	Ready  func() error
	Logger *slog.Logger
	// API serves what is below /api/, Webhooks what is below /webhooks/.
	API, Webhooks http.Handler
	// UI serves what is at and below /ui, and what it needs below /api/.
	UI http.Handler
	// Stopping is called when the server begins to stop: answers that would
	// not end by themselves are to end then.
	Stopping func()
}

// HTTP serves /metrics, /healthz (the process runs), /readyz, /api/, /webhooks/ and /ui.
type HTTP struct {
	listener net.Listener
	server   *http.Server
}

// NewHTTP makes a server; it serves nothing before Run.
func NewHTTP(c HTTPConfig) (*HTTP, error) {
	if c.Listener == nil || c.Gatherer == nil || c.Ready == nil || c.Logger == nil {
		return nil, errors.New("making the HTTP server: Listener, Gatherer, Ready and Logger are required")
	}
	errorLog := slog.NewLogLogger(c.Logger.Handler(), slog.LevelWarn)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Gatherer, promhttp.HandlerOpts{
		ErrorLog:            errorLog,
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
		Timeout:             10 * time.Second,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := c.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	if c.API != nil {
		mux.Handle("/api/", c.API)
	}
	if c.Webhooks != nil {
		mux.Handle("/webhooks/", c.Webhooks)
	}
	if c.UI != nil {
		for _, path := range []string{"/ui", "/ui/", "/api/v1/timeline", "/api/v1/savings"} {
			mux.Handle(path, c.UI)
		}
	}
	server := &http.Server{
		Handler:           mux,
		ErrorLog:          errorLog,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	if c.Stopping != nil {
		server.RegisterOnShutdown(c.Stopping)
	}
	return &HTTP{listener: c.Listener, server: server}, nil
}

// Run serves until ctx ends, lets requests finish for a few seconds and
// returns nil then. Call it once.
func (h *HTTP) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- h.server.Serve(h.listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving HTTP on %s: %w", h.listener.Addr(), err)
	case <-ctx.Done():
	}
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
	defer cancel()
	if h.server.Shutdown(stopping) != nil {
		_ = h.server.Close() // ends the connections that Shutdown waited for
	}
	<-served //nolint:errcheck // it ended because it was told to
	return nil
}
