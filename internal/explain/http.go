package explain

import (
	"context"
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

// Source is what a Handler asks. Its methods are called by many at once.
type Source interface {
	// Report returns the newest report from memory, nil when this process has
	// none: it does not lead, or has not planned yet.
	Report() *Report
	// Pod says where a runner pod went, nil when no such pod is known. An error
	// means that this process cannot tell now.
	Pod(ctx context.Context, namespace, name string) (*Pod, error)
}

// Handler serves what it is told, read only, below /api/v1.
func Handler(source Source) http.Handler {
	latest := source.Report
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
	mux.HandleFunc("GET /api/v1/pods/{namespace}/{name}", func(w http.ResponseWriter, q *http.Request) {
		namespace, name := q.PathValue("namespace"), q.PathValue("name")
		pod, err := source.Pod(q.Context(), namespace, name)
		switch {
		case err != nil:
			none(w)
		case pod == nil:
			answer(w, http.StatusNotFound, problem{Error: fmt.Sprintf("no runner pod %.100q is known in namespace %.100q; one that was deleted is for an hour", name, namespace)})
		default:
			answer(w, http.StatusOK, pod)
		}
	})
	places := make(chan struct{}, atOnce)
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
			if q.URL.RawQuery != "" {
				answer(w, http.StatusBadRequest, problem{Error: fmt.Sprintf("unknown parameters %.40q: none is accepted", q.URL.RawQuery)})
				return
			}
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
