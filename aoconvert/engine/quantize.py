"""One tensor: cast, quantized by torchao, and measured against the original while that is at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aoconvert.engine.assembly import Assembly
from aoconvert.engine.blocks import cut
from aoconvert.errors import QuantizeError
from aoconvert.planning.slices import CPU_BLOCK
from aoconvert.schemes.apply import flatten, quantize_weight
from aoconvert.schemes.dequantize import dequantize
from aoconvert.schemes.repair import repair

if TYPE_CHECKING:
    from aoconvert.engine.kernels import Checked
    from aoconvert.schemes import Scheme

# Elements of a block of rows on a GPU
DEVICE_BLOCK = 1 << 26
# Elements that are widened to float64 at once
_WIDE = 1 << 19
_DEVICE_WIDE = 1 << 22


@dataclass(frozen=True)
class Quantized:
    """A quantized weight in host memory and its error against the source's weight.

    Attributes:
        tensor: torchao's tensor subclass, on the CPU.
        sqnr_db: 20·log10(‖w‖/‖w − dequantized‖) in dB; ``None`` where the error or the weight is zero.
        max_abs_error: largest |w − dequantized|.
    """

    tensor: torch.Tensor
    sqnr_db: float | None
    max_abs_error: float


@dataclass
class Error:
    """‖w‖², ‖w − dequantized‖² and max |w − dequantized|; ``repaired`` counts rows of zeros that were given a scale.

    The differences are float32, their squares and sums float64, in which those squares are exact. So block sizes,
    threads and the way of computing change the sums by some 1e-15 of themselves, which no rounded figure shows.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    repaired: int = 0

    def add(self, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Count in a block: the source's rows and what torchao made of them, perhaps with other rows before them."""
        for weight, difference in differences(original, quantized):
            low, high = torch.aminmax(difference)  # ten times faster than the infinity norm
            self.merge(Error(float(squares(weight)), float(squares(difference)), max(-float(low), float(high))))

    def merge(self, other: Error) -> None:
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


def differences(original: torch.Tensor, quantized: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The source's rows, and what they differ from what torchao made of them, in float32, some rows at a time.

    What torchao made may have other rows before them.
    """
    rows = original.reshape(-1, original.shape[-1])
    whole = dequantize(quantized).reshape(-1, original.shape[-1])[-len(rows) :]
    step = max(1, (_WIDE if original.device.type == "cpu" else _DEVICE_WIDE) // max(1, original.shape[-1]))
    for start in range(0, len(rows), step):
        weight = rows[start : start + step].to(torch.float32)
        yield weight, weight - whole[start : start + step]


def squares(values: torch.Tensor) -> torch.Tensor:
    """Σ values² in float64, on the values' device. It cannot overflow: the largest float32 squared is 1e77."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in torch.split(values.reshape(-1), _WIDE if values.device.type == "cpu" else _DEVICE_WIDE):
        wide = chunk.to(torch.float64)
        total += torch.dot(wide, wide)
    return total


def quantize_tensor(
    name: str,
    weight: torch.Tensor,
    dtype: torch.dtype,
    scheme: Scheme,
    device: str,
    *,
    kernel: Checked | None = None,
    block: int | None = None,
) -> Quantized:
    """Quantize one weight; the arguments are those of :func:`quantize_rows`.

    Raises:
        QuantizeError: NaN or infinity in the weight, or torchao failed on it.
    """
    error = Error()
    result = quantize_rows(name, weight, dtype, scheme, device, error, kernel=kernel, block=block)
    return Quantized(result, error.sqnr_db, error.largest)


def quantize_rows(
    name: str,
    weight: torch.Tensor,
    dtype: torch.dtype,
    scheme: Scheme,
    device: str,
    error: Error,
    *,
    kernel: Checked | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """Quantize a weight, or some rows of it where the scheme treats every row on its own.

    Args:
        name: for messages.
        weight: the source's weight, (rows, in_features) or (experts, rows, in_features), floating, on the CPU.
        dtype: base dtype; the weight is cast to it before it is quantized.
        scheme: what to quantize it to.
        device: where the arithmetic runs.
        error: these rows are counted in.
        kernel: the compiled way, for this source dtype and ``dtype``; eager without.
        block: elements of a block of rows that eager takes at once; default by device.

    Returns:
        torchao's tensor of these rows, on the CPU.

    Raises:
        QuantizeError: NaN or infinity in the weight, or torchao failed on it.
    """
    elements = block or (CPU_BLOCK if device == "cpu" else DEVICE_BLOCK)
    flat = weight.reshape(-1, weight.shape[-1]) if scheme.rowwise else weight
    done = kernel.quantize(flat) if kernel is not None else None
    if done is None and scheme.shared and weight.dim() == 3:
        done = _experts(name, weight, dtype, scheme, device, elements)
    elif done is None:
        done = _eager(name, flat, dtype, scheme, device, elements)
    result, figures = done
    if not figures.finite:
        raise not_finite(name, weight, dtype, figures, scheme)
    error.merge(figures)
    return result if result.shape == weight.shape else _stacked([result], weight, dtype, scheme)


def _experts(
    name: str, weight: torch.Tensor, dtype: torch.dtype, scheme: Scheme, device: str, elements: int
) -> tuple[torch.Tensor, Error]:
    """One by one: each of the stacked matrices has a scale of its own."""
    error = Error()
    made = []
    for at, matrix in enumerate(weight):
        quantized, figures = _eager(f"{name}[{at}]", matrix, dtype, scheme, device, elements)
        error.merge(figures)
        made.append(quantized)
    return _stacked(made, weight, dtype, scheme), error


def _stacked(pieces: Sequence[torch.Tensor], weight: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> torch.Tensor:
    """Rows of stacked experts, or the experts, as torchao's tensor of the stack: inner tensors of another shape."""
    like = quantize_weight(weight.to("meta", dtype), scheme)
    names, context = flatten(like)
    parts = {}
    for name in names:
        inner = [getattr(piece, name) for piece in pieces]
        parts[name] = (inner[0] if len(inner) == 1 else torch.stack(inner)).reshape(getattr(like, name).shape)
    stack: torch.Tensor = type(like).__tensor_unflatten__(parts, context, like.shape, like.stride())  # type: ignore[attr-defined]
    return stack


def _eager(
    name: str, weight: torch.Tensor, dtype: torch.dtype, scheme: Scheme, device: str, elements: int
) -> tuple[torch.Tensor, Error]:
    rows = len(weight)
    blocks = cut(weight, scheme, elements)
    error = Error()
    assembly = None
    for start in range(0, rows, blocks.step):
        original = weight[start : start + blocks.step].to(device)
        try:
            quantized = quantize_weight(blocks.behind(original.to(dtype)), scheme)
        except Exception as failure:  # torchao raises whatever its handlers raise
            raise QuantizeError(
                f"{name} {list(weight.shape)}: {scheme.name} failed: {failure}".splitlines()[0], hint=f"--skip {name}"
            ) from failure
        if not hasattr(quantized, "__tensor_flatten__"):
            raise QuantizeError(
                f"torchao left {name} {list(weight.shape)} unquantized under {scheme.name}", hint=f"--skip {name}"
            )
        error.merge(_measured(original, quantized))
        if blocks.step >= rows and not original.is_cuda:  # torchao's .to() would cast scales as well
            return quantized, error
        assembly = assembly or Assembly(quantize_weight(weight.to("meta", dtype), scheme), scheme)
        assembly.put_all(quantized, start, blocks.ahead)
    assert assembly is not None
    return assembly.result(), error


def _measured(original: torch.Tensor, quantized: torch.Tensor) -> Error:
    """The error of a block; rows of zeros that have become NaN are repaired in place."""
    error = Error()
    error.add(original, quantized)
    if math.isfinite(error.signal) and not error.finite and (rows := repair(quantized)):
        error = Error(repaired=rows)
        error.add(original, quantized)
    return error


def not_finite(name: str, weight: torch.Tensor, dtype: torch.dtype, error: Error, scheme: Scheme) -> QuantizeError:
    """Say where the NaN or infinity comes from: the source, the cast, or the scheme."""
    if not math.isfinite(error.signal):
        return QuantizeError(f"{name} holds NaN or infinity", hint="repair the source, or leave it out with --skip")
    if not bool(weight.to(dtype).isfinite().all()):
        return QuantizeError(f"{name} overflows {str(dtype).removeprefix('torch.')}", hint="choose --dtype bfloat16")
    other = ", or choose int8wo" if scheme.name != "int8wo" else ""
    return QuantizeError(f"{name}: {scheme.name} gives NaN or infinity for it", hint=f"--skip {name}{other}")
