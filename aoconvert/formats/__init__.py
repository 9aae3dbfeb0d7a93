"""Files of weights, safetensors and torch's: what they hold, read and written one tensor at a time."""
