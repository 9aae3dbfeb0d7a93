"""How far a quantized weight is from the source's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from aoconvert.schemes.tensors import dequantize

# Elements that are widened to float64 at once
_WIDE = 1 << 19
_DEVICE_WIDE = 1 << 22


@dataclass
class ErrorStats:
    """‖w‖², ‖w − dequantized‖² and max |w − dequantized|; ``repaired`` counts rows of zeros that were given a scale.

    The differences are float32, their squares and sums float64, in which those squares are exact. So block sizes,
    threads and the way of computing change the sums by some 1e-15 of themselves, which no rounded figure shows.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    repaired: int = 0

    def add(self, original: torch.Tensor, quantized: torch.Tensor, ahead: int = 0) -> None:
        """Count in a block: the source's rows, and what torchao made of them behind ``ahead`` others."""
        self.merge(ErrorStats(*error_figures(original, quantized, ahead).tolist()))

    def merge(self, other: ErrorStats) -> None:
        """Count in the figures of other rows."""
        self.signal += other.signal
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)
        self.repaired += other.repaired

    @property
    def finite(self) -> bool:
        """No NaN and no infinity was seen."""
        return math.isfinite(self.signal + self.noise)

    @property
    def sqnr_db(self) -> float | None:
        """20·log10(‖w‖/‖w − dequantized‖) in dB; ``None`` where either is zero."""
        if self.signal == 0 or self.noise == 0:
            return None
        return round(10 * math.log10(self.signal / self.noise), 4)


def error_figures(original: torch.Tensor, quantized: torch.Tensor, ahead: int = 0) -> torch.Tensor:
    """``signal``, ``noise`` and ``largest`` of a block, as of ``ErrorStats.add``: three float64, on the block's device.

    Reading them waits for the device.
    """
    figures = torch.zeros(3, dtype=torch.float64, device=original.device)
    for weight, difference in _differences(original, quantized, ahead):
        low, high = torch.aminmax(difference)  # ten times faster than the infinity norm
        figures[0] += squares(weight)
        figures[1] += squares(difference)
        figures[2] = torch.maximum(figures[2], torch.stack([low, high]).abs().amax())
    return figures


def _differences(
    original: torch.Tensor, quantized: torch.Tensor, ahead: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The source's rows, and what they differ from what torchao made of them, in float32, some rows at a time.

    What torchao made may have other rows behind them and, ``ahead`` of them, before them.
    """
    rows = original.reshape(-1, original.shape[-1])
    whole = dequantize(quantized).reshape(-1, original.shape[-1])[ahead : ahead + len(rows)]
    step = max(1, (_WIDE if original.device.type == "cpu" else _DEVICE_WIDE) // max(1, original.shape[-1]))
    for start in range(0, len(rows), step):
        weight = rows[start : start + step].to(torch.float32)
        yield weight, weight - whole[start : start + step]


def squares(values: torch.Tensor) -> torch.Tensor:
    """Σ values² in float64, on the values' device. It cannot overflow: the largest float32 squared is 1e77."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in torch.split(values.reshape(-1), _WIDE if values.device.type == "cpu" else _DEVICE_WIDE):
        wide = chunk.to(torch.float64)
        # on a GPU the product is cuBLAS's, which takes 32 MiB for each stream
        total += torch.dot(wide, wide) if wide.device.type == "cpu" else wide.square_().sum()
    return total
