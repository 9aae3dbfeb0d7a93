"""The engine: read → quantize → write, one tensor at a time."""
