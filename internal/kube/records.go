package kube

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// Between the API's objects and the records in Hearth's own words. What only
// people read is bent into the bounds of the API's schema, so that it can never
// make the write of a record fail.

func groupID(o *v1alpha1.RunnerNodeGroup) model.GroupID {
	return model.GroupID(cmp.Or(o.Spec.ID, o.Name))
}

func groupStatus(r nodegroups.Record, s model.GroupSummary) v1alpha1.RunnerNodeGroupStatus {
	status := v1alpha1.RunnerNodeGroupStatus{
		Sequence: r.Sequence, Target: r.Target, Hidden: r.Hidden,
		Min: max(s.Min, 0), Max: max(s.Max, 0),
		Ready: max(s.Ready, 0), Parked: max(s.Parked, 0), Warm: max(s.Warm, 0),
		Conditions: conditions(s.Conditions),
	}
	for _, id := range slices.Sorted(maps.Keys(r.Intents)) {
		i := r.Intents[id]
		status.Intents = append(status.Intents, v1alpha1.Intent{
			InstanceID: string(id), Desired: string(i.Desired), Stage: string(i.Stage), Since: stamp(i.Since),
			Engine: i.Engine, Exit: string(i.Exit),
		})
	}
	for phase, n := range s.Phases {
		if status.Phases == nil {
			status.Phases = map[string]int{}
		}
		status.Phases[string(phase)] = n
	}
	return status
}

func recordFrom(s v1alpha1.RunnerNodeGroupStatus) nodegroups.Record {
	const most = 1 << 20 // nodes; what a person spoiled must not overflow
	r := nodegroups.Record{
		Sequence: s.Sequence, Target: min(max(s.Target, 0), most), Hidden: min(max(s.Hidden, 0), most),
		Intents: make(map[model.InstanceID]nodegroups.Intent, len(s.Intents)),
	}
	for _, i := range s.Intents {
		r.Intents[model.InstanceID(i.InstanceID)] = nodegroups.Intent{
			Desired: model.Desired(i.Desired), Stage: nodegroups.Stage(i.Stage), Since: fromStamp(i.Since),
			Engine: i.Engine, Exit: nodegroups.Exit(i.Exit),
		}
	}
	return r
}

func nodeSpec(r model.NodeRecord) v1alpha1.RunnerNodeSpec {
	return v1alpha1.RunnerNodeSpec{
		NodeGroup: string(r.Group), ProviderID: string(r.ID), Desired: string(r.Desired),
	}
}

func nodeStatus(r model.NodeRecord) v1alpha1.RunnerNodeStatus {
	status := v1alpha1.RunnerNodeStatus{
		Phase: string(r.Phase), NodeName: string(r.Node), Hidden: r.Hidden,
		ConnectedClients: max(r.ConnectedClients, 0),
		Score:            strconv.FormatFloat(r.Score, 'g', 6, 64),
		Decision:         string(r.Decision), Reason: clip(r.Reason, 1024),
		Conditions: conditions(r.Conditions),
	}
	if !r.Since.IsZero() {
		status.Since = new(stamp(r.Since))
	}
	if r.CacheBytes > 0 {
		const mib = 1 << 20
		status.CacheBytes = resource.NewQuantity(r.CacheBytes/mib*mib, resource.BinarySI)
	}
	for _, w := range r.Warmth {
		if w.Key == "" || len(status.Warmth) == model.MaxWarmKeys {
			continue
		}
		status.Warmth = append(status.Warmth, v1alpha1.KeyWarmth{
			Key: string(w.Key), Warmth: fraction(w.Warmth), LastUsed: stamp(w.LastUsed), Uses: max(w.Uses, 0),
		})
	}
	return status
}

func nodeRecordFrom(o v1alpha1.RunnerNode) model.NodeRecord {
	r := model.NodeRecord{
		ID:    model.InstanceID(o.Spec.ProviderID),
		Group: model.GroupID(o.Spec.NodeGroup), Node: model.NodeName(o.Status.NodeName),
		Desired: model.Desired(o.Spec.Desired), Phase: model.Phase(o.Status.Phase), Hidden: o.Status.Hidden,
		ConnectedClients: o.Status.ConnectedClients,
		Decision:         model.Decision(o.Status.Decision), Reason: o.Status.Reason,
	}
	// Numbers that a person spoiled are derived anew sooner or later.
	r.Score, _ = strconv.ParseFloat(o.Status.Score, 64)
	if o.Status.Since != nil {
		r.Since = fromStamp(*o.Status.Since)
	}
	if o.Status.CacheBytes != nil {
		r.CacheBytes = o.Status.CacheBytes.Value()
	}
	for _, w := range o.Status.Warmth {
		warmth, _ := strconv.ParseFloat(w.Warmth, 64)
		r.Warmth = append(r.Warmth, model.KeyWarmth{
			Key: model.CacheKey(w.Key), Warmth: warmth, LastUsed: fromStamp(w.LastUsed), Uses: w.Uses,
		})
	}
	for _, c := range o.Status.Conditions {
		r.Conditions = append(r.Conditions, model.Condition{
			Type: c.Type, True: c.Status == metav1.ConditionTrue, Reason: c.Reason,
			Message: c.Message, Since: fromStamp(c.LastTransitionTime),
		})
	}
	return r
}

func conditions(list []model.Condition) []metav1.Condition {
	var out []metav1.Condition
	for _, c := range list {
		status := metav1.ConditionFalse
		if c.True {
			status = metav1.ConditionTrue
		}
		out = append(out, metav1.Condition{
			Type: c.Type, Status: status, Reason: cmp.Or(c.Reason, c.Type),
			Message: clip(c.Message, 4096), LastTransitionTime: stamp(c.Since),
		})
	}
	return out
}

// stamp writes a time as the API keeps it, to the second. The API cannot hold
// a zero time where one is required: the epoch stands for it.
func stamp(t time.Time) metav1.Time {
	if t.IsZero() {
		return metav1.Unix(0, 0)
	}
	return metav1.Unix(t.Unix(), 0)
}

func fromStamp(t metav1.Time) time.Time {
	if t.Unix() <= 0 {
		return time.Time{}
	}
	return t.Time
}

// fraction writes a number from 0 to 1 with two decimals.
func fraction(f float64) string {
	if math.IsNaN(f) {
		f = 0
	}
	return strconv.FormatFloat(min(max(f, 0), 1), 'f', 2, 64)
}

// clip cuts a text for people to at most n bytes.
func clip(s string, n int) string {
	const ellipsis = "…"
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-len(ellipsis)], "") + ellipsis
}
