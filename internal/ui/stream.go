package ui

import (
	"fmt"
	"net/http"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
)

// lookEvery is how often a stream looks whether there is something new.
const lookEvery = time.Second

// serveStream tells a page, by server-sent events, that there is something new
// ("changed") or that the stream lives ("alive"). The page then asks for itself
// anew, so that a stream holds nothing and may break at any time.
func (u *UI) serveStream(w http.ResponseWriter, q *http.Request) {
	if _, err := parseFilter(q.URL.Query(), nil); err != nil {
		refuse(w, http.StatusBadRequest, err.Error(), nil)
		return
	}
	select {
	case u.streams <- struct{}{}:
		defer func() { <-u.streams }()
	default:
		w.Header().Set("Retry-After", "10")
		refuse(w, http.StatusServiceUnavailable, fmt.Sprintf("%d pages are kept live already", streams), nil)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	out := http.NewResponseController(w)
	say := func(what string) bool {
		// The server's own deadline is for answers that end. Not every
		// ResponseWriter has one.
		_ = out.SetWriteDeadline(time.Now().Add(2 * u.cfg.Heartbeat))
		_, err := fmt.Fprintf(w, "event: %s\ndata: -\n\n", what)
		return err == nil && out.Flush() == nil
	}
	var shown *explain.Report
	if shown = u.cfg.Source.Report(); !say("alive") {
		return
	}
	look, heartbeat := time.NewTicker(lookEvery), time.NewTicker(u.cfg.Heartbeat)
	defer look.Stop()
	defer heartbeat.Stop()
	for {
		what := "alive"
		select {
		case <-q.Context().Done():
			return
		case <-u.done:
			return
		case <-heartbeat.C:
		case <-look.C:
			now := u.cfg.Source.Report()
			if now == shown {
				continue
			}
			shown, what = now, "changed"
		}
		if !say(what) {
			return
		}
	}
}
