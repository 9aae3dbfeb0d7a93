"""In which blocks of rows a weight is quantized, what a block needs beside its rows, and how one is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from aoconvert import accelerators
from aoconvert.errors import AoconvertError, QuantizeError
from aoconvert.schemes.apply import quantize_weight

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme


@dataclass(frozen=True)
class Blocks:
    """How a weight of shape (rows, in_features), or of stacked experts, is cut.

    Attributes:
        step: rows of a block; a row of stacked experts is one expert.
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

    def completed(self, block: torch.Tensor) -> tuple[torch.Tensor, int]:
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


def cut(weight: torch.Tensor, scheme: Scheme, elements: int) -> Blocks:
    """The blocks of a weight on the CPU, of about ``elements`` values each."""
    if weight.dim() == 3:
        experts = max(1, elements // max(1, weight[:1].numel()))
        return Blocks(len(weight) if scheme.rows.tile is None else experts)
    if scheme.rows.tile is None:
        return Blocks(len(weight))
    step = scheme.block(elements // weight.shape[1])
    if not scheme.rows.shared_scale or step >= len(weight):
        return Blocks(step)
    low, high = torch.aminmax(weight)
    if low == high == 0:  # torchao gives it no scale: it is repaired, whole
        return Blocks(len(weight))
    extremes = high.expand(scheme.entry.multiples[0], weight.shape[1]).clone()
    extremes[0, 0] = low
    return Blocks(step, scheme.block(1), extremes)


@contextlib.contextmanager
def torchao_at_work(name: str, scheme: Scheme) -> Iterator[None]:
    """Say which weight torchao failed on; what its device failed of passes as it is.

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
            f"{name}: {scheme.name} failed: {failure}".splitlines()[0], hint=f"--skip {name}"
        ) from failure


def quantize_block(name: str, block: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What torchao makes of a block of rows in the base dtype, on their device.

    Raises:
        QuantizeError: torchao left it as it is.
    """
    quantized = quantize_weight(block, scheme)
    if not hasattr(quantized, "__tensor_flatten__"):
        raise QuantizeError(f"torchao left {name} unquantized under {scheme.name}", hint=f"--skip {name}")
    return quantized
