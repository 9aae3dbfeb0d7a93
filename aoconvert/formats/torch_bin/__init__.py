"""torch's ``.bin``: a zip archive of storages and one pickle, read without executing it, written as a stream."""
