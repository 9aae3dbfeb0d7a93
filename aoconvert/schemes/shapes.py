"""Which weights a scheme can take, decided from shape and dtype alone.

torchao raises, and aborts the whole model, for most of these; the rules follow torchao 0.18 and are held against it by
property tests.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from aoconvert.formats.dtypes import dtype_name

if TYPE_CHECKING:
    import torch

    from aoconvert.schemes.base import Scheme

_BLOCK = 128


def blocker(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme) -> str | None:
    """Why a weight cannot take ``scheme``, else ``None``.

    Args:
        shape: (out_features, in_features), or (experts, out_features, in_features).
        dtype: the weight's dtype when it is quantized. Stricter than torchao for float8, which takes float64 and
            integers too.
        scheme: what :func:`aoconvert.schemes.get` returned.
    """
    if len(shape) == 3 and 3 not in scheme.ranks:
        return f"a stack of matrices; {scheme.name} supports only single matrices"
    if scheme.own_blocker is not None:
        return scheme.own_blocker(shape, dtype)
    entry, granularity = scheme.entry, scheme.format.granularity
    name = dtype_name(dtype)
    if name not in entry.dtypes:
        many = "none of " if len(entry.dtypes) > 1 else "not "
        return f"dtype {name} is {many}{', '.join(entry.dtypes)}"
    if len(shape) not in scheme.ranks:
        return f"{len(shape)} dimensions; {scheme.name} supports {' or '.join(map(str, scheme.ranks))}"
    if 0 in shape:
        return "it is empty"
    out_features, in_features = shape[-2:]
    for label, value, multiple in zip(
        ("out_features", "in_features"), (out_features, in_features), entry.multiples, strict=True
    ):
        if value % multiple:
            return f"{label} {value} is not a multiple of {multiple}"
    if scheme.group_size is not None and in_features % scheme.group_size:
        return f"in_features {in_features} is not a multiple of group size {scheme.group_size}"
    # the scales of all experts are laid out in tiles of 128 rows, and one expert must not end inside a tile;
    # torchao takes some of these, and then gives an expert the scales of another
    if prod(shape[:-2]) > 1 and scheme.rows.tile is not None and out_features % scheme.rows.tile:
        return f"out_features {out_features} of several experts is not a multiple of {scheme.rows.tile}"
    # torchao's _is_128_128_scaled then sees blocks where there is one scale, and its product fails
    if granularity == "per tensor" and scheme.layout.min_capability is not None and shape == (_BLOCK, _BLOCK):
        return f"torchao mistakes a {_BLOCK} x {_BLOCK} weight with one scale for a blockwise one, and cannot run it"
    # torchao's choose_qparams reduces a block of one value over the whole tensor and fails on the shape of the result;
    # HQQ, which takes weights whole, does not ask it
    if in_features == 1 and granularity == "per row" and prod(shape) > 1 and scheme.rows.tile is not None:
        return "in_features 1: a row of one value does not get its own scale"
    return None
