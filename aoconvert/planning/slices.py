"""In which pieces a tensor passes through the engine: rows, so that no tensor has to be in memory whole."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aoconvert.planning.types import TensorPlan
    from aoconvert.schemes import Scheme

SLICE_BYTES = 32 << 20
"""Most source bytes of a piece, as far as single rows allow it."""

BUFFERS = 3
"""How many pieces are in memory at most: one being read, one at work, one being written."""

WHOLE_BYTES = 128 << 20
"""A result up to this size is put together in memory; a larger one goes to its file piece by piece."""


# Values of a block of rows. On a CPU a block and its temporaries stay in the caches: 4 to 7 times faster than the whole
# 7680x1920 weight at once (tests/benchmarks/README.md).
CPU_BLOCK = 1 << 19
# Rows of a block for one of the rows before it, which are work for nothing; more blocks leave the caches
_SHARE = 2


def block(scheme: Scheme, columns: int, elements: int) -> tuple[int, int]:
    """Rows of a matrix that are quantized at once, about ``elements`` values; and rows that have to be before them.

    The latter hold the extremes of the whole matrix where all its rows share a scale.
    """
    step = scheme.block(elements // columns)
    if not scheme.shared:
        return step, 0
    ahead = scheme.block(1)
    return max(step, _SHARE * ahead), ahead


def by_rows(tensor: TensorPlan) -> bool:
    """Whether the pieces of a tensor can be worked on one by one: copied, cast, or quantized block by block.

    A row of stacked experts is one expert, with scales of its own.
    """
    if len(tensor.shape) < 1 or tensor.shape[0] < 2 or 0 in tensor.shape:
        return False
    scheme = tensor.scheme
    return scheme is None or scheme.rowwise or (len(tensor.shape) == 3 and scheme.unit is not None)


def slices(tensor: TensorPlan) -> list[tuple[int, int]]:
    """Row ranges (start, stop) of dimension 0 that cover the tensor in order; one range for what must stay whole."""
    rows = tensor.shape[0] if tensor.shape else 1
    if tensor.bytes_in <= SLICE_BYTES or not by_rows(tensor):
        return [(0, rows)]
    step = max(1, SLICE_BYTES // (prod(tensor.shape[1:]) * (tensor.bytes_in // tensor.numel)))
    if tensor.scheme is not None and len(tensor.shape) == 2:
        step = tensor.scheme.block(step)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def is_streamed(tensor: TensorPlan) -> bool:
    """Whether the result is written piece by piece, because it is too large to be put together in memory."""
    return tensor.bytes_out > WHOLE_BYTES and by_rows(tensor)
