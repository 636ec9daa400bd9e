// Package deploy holds the manifests that Hearth is installed with, for the
// demo, the tests and whoever applies them from the binary. It owns the rights
// that Hearth runs with; it applies nothing itself.
package deploy

import (
	_ "embed"
	"slices"
)

var (
	//go:embed crds/hearth.dev_runnernodegroups.yaml
	runnerNodeGroups []byte
	//go:embed crds/hearth.dev_runnernodes.yaml
	runnerNodes []byte
	//go:embed rbac.yaml
	rbac []byte
	//go:embed rbac-kwok.yaml
	rbacKwok []byte
	//go:embed rbac-placement.yaml
	rbacPlacement []byte
	//go:embed placement.yaml
	placement []byte
	//go:embed iam-policy.json
	iamPolicy []byte
)

// Namespace is where the manifests put Hearth, ServiceAccount the account that
// it runs under.
const (
	Namespace      = "hearth"
	ServiceAccount = "hearth"
)

// PlacementName names everything of the placement webhook: the Service, the
// MutatingWebhookConfiguration and the Secret with its certificate.
const PlacementName = "hearth-placement"

// CRDs returns the custom resource definitions, one YAML document each.
func CRDs() [][]byte {
	return [][]byte{slices.Clone(runnerNodeGroups), slices.Clone(runnerNodes)}
}

// RBAC returns the namespace, the service account and its rights, as YAML of
// several documents.
func RBAC() []byte { return slices.Clone(rbac) }

// RBACKwok returns the rights that the embedded backend needs beyond RBAC, as
// YAML of several documents.
func RBACKwok() []byte { return slices.Clone(rbacKwok) }

// RBACPlacement returns the rights that the placement webhook needs beyond RBAC
// to make its own certificate, as YAML of several documents.
func RBACPlacement() []byte { return slices.Clone(rbacPlacement) }

// Placement returns the Service and the webhook configuration of the placement
// webhook, as YAML of several documents.
func Placement() []byte { return slices.Clone(placement) }

// IAMPolicy returns what the AWS backend may do in an account, as JSON.
func IAMPolicy() []byte { return slices.Clone(iamPolicy) }
