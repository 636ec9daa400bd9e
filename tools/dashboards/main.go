// Command dashboards writes Hearth's Grafana dashboard as JSON, from the panels
// below. docs/metrics.md says what the metrics mean.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

func main() {
	if err := write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "dashboards:", err)
		os.Exit(1)
	}
}

func write(w io.Writer) error {
	d, err := board()
	if err != nil {
		return err
	}
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	return out.Encode(d)
}

// panel is one question. Queries without a legend are one series.
type panel struct {
	title, says, unit string
	stacked           bool
	// alarm, for a figure: from where on it is red, or below where it is. Zero
	// for none.
	above, below float64
	queries      []query
}

type query struct{ legend, expr string }

// group selects the node groups that are looked at.
const group = `nodegroup=~"$nodegroup"`

// health is the first row: figures, green when all is well.
func health() []panel {
	return []panel{
		{title: "Leader", says: "Replicas that lead: one.", below: 1, above: 2, queries: []query{{"", `sum(hearth_leader) or vector(0)`}}},
		{title: "Snapshot age", says: "How old the reading of the cloud is that cluster-autoscaler is answered from.", unit: "s", above: 300,
			queries: []query{{"", `max(hearth_snapshot_age_seconds and on (instance) hearth_leader == 1)`}}},
		{title: "Autoscaler loops", says: "Refreshes of cluster-autoscaler a minute. None: it does not reach Hearth.", below: 0.2,
			queries: []query{{"", `60 * sum(rate(grpc_server_handled_total{grpc_method="Refresh"}[5m])) or vector(0)`}}},
		{title: "Failed answers", says: "Share of cluster-autoscaler's calls that failed, vetoes left out.", unit: "percentunit", above: 0.05,
			queries: []query{{"", `(sum(rate(grpc_server_handled_total{grpc_code!~"OK|FailedPrecondition|Unimplemented"}[5m])) or vector(0)) / sum(rate(grpc_server_handled_total[5m]))`}}},
		{title: "Config", says: "1: the config file is in use as it is.", below: 1, queries: []query{{"", `min(hearth_config_last_reload_successful)`}}},
		{title: "Bad annotations", says: "Annotations that cannot be used and are ignored.", above: 1, queries: []query{{"", `sum(hearth_annotation_errors) or vector(0)`}}},
		{title: "Unclean stops", says: "Engines that did not stop cleanly in a day: their caches are lost.", above: 1,
			queries: []query{{"", `sum(increase(hearth_scale_events_total{reason="unclean-stop"}[1d])) or vector(0)`}}},
		{title: "Spent in a day", says: "On nodes, by node-price and parked-price.", unit: "currencyUSD",
			queries: []query{{"", `sum(increase(hearth_spent_dollars_total[1d]))`}}},
	}
}

type row struct {
	title  string
	panels []panel
}

func rows() []row {
	return []row{
		{"Caches and waiting", []panel{
			{title: "Warm starts", says: "Share of the jobs whose node had their cache.", unit: "percentunit",
				queries: []query{{"{{nodegroup}}", `sum by (nodegroup) (increase(hearth_jobs_total{temperature="warm",` + group + `}[1h])) / sum by (nodegroup) (increase(hearth_jobs_total{` + group + `}[1h]))`}}},
			{title: "Jobs", says: "Jobs that started, an hour.", stacked: true,
				queries: []query{{"{{temperature}}", `sum by (temperature) (increase(hearth_jobs_total{` + group + `}[1h]))`}}},
			{title: "Wait for a node", says: "From a job's pod to its start.", unit: "s", queries: []query{
				{"median", `histogram_quantile(0.5, sum by (le) (rate(hearth_job_wait_seconds_bucket{` + group + `}[1h])))`},
				{"95 %", `histogram_quantile(0.95, sum by (le) (rate(hearth_job_wait_seconds_bucket{` + group + `}[1h])))`},
			}},
			{title: "Saved by warm caches", says: "Time of jobs, an hour.", unit: "s",
				queries: []query{{"{{nodegroup}}", `sum by (nodegroup) (increase(hearth_saved_seconds_total{` + group + `}[1h]))`}}},
		}},
		{"Cost", []panel{
			{title: "Cost of nodes", says: "Dollars an hour, by whether they run or are parked.", unit: "currencyUSD", stacked: true,
				queries: []query{{"{{tier}}", `sum by (tier) (rate(hearth_spent_dollars_total{` + group + `}[10m])) * 3600`}}},
			{title: "Cost by node group", says: "Dollars an hour.", unit: "currencyUSD", stacked: true,
				queries: []query{{"{{nodegroup}}", `sum by (nodegroup) (rate(hearth_spent_dollars_total{` + group + `}[10m])) * 3600`}}},
		}},
		{"Nodes", []panel{
			{title: "Nodes by phase", says: "", stacked: true, queries: []query{{"{{phase}}", `sum by (phase) (hearth_nodegroup_nodes{` + group + `})`}}},
			{title: "Nodes by node group", says: "Those that run, parked ones left out.", stacked: true,
				queries: []query{{"{{nodegroup}}", `sum by (nodegroup) (hearth_nodegroup_nodes{phase!~"Parked|Parking|Terminating",` + group + `})`}}},
			{title: "Sizes", says: "What cluster-autoscaler was told, and nodes ahead of that.", queries: []query{
				{"target {{nodegroup}}", `sum by (nodegroup) (hearth_nodegroup_target_size{` + group + `})`},
				{"hidden {{nodegroup}}", `sum by (nodegroup) (hearth_nodegroup_hidden_nodes{` + group + `})`},
			}},
		}},
		{"Decisions", []panel{
			{title: "What happened to nodes", says: "Nodes an hour, by what was done.", stacked: true,
				queries: []query{{"{{action}}", `sum by (action) (increase(hearth_scale_events_total{` + group + `}[1h]))`}}},
			{title: "Why", says: "Nodes an hour, by reason.", queries: []query{{"{{action}}: {{reason}}", `sum by (action, reason) (increase(hearth_scale_events_total{` + group + `}[1h]))`}}},
			{title: "Vetoes", says: "Requests of cluster-autoscaler to delete nodes that were refused, an hour.",
				queries: []query{{"{{reason}}", `sum by (reason) (increase(hearth_veto_total{` + group + `}[1h])) or vector(0)`}}},
		}},
		{"Engines", []panel{
			{title: "Cache", says: "In the engines of a node group, parked ones too.", unit: "bytes", stacked: true,
				queries: []query{{"{{nodegroup}}", `sum by (nodegroup) (hearth_engine_cache_bytes{` + group + `})`}}},
			{title: "Sessions", says: "Connected to engines.", queries: []query{{"{{nodegroup}}", `sum by (nodegroup) (hearth_engine_connected_clients{` + group + `})`}}},
			{title: "Caches lost", says: "Nodes an hour whose engine did not stop cleanly, or that did not come back from being parked.",
				queries: []query{{"{{reason}}", `sum by (reason) (increase(hearth_scale_events_total{reason=~"unclean-stop|resume-failed",` + group + `}[1h])) or vector(0)`}}},
		}},
		{"Cloud", []panel{
			{title: "Requests", says: "A minute, by result.", stacked: true,
				queries: []query{{"{{operation}} {{code}}", `60 * sum by (operation, code) (rate(hearth_cloud_request_duration_seconds_count[5m]))`}}},
			{title: "Duration", says: "95 % of the requests take less.", unit: "s",
				queries: []query{{"{{operation}}", `histogram_quantile(0.95, sum by (le, operation) (rate(hearth_cloud_request_duration_seconds_bucket[10m])))`}}},
		}},
		{"Demand", []panel{
			{title: "Waiting jobs", says: "Queued, by the CI system that said so, and pods without a node.", stacked: true,
				queries: []query{{"{{source}}", `sum by (source) (hearth_jobs_pending)`}}},
			{title: "Webhooks", says: "A minute, by what came of them.",
				queries: []query{{"{{source}} {{result}}", `60 * sum by (source, result) (rate(hearth_webhook_requests_total[5m])) or vector(0)`}}},
			{title: "Placement", says: "Pods a minute, by what the webhook did.",
				queries: []query{{"{{result}}", `60 * sum by (result) (rate(hearth_placement_requests_total[5m]))`}}},
		}},
		{"cluster-autoscaler", []panel{
			{title: "Calls", says: "A minute, by method.", stacked: true,
				queries: []query{{"{{grpc_method}}", `60 * sum by (grpc_method) (rate(grpc_server_handled_total[5m]))`}}},
			{title: "Duration", says: "99 % of the calls take less.", unit: "s",
				queries: []query{{"{{grpc_method}}", `histogram_quantile(0.99, sum by (le, grpc_method) (rate(grpc_server_handling_seconds_bucket[5m])))`}}},
		}},
	}
}

func source() common.DataSourceRef {
	return common.DataSourceRef{Type: new("prometheus"), Uid: new("$datasource")}
}

func targets(p panel) (out []cog.Builder[variants.Dataquery]) {
	for i, q := range p.queries {
		b := prometheus.NewDataqueryBuilder().Expr(q.expr).RefId(string(rune('A' + i))).LegendFormat(q.legend).Datasource(source())
		out = append(out, b)
	}
	return out
}

func figure(p panel) cog.Builder[dashboard.Panel] {
	steps := []dashboard.Threshold{{Color: "green"}}
	if p.below > 0 {
		steps = []dashboard.Threshold{{Color: "red"}, {Value: new(p.below), Color: "green"}}
	}
	if p.above > 0 {
		steps = append(steps, dashboard.Threshold{Value: new(p.above), Color: "red"})
	}
	b := stat.NewPanelBuilder().Title(p.title).Description(p.says).Datasource(source()).Height(4).Span(3).
		Thresholds(dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(steps))
	if p.unit != "" {
		b.Unit(p.unit)
	}
	for _, t := range targets(p) {
		b.WithTarget(t)
	}
	return b
}

func lines(p panel, span uint32) cog.Builder[dashboard.Panel] {
	b := timeseries.NewPanelBuilder().Title(p.title).Description(p.says).Datasource(source()).Height(8).Span(span).Min(0).FillOpacity(10)
	if p.stacked {
		b.FillOpacity(30).Stacking(common.NewStackingConfigBuilder().Mode(common.StackingModeNormal))
	}
	if p.unit != "" {
		b.Unit(p.unit)
	}
	for _, t := range targets(p) {
		b.WithTarget(t)
	}
	return b
}

func board() (dashboard.Dashboard, error) {
	b := dashboard.NewDashboardBuilder("Hearth").Uid("hearth").Tags([]string{"hearth", "cluster-autoscaler", "dagger"}).
		Description("Warm CI nodes: are caches warm, what does it cost, is everything healthy? docs/dashboards.md says what each panel answers.").
		Refresh("1m").Time("now-24h", "now").Readonly().
		WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Prometheus").Type("prometheus")).
		WithVariable(dashboard.NewQueryVariableBuilder("nodegroup").Label("Node group").Datasource(source()).
			Query(dashboard.StringOrMap{String: new("label_values(hearth_nodegroup_target_size, nodegroup)")}).
			Refresh(dashboard.VariableRefreshOnTimeRangeChanged).Multi(true).IncludeAll(true).AllValue(".*")).
		WithRow(dashboard.NewRowBuilder("Is it healthy?"))
	for _, p := range health() {
		b.WithPanel(figure(p))
	}
	for _, r := range rows() {
		b.WithRow(dashboard.NewRowBuilder(r.title))
		for _, p := range r.panels {
			b.WithPanel(lines(p, uint32(24/len(r.panels))))
		}
	}
	return b.Build()
}
