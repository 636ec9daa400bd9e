// Package test runs internal/kube and internal/kwok against a real API server,
// under exactly the rights that deploy ships, with kwok in place of the
// kubelets. It holds what an API server in memory cannot show: the CRDs'
// schemas and columns, rights, preconditions, watches that break.
package test
