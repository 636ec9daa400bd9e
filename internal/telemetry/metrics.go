package telemetry

import (
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Metrics are Hearth's own metrics. They may be used concurrently. What bounds
// the number of series is that label values come from fixed sets: groups are
// those that exist, phases are model.Phases, temperatures warm and cold, and
// actions, reasons, operations and codes are stable words of the code.
type Metrics struct {
	Nodes       *prometheus.GaugeVec // nodegroup, phase
	TargetSize  *prometheus.GaugeVec // nodegroup
	HiddenNodes *prometheus.GaugeVec // nodegroup

	Jobs    *prometheus.CounterVec   // nodegroup, temperature
	JobWait *prometheus.HistogramVec // nodegroup; seconds
	// JobsPending are queued or, source "pod", waiting for a node; those that no
	// group may run have no nodegroup.
	JobsPending *prometheus.GaugeVec // nodegroup, source
	// WebhookRequests counts messages of CI systems.
	WebhookRequests *prometheus.CounterVec // source, result

	EngineCacheBytes *prometheus.GaugeVec // nodegroup
	EngineClients    *prometheus.GaugeVec // nodegroup

	ScaleEvents      *prometheus.CounterVec // nodegroup, action, reason
	Vetoes           *prometheus.CounterVec // nodegroup, reason
	AnnotationErrors *prometheus.GaugeVec   // nodegroup

	// Saved is what warm caches saved the jobs that ended, Spent what nodes cost
	// by their prices.
	Saved *prometheus.CounterVec // nodegroup; seconds
	Spent *prometheus.CounterVec // nodegroup, tier; dollars

	Placements *prometheus.CounterVec // result

	CloudRequestDuration *prometheus.HistogramVec // operation, code; seconds
	SnapshotAge          prometheus.Gauge         // seconds
	Leader               prometheus.Gauge         // 1 or 0

	configReloads          *prometheus.CounterVec
	configReloadSuccessful prometheus.Gauge
	buildInfo              *prometheus.GaugeVec
}

// NewMetrics registers the metrics with reg. It panics when they are already
// there: that is a mistake in the program.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	auto := promauto.With(reg)
	gauge := func(name, help string) prometheus.Gauge {
		return auto.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return auto.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return auto.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	histograms := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return auto.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	}
	m := &Metrics{
		Nodes:       gauges("hearth_nodegroup_nodes", "Instances of the node group by phase.", "nodegroup", "phase"),
		TargetSize:  gauges("hearth_nodegroup_target_size", "Target size of the node group as told to cluster-autoscaler.", "nodegroup"),
		HiddenNodes: gauges("hearth_nodegroup_hidden_nodes", "Nodes launched ahead of demand that cluster-autoscaler is not told of yet.", "nodegroup"),

		Jobs:            counters("hearth_jobs_total", "CI jobs that started, by whether their node's cache was warm or cold for them.", "nodegroup", "temperature"),
		WebhookRequests: counters("hearth_webhook_requests_total", "Messages of CI systems: accepted, duplicate, ignored (about something else), stale (too old), unauthorized, malformed, too-large, busy (answered 429), not-leading.", "source", "result"),
		JobsPending:     gauges("hearth_jobs_pending", "CI jobs that are queued, by the CI system that said so, and runner pods without a node (source pod). Jobs that no node group may run have an empty nodegroup.", "nodegroup", "source"),
		JobWait: histograms("hearth_job_wait_seconds", "Time from a CI job's pod being created to its start.",
			[]float64{1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800}, "nodegroup"),

		EngineCacheBytes: gauges("hearth_engine_cache_bytes", "Bytes in the caches of the node group's engines, parked ones too, as far as their metrics told.", "nodegroup"),
		EngineClients:    gauges("hearth_engine_connected_clients", "Sessions connected to the node group's engines, as far as their metrics tell.", "nodegroup"),

		ScaleEvents:      counters("hearth_scale_events_total", "Nodes that something happened to, by what and why.", "nodegroup", "action", "reason"),
		Vetoes:           counters("hearth_veto_total", "Requests of cluster-autoscaler to delete nodes that were vetoed, by reason.", "nodegroup", "reason"),
		AnnotationErrors: gauges("hearth_annotation_errors", "Annotations of the node group that cannot be used and are ignored.", "nodegroup"),

		Saved: counters("hearth_saved_seconds_total", "Time that warm caches saved the CI jobs that ended, as far as was learnt.", "nodegroup"),
		Spent: counters("hearth_spent_dollars_total", "What nodes cost by node-price and parked-price, by tier: running, parked.", "nodegroup", "tier"),

		Placements: counters("hearth_placement_requests_total", "Pods that the placement webhook was asked about: placed, late (warm nodes exist and have been full for long), says (the pod says itself where to run), foreign (no runner pod of a known key), bad (cannot be read).", "result"),

		CloudRequestDuration: histograms("hearth_cloud_request_duration_seconds", "Duration of requests to the cloud by operation and result.",
			[]float64{.01, .03, .1, .3, 1, 3, 10, 30}, "operation", "code"),
		SnapshotAge: gauge("hearth_snapshot_age_seconds", "Age of the cloud snapshot that read requests are answered from."),
		Leader:      gauge("hearth_leader", "1 when this replica leads, so that it serves and acts."),

		configReloads:          counters("hearth_config_reloads_total", "Reloads of the config file by result.", "result"),
		configReloadSuccessful: gauge("hearth_config_last_reload_successful", "1 when the config file is in use as it is, 0 when the last reload failed and the config before is in use."),
		buildInfo:              gauges("hearth_build_info", "Always 1; says which build this is.", "version", "revision", "goversion"),
	}
	m.configReloadSuccessful.Set(1)
	for _, result := range []string{"success", "failure"} {
		m.configReloads.WithLabelValues(result)
	}
	for _, result := range []string{"placed", "late", "says", "foreign", "bad"} {
		m.Placements.WithLabelValues(result)
	}
	return m
}

// ForgetGroup deletes all series of a group that exists no more.
func (m *Metrics) ForgetGroup(id string) {
	group := prometheus.Labels{"nodegroup": id}
	for _, vec := range []interface{ DeletePartialMatch(prometheus.Labels) int }{
		m.Nodes, m.TargetSize, m.HiddenNodes, m.Jobs, m.JobWait, m.JobsPending, m.ScaleEvents, m.Vetoes, m.AnnotationErrors,
		m.EngineCacheBytes, m.EngineClients, m.Saved, m.Spent,
	} {
		vec.DeletePartialMatch(group)
	}
}

// ConfigReloaded counts a reload of the config file; nil is a success.
func (m *Metrics) ConfigReloaded(err error) {
	if err != nil {
		m.configReloads.WithLabelValues("failure").Inc()
		m.configReloadSuccessful.Set(0)
		return
	}
	m.configReloads.WithLabelValues("success").Inc()
	m.configReloadSuccessful.Set(1)
}

// SetBuild tells which build this is.
func (m *Metrics) SetBuild(version, revision string) {
	m.buildInfo.Reset()
	m.buildInfo.WithLabelValues(version, revision, runtime.Version()).Set(1)
}
