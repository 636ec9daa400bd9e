// Package controller is the loop: it gathers what the cloud, the cluster and
// cluster-autoscaler say, lets the pure packages decide, and acts. It owns
// time and concurrency: one goroutine owns the fleet (every nodegroups.Group),
// takes the server's writes in turn and answers them once they are recorded;
// reads are answered from an atomic view. Whatever takes long runs beside it
// and comes back as an event.
//
// It knows the cloud, the cluster and the store only through the interfaces
// that it declares, and decides nothing itself: sizes and lives are
// pkg/nodegroups', warmth and plans are pkg/scoring's.
package controller
