package explain

import (
	"encoding/json"
	"fmt"
	"net/http"
)

// atOnce bounds the reports that are written at the same time: a report of
// thousands of nodes is some megabytes.
const atOnce = 4

// problem is the body of every answer that is not 200.
type problem struct {
	Error string `json:"error"`
	// Known are the ids of the groups that there are, when another was asked
	// for.
	Known []string `json:"known,omitempty"`
}

// Handler serves a report, read only, below /api/v1/nodegroups. latest returns
// the newest one from memory, nil when this process has none: it does not lead,
// or has not planned yet.
func Handler(latest func() *Report) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/nodegroups", func(w http.ResponseWriter, _ *http.Request) {
		if r := latest(); r != nil {
			answer(w, http.StatusOK, r)
			return
		}
		none(w)
	})
	mux.HandleFunc("GET /api/v1/nodegroups/{id}", func(w http.ResponseWriter, q *http.Request) {
		r := latest()
		if r == nil {
			none(w)
			return
		}
		missing := problem{Error: fmt.Sprintf("unknown node group %.100q", q.PathValue("id"))}
		for i := range r.Groups {
			if r.Groups[i].ID == q.PathValue("id") {
				answer(w, http.StatusOK, &r.Groups[i])
				return
			}
			missing.Known = append(missing.Known, r.Groups[i].ID)
		}
		answer(w, http.StatusNotFound, missing)
	})
	places := make(chan struct{}, atOnce)
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
			mux.ServeHTTP(w, q)
		default:
			w.Header().Set("Retry-After", "1")
			answer(w, http.StatusServiceUnavailable, problem{Error: fmt.Sprintf("%d requests are being answered already", atOnce)})
		}
	})
}

func none(w http.ResponseWriter) {
	answer(w, http.StatusServiceUnavailable, problem{
		Error: "no plan here: this replica does not lead (the pod labelled hearth.dev/leader=true does), or has just begun to",
	})
}

// answer writes a body as JSON. An error means that the client has gone.
func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
