// Package telemetry is how Hearth is observed: the logger that everything is
// given, the metrics of interface.md in one struct, and the HTTP server for
// metrics and probes. It owns the names and labels of the metrics and keeps
// labels bounded: no node, pod or job ids. It never decides anything and keeps
// no global state of its own.
package telemetry

import (
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
)

// New returns a logger that writes lines to w. format is json or text, level
// is debug, info, warn or error; the error names the accepted values.
func New(w io.Writer, format, level string) (*slog.Logger, error) {
	least, err := ParseLevel(level)
	if err != nil {
		return nil, err
	}
	return NewLevelled(w, format, least)
}

// ParseLevel reads debug, info, warn or error; the error names them.
func ParseLevel(level string) (slog.Level, error) {
	var least slog.Level
	switch strings.ToLower(level) {
	case "debug", "info", "warn", "error":
		_ = least.UnmarshalText([]byte(level)) // knows these four
		return least, nil
	}
	return 0, fmt.Errorf("log level %q: want debug, info, warn or error", level)
}

// NewLevelled is New with a level that may change while the logger is in use.
func NewLevelled(w io.Writer, format string, level slog.Leveler) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: level}
	switch format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	}
	return nil, fmt.Errorf("log format %q: want json or text", format)
}

// RouteLibraries sends what controller-runtime and client-go log through
// logger. They have one logger per process: call it once, from main.
func RouteLibraries(logger *slog.Logger) {
	ctrllog.SetLogger(logr.FromSlogHandler(logger.Handler()))
	klog.SetSlogLogger(logger)
}
