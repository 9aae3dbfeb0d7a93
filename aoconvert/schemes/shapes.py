"""Which weights a scheme can take, decided from shape and dtype alone.

torchao raises, and aborts the whole model, for most of these; the rules follow torchao 0.18 and are held against it by
property tests.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from aoconvert.schemes.base import Scheme

DTYPES = ("bfloat16", "float16", "float32")


def blocker(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme) -> str | None:
    """Why a weight cannot take ``scheme``, else ``None``.

    Args:
        shape: (out_features, in_features), or (experts, out_features, in_features).
        dtype: the weight's dtype when it is quantized. Stricter than torchao for float8, which takes float64 and
            integers too.
        scheme: what :func:`aoconvert.schemes.get` returned.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        return f"dtype {name} is none of {', '.join(DTYPES)}"
    if len(shape) not in scheme.ranks:
        return f"{len(shape)} dimensions, {scheme.name} takes {' or '.join(map(str, scheme.ranks))}"
    if 0 in shape:
        return "it is empty"
    in_features = shape[-1]
    if scheme.group_size is not None and in_features % scheme.group_size:
        return f"in_features {in_features} is not a multiple of group size {scheme.group_size}"
    # torchao's choose_qparams reduces a block of one value over the whole tensor and fails on the shape of the result
    if in_features == 1 and scheme.granularity == "per row" and prod(shape) > 1 and not scheme.single_values:
        return "in_features 1: a row of one value has no scale of its own"
    return None
