// Package controlplane runs a real kube-apiserver, and nothing else of a cluster,
// against a store that speaks the etcd v3 API. The test suite and the local-kube
// command start it the same way, so what the suite proves is what a person gets.
//
// Everything listens on the loopback interface. Keys and certificates are made
// for one directory at every start; only the key that signs service account
// tokens is kept, because tokens outlive a start.
package controlplane
