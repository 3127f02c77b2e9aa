"""What stores the rows: one module for each kind of database."""
