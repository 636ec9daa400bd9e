// Package playground runs the whole loop on one machine, for the demo and for
// end-to-end tests: a real control plane, `hearth serve` as a process of its
// own under exactly the rights that are shipped, and an autoscaler in front of
// it, the reference one or a real cluster-autoscaler. Between the autoscaler
// and the provider stands what a Service is in a cluster: a forwarder that
// leads to the replica that serves, and that can lose connections silently.
//
// It owns the processes, certificates and files and ends all of them. It
// asserts nothing and narrates nothing.
package playground
