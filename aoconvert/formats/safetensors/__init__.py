"""safetensors: 8 bytes of length, a JSON header, the data. The header is read without torch."""
