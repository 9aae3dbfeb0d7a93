"""In which blocks of rows a weight is quantized, and what a block needs beside its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aoconvert.planning import slices

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme


@dataclass(frozen=True)
class Blocks:
    """How a weight of shape (rows, in_features), or of stacked experts, is cut.

    Attributes:
        step: rows of a block; a row of stacked experts is one expert.
        extremes: rows of the smallest and the largest value of the whole weight. Where all rows share a scale, a block
            is quantized behind them, and torchao finds the scale of the whole in it.
    """

    step: int
    extremes: torch.Tensor | None = None

    @property
    def ahead(self) -> int:
        """How many rows are before those of a block."""
        return 0 if self.extremes is None else len(self.extremes)

    def behind(self, block: torch.Tensor) -> torch.Tensor:
        """The block's rows with the extremes before them, in its dtype and on its device."""
        return block if self.extremes is None else torch.cat([self.extremes.to(block), block])


def cut(weight: torch.Tensor, scheme: Scheme, elements: int) -> Blocks:
    """The blocks of a weight on the CPU, of about ``elements`` values each."""
    if weight.dim() == 3:
        experts = max(1, elements // max(1, weight[:1].numel()))
        return Blocks(len(weight) if scheme.unit is None else experts)
    if scheme.unit is None:
        return Blocks(len(weight))
    step, ahead = slices.block(scheme, weight.shape[1], elements)
    if not ahead or step >= len(weight):
        return Blocks(step)
    low, high = torch.aminmax(weight)
    if low == high == 0:  # torchao gives it no scale: it is repaired, whole
        return Blocks(len(weight))
    extremes = high.expand(ahead, weight.shape[1]).clone()
    extremes[0, 0] = low
    return Blocks(step, extremes)
