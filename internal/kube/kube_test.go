package kube

import (
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/hearth-ci/hearth/api/v1alpha1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// morning is when everything in the tests happens.
var morning = time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)

// newClient returns a client of an API server in memory, whose calls pass
// through funcs.
func newClient(t *testing.T, funcs interceptor.Funcs, objects ...client.Object) client.WithWatch {
	t.Helper()
	scheme, err := newScheme()
	if err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&v1alpha1.RunnerNodeGroup{}, &v1alpha1.RunnerNode{}).
		WithIndex(&corev1.Pod{}, "spec.nodeName", func(o client.Object) []string {
			return []string{o.(*corev1.Pod).Spec.NodeName}
		}).
		WithInterceptorFuncs(funcs).Build()
}

func engineSelector(t testing.TB) EngineSelector {
	t.Helper()
	s, err := labels.Parse("app.kubernetes.io/name=dagger-helm")
	if err != nil {
		t.Fatal(err)
	}
	return EngineSelector{Labels: s}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
