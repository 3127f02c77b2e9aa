"""Running storms: sessions of repetitions, each one server, one load, one set of records."""
