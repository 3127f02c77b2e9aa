"""etcd's services: one module each, from bytes to bytes over the engine."""
