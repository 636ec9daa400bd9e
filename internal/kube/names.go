package kube

import "github.com/hearth-ci/hearth/pkg/model"

// Names that Hearth puts on objects it does not own.
const (
	annotationDecision    = model.Prefix + "/decision"
	annotationReason      = model.Prefix + "/reason"
	annotationProtectedBy = model.Prefix + "/scale-down-disabled-by"
	protectedByUs         = "hearth"
	labelCacheKey         = model.Prefix + "/cache-key"   // on pods, by people; also as an annotation
	labelWarmPrefix       = "cache." + model.Prefix + "/" // and the hash of a cache key
	warm                  = "warm"                        // the value of such labels
	annotationWarmKeys    = model.Prefix + "/warm-keys"   // what those hashes stand for
	labelLeader           = model.Prefix + "/leader"

	// finalizerExitCode keeps the pod of an engine that was told to stop until
	// its exit code has been recorded: the kubelet reports the code and at once
	// deletes the pod.
	finalizerExitCode = model.Prefix + "/exit-code"

	// taintDraining keeps new pods away from a node that is being drained.
	// cluster-autoscaler ignores taints of this prefix when it copies a live
	// node as the template of its group; any other would make an emptied group
	// unfit for ever.
	taintDraining = "status-taint.cluster-autoscaler.kubernetes.io/hearth-draining"
)

// Names that cluster-autoscaler gives a meaning.
const (
	annotationScaleDownDisabled = "cluster-autoscaler.kubernetes.io/scale-down-disabled"
	taintToBeDeleted            = "ToBeDeletedByClusterAutoscaler" // its value: since when, in Unix seconds
	taintDeletionCandidate      = "DeletionCandidateOfClusterAutoscaler"
)
