"""A config → an empty model: which tensors there are, and which may be quantized."""

from aoconvert.models.base import ModelPart, Skeleton, TensorSpec
from aoconvert.models.pipeline import ModelLayout, build_skeleton, identify, join

__all__ = ["ModelLayout", "ModelPart", "Skeleton", "TensorSpec", "build_skeleton", "identify", "join"]
