package explain_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/internal/explain"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func small() *explain.Report {
	at := time.Date(2026, 1, 5, 9, 0, 0, 0, time.UTC)
	return &explain.Report{At: at, Groups: []explain.Group{
		{ID: "a", At: at, Role: "runner", Nodes: []explain.Node{{Name: "node-1", Instance: "fake:///a/i-1", State: explain.StateIdle}}},
		{ID: "b/c d", At: at, Role: "plain"},
	}}
}

// source answers with that report, and knows one pod while there is a report.
type source func() *explain.Report

func (s source) Report() *explain.Report { return s() }

func (s source) Pod(_ context.Context, namespace, name string) (*explain.Pod, error) {
	switch {
	case s() == nil:
		return nil, errors.New("not leading")
	case namespace == "ci" && name == "runner-1":
		return &explain.Pod{Namespace: namespace, Name: name, State: explain.PodWaiting}, nil
	}
	return nil, nil
}

func TestHandler(t *testing.T) {
	none := func() *explain.Report { return nil }
	for _, tc := range []struct {
		method, path string
		latest       func() *explain.Report
		code         int
		has          string // in the body
	}{
		{"GET", "/api/v1/nodegroups", small, 200, `"id":"b/c d"`},
		{"GET", "/api/v1/nodegroups/a", small, 200, `{"id":"a","at":"2026-01-05T09:00:00Z"`},
		{"GET", "/api/v1/nodegroups/b%2Fc%20d", small, 200, `{"id":"b/c d"`},
		{"GET", "/api/v1/nodegroups/x", small, 404, `{"error":"unknown node group \"x\"","known":["a","b/c d"]}`},
		{"GET", "/api/v1/nodegroups/" + strings.Repeat("x", 4000), small, 404, `"known"`},
		{"GET", "/api/v1/nodegroups?group=a", small, 400, `unknown parameters \"group=a\": none is accepted`},
		{"GET", "/api/v1/nodegroups", none, 503, `{"error":"no plan here`},
		{"GET", "/api/v1/nodegroups/a", none, 503, `{"error":"no plan here`},
		{"HEAD", "/api/v1/nodegroups", small, 200, ""},
		{"POST", "/api/v1/nodegroups", small, 405, ""},
		{"DELETE", "/api/v1/nodegroups/a", small, 405, ""},
		{"GET", "/api/v1/nodes", small, 404, ""},
		{"GET", "/api/v1/pods/ci/runner-1", small, 200, `"namespace":"ci","name":"runner-1","state":"waiting"`},
		{"GET", "/api/v1/pods/ci/runner-2", small, 404, `{"error":"no runner pod \"runner-2\" is known in namespace \"ci\"`},
		{"GET", "/api/v1/pods/ci/" + strings.Repeat("x", 4000), small, 404, `"error"`},
		{"GET", "/api/v1/pods/ci/runner-1", none, 503, `{"error":"no plan here`},
		{"GET", "/api/v1/pods/runner-1", small, 404, ""},
		{"DELETE", "/api/v1/pods/ci/runner-1", small, 405, ""},
	} {
		t.Run(tc.method+" "+tc.path[:min(len(tc.path), 40)], func(t *testing.T) {
			w := httptest.NewRecorder()
			explain.Handler(source(tc.latest)).ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
			if w.Code != tc.code || !strings.Contains(w.Body.String(), tc.has) {
				t.Fatalf("got %d %s", w.Code, w.Body)
			}
			if w.Body.Len() > 2000 {
				t.Errorf("%d bytes say so", w.Body.Len())
			}
			if tc.has != "" && (w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("Content-Type") != "application/json") {
				t.Errorf("headers %v", w.Header())
			}
		})
	}
}

// stuck is a client that does not read its answer.
type stuck struct {
	*httptest.ResponseRecorder
	begun, resume chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	s.begun <- struct{}{}
	<-s.resume
	return len(p), nil
}

func TestHandlerBoundsWhatItDoesAtOnce(t *testing.T) {
	h := explain.Handler(source(small))
	get := func(w http.ResponseWriter) { h.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/nodegroups", nil)) }
	begun, resume := make(chan struct{}), make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() { get(stuck{httptest.NewRecorder(), begun, resume}) })
		<-begun
	}
	w := httptest.NewRecorder()
	if get(w); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("a fifth got %d %s", w.Code, w.Body)
	}
	close(resume)
	clients.Wait()
	w = httptest.NewRecorder()
	if get(w); w.Code != 200 {
		t.Errorf("when they were done: %d %s", w.Code, w.Body)
	}
}

// answers starts a server that gives one answer.
func answers(t *testing.T, code int, body string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestFetch(t *testing.T) {
	s := httptest.NewServer(explain.Handler(source(small)))
	defer s.Close()
	for _, address := range []string{s.URL, s.URL + "/", strings.TrimPrefix(s.URL, "http://")} {
		r, err := explain.Fetch(t.Context(), address)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := json.Marshal(r)
		want, _ := json.Marshal(small())
		if string(got) != string(want) {
			t.Errorf("from %s: %s, want %s", address, got, want)
		}
	}
}

func TestFetchPod(t *testing.T) {
	s := httptest.NewServer(explain.Handler(source(small)))
	defer s.Close()
	if d, err := explain.FetchPod(t.Context(), s.URL, "ci", "runner-1"); err != nil || d.Name != "runner-1" {
		t.Errorf("%+v, %v", d, err)
	}
	for _, name := range []string{"runner-2", "../../metrics", "a/b", ""} {
		if d, err := explain.FetchPod(t.Context(), s.URL, "ci", name); err == nil {
			t.Errorf("of %q: %+v", name, d)
		}
	}
	if _, err := explain.FetchPod(t.Context(), answers(t, 200, `{"name":"other"}`), "ci", "runner-1"); err == nil {
		t.Error("another pod was taken for the one that was asked for")
	}
}

func TestFetchFails(t *testing.T) {
	closed := httptest.NewServer(nil)
	closed.Close()
	for _, tc := range []struct{ name, address, says string }{
		{"nobody there", closed.URL, "nothing listens at " + closed.URL + "; for a provider in a cluster run this first: kubectl -n hearth port-forward deploy/hearth 8087"},
		{"not leading", answers(t, 503, `{"error":"no plan here"}`), "503 Service Unavailable: no plan here"},
		{"another server", answers(t, 404, "<html>"), "404 Not Found: it does not speak Hearth's API"},
		{"another API", answers(t, 200, `{"kind":"List"}`), "its answer is no report"},
		{"escape codes", answers(t, 500, `{"error":"\u001b[2Jx"}`), "500 Internal Server Error: ?[2Jx"},
		{"too long", answers(t, 200, strings.Repeat(" ", 64<<20+1)), "longer than 64 MiB"},
		{"no host", "http://", "want an address such as"},
		{"no HTTP", "ftp://host", "want an address such as"},
		{"no address", "http://a b", "want an address such as"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := explain.Fetch(t.Context(), tc.address); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want %q in it", err, tc.says)
			}
		})
	}
}

func TestFind(t *testing.T) {
	r := small()
	for _, name := range []string{"node-1", "fake:///a/i-1"} { // in full
		if g, n, err := r.Find(name); err != nil || g.ID != "a" || n == nil || n.Name != "node-1" {
			t.Errorf("%s: %v %v %v", name, g, n, err)
		}
	}
	nodes := []explain.Node{{Name: "ip-1.eu.internal"}, {Name: "ip-2.eu.internal"}, {Instance: "aws:///eu/ip-2"}, {Instance: "aws:///eu/i-3"}}
	shorts := &explain.Report{Groups: []explain.Group{{ID: "g", Nodes: nodes}}}
	for name, want := range map[string]string{"ip-1": "ip-1.eu.internal", "i-3": "aws:///eu/i-3"} {
		if g, n, err := shorts.Find(name); err != nil || g == nil || n == nil || n.Label() != want {
			t.Errorf("short %s: %v %v %v", name, g, n, err)
		}
	}
	if _, _, err := shorts.Find("ip-2"); err == nil || !strings.Contains(err.Error(), `"ip-2" may be ip-2.eu.internal or aws:///eu/ip-2`) {
		t.Errorf("an ambiguous name: %v", err)
	}
	if g, n, err := r.Find("b/c d"); err != nil || g.ID != "b/c d" || n != nil {
		t.Errorf("%v %v %v", g, n, err)
	}
	for name, says := range map[string]string{
		"nodde-1": "similar are node-1",
		"a/i-1":   "similar are fake:///a/i-1",
		"NODE":    "similar are node-1",
		"zzzzzzz": "node groups are a, b/c d",
	} {
		if _, _, err := r.Find(name); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: error %v, want %q in it", name, err, says)
		}
	}
	if _, _, err := (&explain.Report{}).Find("x"); err == nil {
		t.Error("found in nothing")
	}
	if states := explain.States(); len(slices.Compact(slices.Sorted(slices.Values(states)))) != 6 {
		t.Errorf("states %v", states)
	}
}
