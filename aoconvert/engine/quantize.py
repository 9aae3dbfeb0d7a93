"""One tensor: cast, quantized by torchao, and measured against the original while that is at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from aoconvert.errors import QuantizeError
from aoconvert.schemes.apply import flatten, quantize_weight

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

# Elements of a block of rows. On a CPU a block and its temporaries stay in the caches: 4 to 7 times faster than the
# whole 7680x1920 weight at once (tests/benchmarks/README.md).
CPU_BLOCK = 1 << 19
DEVICE_BLOCK = 1 << 26


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
    """The error of a quantized weight, summed over blocks of rows: ‖w‖², ‖w − dequantized‖², max |w − dequantized|."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Count in a block: the source's rows and what torchao made of them."""
        weight = original.to(torch.float32)
        difference = weight - quantized.dequantize().to(torch.float32)
        self.signal += _norm(weight) ** 2
        self.noise += _norm(difference) ** 2
        low, high = torch.aminmax(difference)  # ten times faster than the infinity norm
        self.largest = max(self.largest, -float(low), float(high))

    @property
    def sqnr_db(self) -> float | None:
        """20·log10(‖w‖/‖w − dequantized‖) in dB; ``None`` where either is zero."""
        if self.signal == 0 or self.noise == 0:
            return None
        return round(10 * math.log10(self.signal / self.noise), 4)


def _norm(values: torch.Tensor) -> float:
    """2-norm of float32 values; their squares overflow float32 from 2**64 on, which is rare enough to be slow."""
    norm = float(torch.linalg.vector_norm(values))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(values, dtype=torch.float64))


@dataclass
class _Assembly:
    """Builds a torchao tensor out of blocks of its rows."""

    shape: torch.Size
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    template: torch.Tensor | None = None

    def put(self, start: int, stop: int, block: torch.Tensor) -> None:
        names, _ = flatten(block)
        for name in names:
            inner = getattr(block, name)
            per_row, rest = divmod(inner.shape[0], stop - start)
            if rest:
                raise QuantizeError(f"{type(block).__name__}.{name} does not go by rows")
            if name not in self.parts:
                rows = self.shape[0] * per_row
                self.parts[name] = torch.empty((rows, *inner.shape[1:]), dtype=inner.dtype)
            self.parts[name][start * per_row : stop * per_row].copy_(inner)
        self.template = block

    def result(self) -> torch.Tensor:
        block = self.template
        assert block is not None
        _, context = flatten(block)
        stride = (self.shape[1], 1)
        whole: torch.Tensor = type(block).__tensor_unflatten__(self.parts, context, self.shape, stride)  # type: ignore[attr-defined]
        return whole


def quantize_tensor(
    name: str, weight: torch.Tensor, dtype: torch.dtype, scheme: Scheme, device: str, *, block: int | None = None
) -> Quantized:
    """Quantize one weight, by blocks of rows where the scheme treats every row on its own.

    Args:
        name: for messages.
        weight: the source's weight, (out_features, in_features), floating, on the CPU.
        dtype: base dtype; the weight is cast to it before it is quantized.
        scheme: what to quantize it to.
        device: where the arithmetic runs.
        block: elements of a block; default by device.

    Raises:
        QuantizeError: NaN or infinity in the weight, or torchao failed on it.
    """
    rows, columns = weight.shape
    elements = block or (CPU_BLOCK if device == "cpu" else DEVICE_BLOCK)
    step = max(1, elements // columns) if scheme.rowwise else rows
    error = Error()
    assembly = _Assembly(weight.shape)
    result: torch.Tensor | None = None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        original = weight[start:stop].to(device)
        try:
            quantized = quantize_weight(original.to(dtype), scheme)
        except Exception as failure:  # torchao raises whatever its handlers raise
            raise QuantizeError(
                f"{name} {list(weight.shape)}: {scheme.name} failed: {failure}".splitlines()[0], hint=f"--skip {name}"
            ) from failure
        if not hasattr(quantized, "__tensor_flatten__"):
            raise QuantizeError(
                f"torchao left {name} {list(weight.shape)} unquantized under {scheme.name}", hint=f"--skip {name}"
            )
        error.add(original, quantized)
        if step >= rows:
            result = quantized.to("cpu")
        else:
            assembly.put(start, stop, quantized)
    if not math.isfinite(error.signal + error.noise):
        raise _not_finite(name, weight, dtype, error, scheme)
    return Quantized(result if result is not None else assembly.result(), error.sqnr_db, error.largest)


def _not_finite(name: str, weight: torch.Tensor, dtype: torch.dtype, error: Error, scheme: Scheme) -> QuantizeError:
    """Say where the NaN or infinity comes from: the source, the cast, or the scheme."""
    if not math.isfinite(error.signal):
        return QuantizeError(f"{name} holds NaN or infinity", hint="repair the source, or leave it out with --skip")
    if not bool(weight.to(dtype).isfinite().all()):
        return QuantizeError(f"{name} overflows {str(dtype).removeprefix('torch.')}", hint="choose --dtype bfloat16")
    return QuantizeError(
        f"{name}: {scheme.name} gives NaN for it (a row of zeros has no float8 scale)",
        hint=f"--skip {name}, or choose int8wo",
    )
