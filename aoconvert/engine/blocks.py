"""In which blocks of rows a weight is quantized, and what a block needs beside its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from aoconvert import accelerators
from aoconvert.errors import AoconvertError, QuantizeError

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme


@dataclass(frozen=True)
class Blocks:
    """How a matrix of shape (rows, in_features) is cut.

    Attributes:
        step: rows of a block.
        unit: rows that are packed together.
        extremes: rows of the smallest and the largest value of the whole weight. Where all rows share a scale, a block
            is quantized with them, and torchao finds the scale of the whole in it.
    """

    step: int
    unit: int = 1
    extremes: torch.Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Blocks:
        """The same for blocks of this dtype on a device, which copies while the caller goes on."""
        if self.extremes is None:
            return self
        return replace(self, extremes=self.extremes.to(dtype).to(device, non_blocking=True))

    def complete(self, block: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A block, or the end of the weight, with what it needs.

        Returns:
            The rows to quantize, in the block's dtype and on its device, and how many are before the block's own.
        """
        if self.extremes is None:
            return block, 0
        extremes = self.extremes.to(block)
        if len(block) % self.unit == 0:
            return torch.cat([block, extremes]), 0
        # behind it they would be packed with its last rows
        return torch.cat([extremes[-1:].expand(self.unit - len(extremes), -1), extremes, block]), self.unit


def matrix_shape(shape: tuple[int, ...], scheme: Scheme | None) -> tuple[int, tuple[int, ...]]:
    """How many matrices a weight is cut as, and the shape of each.

    Stacked experts are one, each below the other, where rows do not look at others, and one for each expert where all
    rows of an expert share a scale. What torchao has to take whole stays as it is.
    """
    if scheme is None or len(shape) != 3 or scheme.rows.tile is None:
        return 1, shape
    experts, rows, columns = shape
    return (experts, (rows, columns)) if scheme.rows.shared_scale else (1, (experts * rows, columns))


def block_rows(shape: tuple[int, ...], scheme: Scheme, elements: int) -> int:
    """How many rows of a matrix are a block of about ``elements`` values."""
    return shape[0] if scheme.rows.tile is None else min(shape[0], scheme.block(elements // shape[1]))


def cut(matrix: torch.Tensor, scheme: Scheme, elements: int) -> Blocks:
    """The blocks of a matrix on the CPU, of about ``elements`` values each."""
    step = block_rows(matrix.shape, scheme, elements)
    if not scheme.rows.shared_scale or step == len(matrix):
        return Blocks(step)
    low, high = torch.aminmax(matrix)
    if low == high == 0:  # torchao gives it no scale: it is repaired, whole
        return Blocks(len(matrix))
    extremes = high.expand(scheme.entry.multiples[0], matrix.shape[1]).clone()
    extremes[0, 0] = low
    return Blocks(step, scheme.block(1), extremes)


@contextlib.contextmanager
def torchao_at_work(name: str, scheme: Scheme, which: str = "") -> Iterator[None]:
    """Say which weight torchao failed on, and ``which`` part of it; what its device failed of passes as it is.

    Raises:
        QuantizeError: torchao failed.
    """
    try:
        yield
    except AoconvertError:
        raise
    except Exception as failure:  # torchao raises whatever its handlers raise
        if accelerators.is_full(failure) or isinstance(failure, torch.AcceleratorError):
            raise
        raise QuantizeError(
            f"{name}{which}: {scheme.name} failed: {failure}".splitlines()[0], hint=f"--skip {name}"
        ) from failure
