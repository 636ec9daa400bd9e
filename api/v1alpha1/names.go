package v1alpha1

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"strings"

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
	return hashed(string(id), string(id))
}

// GroupLabel returns the value of NodeGroupLabel for the group: its id when
// that is a valid label value, else a readable part of it and a hash.
func GroupLabel(id model.GroupID) string {
	if id != "" && len(validation.IsValidLabelValue(string(id))) == 0 {
		return string(id)
	}
	return hashed(string(id), string(id))
}

// NodeName returns the name of the instance's RunnerNode: the last part of its
// providerID and a hash of all of it.
func NodeName(id model.InstanceID) string {
	return hashed(path.Base(string(id)), string(id))
}

// hashed makes a name of at most 63 characters that is valid as an object name
// and as a label value: what it can of readable, and a hash of all.
func hashed(readable, all string) string {
	sum := sha256.Sum256([]byte(all))
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r + ('a' - 'A')
		default:
			return '-'
		}
	}, readable)
	safe = strings.Trim(safe[:min(len(safe), 50)], "-")
	return strings.TrimPrefix(safe+"-"+hex.EncodeToString(sum[:5]), "-")
}
