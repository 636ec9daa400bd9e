package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// RunnerNode is one instance, running or parked: what was meant for it and how
// warm its engine is. It lives as long as the instance.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=rn
// +kubebuilder:subresource:status
// +kubebuilder:selectablefield:JSONPath=`.spec.nodeGroup`
// +kubebuilder:printcolumn:name="Group",type=string,JSONPath=`.spec.nodeGroup`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Warmth",type=string,JSONPath=`.status.warmth[0].warmth`,description="of the key that is warmest here"
// +kubebuilder:printcolumn:name="Cache",type=string,JSONPath=`.status.cacheBytes`
// +kubebuilder:printcolumn:name="Clients",type=integer,JSONPath=`.status.connectedClients`
// +kubebuilder:printcolumn:name="Decision",type=string,JSONPath=`.status.decision`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.reason`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type RunnerNode struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec RunnerNodeSpec `json:"spec"`
	// +optional
	Status RunnerNodeStatus `json:"status,omitempty"`
}

// RunnerNodeSpec says which instance it is and what is meant for it.
type RunnerNodeSpec struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	NodeGroup string `json:"nodeGroup"`
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the instance cannot be changed"
	ProviderID string `json:"providerID"`
	// +kubebuilder:validation:Enum=Running;Parked;Gone
	Desired string `json:"desired"`
}

// RunnerNodeStatus is what is known of the instance.
type RunnerNodeStatus struct {
	// +optional
	// +kubebuilder:validation:Enum=Launching;Ready;Draining;Parking;Parked;Resuming;Terminating
	Phase string `json:"phase,omitempty"`
	// Since is when the phase began.
	//
	// +optional
	Since *metav1.Time `json:"since,omitempty"`
	// NodeName is the name of its Node, empty while none is registered.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=253
	NodeName string `json:"nodeName,omitempty"`
	// Hidden: cluster-autoscaler does not know of it yet.
	//
	// +optional
	Hidden bool `json:"hidden,omitempty"`
	// Warmth by cache key, the warmest first.
	//
	// +optional
	// +listType=map
	// +listMapKey=key
	// +kubebuilder:validation:MaxItems=32
	Warmth []KeyWarmth `json:"warmth,omitempty"`
	// CacheBytes is the size of the engine's cache, to the MiB.
	//
	// +optional
	CacheBytes *resource.Quantity `json:"cacheBytes,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	ConnectedClients int `json:"connectedClients,omitempty"`
	// Score orders the nodes of a group: the lowest goes first.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=32
	Score string `json:"score,omitempty"`
	// +optional
	// +kubebuilder:validation:Enum=keep;release;park
	Decision string `json:"decision,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Reason string `json:"reason,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// KeyWarmth is what the engine is believed to hold of one cache key.
type KeyWarmth struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key"`
	// Warmth is a decimal number from 0, cold, to 1.
	//
	// +kubebuilder:validation:Pattern=`^(0|1)\.[0-9]{2}$`
	Warmth string `json:"warmth"`
	// LastUsed is when the last job of this key ended here.
	LastUsed metav1.Time `json:"lastUsed"`
	// Uses counts the jobs of this key that ran here.
	//
	// +kubebuilder:validation:Minimum=0
	Uses int `json:"uses"`
}

// RunnerNodeList is a list of RunnerNodes.
//
// +kubebuilder:object:root=true
type RunnerNodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []RunnerNode `json:"items"`
}
