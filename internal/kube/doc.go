// Package kube is Hearth's hands and eyes in the cluster: [Feed] tells what
// happens to nodes, pods and annotations, [Nodes] acts on Node objects,
// [Engines] on the pods of engines, [Store] keeps the records and [Memories] what
// was learnt, [Events] tells people, and [LabelLeader] leads the Services to the
// leader. It owns every name that Hearth puts on an object it does not own. It decides nothing: what is
// idle, warm or to be removed is told to it.
//
// All writes are patches or updates that fail rather than overwrite what
// somebody else changed meanwhile. Everything is idempotent.
package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
)

// NewClient returns a client that knows Kubernetes' own kinds and Hearth's. It
// caches no objects: every read is a live one. It sends nothing before its
// first use.
func NewClient(cfg *rest.Config) (client.WithWatch, error) {
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	c, err := client.NewWithWatch(cfg, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("making a client of the API server: %w", err)
	}
	return c, nil
}

func newScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("registering the kinds of the API: %w", err)
		}
	}
	return scheme, nil
}
