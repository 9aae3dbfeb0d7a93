"""In which pieces a tensor passes through the engine: rows, so that no tensor has to be in memory whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from aoconvert.environment import available_cores

if TYPE_CHECKING:
    from aoconvert.planning.types import TensorPlan
    from aoconvert.schemes import Scheme

SLICE_BYTES = 32 << 20
"""Most source bytes of a piece, as far as single rows allow it."""

BUFFERS = 3
"""How many pieces are in memory at most: one being read, one at work, one being written."""

PER_DEVICE = 2
"""Pieces on a GPU at once: while one is worked on, another is copied."""

WHOLE_BYTES = 128 << 20
"""A result up to this size is put together in memory; a larger one goes to its file piece by piece."""


# Values of a block of rows. On a CPU a block and its temporaries stay in the caches: 4 to 7 times faster than the whole
# 7680x1920 weight at once (tests/benchmarks/README.md).
CPU_BLOCK = 1 << 19
# The same on a GPU, where larger blocks do more at once
DEVICE_BLOCK = 1 << 22
BYTES_PER_VALUE = 24
"""Temporaries of torchao for each value of a block of rows. Measured."""

# Most of these for blocks that are worked on at the same time
_AT_ONCE_BYTES = 256 << 20


def at_once(scheme: Scheme, columns: int) -> int:
    """How many blocks of a matrix are worked on at a time on a CPU, each by a core: wide blocks take memory."""
    values = scheme.block(CPU_BLOCK // columns) * columns
    return max(1, min(available_cores(), _AT_ONCE_BYTES // (values * BYTES_PER_VALUE)))


def by_rows(tensor: TensorPlan) -> bool:
    """Whether the pieces of a tensor can be worked on one by one: copied, cast, or quantized block by block.

    A row of stacked experts is one expert, with scales of its own.
    """
    if len(tensor.shape) < 1 or tensor.shape[0] < 2 or 0 in tensor.shape:
        return False
    scheme = tensor.scheme
    return scheme is None or scheme.rows.by_tiles or (len(tensor.shape) == 3 and scheme.rows.tile is not None)


def slices(tensor: TensorPlan) -> list[tuple[int, int]]:
    """Row ranges (start, stop) of dimension 0 that cover the tensor in order; one range for what must stay whole."""
    rows = tensor.shape[0] if tensor.shape else 1
    if tensor.bytes_read <= SLICE_BYTES or not by_rows(tensor):
        return [(0, rows)]
    step = max(1, SLICE_BYTES // (prod(tensor.shape[1:]) * (tensor.bytes_read // tensor.numel)))
    if tensor.scheme is not None and len(tensor.shape) == 2:
        step = tensor.scheme.block(step)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def common_slices(tensors: Sequence[TensorPlan]) -> list[tuple[int, int]]:
    """The slices of one tensor for several plans: whole where one takes it whole, else in the largest unit."""
    by_unit = sorted(tensors, key=lambda tensor: tensor.scheme.block(1) if tensor.scheme else 1, reverse=True)
    return min(map(slices, by_unit), key=lambda ranges: len(ranges) > 1)


def is_streamed(tensor: TensorPlan) -> bool:
    """Whether the result is written piece by piece, because it is too large to be put together in memory."""
    return tensor.bytes_out > WHOLE_BYTES and by_rows(tensor)
