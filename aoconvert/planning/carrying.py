"""Whether the codes of a quantized original become those of the result as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aoconvert.formats.dtypes import dtype_name
from aoconvert.models.base import Codes, SourceTensor
from aoconvert.planning.slices import BUFFERS, SLICE_BYTES, slices

if TYPE_CHECKING:
    import torch

    from aoconvert.planning.types import TensorPlan
    from aoconvert.schemes import Scheme

CARRIED = "carried: the same codes as the original"
_CLASSES = ("Float8Tensor", "Int8Tensor")
_EXACT = ("float32", "float16", "bfloat16")


def why_again(origin: SourceTensor | None, like: torch.Tensor, scheme: Scheme) -> str | None:
    """Why a tensor has to be quantized again; ``None`` where its codes and scales can be kept, bit for bit.

    A scale of the whole matrix can stand in each row or block: that changes no value.

    Args:
        origin: of the checkpoint; ``None`` where the tensor is made of several.
        like: what torchao makes of it, on meta.
        scheme: that was asked for.
    """
    if origin is None:
        return "it is made of several tensors of the original"
    if not origin.dequantized:
        return "the original does not quantize it"
    codes = origin.codes
    if codes is None:
        return "no class of torchao holds such codes"
    made: Any = like
    if type(like).__name__ not in _CLASSES or made.qdata.dtype != codes.data.dtype:
        return f"the original has codes of {dtype_name(codes.data.dtype)}, which {scheme.name} does not store"
    if getattr(made, "reduce_range", False):
        return f"{scheme.name} stores codes of 7 bits"
    if dtype_name(codes.scale.dtype) not in _EXACT:
        return f"its scales are {dtype_name(codes.scale.dtype)}, which torchao does not take"
    block = tuple(made.block_size)
    if codes.block not in (block, codes.data.shape):
        ours = scheme.format.granularity
        return f"the original has a scale for each {_describe(codes)}, and {scheme.name} has one {ours}"
    return None


def _describe(codes: Codes) -> str:
    rows, columns = codes.block
    return "row" if codes.block == (1, codes.data.shape[1]) else f"block of {rows}×{columns}"


def code_bytes(tensor: TensorPlan) -> int:
    """Host memory that the codes of a tensor take beside its values while it is read."""
    pieces = slices(tensor)
    return tensor.numel if len(pieces) == 1 else BUFFERS * min(tensor.numel, SLICE_BYTES)
