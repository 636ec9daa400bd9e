package localcluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

//nolint:gochecknoglobals // a constant, if it could be one
var crdKind = schema.GroupKind{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition"}

// Apply applies the objects of the manifests (YAML of one or more documents) on the server's
// side, in their order, as the administrator. After a CustomResourceDefinition it waits until
// the API serves it, so that objects of the new kind may follow.
func (c *Cluster) Apply(ctx context.Context, manifests ...[]byte) error {
	cl, err := client.New(c.AdminConfig(), client.Options{})
	if err != nil {
		return fmt.Errorf("connecting to the API server: %w", err)
	}
	for _, manifest := range manifests {
		decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifest), 4096)
		for {
			obj := &unstructured.Unstructured{}
			if err := decoder.Decode(&obj.Object); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return fmt.Errorf("reading a manifest: %w", err)
			}
			if len(obj.Object) == 0 {
				continue // an empty document
			}
			if err := apply(ctx, cl, obj); err != nil {
				return fmt.Errorf("applying %s %q: %w", obj.GetKind(), obj.GetName(), err)
			}
		}
	}
	return nil
}

func apply(ctx context.Context, cl client.Client, obj *unstructured.Unstructured) error {
	err := cl.Apply(ctx, client.ApplyConfigurationFromUnstructured(obj), client.FieldOwner("localcluster"), client.ForceOwnership)
	if err != nil || obj.GroupVersionKind().GroupKind() != crdKind {
		return err
	}
	return wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
		if err := cl.Get(ctx, client.ObjectKeyFromObject(obj), obj); err != nil {
			return false, err
		}
		if !established(obj) {
			return false, nil
		}
		group, _, _ := unstructured.NestedString(obj.Object, "spec", "group")
		kind, _, _ := unstructured.NestedString(obj.Object, "spec", "names", "kind")
		_, err := cl.RESTMapper().RESTMapping(schema.GroupKind{Group: group, Kind: kind})
		if meta.IsNoMatchError(err) {
			return false, nil // discovery follows a moment later
		}
		return err == nil, err
	})
}

func established(crd *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(crd.Object, "status", "conditions")
	for _, c := range conditions {
		if c, ok := c.(map[string]any); ok && c["type"] == "Established" && c["status"] == "True" {
			return true
		}
	}
	return false
}
