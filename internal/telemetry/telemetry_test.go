package telemetry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"k8s.io/klog/v2"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/hearth-ci/hearth/internal/telemetry"
	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLoggerFormatsAndLevels(t *testing.T) {
	var out bytes.Buffer
	logger, err := telemetry.New(&out, "json", "warn")
	if err != nil {
		t.Fatal(err)
	}
	logger.Info("not this")
	logger.Warn("this", "n", 1)
	var line struct {
		Level, Msg string
		N          int
	}
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.Level != "WARN" || line.Msg != "this" || line.N != 1 {
		t.Errorf("got %q, %v", out.String(), err)
	}

	out.Reset()
	logger, err = telemetry.New(&out, "text", "debug")
	if err != nil {
		t.Fatal(err)
	}
	logger.Debug("fine")
	if !strings.Contains(out.String(), "level=DEBUG msg=fine") {
		t.Errorf("got %q", out.String())
	}

	for _, tc := range []struct{ format, level, want string }{
		{"xml", "info", `log format "xml": want json or text`},
		{"json", "loud", `log level "loud": want debug, info, warn or error`},
		{"json", "", `log level "": want debug, info, warn or error`},
	} {
		if _, err := telemetry.New(io.Discard, tc.format, tc.level); err == nil || err.Error() != tc.want {
			t.Errorf("%q, %q: got %v, want %s", tc.format, tc.level, err, tc.want)
		}
	}
}

// routed sends the libraries' lines to a buffer. controller-runtime keeps the
// first logger that it is given, so all runs of the test share one.
var routed = sync.OnceValue(func() *bytes.Buffer {
	var out bytes.Buffer
	logger, err := telemetry.New(&out, "text", "info")
	if err != nil {
		panic(err)
	}
	telemetry.RouteLibraries(logger)
	return &out
})

func TestLibrariesLogThroughTheLogger(t *testing.T) {
	out := routed()
	out.Reset()
	klog.Background().Info("from client-go", "a", 1)
	ctrllog.Log.Info("from controller-runtime", "b", 2)
	ctrllog.Log.V(1).Info("detail")
	klog.Flush()
	for _, want := range []string{`level=INFO msg="from client-go" a=1`, `level=INFO msg="from controller-runtime" b=2`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "detail") {
		t.Errorf("verbose lines at level info:\n%s", out.String())
	}
}

// used returns metrics on which everything was told of two groups.
func used(t *testing.T) (*prometheus.Registry, *telemetry.Metrics) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	m := telemetry.NewMetrics(reg)
	for _, id := range []string{"a", "b"} {
		m.Nodes.WithLabelValues(id, string(model.PhaseReady)).Set(2)
		m.TargetSize.WithLabelValues(id).Set(3)
		m.HiddenNodes.WithLabelValues(id).Set(1)
		m.Jobs.WithLabelValues(id, "warm").Inc()
		m.JobWait.WithLabelValues(id).Observe(3)
		m.ScaleEvents.WithLabelValues(id, "launch", "scale-up").Add(3)
		m.Vetoes.WithLabelValues(id, "busy").Inc()
		m.AnnotationErrors.WithLabelValues(id).Set(2)
	}
	m.CloudRequestDuration.WithLabelValues("launch", "OK").Observe(1)
	m.SnapshotAge.Set(45)
	m.ConfigReloaded(nil)
	m.ConfigReloaded(errors.New("bad"))
	m.Leader.Set(1)
	m.SetBuild("v1", "abc")
	return reg, m
}

func TestMetricsAreWellFormed(t *testing.T) {
	reg, _ := used(t)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	want := []string{
		"hearth_annotation_errors", "hearth_build_info", "hearth_cloud_request_duration_seconds", "hearth_config_last_reload_successful",
		"hearth_config_reloads_total", "hearth_job_wait_seconds", "hearth_jobs_total", "hearth_leader", "hearth_nodegroup_hidden_nodes",
		"hearth_nodegroup_nodes", "hearth_nodegroup_target_size", "hearth_placement_requests_total", "hearth_scale_events_total", "hearth_snapshot_age_seconds", "hearth_veto_total",
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		got = append(got, f.GetName())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestForgottenGroupsLeaveNoSeries(t *testing.T) {
	reg, m := used(t)
	m.ForgetGroup("b")
	groups := func() map[string]int {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		series := map[string]int{}
		for _, f := range families {
			for _, s := range f.GetMetric() {
				for _, label := range s.GetLabel() {
					if label.GetName() == "nodegroup" {
						series[label.GetValue()]++
					}
				}
			}
		}
		return series
	}
	if diff := cmp.Diff(map[string]int{"a": 8}, groups()); diff != "" {
		t.Errorf("series by group: %s", diff)
	}
	m.ForgetGroup("a")
	if diff := cmp.Diff(map[string]int{}, groups()); diff != "" {
		t.Errorf("series by group: %s", diff)
	}
}

func TestConfigReloads(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := telemetry.NewMetrics(reg)
	check := func(success, failure, last int) {
		t.Helper()
		want := fmt.Sprintf(`
# HELP hearth_config_last_reload_successful 1 when the config file is in use as it is, 0 when the last reload failed and the config before is in use.
# TYPE hearth_config_last_reload_successful gauge
hearth_config_last_reload_successful %d
# HELP hearth_config_reloads_total Reloads of the config file by result.
# TYPE hearth_config_reloads_total counter
hearth_config_reloads_total{result="failure"} %d
hearth_config_reloads_total{result="success"} %d
`, last, failure, success)
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "hearth_config_last_reload_successful", "hearth_config_reloads_total"); err != nil {
			t.Error(err)
		}
	}
	check(0, 0, 1)
	m.ConfigReloaded(errors.New("bad"))
	check(0, 1, 0)
	m.ConfigReloaded(nil)
	check(1, 1, 1)
}

func TestHTTP(t *testing.T) {
	reg, _ := used(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var unready atomic.Bool
	unready.Store(true)
	server, err := telemetry.NewHTTP(telemetry.HTTPConfig{
		Listener: listener, Gatherer: reg, Logger: slog.New(slog.DiscardHandler),
		API: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { _, _ = io.WriteString(w, "the API at "+q.URL.Path) }),
		Ready: func() error {
			if unready.Load() {
				return errors.New("waiting for the first snapshot")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func(method, path string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+listener.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	check := func(method, path string, code int, contains string) {
		t.Helper()
		if got, body := get(method, path); got != code || !strings.Contains(body, contains) {
			t.Errorf("%s %s: got %d %q, want %d %q", method, path, got, body, code, contains)
		}
	}
	check("GET", "/healthz", 200, "ok")
	check("GET", "/readyz", 503, "waiting for the first snapshot")
	unready.Store(false)
	check("GET", "/readyz", 200, "ok")
	check("GET", "/metrics", 200, `hearth_nodegroup_target_size{nodegroup="a"} 3`)
	check("GET", "/api/v1/x", 200, "the API at /api/v1/x")
	check("POST", "/metrics", 405, "")
	check("GET", "/", 404, "")

	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := net.Dial("tcp", listener.Addr().String()); err == nil {
		t.Error("it still listens")
	}
}

func TestHTTPNeedsItsParts(t *testing.T) {
	if _, err := telemetry.NewHTTP(telemetry.HTTPConfig{}); err == nil {
		t.Error("an empty config was taken")
	}
}
