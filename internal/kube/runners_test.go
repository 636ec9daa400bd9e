package kube

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestJobKey(t *testing.T) {
	for _, tt := range []struct {
		repository, ref string
		want            model.CacheKey
	}{
		{"", "", ""},
		{"", "acme/shop/.github/workflows/ci.yml@refs/heads/main", ""},
		{"acme/shop", "", "github/acme/shop"},
		{"acme/shop", "acme/shop/.github/workflows/ci.yml@refs/heads/main", "github/acme/shop/.github/workflows/ci.yml"},
		{"acme/shop", "acme/shop/.github/workflows/ci.yml@refs/pull/7/merge", "github/acme/shop/.github/workflows/ci.yml"},
		{"acme/shop", "acme/lib/.github/workflows/build.yml@v1", "github/acme/shop/acme/lib/.github/workflows/build.yml"},
		{"acme/shop", "@", "github/acme/shop"},
	} {
		if got := jobKey(tt.repository, tt.ref); got != tt.want {
			t.Errorf("jobKey(%q, %q) = %q, want %q", tt.repository, tt.ref, got, tt.want)
		}
	}
	if got := jobKey(strings.Repeat("a", 10<<10), ""); len(got) > maxKeyLength {
		t.Errorf("a key of %d bytes", len(got))
	}
}

// runnerObject is an EphemeralRunner with what its status says of its job.
func runnerObject(name, uid string, status map[string]any) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{}}
	o.SetGroupVersionKind(ephemeralRunner("EphemeralRunner"))
	o.SetNamespace("ci")
	o.SetName(name)
	o.SetUID(types.UID(uid))
	o.SetCreationTimestamp(metav1.Unix(1767600000, 0))
	if status != nil {
		o.Object["status"] = status
	}
	return o
}

func shop() map[string]any {
	return map[string]any{
		"jobRepositoryName": "acme/shop", "jobWorkflowRef": "acme/shop/.github/workflows/ci.yml@refs/heads/main",
		"jobId": "9", "workflowRunId": int64(7),
	}
}

func TestReadRunner(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status map[string]any
		busy   bool
	}{
		{"no status", nil, false},
		{"no job yet", map[string]any{"phase": "Running", "jobDisplayName": "", "workflowRunId": int64(0)}, false},
		{"of other types", map[string]any{"jobRepositoryName": int64(7), "jobWorkflowRef": []any{}}, true},
		{"an older controller's", map[string]any{"jobRequestId": int64(7)}, true},
		{"a newer one's", map[string]any{"jobId": "0b1c"}, true},
	} {
		if r, matters := readRunner(runnerObject("r", "u", tt.status)); !matters || r.key != "" || r.busy != tt.busy {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
	o := runnerObject("r", "u", shop())
	o.Object["spec"] = map[string]any{"jitToken": "secret"}
	stripRunner(o)
	if _, has := o.Object["spec"]; has {
		t.Error("the spec is kept")
	}
	if r, _ := readRunner(o); !r.busy || r.key != "github/acme/shop/.github/workflows/ci.yml" || r.name.Name != "r" {
		t.Errorf("%+v", r)
	}
}

// jobSink remembers the job of each pod as last told.
type jobSink struct {
	logSink
	state   sync.Mutex
	jobs    map[string]model.CacheKey
	waiting map[string]bool
}

func (s *jobSink) PodChanged(p model.Pod) {
	s.state.Lock()
	defer s.state.Unlock()
	s.jobs[p.Name], s.waiting[p.Name] = p.Job, p.Waiting
}

// A cluster that learns of EphemeralRunners later is noticed, and a job makes
// its pod known anew, whichever is seen first.
func TestJobsOfEphemeralRunners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		installed := false
		var mu sync.Mutex
		set := map[string]string{"actions.github.com/scale-set-namespace": "arc", "actions.github.com/scale-set-name": "linux"}
		c := newClient(t, interceptor.Funcs{
			List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
				mu.Lock()
				defer mu.Unlock()
				if u, ok := list.(*unstructured.UnstructuredList); ok && !installed {
					return &meta.NoKindMatchError{GroupKind: u.GroupVersionKind().GroupKind()}
				}
				return c.List(ctx, list, opts...)
			},
		}, pod("early", "p1", "n", set), pod("late", "p2", "n", set), pod("other", "p3", "n", nil), runnerObject("early", "r1", shop()))
		sink := &jobSink{jobs: map[string]model.CacheKey{}, waiting: map[string]bool{}}
		f, err := NewFeed(FeedConfig{
			Client: listOnly{c}, Sink: sink, Engines: engineSelector(t), Logger: slog.New(slog.DiscardHandler),
			KeysFor: func(model.GroupID) []string { return nil },
		})
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { f.Run(ctx) })
		defer running.Wait()
		defer cancel()
		want := func(when string, jobs map[string]model.CacheKey) {
			t.Helper()
			synctest.Wait()
			sink.state.Lock()
			defer sink.state.Unlock()
			for name, key := range jobs {
				// Without an EphemeralRunner nothing is known of a runner's work.
				if waits := name == "late" && when == "no job yet"; sink.waiting[name] != waits {
					t.Errorf("%s: %s waits for a job: %v", when, name, !waits)
				}
				if sink.jobs[name] != key {
					t.Errorf("%s: the job of %s is %q, want %q", when, name, sink.jobs[name], key)
				}
			}
		}
		const ci = "github/acme/shop/.github/workflows/ci.yml"
		time.Sleep(3 * time.Second)
		if !f.Synced() {
			t.Fatal("EphemeralRunners that are not there hold up the rest")
		}
		want("without them", map[string]model.CacheKey{"early": "", "late": "", "other": ""})
		mu.Lock()
		installed = true
		mu.Unlock()
		time.Sleep(lookForRunners)
		want("installed", map[string]model.CacheKey{"early": ci, "late": ""})
		o := runnerObject("late", "r2", nil)
		must(t, c.Create(t.Context(), o))
		want("no job yet", map[string]model.CacheKey{"late": ""})
		o.Object["status"] = shop()
		must(t, c.Update(t.Context(), o))
		want("picked up", map[string]model.CacheKey{"late": ci, "other": ""})
		// The runner is seen before its pod.
		must(t, c.Create(t.Context(), runnerObject("quick", "r3", shop())))
		synctest.Wait()
		must(t, c.Create(t.Context(), pod("quick", "p4", "n", set)))
		want("before its pod", map[string]model.CacheKey{"quick": ci})
		must(t, c.Delete(t.Context(), o))
		must(t, c.Delete(t.Context(), &corev1.Pod{ObjectMeta: pod("late", "p2", "n", set).ObjectMeta}))
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, kept := f.jobs[types.NamespacedName{Namespace: "ci", Name: "late"}]; kept || len(f.podNames) != 3 {
			t.Errorf("kept jobs %v, pods %v", f.jobs, f.podNames)
		}
	})
}

// comingSink remembers how many runners are to have a pod.
type comingSink struct {
	logSink
	state sync.Mutex
	last  map[model.GroupID]map[string]time.Time
}

func (s *comingSink) RunnerComing(g model.GroupID, runner string, since time.Time) {
	s.state.Lock()
	defer s.state.Unlock()
	if s.last[g] == nil {
		s.last[g] = map[string]time.Time{}
	}
	if s.last[g][runner] = since; since.IsZero() {
		delete(s.last[g], runner)
	}
}

// A runner that asks for a node group counts from its creation to its pod, and
// never again, whichever is seen first.
func TestRunnersComing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set := map[string]string{"actions.github.com/scale-set-namespace": "arc", "actions.github.com/scale-set-name": "linux"}
		asking := func(name, uid string, status map[string]any) *unstructured.Unstructured {
			o := runnerObject(name, uid, status)
			o.Object["spec"] = map[string]any{
				"jitToken": "secret", "spec": map[string]any{"nodeSelector": map[string]any{"hearth.dev/node-group": "runners", "disk": "ssd"}},
			}
			return o
		}
		c := newClient(t, interceptor.Funcs{}, pod("had", "p1", "n", set), asking("had", "r1", nil), asking("done", "r2", map[string]any{"phase": "Succeeded"}), runnerObject("anywhere", "r3", nil))
		sink := &comingSink{last: map[model.GroupID]map[string]time.Time{}}
		f, err := NewFeed(FeedConfig{
			Client: listOnly{c}, Sink: sink, Engines: engineSelector(t), Logger: slog.New(slog.DiscardHandler),
			KeysFor: func(model.GroupID) []string { return nil },
		})
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { f.Run(ctx) })
		defer running.Wait()
		defer cancel()
		want := func(when string, n int) {
			t.Helper()
			synctest.Wait()
			sink.state.Lock()
			defer sink.state.Unlock()
			if got := len(sink.last["runners"]); got != n || len(sink.last) > 1 {
				t.Errorf("%s: %v are coming, want %d", when, sink.last, n)
			}
		}
		time.Sleep(time.Minute)
		want("at first", 0)
		failing := asking("c", "r-c", nil)
		for _, o := range []*unstructured.Unstructured{asking("a", "r-a", nil), asking("b", "r-b", nil), failing} {
			must(t, c.Create(t.Context(), o))
		}
		want("created", 3)
		must(t, c.Create(t.Context(), pod("a", "p-a", "", set)))
		want("a has its pod", 2)
		must(t, c.Delete(t.Context(), &corev1.Pod{ObjectMeta: pod("a", "p-a", "", set).ObjectMeta}))
		want("a had its pod", 2)
		must(t, c.Delete(t.Context(), asking("b", "r-b", nil)))
		want("b is gone", 1)
		failing.Object["status"] = map[string]any{"phase": "Failed"}
		must(t, c.Update(t.Context(), failing))
		want("c has failed", 0)
		must(t, c.Create(t.Context(), pod("d", "p-d", "", set)))
		must(t, c.Create(t.Context(), asking("d", "r-d", nil)))
		want("d's pod was seen first", 0)
		for _, name := range []string{"had", "done", "a", "c", "d"} {
			must(t, c.Delete(t.Context(), runnerObject(name, "", nil)))
		}
		for name, uid := range map[string]string{"had": "p1", "d": "p-d"} {
			must(t, c.Delete(t.Context(), &corev1.Pod{ObjectMeta: pod(name, uid, "", set).ObjectMeta}))
		}
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.met) != 0 || len(f.coming) != 0 {
			t.Errorf("kept: met %v, coming %v", f.met, f.coming)
		}
	})
}
