// Package e2e tests the whole of Hearth on a real control plane: etcd,
// kube-apiserver, scheduler, controller-manager, `hearth serve` as a process
// under the rights that are shipped, and an autoscaler in front. The
// reference autoscaler is used, or the real cluster-autoscaler that
// CLUSTER_AUTOSCALER names; every test must pass with either.
package e2e
