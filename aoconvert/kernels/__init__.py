"""An optional accelerator: torchao's own quantization compiled for this CPU. Without it everything works."""
