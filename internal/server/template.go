package server

import (
	"fmt"
	"maps"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

// nodeGroupLabel is on every node of a group; its value is
// model.GroupLabel.
const nodeGroupLabel = model.Prefix + "/node-group"

// warmLabelPrefix starts the labels of keys that a node is warm for.
const warmLabelPrefix = "cache." + model.Prefix + "/"

// encodeTemplate describes a node that the group would get, complete: what is
// missing here, CA's scheduling simulation does not know.
func encodeTemplate(group model.NodeGroup) ([]byte, error) {
	t := group.Template
	capacity, err := resourceList(t.Capacity)
	if err != nil {
		return nil, fmt.Errorf("describing a node of group %q: %w", string(group.ID), err)
	}
	allocatable, err := resourceList(t.Allocatable)
	if err != nil {
		return nil, fmt.Errorf("describing a node of group %q: %w", string(group.ID), err)
	}
	if len(allocatable) == 0 {
		allocatable = capacity
	}
	name := "template-" + string(group.ID)
	labels := map[string]string{v1.LabelOSStable: "linux", v1.LabelArchStable: "amd64"}
	maps.Copy(labels, t.Labels)
	// A new node is warm for nothing: if it were promised to be, nodes would be
	// launched without end for a pod that requires it.
	maps.DeleteFunc(labels, func(key, _ string) bool { return strings.HasPrefix(key, warmLabelPrefix) })
	if t.Zone != "" {
		labels[v1.LabelTopologyZone] = t.Zone
	}
	if t.InstanceType != "" {
		labels[v1.LabelInstanceTypeStable] = t.InstanceType
	}
	labels[v1.LabelHostname] = name
	labels[nodeGroupLabel] = model.GroupLabel(group.ID)

	node := v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Status: v1.NodeStatus{
			Capacity:    capacity,
			Allocatable: allocatable,
			Conditions: []v1.NodeCondition{{
				Type:    v1.NodeReady,
				Status:  v1.ConditionTrue,
				Reason:  "Template",
				Message: "a node of this group would be ready",
			}},
		},
	}
	for _, taint := range t.Taints {
		node.Spec.Taints = append(node.Spec.Taints, v1.Taint{Key: taint.Key, Value: taint.Value, Effect: v1.TaintEffect(taint.Effect)})
	}
	encoded, err := node.Marshal()
	if err != nil {
		return nil, fmt.Errorf("describing a node of group %q: %w", string(group.ID), err)
	}
	return encoded, nil
}

func resourceList(quantities map[string]string) (v1.ResourceList, error) {
	list := make(v1.ResourceList, len(quantities))
	for name, text := range quantities {
		q, err := resource.ParseQuantity(text)
		if err != nil {
			return nil, fmt.Errorf("resource %q: quantity %q: %w", name, text, err)
		}
		list[v1.ResourceName(name)] = q
	}
	return list, nil
}
