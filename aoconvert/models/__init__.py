"""A config → an empty model: which tensors there are, and which may be quantized."""

from aoconvert.models.base import Component, Skeleton, TensorSpec
from aoconvert.models.pipeline import ModelLayout, build_skeleton, identify, join

__all__ = ["Component", "ModelLayout", "Skeleton", "TensorSpec", "build_skeleton", "identify", "join"]
