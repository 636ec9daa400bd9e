package kube

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// nodeFrom says what matters of a Node. It shares nothing with it but labels.
func nodeFrom(n *corev1.Node) model.Node {
	out := model.Node{
		Name:          model.NodeName(n.Name),
		UID:           string(n.UID),
		ID:            model.InstanceID(n.Spec.ProviderID),
		Created:       n.CreationTimestamp.Time,
		Unschedulable: n.Spec.Unschedulable,
		Marks: model.Marks{
			Decision:      model.Decision(n.Annotations[annotationDecision]),
			Reason:        n.Annotations[annotationReason],
			Protected:     n.Annotations[annotationScaleDownDisabled] == "true",
			ProtectedByUs: n.Annotations[annotationProtectedBy] == protectedByUs,
			Warm:          warmKeys(n),
		},
		Labels: n.Labels,
	}
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		out.Ready = c.Status == corev1.ConditionTrue
		out.ReadyChanged = c.LastTransitionTime.Time
		if c.Reason == "NodeStatusNeverUpdated" {
			// Set by the node lifecycle controller for a kubelet that never
			// spoke: the condition did not change, there was none.
			out.ReadyChanged = out.Created
		}
	}
	for _, t := range n.Spec.Taints {
		switch t.Key {
		case corev1.TaintNodeNotReady:
			// Put on at registration and taken off a moment after the kubelet is
			// ready: until then no pod is scheduled there, and
			// cluster-autoscaler counts the node as not ready.
			out.Ready = false
		case taintDraining:
			out.Draining = true
		case taintToBeDeleted:
			out.CATaintSince = taintedSince(t, out.Created)
		}
	}
	return out
}

// taintedSince says when cluster-autoscaler put its taint on. A value that
// cannot be read must not make the taint invisible.
func taintedSince(t corev1.Taint, created time.Time) time.Time {
	if seconds, err := strconv.ParseInt(t.Value, 10, 64); err == nil && seconds > 0 {
		return time.Unix(seconds, 0)
	}
	if t.TimeAdded != nil {
		return t.TimeAdded.Time
	}
	return created
}

// podReader says what matters of a pod.
type podReader struct {
	engines labels.Selector
	// groupOf returns the group with that value of the node group label.
	groupOf func(label string) model.GroupID
	// nodeGroup returns the group of a Node, empty when it has none.
	nodeGroup func(model.NodeName) model.GroupID
	keysFor   func(model.GroupID) []string
}

// pod reads a pod. Of one that is to be ignored only the names are read.
func (r podReader) pod(p *corev1.Pod) model.Pod {
	out := model.Pod{
		Namespace: p.Namespace, Name: p.Name, UID: string(p.UID),
		Node: model.NodeName(p.Spec.NodeName),
		Kind: r.kind(p),
	}
	if out.Kind == model.PodIgnored {
		return out
	}
	out.Created = p.CreationTimestamp.Time
	out.IP = p.Status.PodIP
	if p.Status.StartTime != nil {
		out.Started = p.Status.StartTime.Time
	}
	out.Finished, out.Failed = finished(p), p.Status.Phase == corev1.PodFailed
	if label := p.Spec.NodeSelector[v1alpha1.NodeGroupLabel]; label != "" {
		out.Group = r.groupOf(label)
	}
	if out.Kind == model.PodEngine {
		out.Engine = engineContainer(p)
	}
	if out.Kind == model.PodRunner {
		group := out.Group
		if group == "" && out.Node != "" {
			group = r.nodeGroup(out.Node)
		}
		out.Key = CacheKey(p.Labels, p.Annotations, r.keysFor(group))
	}
	if out.Kind == model.PodEngine {
		out.EngineState = engineState(p)
	}
	return out
}

func (r podReader) kind(p *corev1.Pod) model.PodKind {
	if r.engines.Matches(labels.Set(p.Labels)) {
		return model.PodEngine
	}
	if p.Namespace == metav1.NamespaceSystem {
		return model.PodIgnored // cluster services that landed on a runner node
	}
	_, mirror := p.Annotations[corev1.MirrorPodAnnotationKey]
	if owner := metav1.GetControllerOf(p); mirror || owner != nil && (owner.Kind == "DaemonSet" || owner.Kind == "Node") {
		return model.PodIgnored
	}
	return model.PodRunner
}

// engineContainerName is the container's name in Dagger's Helm chart.
const engineContainerName = "dagger-engine"

// engineContainer tells of the container that has the chart's name, else of the
// first: what a cluster adds to pods usually comes after.
func engineContainer(p *corev1.Pod) *model.EngineContainer {
	out := &model.EngineContainer{Grace: corev1.DefaultTerminationGracePeriodSeconds * time.Second}
	if s := p.Spec.TerminationGracePeriodSeconds; s != nil {
		out.Grace = time.Duration(*s) * time.Second
	}
	containers := p.Spec.Containers
	if len(containers) == 0 {
		return out
	}
	at := max(0, slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == engineContainerName }))
	out.Image = containers[at].Image
	for _, c := range p.Status.ContainerStatuses {
		if end := c.State.Terminated; c.Name == containers[at].Name && end != nil {
			out.Exit = &model.ContainerExit{Code: end.ExitCode, At: end.FinishedAt.Time}
		}
	}
	return out
}

// finished returns when the last container of a pod that is over ended, and
// zero of any other. One that was evicted has no containers to ask.
func finished(p *corev1.Pod) (at time.Time) {
	if p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
		return time.Time{}
	}
	latest := func(t metav1.Time) {
		if t.After(at) {
			at = t.Time
		}
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if c.State.Terminated != nil {
			latest(c.State.Terminated.FinishedAt)
		}
	}
	if at.IsZero() {
		for _, c := range p.Status.Conditions {
			latest(c.LastTransitionTime)
		}
	}
	if at.IsZero() {
		at = p.CreationTimestamp.Time
	}
	return at
}

// maxKeyLength bounds a cache key in bytes: it becomes part of objects,
// annotations and memory, and comes from whoever may create pods.
const maxKeyLength = 253

// CacheKey returns the key of the pipeline that a runner pod runs, or of the
// best that is known of it; empty when nothing is. Keys are the labels or
// annotations that make it, as a group's cache-keys says; a label wins over an
// annotation of the same name. When the pod has none of them, or none are
// given, what its CI system puts on every pod is used:
//
//   - hearth.dev/cache-key, which people set where they know better;
//   - GitHub's actions-runner-controller: namespace and name of the runner
//     scale set (labels that it puts on runners, and on listeners, which run no
//     jobs and have no key);
//   - GitLab Runner: the project's id (an annotation, in newer versions also a
//     label);
//   - Buildkite's agent-stack-k8s: the pipeline's slug, else the repository
//     (annotations).
//
// A key longer than 253 bytes is cut and ends in a hash of all of it.
func CacheKey(labels, annotations map[string]string, keys []string) model.CacheKey {
	value := func(key string) string {
		return cmp.Or(strings.TrimSpace(labels[key]), strings.TrimSpace(annotations[key]))
	}
	joined := func(prefix string, keys ...string) string {
		values := make([]string, len(keys))
		for i, key := range keys {
			values[i] = value(key)
		}
		if strings.Join(values, "") == "" {
			return ""
		}
		return prefix + strings.Join(values, "/")
	}
	if labels["app.kubernetes.io/component"] == "runner-scale-set-listener" {
		return ""
	}
	return bounded(cmp.Or(
		joined("", keys...),
		value(labelCacheKey),
		joined("", "actions.github.com/scale-set-namespace", "actions.github.com/scale-set-name"),
		joined("gitlab/", "project.runner.gitlab.com/id"),
		joined("buildkite/", "buildkite.com/pipeline-slug"),
		joined("buildkite/", "buildkite.com/build-repo"),
	))
}

func bounded(key string) model.CacheKey {
	key = strings.ToValidUTF8(key, "?")
	if len(key) <= maxKeyLength {
		return model.CacheKey(key)
	}
	sum := sha256.Sum256([]byte(key))
	tail := "~" + hex.EncodeToString(sum[:8])
	return model.CacheKey(strings.ToValidUTF8(key[:maxKeyLength-len(tail)], "") + tail)
}
