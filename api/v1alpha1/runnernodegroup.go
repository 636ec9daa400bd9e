package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// RunnerNodeGroup is one node group: its annotations are the group's settings,
// its status is what Hearth has promised to cluster-autoscaler and must not
// forget. Hearth makes one for every group and never deletes it.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=rng
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Target",type=integer,JSONPath=`.status.target`
// +kubebuilder:printcolumn:name="Ready",type=integer,JSONPath=`.status.ready`
// +kubebuilder:printcolumn:name="Parked",type=integer,JSONPath=`.status.parked`
// +kubebuilder:printcolumn:name="Hidden",type=integer,JSONPath=`.status.hidden`
// +kubebuilder:printcolumn:name="Min",type=integer,JSONPath=`.status.min`
// +kubebuilder:printcolumn:name="Max",type=integer,JSONPath=`.status.max`
// +kubebuilder:printcolumn:name="Warm",type=integer,JSONPath=`.status.warm`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type RunnerNodeGroup struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec RunnerNodeGroupSpec `json:"spec,omitempty"`
	// +optional
	Status RunnerNodeGroupStatus `json:"status,omitempty"`
}

// RunnerNodeGroupSpec says which node group the object is about.
type RunnerNodeGroupSpec struct {
	// ID of the node group where the object's name cannot be the same, since
	// ids may hold characters that names may not.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=255
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the id cannot be changed"
	ID string `json:"id,omitempty"`
}

// RunnerNodeGroupStatus is written as a whole: one write commits a change of
// any number of nodes.
type RunnerNodeGroupStatus struct {
	// Sequence grows with every change of target, hidden or intents. Zero
	// means that nothing has been promised yet.
	//
	// +kubebuilder:validation:Minimum=0
	Sequence int64 `json:"sequence"`
	// Target is the size that cluster-autoscaler was told.
	//
	// +kubebuilder:validation:Minimum=0
	Target int `json:"target"`
	// Hidden is the number of nodes beyond the target that cluster-autoscaler
	// does not know yet.
	//
	// +kubebuilder:validation:Minimum=0
	Hidden int `json:"hidden"`
	// Intents are the instances that are not simply to run.
	//
	// +optional
	// +listType=map
	// +listMapKey=instanceID
	// +kubebuilder:validation:MaxItems=5000
	Intents []Intent `json:"intents,omitempty"`

	// +kubebuilder:validation:Minimum=0
	Min int `json:"min"`
	// +kubebuilder:validation:Minimum=0
	Max int `json:"max"`
	// +kubebuilder:validation:Minimum=0
	Ready int `json:"ready"`
	// +kubebuilder:validation:Minimum=0
	Parked int `json:"parked"`
	// Warm is the number of idle nodes that are kept running.
	//
	// +kubebuilder:validation:Minimum=0
	Warm int `json:"warm"`
	// Phases counts the nodes by phase.
	//
	// +optional
	// +kubebuilder:validation:MaxProperties=16
	Phases map[string]int `json:"phases,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Intent is what is meant to become of one instance.
type Intent struct {
	// InstanceID is the instance's providerID.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	InstanceID string `json:"instanceID"`
	// +kubebuilder:validation:Enum=Running;Parked;Gone
	Desired string `json:"desired"`
	// +kubebuilder:validation:Enum=Draining;StoppingEngine;Stopping;Starting
	Stage string      `json:"stage"`
	Since metav1.Time `json:"since"`
	// Engine is the UID of the Dagger engine's pod that is or was to stop.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=64
	Engine string `json:"engine,omitempty"`
	// Exit is how the engine ended: its exit code, or why none is known.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=32
	Exit string `json:"exit,omitempty"`
}

// RunnerNodeGroupList is a list of RunnerNodeGroups.
//
// +kubebuilder:object:root=true
type RunnerNodeGroupList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []RunnerNodeGroup `json:"items"`
}
