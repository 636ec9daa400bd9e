// Package v1alpha1 is Hearth's Kubernetes API: RunnerNodeGroup and RunnerNode,
// both cluster-scoped, in the group hearth.dev, and how node groups and
// instances are named in it. It holds types and names only; nothing in it
// talks to an API server or knows what the fields are for.
//
// People write metadata.annotations of a RunnerNodeGroup and nothing else;
// spec and status of both kinds are written by Hearth's leader alone.
//
// +kubebuilder:object:generate=true
// +groupName=hearth.dev
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-ci/hearth/pkg/model"
)

// GroupVersion returns the group and version of every kind of this package.
func GroupVersion() schema.GroupVersion {
	return schema.GroupVersion{Group: model.Prefix, Version: "v1alpha1"}
}

// AddToScheme makes the kinds of this package known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion(),
		&RunnerNodeGroup{}, &RunnerNodeGroupList{},
		&RunnerNode{}, &RunnerNodeList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion())
	return nil
}
