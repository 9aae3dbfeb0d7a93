"""Rows of a tensor that a formula makes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from aoconvert.errors import AoconvertError, ReadError
from aoconvert.models.base import Load, Rows, SourceTensor
from aoconvert.models.conversions import BLOCK_BYTES, room

if TYPE_CHECKING:
    import torch


def make_rows(
    tensor: SourceTensor,
    rows: Rows | None,
    load: Load,
    into: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The tensor, or its rows (start, stop), contiguous, a few at a time.

    Args:
        tensor: has a formula.
        rows: ``None`` for all.
        load: gives stored tensors.
        into: uint8 memory for them, where it is large enough.
        dtype: of the result; by default the tensor's own.

    Raises:
        ReadError: the parts could not be read, or do not fit together.
    """
    formula = tensor.formula
    assert formula is not None
    start, stop = rows or (0, tensor.shape[0])
    shape = (stop - start, *tensor.shape[1:])
    result = room(shape, dtype or tensor.dtype, into)
    unit = formula.unit
    step = max(1, BLOCK_BYTES // (unit * max(1, prod(shape[1:])) * tensor.dtype.itemsize)) * unit
    at = start
    while at < stop:
        first = at - at % unit
        last = min(first + step, tensor.shape[0])
        until = min(last, stop)
        try:
            block = formula.make((first, last), load)
        except AoconvertError:
            raise
        except Exception as error:  # of the library whose formula it is
            raise ReadError(
                f"{tensor.name} could not be dequantized: {error}".splitlines()[0],
                hint="check that from_pretrained opens this model",
            ) from error
        result[at - start : until - start].copy_(block[at - first : until - first])
        at = until
    return result


def working_bytes(tensor: SourceTensor) -> int:
    """Host memory that is taken while a few rows are made: the parts, and what the library makes on the way."""
    formula = tensor.formula
    assert formula is not None
    row = prod(tensor.shape[1:]) * 4
    return 4 * max(BLOCK_BYTES, formula.unit * row)
