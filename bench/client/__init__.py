"""A lean client of the few RPCs that storms use, and the same through grpcio to check it by."""
