"""HTTP/2 for gRPC, and HTTP/1.1 beside it: knows bytes and streams, nothing of etcd."""
