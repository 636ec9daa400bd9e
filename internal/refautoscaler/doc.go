// Package refautoscaler is a small autoscaler that behaves towards its cloud
// provider as cluster-autoscaler (CA) does. It exists for this project's tests and
// its demo only: CA is not to be had as a Go module. It is never a replacement for
// CA, leaves out most of what CA can do, and where the two differ, it is wrong.
//
// It owns CA's client behaviour: which RPC is made when, what is cached and for how
// long, what an error does, how sizes, registered nodes and requests are reconciled,
// which taints are set and taken back. It never imports the provider, never reads
// the provider's state, and never decides by anything that CA does not see.
//
// It uses the time package directly, for RPC deadlines cannot take an injected
// clock: tests run it in virtual time in a testing/synctest bubble.
//
// # Rules and where they come from
//
// Paths are in kubernetes/autoscaler, cluster-autoscaler/, release 1.36.1 unless a
// release is named.
//
//	provider.go
//	  one deadline for every RPC                        cloudprovider/externalgrpc
//	  NodeGroups cached from Refresh to Refresh;        externalgrpc_cloud_provider.go
//	    an error is an empty list, and is not cached
//	  NodeGroupForNode cached likewise, but for "not    externalgrpc_cloud_provider.go
//	    mine"; one mutex held across both
//	  template asked once for a group object            externalgrpc_node_group.go
//	  Unimplemented options or no message: defaults;    externalgrpc_node_group.go
//	    else every value literally
//	  old and new form of the wire                      same, 1.33.6, 1.34.5
//	state.go
//	  NodeGroupNodes cached for 2 min, asked anew       clusterstate/utils
//	    while scaling up; an error is an empty list       node_instances_cache.go
//	    in the refresh, an error of the loop otherwise
//	  ToBeDeleted nodes are neither ready nor unready   clusterstate.go hasCloudProviderInstance
//	  a node is "not started" for 15 min; since 1.35    clusterstate.go updateReadinessStats,
//	    for 0 s in groups that answer GetOptions          github.com/kubernetes/autoscaler/issues/10245
//	  request: grows, shrinks by failed instances, is   clusterstate.go updateScaleRequests
//	    done when nothing is upcoming, times out; 1.36
//	    then takes the whole of it back
//	  upcoming = target - ready - unready - long        clusterstate.go GetUpcomingNodes
//	    unregistered; 1.36: only with a request and
//	    without back-off
//	  group unhealthy: > 3 and > 45 % missing           clusterstate.go IsNodeGroupHealthy
//	  cluster unhealthy: > 3 and > 45 % unready         clusterstate.go IsClusterHealthy
//	  error instances: creating, with a code, id not    clusterstate.go
//	    seen the round before, while scaling up           handleInstanceCreationErrors
//	  back-off 5 min, doubled to 30 min, forgotten      utils/backoff
//	    after 3 h
//	loop.go
//	  ToBeDeleted taints removed once, before the       core/static_autoscaler.go
//	    first Refresh, from nodes of our groups           cleanUpIfRequired
//	  order of a loop, what ends it                     core/static_autoscaler.go RunOnce
//	  instances unregistered for too long are deleted,  removeOldUnregisteredNodes
//	    down to min
//	  instances with errors are deleted in every loop   deleteCreatedNodesWithErrors
//	  sizes wrong for too long are decreased, and the   fixNodeGroupSize
//	    loop ends there
//	  a productive loop is followed by others at once;  loop/trigger.go, main.go
//	    an unschedulable pod starts one
//	  no good loop for max-failing-time: killed         metrics/liveness.go
//	template.go
//	  live node, ready for a minute, before cached      processors/nodeinfosprovider
//	    copy, before the provider's template              mixed_nodeinfos_processor.go
//	  taints that a template loses                      utils/taints
//	scaleup.go
//	  pods that fit somewhere, upcoming nodes included, core/podlistprocessor
//	    cause nothing
//	  pods all younger than 2 s: wait, no scale-down    core/static_autoscaler.go
//	  first-fit decreasing on the template, to max      estimator
//	  expander: grpc, then least-waste; an error        expander/grpcplugin, expander/waste
//	    filters nothing, an empty answer everything
//	  a failed IncreaseSize backs the group off (and    core/scaleup/orchestrator
//	    ends the loop until 1.33)
//	scaledown.go
//	  candidates: ours, above min, not disabled, not    processors/nodes, core/scaledown
//	    being deleted, utilization at most the threshold  eligibility
//	  empty first, previous candidates first            processors/scaledowncandidates
//	  unremovable: skipped for 5 min                    core/scaledown/unremovable
//	  unneeded since, threshold by GetOptions           core/scaledown/unneeded
//	  soft taints                                       core/scaledown/actuation softtaint.go
//	drain.go
//	  which pods block a drain                          simulator/drainability/rules
//	delete.go
//	  taint (and cordon since 1.34), wait 5 s, look     core/scaledown/actuation
//	    again, evict, DeleteNodes; an error takes the     actuator.go, drain.go,
//	    taint back, for all nodes of the call             delete_in_batch.go
//
// # Left out
//
// Balancing of similar groups, priorities and preemption, volumes, host ports, pod
// affinity and topology spread, PodDisruptionBudgets other than through the eviction
// API, checks that a pod's controller still exists, DRA, GPUs, prices,
// ProvisioningRequests, zero-or-max groups, cluster-wide limits, the status
// ConfigMap, Kubernetes events, leader election. Ties that CA breaks by chance are
// broken by the order of the list.
package refautoscaler
