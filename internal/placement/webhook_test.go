package placement

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// desk is a webhook with what it knows, and a clock.
type desk struct {
	*Handler
	index    *Index
	requests *prometheus.CounterVec
	now      time.Time
	slots    int
	pods     int
}

const group = "runners"

func newDesk(t testing.TB) *desk {
	t.Helper()
	d := &desk{now: time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC), slots: 1}
	d.requests = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "requests"}, []string{"result"})
	var err error
	d.index, err = NewIndex(IndexConfig{
		Label: kube.WarmLabel, WarmLabels: kube.WarmLabels,
		Group:    func(labels map[string]string) model.GroupID { return model.GroupID(labels["hearth.dev/node-group"]) },
		Slots:    func(model.GroupID) int { return d.slots },
		Patience: func(model.GroupID) time.Duration { return 45 * time.Second },
		Now:      func() time.Time { return d.now },
	})
	must(t, err)
	engines, err := labels.Parse("app.kubernetes.io/name=dagger-helm")
	must(t, err)
	feed, err := kube.NewFeed(kube.FeedConfig{
		Client: fake.NewClientBuilder().Build(), Sink: nowhere{}, Engines: kube.EngineSelector{Labels: engines},
		KeysFor: func(model.GroupID) []string { return nil }, Logger: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	d.Handler, err = NewHandler(HandlerConfig{
		Index: d.index, Read: feed.Read, Label: kube.WarmLabel, Requests: d.requests, Logger: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	return d
}

// nowhere is told nothing: the feed is not run.
type nowhere struct{}

func (nowhere) NodeChanged(model.Node)                        {}
func (nowhere) NodeGone(model.Node)                           {}
func (nowhere) PodChanged(model.Pod)                          {}
func (nowhere) PodGone(model.Pod)                             {}
func (nowhere) RunnerComing(model.GroupID, string, time.Time) {}

func (nowhere) AnnotationsChanged(model.GroupID, map[string]string) {}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// node registers a Ready node that is warm for keys.
func (d *desk) node(name string, keys ...model.CacheKey) {
	d.put(name, func(*model.Node) {}, keys...)
}

func (d *desk) put(name string, change func(*model.Node), keys ...model.CacheKey) {
	n := model.Node{Name: model.NodeName(name), UID: "uid-" + name, ID: "x", Ready: true, Labels: map[string]string{"hearth.dev/node-group": group}}
	for _, key := range keys {
		n.Labels[kube.WarmLabel(key)] = "warm"
	}
	change(&n)
	d.index.NodeChanged(n)
}

// job lets a job run on a node; it returns its end.
func (d *desk) job(node, key string) (end func()) {
	d.pods++
	p := model.Pod{UID: fmt.Sprint(d.pods), Kind: model.PodRunner, Node: model.NodeName(node), Key: model.CacheKey(key), Started: d.now}
	d.index.PodChanged(p)
	d.index.PodChanged(p) // its status changes, and it is told again
	return func() {
		p.Finished = d.now
		d.index.PodChanged(p)
	}
}

// runner is a runner pod of a key, as its creator sends it.
func runner(key string) *corev1.Pod {
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			GenerateName: "job-", Namespace: "ci", Annotations: map[string]string{"hearth.dev/cache-key": key},
		},
		Spec: corev1.PodSpec{
			NodeSelector: map[string]string{"hearth.dev/node-group": group},
			Containers:   []corev1.Container{{Name: "job", Image: "ci"}},
		},
	}
}

// review is what the API server sends when the pod is created.
func review(t testing.TB, pod any) []byte {
	t.Helper()
	raw, err := json.Marshal(pod)
	must(t, err)
	text, err := json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: &admissionv1.AdmissionRequest{
			UID: "u-1", Kind: metav1.GroupVersionKind{Version: "v1", Kind: "Pod"},
			Resource:  metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
			Namespace: "ci", Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: raw},
		},
	})
	must(t, err)
	return text
}

func (d *desk) post(body []byte) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	d.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/placement", bytes.NewReader(body)))
	return w
}

// admit returns the pod as it is created.
func (d *desk) admit(t testing.TB, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	w := d.post(review(t, pod))
	if w.Code != http.StatusOK {
		t.Fatalf("answered %d: %s", w.Code, w.Body)
	}
	var answer admissionv1.AdmissionReview
	must(t, json.Unmarshal(w.Body.Bytes(), &answer))
	r := answer.Response
	if answer.APIVersion != "admission.k8s.io/v1" || answer.Kind != "AdmissionReview" || r == nil || r.UID != "u-1" || !r.Allowed || len(r.Warnings) > 0 {
		t.Fatalf("answered %s", w.Body)
	}
	raw, err := json.Marshal(pod)
	must(t, err)
	if len(r.Patch) > 0 {
		patch, err := jsonpatch.DecodePatch(r.Patch)
		must(t, err)
		raw, err = patch.Apply(raw)
		must(t, err)
	}
	out := &corev1.Pod{}
	must(t, json.Unmarshal(raw, out))
	return out
}

// preferences are the pod's, as "weight place".
func preferences(pod *corev1.Pod) (all []string) {
	a := pod.Spec.Affinity
	if a == nil || a.NodeAffinity == nil {
		return nil
	}
	for _, term := range a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution {
		var where []string
		for _, e := range term.Preference.MatchExpressions {
			where = append(where, strings.TrimSpace(fmt.Sprintf("%s %s %s", e.Operator, e.Key, strings.Join(e.Values, ","))))
		}
		for _, f := range term.Preference.MatchFields {
			where = append(where, strings.Join(f.Values, ","))
		}
		all = append(all, fmt.Sprintf("%d %s", term.Weight, strings.Join(where, " and ")))
	}
	return all
}

func (d *desk) wantPreferences(t *testing.T, key string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, preferences(d.admit(t, runner(key)))); diff != "" {
		t.Errorf("preferences of a pod of %q (-want +got):\n%s", key, diff)
	}
}

func label(weight int, key model.CacheKey) string {
	return fmt.Sprintf("%d Exists %s", weight, kube.WarmLabel(key))
}

func TestPrefersWarmNodes(t *testing.T) {
	d := newDesk(t)
	// Of a key that no node is known for a node may come back that is.
	d.wantPreferences(t, "a", label(80, "a"))
	d.node("n1", "a", "b")
	d.node("n2", "a")
	d.node("n3", "b")
	d.node("n4")
	d.wantPreferences(t, "a", label(80, "a"), "20 n2", "16 n1") // n1 is one of two that know b
	d.wantPreferences(t, "b", label(80, "b"), "20 n3", "16 n1")
	end := d.job("n2", "a")
	d.wantPreferences(t, "a", label(80, "a"), "20 n1")
	end()
	d.wantPreferences(t, "a", label(80, "a"), "20 n2", "16 n1")
	for _, tt := range []struct {
		name   string
		change func(*model.Node)
	}{
		{"NotReady", func(n *model.Node) { n.Ready = false }},
		{"cordoned", func(n *model.Node) { n.Unschedulable = true }},
		{"draining", func(n *model.Node) { n.Draining = true }},
		{"being removed", func(n *model.Node) { n.CATaintSince = d.now }},
		{"of another group", func(n *model.Node) { n.Labels["hearth.dev/node-group"] = "others" }},
	} {
		d.put("n2", tt.change, "a")
		if got := preferences(d.admit(t, runner("a"))); !slices.Equal(got, []string{label(80, "a"), "20 n1"}) {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
	d.index.NodeGone(model.Node{Name: "n1"})
	d.wantPreferences(t, "a", label(80, "a"))
}

// The node whose other caches others need least goes first, and five are named.
func TestLeastMissedFirst(t *testing.T) {
	d := newDesk(t)
	d.node("only-c", "a", "c")         // the one node that knows c
	d.node("two-of-b", "a", "b")       // b is known by two
	d.node("two-of-b-too", "a", "b")   //
	d.node("nothing-else", "a")        //
	d.node("many", "a", "e", "f")      // the one that knows e and f
	d.node("most", "a", "g", "h", "i") //
	d.wantPreferences(t, "a", label(80, "a"), "20 nothing-else", "16 two-of-b", "12 two-of-b-too", "8 only-c", "4 many")
	// A copy on a node that takes no pods is none.
	d.put("two-of-b", func(n *model.Node) { n.Unschedulable = true }, "a", "b")
	d.wantPreferences(t, "a", label(80, "a"), "20 nothing-else", "16 only-c", "12 two-of-b-too", "8 many", "4 most")
}

// A job that was seen to start makes its node warm before a label says so.
func TestSeenJobsCountUntilLabelsFollow(t *testing.T) {
	d := newDesk(t)
	d.node("n1")
	d.job("n1", "a")()
	d.wantPreferences(t, "a", label(80, "a"), "100 n1")
	d.node("n1", "a")
	d.wantPreferences(t, "a", label(80, "a"), "20 n1")
	d.job("n1", "b")()
	d.now = d.now.Add(seenFor)
	d.wantPreferences(t, "b", label(80, "b"))
	// The engine has lost its cache: labels go, and what was seen with them.
	d.job("n1", "c")()
	d.node("n1")
	d.wantPreferences(t, "a", label(80, "a"))
	d.wantPreferences(t, "c", label(80, "c"))
	// Another machine under the same name knows nothing.
	d.job("n1", "c")()
	d.put("n1", func(n *model.Node) { n.UID = "another" })
	d.wantPreferences(t, "c", label(80, "c"))
}

func TestHeldBackWhenAllWarmNodesAreFullForLong(t *testing.T) {
	d := newDesk(t)
	d.node("n1", "a")
	d.node("n2", "a")
	d.node("n3")
	end := d.job("n1", "a")
	d.now = d.now.Add(44 * time.Second)
	d.job("n2", "a")
	d.wantPreferences(t, "a", label(80, "a")) // n1 is about to be late, n2 is not
	d.now = d.now.Add(44 * time.Second)
	d.wantPreferences(t, "a", label(80, "a"))
	d.now = d.now.Add(time.Second)
	pod := d.admit(t, runner("a"))
	if got := preferences(pod); got != nil || pod.Annotations["hearth.dev/placement"] != "no preference: all 2 warm nodes have been full for long" {
		t.Errorf("preferences %q, annotations %q", got, pod.Annotations)
	}
	if pod.Annotations[safeToEvict] != "false" {
		t.Error("it may be evicted")
	}
	if again := d.admit(t, pod); cmp.Diff(pod, again) != "" {
		t.Errorf("asked again it changed:\n%s", cmp.Diff(pod, again))
	}
	end()
	d.wantPreferences(t, "a", label(80, "a"), "20 n1")
}

func TestNodesWithSeveralSlots(t *testing.T) {
	d := newDesk(t)
	d.slots = 2
	d.node("n1", "a")
	first := d.job("n1", "a")
	d.wantPreferences(t, "a", label(80, "a"), "20 n1")
	d.job("n1", "a")
	d.wantPreferences(t, "a", label(80, "a"))
	first()
	first() // told again
	d.wantPreferences(t, "a", label(80, "a"), "20 n1")
}

// Pods that say where to run keep what they say, however contradictory.
func TestPodsThatSayWhereToRun(t *testing.T) {
	required := func(key string, op corev1.NodeSelectorOperator) *corev1.NodeSelector {
		return &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: op}, {Key: key, Operator: corev1.NodeSelectorOpDoesNotExist}},
		}}}
	}
	for name, say := range map[string]func(*corev1.Pod){
		"node name": func(p *corev1.Pod) { p.Spec.NodeName = "n9" },
		"host name": func(p *corev1.Pod) { p.Spec.NodeSelector["kubernetes.io/hostname"] = "n9" },
		"required and contradicting itself": func(p *corev1.Pod) {
			p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
				RequiredDuringSchedulingIgnoredDuringExecution: required(kube.WarmLabel("a"), corev1.NodeSelectorOpExists),
			}}
		},
		"preferred": func(p *corev1.Pod) {
			p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
				PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{Weight: 1, Preference: required("x", corev1.NodeSelectorOpExists).NodeSelectorTerms[0]}},
			}}
		},
		"a person has decided": func(p *corev1.Pod) { p.Annotations["hearth.dev/placement"] = "off" },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			d.node("n1", "a")
			pod := runner("a")
			say(pod)
			want := pod.DeepCopy()
			want.Annotations[safeToEvict] = "false"
			if diff := cmp.Diff(want, d.admit(t, pod)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	// What other affinities say goes together with ours.
	d := newDesk(t)
	d.node("n1", "a")
	pod := runner("a")
	pod.Spec.Affinity = &corev1.Affinity{
		NodeAffinity:    &corev1.NodeAffinity{},
		PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{TopologyKey: "kubernetes.io/hostname"}}},
		PodAffinity:     &corev1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{TopologyKey: "kubernetes.io/hostname"}}},
	}
	got := d.admit(t, pod)
	if len(preferences(got)) != 2 || got.Spec.Affinity.PodAntiAffinity == nil || got.Spec.Affinity.PodAffinity == nil {
		t.Errorf("affinity %+v", got.Spec.Affinity)
	}
}

// Pods that are none of ours come through untouched.
func TestForeignPods(t *testing.T) {
	for name, change := range map[string]func(*corev1.Pod){
		"no known key": func(p *corev1.Pod) { p.Annotations = nil },
		"an engine":    func(p *corev1.Pod) { p.Labels = map[string]string{"app.kubernetes.io/name": "dagger-helm"} },
		"of a DaemonSet": func(p *corev1.Pod) {
			p.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Name: "x", Controller: new(true)}}
		},
	} {
		d := newDesk(t)
		d.node("n1", "a")
		pod := runner("a")
		change(pod)
		if diff := cmp.Diff(pod, d.admit(t, pod)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if got := testutil.ToFloat64(d.requests.WithLabelValues("foreign")); got != 1 {
			t.Errorf("%s: counted %v times", name, got)
		}
	}
}

// Other mutators run before, between and after, and the API server asks again.
func TestAskedAgain(t *testing.T) {
	d := newDesk(t)
	d.node("n1", "a")
	first := d.admit(t, runner("a"))
	d.node("n2", "a") // the world has moved on meanwhile
	if diff := cmp.Diff(first, d.admit(t, first)); diff != "" {
		t.Errorf("asked again it changed:\n%s", diff)
	}
	others := first.DeepCopy()
	others.Annotations["sidecar.example.com/injected"] = "true"
	others.Spec.Containers = append(others.Spec.Containers, corev1.Container{Name: "sidecar"})
	if diff := cmp.Diff(others, d.admit(t, others)); diff != "" {
		t.Errorf("after another mutator it changed:\n%s", diff)
	}
	evicted := first.DeepCopy()
	evicted.Annotations[safeToEvict] = "true" // a later one's word, or a person's
	if got := d.admit(t, evicted); got.Annotations[safeToEvict] != "true" {
		t.Error("another's safe-to-evict was overwritten")
	}
	bare := runner("a") // another mutator dropped all of ours
	if len(preferences(d.admit(t, bare))) == 0 {
		t.Error("a pod that lost its preferences gets none")
	}
}

func TestKeysOfAnyKind(t *testing.T) {
	d := newDesk(t)
	for name, key := range map[string]string{
		"10 kB": strings.Repeat("k", 10<<10), "controls": "\x00\n\t", "quotes": `"}],"`, "path": "~1/~0", "emoji": "🔥", "markup": "</script>",
	} {
		clean := strings.TrimSpace(key)
		got := preferences(d.admit(t, runner(key)))
		if len(got) != 1 && clean != "" {
			t.Errorf("%s: preferences %q", name, got)
		}
	}
}

func TestHugePods(t *testing.T) {
	d := newDesk(t)
	d.node("n1", "a")
	pod := runner("a")
	pod.Annotations["notes"] = strings.Repeat("x", 200<<10)
	for i := range 5000 {
		pod.Spec.Containers[0].Env = append(pod.Spec.Containers[0].Env, corev1.EnvVar{Name: fmt.Sprint(i), Value: strings.Repeat("v", 200)})
	}
	if got := preferences(d.admit(t, pod)); len(got) != 2 {
		t.Errorf("a pod of over 1 MB: preferences %q", got)
	}
	w := d.post(append(review(t, runner("a")), bytes.Repeat([]byte(" "), maxBody)...))
	if w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "too large") {
		t.Errorf("a body beyond the bound: %d %s", w.Code, w.Body)
	}
}

func TestRequestsThatCannotBeUsed(t *testing.T) {
	d := newDesk(t)
	for name, body := range map[string]string{
		"nothing": "", "no JSON": "pod", "another document": `{"kind":"Pod"}`, "no uid": `{"request":{}}`,
		"no request": `{"request":null}`, "a list": `[]`, "wrong types": `{"request":{"uid":7}}`, "cut off": `{"request":{"uid":"u"`,
	} {
		if w := d.post([]byte(body)); w.Code != http.StatusBadRequest {
			t.Errorf("%s: answered %d %s", name, w.Code, w.Body)
		}
	}
	if got := testutil.ToFloat64(d.requests.WithLabelValues("bad")); got != 8 {
		t.Errorf("counted %v", got)
	}
	// The review is one, the pod in it is not: it is allowed as it is.
	for name, pod := range map[string]string{"no object": `null`, "a text": `"x"`, "wrong types": `{"metadata":{"labels":[]}}`} {
		w := d.post([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","operation":"CREATE","resource":{"version":"v1","resource":"pods"},"object":` + pod + `}}`))
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"allowed":true`) || strings.Contains(w.Body.String(), "patch") {
			t.Errorf("%s: answered %d %s", name, w.Code, w.Body)
		}
	}
	for name, request := range map[string]string{
		"an update":        `"operation":"UPDATE","resource":{"version":"v1","resource":"pods"}`,
		"another kind":     `"operation":"CREATE","resource":{"group":"apps","version":"v1","resource":"deployments"}`,
		"a subresource":    `"operation":"CREATE","subResource":"eviction","resource":{"version":"v1","resource":"pods"}`,
		"says no resource": `"operation":"CREATE"`,
	} {
		w := d.post([]byte(`{"request":{"uid":"u",` + request + `,"object":{"metadata":{"labels":{"hearth.dev/cache-key":"a"}},"spec":{}}}}`))
		if w.Code != http.StatusOK || strings.Contains(w.Body.String(), "patch") {
			t.Errorf("%s: answered %d %s", name, w.Code, w.Body)
		}
	}
}

func FuzzWebhook(f *testing.F) {
	f.Add(review(f, runner("a")))
	f.Add([]byte(`{"request":{"uid":"u","operation":"CREATE","resource":{"version":"v1","resource":"pods"},"object":{"metadata":{"labels":{"hearth.dev/cache-key":"a"},"annotations":null},"spec":{"affinity":{"nodeAffinity":null}}}}}`))
	f.Add([]byte(`{"request":{"uid":"u","object":{"metadata":{"annotations":{"hearth.dev/cache-key":"\u0000"}},"spec":{"nodeSelector":{"":""}}}}}`))
	f.Add([]byte(`[{`))
	f.Add([]byte(`{"metadata":{"labels":{"actions.github.com/scale-set-name":"a"},"annotations":{"~1/~0":""}},"spec":{"affinity":{"podAffinity":{}},"nodeName":""}}`))
	d := newDesk(f)
	d.node("n1", "a")
	d.job("n1", "b")
	f.Fuzz(func(t *testing.T, body []byte) {
		d.sane(t, body)
		if json.Valid(body) { // as a pod
			d.sane(t, review(t, json.RawMessage(body)))
		}
	})
}

// sane checks what holds for any answer.
func (d *desk) sane(t *testing.T, body []byte) {
	w := d.post(body)
	if w.Code == http.StatusBadRequest {
		return
	}
	var in, out admissionv1.AdmissionReview
	must(t, utiljson.Unmarshal(body, &in))
	must(t, utiljson.Unmarshal(w.Body.Bytes(), &out))
	if w.Code != http.StatusOK || out.Response == nil || !out.Response.Allowed || out.Response.UID != in.Request.UID {
		t.Fatalf("answered %d %s", w.Code, w.Body)
	}
	if len(out.Response.Patch) == 0 {
		return
	}
	patch, err := jsonpatch.DecodePatch(out.Response.Patch)
	must(t, err)
	var whole struct {
		Metadata *json.RawMessage `json:"metadata"`
		Spec     *json.RawMessage `json:"spec"`
	}
	must(t, utiljson.Unmarshal(in.Request.Object.Raw, &whole))
	if whole.Metadata == nil || whole.Spec == nil {
		return // no API server sends such
	}
	changed, err := patch.Apply(in.Request.Object.Raw)
	must(t, err)
	// Asked again, it leaves the pod as it is.
	in.Request.Object.Raw = changed
	again, err := json.Marshal(in)
	must(t, err)
	if w = d.post(again); strings.Contains(w.Body.String(), `"patch"`) {
		t.Errorf("changed twice: %s, then %s", out.Response.Patch, w.Body)
	}
}
