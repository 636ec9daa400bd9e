package placement

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// stopWithin is how long requests may take after the server was told to stop.
const stopWithin = 5 * time.Second

// ServerConfig is what a Server needs. All fields are required.
type ServerConfig struct {
	Listener net.Listener // Run closes it
	Handler  http.Handler // of POST /placement
	// Certificate returns what to show a client now; an error refuses it.
	Certificate func() (*tls.Certificate, error)
	Logger      *slog.Logger
}

// Server serves the webhook over TLS. API servers show no certificate of their
// own unless they are told to: what is answered is no secret, and a NetworkPolicy
// keeps others out.
type Server struct {
	listener net.Listener
	server   *http.Server
}

// NewServer makes a server; it serves nothing before Run.
func NewServer(c ServerConfig) (*Server, error) {
	if c.Listener == nil || c.Handler == nil || c.Certificate == nil || c.Logger == nil {
		return nil, errors.New("making the placement server: a field of its configuration is missing")
	}
	mux := http.NewServeMux()
	mux.Handle("POST /placement", c.Handler)
	return &Server{listener: c.Listener, server: &http.Server{
		Handler:           mux,
		ErrorLog:          slog.NewLogLogger(c.Logger.Handler(), slog.LevelDebug), // handshakes broken off, mostly
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      5 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.Certificate() },
		},
	}}, nil
}

// Run serves until ctx ends, lets requests finish for a few seconds and
// returns nil then. Call it once.
func (s *Server) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- s.server.ServeTLS(s.listener, "", "") }()
	select {
	case err := <-served:
		return fmt.Errorf("serving placement on %s: %w", s.listener.Addr(), err)
	case <-ctx.Done():
	}
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
	defer cancel()
	if s.server.Shutdown(stopping) != nil {
		_ = s.server.Close() // ends the connections that Shutdown waited for
	}
	<-served //nolint:errcheck // it ended because it was told to
	return nil
}
