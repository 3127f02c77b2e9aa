"""What is served over HTTP/1.1 beside gRPC: health, readiness, version and metrics."""
