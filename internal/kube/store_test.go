package kube

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

func promise(sequence int64) nodegroups.Record {
	return nodegroups.Record{
		Sequence: sequence, Target: 5, Hidden: 2,
		Intents: map[model.InstanceID]nodegroups.Intent{
			"aws:///a/i-1": {Desired: model.DesiredGone, Stage: nodegroups.StageDraining, Since: morning},
			"aws:///a/i-2": {Desired: model.DesiredParked, Stage: nodegroups.StageStopping, Since: morning.Add(time.Second)},
			"aws:///a/i-3": {Desired: model.DesiredRunning, Stage: nodegroups.StageStarting},
		},
	}
}

var summary = model.GroupSummary{
	Min: 1, Max: 20, Ready: 4, Parked: 1, Warm: 2,
	Phases:     map[model.Phase]int{model.PhaseReady: 4, model.PhaseParked: 1},
	Conditions: []model.Condition{{Type: "AnnotationsValid", True: true, Since: morning}},
}

// sameTime compares times as instants.
var sameTime = cmp.Options{cmpopts.EquateApproxTime(0), cmpopts.EquateEmpty()}

func wantRecord(t *testing.T, s *Store, group model.GroupID, want nodegroups.Record) {
	t.Helper()
	records, _, _, err := s.Load(t.Context())
	must(t, err)
	if diff := cmp.Diff(want, records[group], sameTime); diff != "" {
		t.Errorf("record of %q (-want +got):\n%s", group, diff)
	}
}

// annotate writes an annotation as a person would.
func annotate(t *testing.T, c client.Client, group, key, value string) {
	t.Helper()
	var o v1alpha1.RunnerNodeGroup
	must(t, c.Get(t.Context(), client.ObjectKey{Name: group}, &o))
	set(&o.Annotations, key, value)
	must(t, c.Update(t.Context(), &o))
}

func TestRecordsSurvive(t *testing.T) {
	for _, group := range []model.GroupID{"runners-a", "Team A/runners", model.GroupID(strings.Repeat("x", 255))} {
		c := newClient(t, interceptor.Funcs{})
		must(t, NewStore(c).SaveGroup(t.Context(), group, promise(1), summary))
		// Another life: nothing but what was written is known.
		s := NewStore(c)
		wantRecord(t, s, group, promise(1))
		must(t, s.SaveGroup(t.Context(), group, promise(2), summary))
		wantRecord(t, NewStore(c), group, promise(2))
	}
}

// TestOneWriteCommits: once the object exists, a record costs one request.
func TestOneWriteCommits(t *testing.T) {
	requests := 0
	c := newClient(t, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, k client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			requests++
			return c.Get(ctx, k, o, opts...)
		},
		SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object, opts ...client.SubResourceUpdateOption) error {
			requests++
			return c.SubResource(sub).Update(ctx, o, opts...)
		},
	})
	s := NewStore(c)
	must(t, s.SaveGroup(t.Context(), "a", promise(1), summary))
	requests = 0
	for sequence := range int64(3) {
		must(t, s.SaveGroup(t.Context(), "a", promise(sequence+2), summary))
	}
	if requests != 3 {
		t.Errorf("%d requests for 3 records; want 3", requests)
	}
}

func TestPeoplesAnnotationsAreKept(t *testing.T) {
	c := newClient(t, interceptor.Funcs{})
	s := NewStore(c)
	must(t, s.SaveGroup(t.Context(), "a", promise(1), summary))
	annotate(t, c, "a", "hearth.dev/min-warm", "2") // a conflict for the next write
	must(t, s.SaveGroup(t.Context(), "a", promise(2), summary))
	records, annotations, _, err := s.Load(t.Context())
	must(t, err)
	if got := annotations["a"]["hearth.dev/min-warm"]; got != "2" {
		t.Errorf("min-warm is %q; want 2", got)
	}
	if got := records["a"].Sequence; got != 2 {
		t.Errorf("sequence %d; want 2", got)
	}
}

// TestSuperseded: a process that has lost the lead without noticing must not
// overwrite what the next one promised.
func TestSuperseded(t *testing.T) {
	c := newClient(t, interceptor.Funcs{})
	old := NewStore(c)
	must(t, old.SaveGroup(t.Context(), "a", promise(1), summary))

	next := NewStore(c)
	if err := next.SaveGroup(t.Context(), "a", promise(2), summary); !errors.Is(err, model.ErrSuperseded) {
		t.Errorf("a process that has not loaded: %v; want ErrSuperseded", err)
	}
	_, _, _, err := next.Load(t.Context())
	must(t, err)
	must(t, next.SaveGroup(t.Context(), "a", promise(2), summary))
	must(t, next.SaveGroup(t.Context(), "a", promise(3), summary))

	for range 2 {
		if err := old.SaveGroup(t.Context(), "a", promise(2), summary); !errors.Is(err, model.ErrSuperseded) {
			t.Errorf("the old leader: %v; want ErrSuperseded", err)
		}
	}
	wantRecord(t, NewStore(c), "a", promise(3))
}

// TestLostAnswer: a write took effect, but its answer did not arrive. The next
// record, with the same number or the following, is written all the same.
func TestLostAnswer(t *testing.T) {
	for _, sequence := range []int64{2, 3} {
		lose := false
		c := newClient(t, interceptor.Funcs{
			SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object, opts ...client.SubResourceUpdateOption) error {
				err := c.SubResource(sub).Update(ctx, o, opts...)
				if lose {
					return context.DeadlineExceeded
				}
				return err
			},
		})
		s := NewStore(c)
		must(t, s.SaveGroup(t.Context(), "a", promise(1), summary))
		lose = true
		if err := s.SaveGroup(t.Context(), "a", promise(2), summary); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("lost answer: %v; want DeadlineExceeded", err)
		}
		lose = false
		want := promise(sequence)
		want.Target = 17
		must(t, s.SaveGroup(t.Context(), "a", want, summary))
		wantRecord(t, NewStore(c), "a", want)
	}
}

func TestDeletedObjectIsMadeAnew(t *testing.T) {
	c := newClient(t, interceptor.Funcs{})
	s := NewStore(c)
	must(t, s.SaveGroup(t.Context(), "a", promise(1), summary))
	must(t, c.Delete(t.Context(), &v1alpha1.RunnerNodeGroup{ObjectMeta: metav1.ObjectMeta{Name: "a"}}))
	must(t, s.SaveGroup(t.Context(), "a", promise(2), summary))
	wantRecord(t, NewStore(c), "a", promise(2))
}

// TestConflictsEndWithTheContext: somebody changes the object all the time.
func TestConflictsEndWithTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	tries := 0
	c := newClient(t, interceptor.Funcs{
		SubResourceUpdate: func(context.Context, client.Client, string, client.Object, ...client.SubResourceUpdateOption) error {
			if tries++; tries == 5 {
				cancel()
			}
			return apierrors.NewConflict(v1alpha1.GroupVersion().WithResource("runnernodegroups").GroupResource(), "a", nil)
		},
	})
	if err := NewStore(c).SaveGroup(ctx, "a", promise(1), summary); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want Canceled", err)
	}
	if tries != 5 {
		t.Errorf("%d tries; want 5: until the context ended", tries)
	}
}

func nodeRecord() model.NodeRecord {
	return model.NodeRecord{
		ID: "aws:///eu-central-1a/i-0abc", Group: "runners-a", Node: "ip-10-0-0-1",
		Desired: model.DesiredRunning, Phase: model.PhaseReady, Hidden: true, Since: morning,
		Warmth: []model.KeyWarmth{
			{Key: "dagger/dagger", Warmth: 0.82, LastUsed: morning, Uses: 7},
			{Key: "dagger/docs", Warmth: 0.3, Uses: 1},
		},
		CacheBytes: 12 << 30, ConnectedClients: 3, Score: 1.25,
		Decision: model.DecisionKeep, Reason: "warmest for dagger/dagger",
		Conditions: []model.Condition{{Type: "Engine", True: true, Reason: "Measured", Message: "m", Since: morning}},
	}
}

func TestNodeRecordsSurvive(t *testing.T) {
	c := newClient(t, interceptor.Funcs{})
	s := NewStore(c)
	load := func() []model.NodeRecord {
		t.Helper()
		_, _, nodes, err := s.Load(t.Context())
		must(t, err)
		return nodes
	}
	r := nodeRecord()
	must(t, s.SaveNode(t.Context(), r))
	if diff := cmp.Diff([]model.NodeRecord{r}, load(), sameTime); diff != "" {
		t.Errorf("after create (-want +got):\n%s", diff)
	}
	// Everything that can go goes.
	r = model.NodeRecord{ID: r.ID, Group: r.Group, Desired: model.DesiredParked, Phase: model.PhaseParking}
	must(t, s.SaveNode(t.Context(), r))
	if diff := cmp.Diff([]model.NodeRecord{r}, load(), sameTime); diff != "" {
		t.Errorf("after update (-want +got):\n%s", diff)
	}
	for range 2 {
		must(t, s.DeleteNode(t.Context(), r.ID))
	}
	if nodes := load(); len(nodes) > 0 {
		t.Errorf("%v is left", nodes)
	}
}

// TestUnchangedNodesAreNotWritten: saving what is there already is no call.
func TestUnchangedNodesAreNotWritten(t *testing.T) {
	calls := 0
	c := newClient(t, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			calls++
			return c.Get(ctx, key, o, opts...)
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			calls++
			return c.Patch(ctx, o, p, opts...)
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
			calls++
			return c.SubResource(sub).Patch(ctx, o, p, opts...)
		},
	})
	s := NewStore(c)
	must(t, s.SaveNode(t.Context(), nodeRecord()))
	calls = 0
	must(t, s.SaveNode(t.Context(), nodeRecord()))
	if calls != 0 {
		t.Errorf("%d calls for what was there already", calls)
	}
	changed := nodeRecord()
	changed.ConnectedClients++
	must(t, s.SaveNode(t.Context(), changed))
	if calls != 1 {
		t.Errorf("%d calls for one change; want 1", calls)
	}
}

// TestNodesChangedByHand: what somebody else wrote is put right by the next
// write, and what somebody deleted is made again.
func TestNodesChangedByHand(t *testing.T) {
	c := newClient(t, interceptor.Funcs{})
	r := nodeRecord()
	must(t, NewStore(c).SaveNode(t.Context(), r))
	s := NewStore(c)
	_, _, _, err := s.Load(t.Context())
	must(t, err)
	saved := func() {
		t.Helper()
		r.ConnectedClients++
		must(t, s.SaveNode(t.Context(), r))
		_, _, nodes, err := NewStore(c).Load(t.Context())
		must(t, err)
		if diff := cmp.Diff([]model.NodeRecord{r}, nodes, sameTime); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	object := &v1alpha1.RunnerNode{}
	must(t, c.Get(t.Context(), client.ObjectKey{Name: v1alpha1.NodeName(r.ID)}, object))
	object.Spec.Desired = string(model.DesiredGone)
	object.Annotations = map[string]string{"by": "hand"}
	must(t, c.Update(t.Context(), object))
	object.Status.Phase = ""
	object.Status.Reason = "edited"
	must(t, c.Status().Update(t.Context(), object))
	saved()
	must(t, c.Get(t.Context(), client.ObjectKeyFromObject(object), object))
	if object.Annotations["by"] != "hand" {
		t.Error("an annotation was lost")
	}
	must(t, c.Delete(t.Context(), object))
	saved()
}

// oversized is a record in which everything for people is out of bounds.
func oversized() model.NodeRecord {
	r := nodeRecord()
	r.Warmth = []model.KeyWarmth{{Key: ""}, {Key: "nan", Warmth: math.NaN()}, {Key: "high", Warmth: 7}, {Key: "low", Warmth: -1, Uses: -3}}
	for i := range 50 {
		r.Warmth = append(r.Warmth, model.KeyWarmth{Key: model.CacheKey(fmt.Sprintf("%0253d", i))})
	}
	r.ConnectedClients = -1
	r.Score = math.Inf(-1)
	r.Reason = strings.Repeat("é", 5000)
	r.Conditions = []model.Condition{{Type: "Engine", Message: "\xff" + strings.Repeat("m", 50000)}}
	return r
}

func TestTextForPeopleIsBounded(t *testing.T) {
	status := nodeStatus(oversized())
	if n := len(status.Warmth); n != model.MaxWarmKeys {
		t.Errorf("%d keys; want %d", n, model.MaxWarmKeys)
	}
	var got []string
	for _, w := range status.Warmth[:3] {
		got = append(got, w.Key+" "+w.Warmth)
	}
	if diff := cmp.Diff([]string{"nan 0.00", "high 1.00", "low 0.00"}, got); diff != "" {
		t.Errorf("warmth (-want +got):\n%s", diff)
	}
	if n := len(status.Reason); n > 1024 || !strings.HasSuffix(status.Reason, "é…") {
		t.Errorf("reason of %d bytes ends in %q", n, status.Reason[n-8:])
	}
	if c := status.Conditions[0]; len(c.Message) > 4096 || c.Reason == "" || c.LastTransitionTime.IsZero() {
		t.Errorf("condition %+v", c)
	}
}
