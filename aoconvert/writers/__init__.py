"""One tensor at a time -> files and their index."""
