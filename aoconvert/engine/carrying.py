"""Codes of a quantized original become those of the result, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from aoconvert.engine.assembly import Part, quantized_on_meta
from aoconvert.engine.blocks import torchao_at_work
from aoconvert.errors import QuantizeError
from aoconvert.planning.slices import CPU_BLOCK
from aoconvert.schemes.apply import flatten, unflatten
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.engine.block_quantizer import WeightSlice
    from aoconvert.models.base import Codes, Load, Rows

_DATA, _SCALE = "qdata", "scale"


def read_codes(codes: Codes, rows: Rows | None, load: Load) -> Mapping[str, torch.Tensor]:
    """Codes and scales of some rows, by the names that torchao has for them; a scale in float32, which holds it.

    Args:
        codes: what is stored.
        rows: from a multiple of a block's rows to another, or to the end; ``None`` for all.
        load: gives stored tensors.
    """
    height, width = codes.data.shape
    start, stop = rows or (0, height)
    each, wide = codes.block
    scale = load(codes.scale, None).to(torch.float32).reshape(-(-height // each), -(-width // wide))
    if each < height:
        scale = scale[start // each : -(-stop // each)]
    return {_DATA: load(codes.data, rows), _SCALE: scale}


def carry(rows: WeightSlice, codes: Mapping[str, torch.Tensor], into: Part) -> ErrorStats:
    """Put codes and scales into a slice's place.

    Args:
        rows: the slice, with the values that the original's library makes of them.
        codes: as :func:`read_codes` gives them.
        into: where they go.

    Returns:
        How far the values that torchao makes of them are from those.

    Raises:
        QuantizeError: they stand for NaN or infinity.
    """
    error, scheme = ErrorStats(), rows.scheme
    height, width = rows.data.shape
    step = scheme.block(max(1, CPU_BLOCK // width))
    for start in range(0, height, step):
        stop = min(start + step, height)
        like = quantized_on_meta((stop - start, width), rows.dtype, scheme)
        with torchao_at_work(rows.name, scheme):
            block = unflatten(like, _parts(like, codes, (start, stop), height))
            error.add(rows.data[start:stop], block)
        into.put(block, start, stop - start)
    if not error.finite:
        raise QuantizeError(
            f"{rows.name} holds NaN or infinity", hint="repair the source, or leave this tensor unquantized with --skip"
        )
    return error


def _parts(like: torch.Tensor, codes: Mapping[str, torch.Tensor], rows: Rows, height: int) -> dict[str, torch.Tensor]:
    """The inner tensors of a block of rows; those that the original does not have are zeros (zero points)."""
    start, stop = rows
    parts: dict[str, torch.Tensor] = {}
    for name in flatten(like)[0]:
        wanted = getattr(like, name)
        if name == _DATA:
            parts[name] = codes[name][start:stop]
        elif name == _SCALE:
            scale = codes[name]
            if len(scale) > 1:  # a block of rows for each
                each = -(-height // len(scale))
                scale = scale[start // each : -(-stop // each)]
            parts[name] = scale.expand(wanted.shape).contiguous()
        else:
            parts[name] = torch.zeros(wanted.shape, dtype=wanted.dtype)
    return parts
