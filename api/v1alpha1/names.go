package v1alpha1

import (
	"path"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-ci/hearth/pkg/model"
)

// NodeGroupLabel is on every Node of a group; pods may select it. Its value is
// GroupLabel of the group.
const NodeGroupLabel = model.Prefix + "/node-group"

// PlacementAnnotation is on pods that the placement webhook has seen: what it
// decided, in words.
const PlacementAnnotation = model.Prefix + "/placement"

// GroupName returns the name of the group's RunnerNodeGroup: its id when that
// is a valid object name, else a readable part of it and a hash.
func GroupName(id model.GroupID) string {
	if len(validation.IsDNS1123Subdomain(string(id))) == 0 {
		return string(id)
	}
	return model.HashedName(string(id), string(id))
}

// GroupLabel returns the value of NodeGroupLabel for the group.
func GroupLabel(id model.GroupID) string { return model.GroupLabel(id) }

// NodeName returns the name of the instance's RunnerNode: the last part of its
// providerID and a hash of all of it.
func NodeName(id model.InstanceID) string {
	return model.HashedName(path.Base(string(id)), string(id))
}
