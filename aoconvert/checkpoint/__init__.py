"""A finished checkpoint: its manifest, what a verification found, and the code that opens it."""
