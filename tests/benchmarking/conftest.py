from cli.conftest import call
from helpers.checkpoints import llama, pipeline

__all__ = ["call", "llama", "pipeline"]
