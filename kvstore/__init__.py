"""A server that speaks the etcd v3 API over SQLite."""
