"""Record what real clients say to an etcd, and say it again to another server."""
