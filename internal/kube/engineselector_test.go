package kube

import (
	"context"
	"errors"
	"net/http"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Only an API server that has understood and says no refuses: whatever may be
// otherwise in a moment is tried again for ever.
func TestRefusedStop(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	status := func(code int32) error {
		return &apierrors.StatusError{ErrStatus: metav1.Status{Code: code, Reason: metav1.StatusReasonUnknown}}
	}
	for name, tt := range map[string]struct {
		err     error
		refused bool
	}{
		"a missing right":         {apierrors.NewForbidden(pods, "e", errors.New("no")), true},
		"a policy's own code":     {status(http.StatusTeapot), true},
		"credentials run out":     {apierrors.NewUnauthorized("token"), false},
		"overload":                {apierrors.NewTooManyRequests("later", 1), false},
		"a server's mistake":      {apierrors.NewInternalError(errors.New("etcd")), false},
		"no server":               {errors.New("dial tcp: connection refused"), false},
		"no answer in time":       {context.DeadlineExceeded, false},
		"a webhook does not work": {status(http.StatusServiceUnavailable), false},
	} {
		t.Run(name, func(t *testing.T) {
			c := fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
				Patch: func(context.Context, client.WithWatch, client.Object, client.Patch, ...client.PatchOption) error {
					return tt.err
				},
			}).Build()
			_, err := NewEngines(c).StopEngine(t.Context(), model.Pod{Namespace: "dagger", Name: "e", UID: "u"})
			if err == nil || errors.Is(err, model.ErrRefused) != tt.refused {
				t.Errorf("%v, want refused %v", err, tt.refused)
			}
		})
	}
}

func TestEngineSelector(t *testing.T) {
	labelled := map[string]string{"app.kubernetes.io/name": "dagger-helm"}
	everywhere := engineSelector(t)
	there := everywhere
	there.Namespaces = []string{"dagger", "engines"}
	for _, tt := range []struct {
		namespace string
		labels    map[string]string
		all, some bool
	}{
		{"dagger", labelled, true, true},
		{"engines", labelled, true, true},
		{"ci", labelled, true, false}, // whoever may create pods there
		{"dagger", nil, false, false},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: tt.namespace, Labels: tt.labels}}
		if everywhere.matches(pod) != tt.all || there.matches(pod) != tt.some {
			t.Errorf("a pod in %s labelled %v: %v, %v", tt.namespace, tt.labels, everywhere.matches(pod), there.matches(pod))
		}
	}
	// It is a job there then, and keeps its node busy.
	r := podReader{
		engines: there, groupOf: func(string) model.GroupID { return "" },
		nodeGroup: func(model.NodeName) model.GroupID { return "" }, keysFor: func(model.GroupID) []string { return nil },
	}
	if p := r.pod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ci", Labels: labelled}}); p.Kind != model.PodRunner || p.Engine != nil {
		t.Errorf("it is taken for %+v", p)
	}
}

func TestServesMetrics(t *testing.T) {
	for name, tt := range map[string]struct {
		container corev1.Container
		want      bool
	}{
		"no":               {corev1.Container{Env: []corev1.EnvVar{{Name: "OTHER", Value: "1"}}}, false},
		"by a variable":    {corev1.Container{Env: []corev1.EnvVar{{Name: "OTHER"}, {Name: envMetrics, Value: "0.0.0.0:9090"}}}, true},
		"who knows":        {corev1.Container{EnvFrom: []corev1.EnvFromSource{{}}}, true},
		"without anything": {corev1.Container{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			tt.container.Name = "dagger-engine"
			pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "sidecar"}, tt.container}}}
			stripPodOrEngine(pod) // what is read must have been kept
			if got := engineContainer(pod).Metrics; got != tt.want {
				t.Errorf("%v", got)
			}
		})
	}
}
