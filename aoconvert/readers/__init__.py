"""Files -> one tensor at a time."""
