from helpers.checkpoints import llama, pipeline

__all__ = ["llama", "pipeline"]
