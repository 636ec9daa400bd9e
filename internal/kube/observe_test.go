package kube

import (
	"maps"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestNodeFrom(t *testing.T) {
	created := metav1.NewTime(morning)
	changed := metav1.NewTime(morning.Add(time.Minute))
	added := metav1.NewTime(morning.Add(2 * time.Minute))
	base := func() *corev1.Node {
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "n", UID: "u", CreationTimestamp: created, Labels: map[string]string{"k": "v"}},
			Spec:       corev1.NodeSpec{ProviderID: "kwok://a/1"},
		}
	}
	want := func() model.Node {
		return model.Node{Name: "n", UID: "u", ID: "kwok://a/1", Created: morning, Labels: map[string]string{"k": "v"}}
	}
	for _, tt := range []struct {
		name   string
		change func(*corev1.Node)
		want   func(*model.Node)
	}{
		{"bare", func(*corev1.Node) {}, func(*model.Node) {}},
		{"ready", func(n *corev1.Node) {
			n.Status.Conditions = []corev1.NodeCondition{
				{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue},
				{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastTransitionTime: changed},
			}
		}, func(n *model.Node) { n.Ready, n.ReadyChanged = true, changed.Time }},
		{"ready, not yet open to pods", func(n *corev1.Node) {
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastTransitionTime: changed}}
			n.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule}}
		}, func(n *model.Node) { n.ReadyChanged = changed.Time }},
		{"silent", func(n *corev1.Node) {
			n.Status.Conditions = []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: "NodeStatusUnknown", LastTransitionTime: changed,
			}}
		}, func(n *model.Node) { n.ReadyChanged = changed.Time }},
		{"never spoke", func(n *corev1.Node) {
			n.Status.Conditions = []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: "NodeStatusNeverUpdated", LastTransitionTime: changed,
			}}
		}, func(n *model.Node) { n.ReadyChanged = morning }},
		{"draining", func(n *corev1.Node) {
			n.Spec.Unschedulable = true
			n.Spec.Taints = []corev1.Taint{{Key: taintDraining, Effect: corev1.TaintEffectNoSchedule}}
		}, func(n *model.Node) { n.Draining, n.Unschedulable = true, true }},
		{"to be deleted", func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: taintToBeDeleted, Value: "1767600000"}}
		}, func(n *model.Node) { n.CATaintSince = time.Unix(1767600000, 0) }},
		{"to be deleted, value not a time", func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: taintToBeDeleted, Value: "soon", TimeAdded: &added}}
		}, func(n *model.Node) { n.CATaintSince = added.Time }},
		{"to be deleted, no time at all", func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: taintToBeDeleted}}
		}, func(n *model.Node) { n.CATaintSince = morning }},
		{"marked", func(n *corev1.Node) {
			n.Annotations = map[string]string{
				"hearth.dev/decision": "keep", "hearth.dev/reason": "warm",
				"cluster-autoscaler.kubernetes.io/scale-down-disabled": "true",
				"hearth.dev/scale-down-disabled-by":                    "hearth",
			}
		}, func(n *model.Node) {
			n.Marks = model.Marks{Decision: model.DecisionKeep, Reason: "warm", Protected: true, ProtectedByUs: true}
		}},
		{"protected by a person", func(n *corev1.Node) {
			n.Annotations = map[string]string{"cluster-autoscaler.kubernetes.io/scale-down-disabled": "true"}
		}, func(n *model.Node) { n.Marks.Protected = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			node, expected := base(), want()
			tt.change(node)
			tt.want(&expected)
			if diff := cmp.Diff(expected, nodeFrom(node)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestPodFrom(t *testing.T) {
	at := func(minutes int) metav1.Time {
		return metav1.NewTime(morning.Add(time.Duration(minutes) * time.Minute))
	}
	r := podReader{
		engines:   engineSelector(t),
		groupOf:   func(label string) model.GroupID { return model.GroupID("group " + label) },
		nodeGroup: func(n model.NodeName) model.GroupID { return model.GroupID("group of " + n) },
		keysFor:   func(g model.GroupID) []string { return []string{"key in " + string(g)} },
	}
	owner := func(kind string) []metav1.OwnerReference {
		return []metav1.OwnerReference{{Kind: kind, Name: "o", Controller: new(true)}}
	}
	for _, tt := range []struct {
		name string
		pod  corev1.Pod
		want model.Pod
	}{
		{"bound runner", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Name: "p", Namespace: "ci", UID: "u", CreationTimestamp: at(0), OwnerReferences: owner("EphemeralRunner"),
				Labels: map[string]string{"key in group of n": "k"},
			},
			Spec:   corev1.PodSpec{NodeName: "n"},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.7", StartTime: new(at(1))},
		}, model.Pod{
			Namespace: "ci", Name: "p", IP: "10.0.0.7", UID: "u", Node: "n", Kind: model.PodRunner, Key: "k",
			Created: at(0).Time, Started: at(1).Time,
		}},
		{"pending runner that selects a group", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"key in group a": "k"}},
			Spec:       corev1.PodSpec{NodeSelector: map[string]string{"hearth.dev/node-group": "a"}},
			Status:     corev1.PodStatus{Phase: corev1.PodPending},
		}, model.Pod{Kind: model.PodRunner, Group: "group a", Key: "k"}},
		{"finished", corev1.Pod{
			Spec: corev1.PodSpec{NodeName: "n"},
			Status: corev1.PodStatus{
				Phase:      corev1.PodSucceeded,
				Conditions: []corev1.PodCondition{{LastTransitionTime: at(9)}},
				ContainerStatuses: []corev1.ContainerStatus{
					{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: at(3)}}},
					{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: at(2)}}},
				},
			},
		}, model.Pod{Node: "n", Kind: model.PodRunner, Finished: at(3).Time}},
		{"evicted", corev1.Pod{
			Spec: corev1.PodSpec{NodeName: "n"},
			Status: corev1.PodStatus{
				Phase:      corev1.PodFailed,
				Conditions: []corev1.PodCondition{{LastTransitionTime: at(9)}},
			},
		}, model.Pod{Node: "n", Kind: model.PodRunner, Finished: at(9).Time, Failed: true}},
		{"failed, nothing known", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{CreationTimestamp: at(0)},
			Spec:       corev1.PodSpec{NodeName: "n"},
			Status:     corev1.PodStatus{Phase: corev1.PodFailed},
		}, model.Pod{Node: "n", Kind: model.PodRunner, Created: at(0).Time, Finished: at(0).Time, Failed: true}},
		{"engine of a DaemonSet", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				OwnerReferences: owner("DaemonSet"),
				Labels:          map[string]string{"app.kubernetes.io/name": "dagger-helm"},
			},
			Spec: corev1.PodSpec{NodeName: "n"},
		}, model.Pod{Node: "n", Kind: model.PodEngine, Engine: &model.EngineContainer{Grace: 30 * time.Second}}},
		{"DaemonSet", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "logs", OwnerReferences: owner("DaemonSet"), CreationTimestamp: at(0)},
			Spec:       corev1.PodSpec{NodeName: "n"},
		}, model.Pod{Name: "logs", Node: "n", Kind: model.PodIgnored}},
		{"owned by a DaemonSet, not controlled", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{OwnerReferences: []metav1.OwnerReference{{Kind: "DaemonSet"}}},
			Spec:       corev1.PodSpec{NodeName: "n"},
		}, model.Pod{Node: "n", Kind: model.PodRunner}},
		{"static pod", corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{"kubernetes.io/config.mirror": "x"}},
			Spec:       corev1.PodSpec{NodeName: "n"},
		}, model.Pod{Node: "n", Kind: model.PodIgnored}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, r.pod(&tt.pod)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestEngineContainer(t *testing.T) {
	ended := func(code int32) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, FinishedAt: metav1.NewTime(morning)}}
	}
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	exit := func(code int32) *model.ContainerExit { return &model.ContainerExit{Code: code, At: morning} }
	proxy, engine := corev1.Container{Name: "proxy", Image: "p"}, corev1.Container{Name: "dagger-engine", Image: "e:1"}
	other := corev1.Container{Name: "engine", Image: "e:2"}
	for _, tt := range []struct {
		name       string
		containers []corev1.Container
		statuses   []corev1.ContainerStatus
		want       model.EngineContainer
	}{
		{"nothing known yet", []corev1.Container{engine}, nil, model.EngineContainer{Image: "e:1"}},
		{"runs", []corev1.Container{engine}, []corev1.ContainerStatus{{Name: "dagger-engine", State: running}}, model.EngineContainer{Image: "e:1"}},
		{"runs again after a crash", []corev1.Container{engine},
			[]corev1.ContainerStatus{{Name: "dagger-engine", State: running, LastTerminationState: ended(137)}}, model.EngineContainer{Image: "e:1"}},
		{"stopped", []corev1.Container{engine}, []corev1.ContainerStatus{{Name: "dagger-engine", State: ended(0)}}, model.EngineContainer{Image: "e:1", Exit: exit(0)}},
		{"killed", []corev1.Container{engine}, []corev1.ContainerStatus{{Name: "dagger-engine", State: ended(137)}}, model.EngineContainer{Image: "e:1", Exit: exit(137)}},
		{"another container ended", []corev1.Container{proxy, engine},
			[]corev1.ContainerStatus{{Name: "dagger-engine", State: running}, {Name: "proxy", State: ended(1)}}, model.EngineContainer{Image: "e:1"}},
		{"the engine before what was added", []corev1.Container{proxy, engine},
			[]corev1.ContainerStatus{{Name: "dagger-engine", State: ended(0)}, {Name: "proxy", State: running}}, model.EngineContainer{Image: "e:1", Exit: exit(0)}},
		{"another name: the first", []corev1.Container{other, proxy},
			[]corev1.ContainerStatus{{Name: "engine", State: ended(0)}, {Name: "proxy", State: ended(1)}}, model.EngineContainer{Image: "e:2", Exit: exit(0)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := &corev1.Pod{
				Spec:   corev1.PodSpec{Containers: tt.containers, TerminationGracePeriodSeconds: new(int64(300))},
				Status: corev1.PodStatus{ContainerStatuses: tt.statuses},
			}
			tt.want.Grace = 300 * time.Second
			stripPod(pod)
			if diff := cmp.Diff(&tt.want, engineContainer(pod)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestCacheKey(t *testing.T) {
	arc := map[string]string{
		"actions.github.com/scale-set-namespace": "arc-runners",
		"actions.github.com/scale-set-name":      "linux-large",
	}
	long := strings.Repeat("é", 200) // 400 bytes
	for _, tt := range []struct {
		name                string
		labels, annotations map[string]string
		keys                []string
		want                model.CacheKey
	}{
		{"nothing known", nil, nil, nil, ""},
		{"label by a person", map[string]string{"hearth.dev/cache-key": "a"}, nil, nil, "a"},
		{"annotation by a person", nil, map[string]string{"hearth.dev/cache-key": "dagger/dagger"}, nil, "dagger/dagger"},
		{"label before annotation", map[string]string{"hearth.dev/cache-key": "a"}, map[string]string{"hearth.dev/cache-key": "b"}, nil, "a"},
		{"blank is nothing", nil, map[string]string{"hearth.dev/cache-key": "  "}, nil, ""},
		{"ARC", arc, nil, nil, "arc-runners/linux-large"},
		{"a person before ARC", arc, map[string]string{"hearth.dev/cache-key": "a"}, nil, "a"},
		{"GitLab, by label", map[string]string{"project.runner.gitlab.com/id": "42"}, nil, nil, "gitlab/42"},
		{"GitLab, by annotation", nil, map[string]string{"project.runner.gitlab.com/id": "42"}, nil, "gitlab/42"},
		{"the group's keys", map[string]string{"repo": "r"}, map[string]string{"flow": "f"}, []string{"repo", "flow"}, "r/f"},
		{"the group's keys before all", map[string]string{"repo": "r", "hearth.dev/cache-key": "a"}, nil, []string{"repo"}, "r"},
		{"one of the group's keys missing", map[string]string{"repo": "r"}, nil, []string{"repo", "flow"}, "r/"},
		{"all of the group's keys missing", arc, nil, []string{"repo", "flow"}, "arc-runners/linux-large"},
		{"too long", nil, map[string]string{"hearth.dev/cache-key": long}, nil,
			model.CacheKey(strings.Repeat("é", 118) + "~df20b2aa6262e99e")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := CacheKey(tt.labels, tt.annotations, tt.keys); got != tt.want {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}

// TestCacheKeyOfEachSystem goes by all that each CI system puts on the pod of a
// job, as its controller's source of 2026 has it.
func TestCacheKeyOfEachSystem(t *testing.T) {
	runner := func(component string) map[string]string {
		return map[string]string{
			"actions-ephemeral-runner":               "True",
			"actions.github.com/organization":        "acme",
			"actions.github.com/scale-set-name":      "linux-large",
			"actions.github.com/scale-set-namespace": "arc-runners",
			"app.kubernetes.io/component":            component,
			"app.kubernetes.io/part-of":              "gha-runner-scale-set",
			"app.kubernetes.io/version":              "0.14.0",
			"pod-template-hash":                      "5d9c7f8b6d",
		}
	}
	gitlab := map[string]string{
		"job.runner.gitlab.com/before_sha": "0000000000000000000000000000000000000000",
		"job.runner.gitlab.com/id":         "991",
		"job.runner.gitlab.com/name":       "build: [amd64]",
		"job.runner.gitlab.com/ref":        "main",
		"job.runner.gitlab.com/sha":        "2d2e5b1",
		"job.runner.gitlab.com/timeout":    "1h0m0s",
		"job.runner.gitlab.com/url":        "https://gitlab.example.com/acme/shop/-/jobs/991",
		"project.runner.gitlab.com/id":     "42",
	}
	buildkite := map[string]string{
		"buildkite.com/build-branch":                     "main",
		"buildkite.com/build-repo":                       "git@github.com:acme/shop.git",
		"buildkite.com/build-url":                        "https://buildkite.com/acme/shop/builds/7",
		"buildkite.com/job-priority":                     "0",
		"buildkite.com/job-url":                          "https://buildkite.com/acme/shop/builds/7#0196",
		"buildkite.com/pipeline-slug":                    "shop",
		"buildkite.com/step-key":                         "unit",
		"cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
	}
	older := maps.Clone(buildkite)
	delete(older, "buildkite.com/pipeline-slug")
	agent := map[string]string{
		"buildkite.com/job-uuid": "0196-af", "buildkite.com/controller-id": "agents", "tag.buildkite.com/queue": "kubernetes",
	}
	for _, tt := range []struct {
		name                string
		labels, annotations map[string]string
		keys                []string
		want                model.CacheKey
	}{
		{"ARC runner", runner("runner"), map[string]string{"actions.github.com/patch-id": "3"}, nil, "arc-runners/linux-large"},
		{"ARC listener", runner("runner-scale-set-listener"), nil, nil, ""},
		{"ARC runner, the group asks for the organisation", runner("runner"), nil, []string{"actions.github.com/organization"}, "acme"},
		{"GitLab, before labels", map[string]string{"pod": "runner-t1-project-42-concurrent-0"}, gitlab, nil, "gitlab/42"},
		{"GitLab", map[string]string{
			"job.runner.gitlab.com/pod": "runner-t1-project-42-concurrent-0", "manager.runner.gitlab.com/id-short": "t1",
			"manager.runner.gitlab.com/name": "k8s", "pod": "runner-t1-project-42-concurrent-0",
			"project.runner.gitlab.com/id": "42", "project.runner.gitlab.com/name": "shop",
			"project.runner.gitlab.com/namespace": "acme", "project.runner.gitlab.com/namespace-id": "5",
			"project.runner.gitlab.com/root-namespace": "acme",
		}, gitlab, nil, "gitlab/42"},
		{"GitLab, by project and job", nil, gitlab, []string{"project.runner.gitlab.com/id", "job.runner.gitlab.com/name"}, "42/build: [amd64]"},
		{"GitLab, capacity held by pause pods", map[string]string{"runner.gitlab.com/pause-pod": "true"}, nil, nil, ""},
		{"Buildkite", agent, buildkite, nil, "buildkite/shop"},
		{"Buildkite, before slugs", agent, older, nil, "buildkite/git@github.com:acme/shop.git"},
		{"Buildkite, by pipeline and step", agent, buildkite, []string{"buildkite.com/pipeline-slug", "buildkite.com/step-key"}, "shop/unit"},
		{"a plain Job", map[string]string{"job-name": "nightly", "batch.kubernetes.io/job-name": "nightly"}, nil, nil, ""},
		{"a plain Job that says", map[string]string{"job-name": "nightly", "hearth.dev/cache-key": "nightly"}, nil, nil, "nightly"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := CacheKey(tt.labels, tt.annotations, tt.keys); got != tt.want {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}

func FuzzCacheKey(f *testing.F) {
	f.Add("a", "b")
	f.Add(strings.Repeat("é", 300), strings.Repeat("x", 252)+"é")
	f.Add("\xff", " ")
	f.Fuzz(func(t *testing.T, a, b string) {
		labels := map[string]string{"a": a, "b": b}
		for _, keys := range [][]string{{"a"}, {"a", "b"}} {
			key := CacheKey(labels, nil, keys)
			if len(key) > maxKeyLength || !utf8.ValidString(string(key)) {
				t.Errorf("key %q of %d bytes", key, len(key))
			}
			if again := CacheKey(labels, nil, keys); again != key {
				t.Errorf("key %q, then %q", key, again)
			}
		}
		// What differs beyond the cut still differs.
		longer := map[string]string{"a": a + "1"}
		if strings.TrimSpace(a) == a && CacheKey(labels, nil, []string{"a"}) == CacheKey(longer, nil, []string{"a"}) && utf8.ValidString(a) {
			t.Errorf("%q and %q have one key", a, a+"1")
		}
	})
}
