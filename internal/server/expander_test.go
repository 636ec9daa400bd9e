package server

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
	pb "github.com/hearth-ci/hearth/protos/expander"
)

func offer(groups ...string) *pb.BestOptionsRequest {
	req := &pb.BestOptionsRequest{}
	for i, g := range groups {
		req.Options = append(req.Options, &pb.Option{NodeGroupId: g, NodeCount: int32(i + 1), Debug: "of " + g})
	}
	return req
}

func TestBestOptions(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	client := serve(t, fleet).expanderClient(t)
	for _, tc := range []struct {
		name    string
		offered []string
		best    []model.GroupID
		want    []string
	}{
		{"one is best", []string{"a", "b", "c"}, []model.GroupID{"b"}, []string{"b"}},
		{"two are", []string{"a", "b", "c"}, []model.GroupID{"c", "a"}, []string{"a", "c"}},
		{"named twice", []string{"a", "b"}, []model.GroupID{"a", "a"}, []string{"a"}},
		{"offered twice", []string{"a", "b", "a"}, []model.GroupID{"a"}, []string{"a", "a"}},
		{"none: all stay", []string{"a", "b"}, nil, []string{"a", "b"}},
		{"only unknown ones: all stay", []string{"a", "b"}, []model.GroupID{"x", ""}, []string{"a", "b"}},
		{"unknown ones do not count", []string{"a", "b"}, []model.GroupID{"x", "b"}, []string{"b"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var asked []ExpanderOption
			fleet.best = func(o []ExpanderOption) []model.GroupID {
				asked = o
				return tc.best
			}
			resp, err := client.BestOptions(brief(t), offer(tc.offered...))
			must(t, err)
			var got []string
			for _, o := range resp.GetOptions() {
				got = append(got, o.GetNodeGroupId())
				if o.GetDebug() != "of "+o.GetNodeGroupId() || o.GetNodeCount() == 0 {
					t.Errorf("an option came back changed: %v", o)
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			for i, o := range asked {
				if string(o.Group) != tc.offered[i] || o.NodeCount != i+1 || o.Debug != "of "+tc.offered[i] {
					t.Errorf("option %d reached the ranker as %+v", i, o)
				}
			}
		})
	}
	t.Run("nothing offered", func(t *testing.T) {
		if _, err := client.BestOptions(brief(t), &pb.BestOptionsRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v, want InvalidArgument", err)
		}
	})
}

// TestPods sends pods in both generations' form and reads their metadata.
func TestPods(t *testing.T) {
	pod := v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Name: "runner", Labels: map[string]string{"repo": "a"}, Annotations: map[string]string{"job": "1"}},
		Spec:       v1.PodSpec{NodeName: "not read", Containers: []v1.Container{{Name: "c", Image: "i"}}},
	}
	encoded, err := pod.Marshal()
	must(t, err)
	for name, option := range map[string]*pb.Option{
		"since 1.35": {NodeGroupId: "a", PodBytes: [][]byte{encoded, []byte("\xff"), encoded}},
		"before":     {NodeGroupId: "a", Pod: [][]byte{encoded, []byte("\xff"), encoded}},
	} {
		t.Run(name, func(t *testing.T) {
			fleet := newFakeFleet(1, 1).show()
			var names []string
			fleet.best = func(o []ExpanderOption) []model.GroupID {
				if o[0].PodCount() != 3 {
					t.Errorf("%d pods, want 3", o[0].PodCount())
				}
				for meta, err := range o[0].Pods() {
					switch {
					case err != nil && meta == nil && strings.Contains(err.Error(), `decoding pod 1 of option "a"`):
						names = append(names, "broken")
					case err != nil:
						t.Errorf("unexpected: %v", err)
					default:
						names = append(names, meta.Namespace+"/"+meta.Name+"/"+meta.Labels["repo"]+"/"+meta.Annotations["job"])
					}
				}
				for range o[0].Pods() { //nolint:errcheck // it may be left early and begun again
					break
				}
				return []model.GroupID{"a"}
			}
			_, err := serve(t, fleet).expanderClient(t).BestOptions(brief(t), &pb.BestOptionsRequest{Options: []*pb.Option{option}})
			must(t, err)
			if diff := cmp.Diff([]string{"ci/runner/a/1", "broken", "ci/runner/a/1"}, names); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestBigOffers: CA sends every pending pod, far more than the usual limit of
// a message.
func TestBigOffers(t *testing.T) {
	client := serve(t, newFakeFleet(1, 1).show()).expanderClient(t)
	req := offer("a", "b")
	req.Options[0].PodBytes = [][]byte{make([]byte, 60<<20)}
	if _, err := client.BestOptions(brief(t), req, grpc.MaxCallSendMsgSize(256<<20)); err != nil {
		t.Errorf("60 MiB: %v", err)
	}
	req.Options[1].PodBytes = [][]byte{make([]byte, 70<<20)}
	if _, err := client.BestOptions(brief(t), req, grpc.MaxCallSendMsgSize(256<<20)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("130 MiB: got %v, want ResourceExhausted", err)
	}
}
