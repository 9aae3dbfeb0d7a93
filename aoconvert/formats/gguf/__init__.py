"""GGUF files: the start of a header, all of it, and the tensors as they are stored."""
