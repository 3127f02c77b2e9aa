"""Storms against any etcd endpoint, and what the server under them made of it."""
