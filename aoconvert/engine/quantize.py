"""One tensor: cast, quantized by torchao, and measured against the original while that is at hand."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aoconvert.engine.eager import Eager, stacked
from aoconvert.errors import QuantizeError
from aoconvert.planning.slices import CPU_BLOCK, DEVICE_BLOCK
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.engine.acceleration import Kernel
    from aoconvert.schemes import Scheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight in host memory and its error against the source's weight.

    Attributes:
        tensor: torchao's tensor subclass, on the CPU.
        sqnr_db: 20·log10(‖w‖/‖w − dequantized‖) in dB; ``None`` where the error or the weight is zero.
        max_abs_error: largest |w − dequantized|.
    """

    tensor: torch.Tensor
    sqnr_db: float | None
    max_abs_error: float


def quantize_tensor(
    name: str,
    weight: torch.Tensor,
    dtype: torch.dtype,
    scheme: Scheme,
    device: str,
    *,
    kernel: Kernel | None = None,
    block: int | None = None,
    pool: Executor | None = None,
) -> QuantizedTensor:
    """Quantize one weight; the arguments are those of :func:`quantize_rows`.

    Raises:
        QuantizeError: NaN or infinity in the weight, or torchao failed on it.
    """
    error = ErrorStats()
    result = quantize_rows(name, weight, dtype, scheme, device, error, kernel=kernel, block=block, pool=pool)
    return QuantizedTensor(result, error.sqnr_db, error.largest)


def quantize_rows(
    name: str,
    weight: torch.Tensor,
    dtype: torch.dtype,
    scheme: Scheme,
    device: str,
    error: ErrorStats,
    *,
    kernel: Kernel | None = None,
    block: int | None = None,
    pool: Executor | None = None,
) -> torch.Tensor:
    """Quantize a weight, or some rows of it where the scheme treats every row on its own.

    Args:
        name: for messages.
        weight: the source's weight, (rows, in_features) or (experts, rows, in_features), floating, on the CPU.
        dtype: base dtype; the weight is cast to it before it is quantized.
        scheme: what to quantize it to.
        device: where the arithmetic runs, but for what torchao makes on a CPU only.
        error: these rows are counted in.
        kernel: the compiled way, for this source dtype and ``dtype``; eager without.
        block: elements of a block of rows that eager takes at once; default by device.
        pool: threads for several blocks at a time; one after the other without.

    Returns:
        torchao's tensor of these rows, on the CPU.

    Raises:
        QuantizeError: NaN or infinity in the weight, or torchao failed on it.
    """
    device = "cpu" if scheme.cpu_only else device
    elements = block or (CPU_BLOCK if device == "cpu" else DEVICE_BLOCK)
    flat = weight.reshape(-1, weight.shape[-1]) if scheme.rows.by_tiles else weight
    done = kernel.quantize(flat) if kernel is not None else None
    if done is None:
        eager = Eager(name, dtype, scheme, device, elements, pool)
        done = eager.experts(weight) if scheme.rows.shared_scale and weight.dim() == 3 else eager.matrix(flat)
    result, figures = done
    if not figures.finite:
        raise not_finite(name, weight, dtype, figures, scheme)
    error.merge(figures)
    return result if result.shape == weight.shape else stacked([result], weight, dtype, scheme)


def not_finite(name: str, weight: torch.Tensor, dtype: torch.dtype, error: ErrorStats, scheme: Scheme) -> QuantizeError:
    """Say where the NaN or infinity comes from: the source, the cast, or the scheme."""
    if not math.isfinite(error.signal):
        return QuantizeError(
            f"{name} holds NaN or infinity", hint="repair the source, or leave this tensor unquantized with --skip"
        )
    if not bool(weight.to(dtype).isfinite().all()):
        return QuantizeError(f"{name} overflows {str(dtype).removeprefix('torch.')}", hint="choose --dtype bfloat16")
    other = ", or choose int8wo" if scheme.name != "int8wo" else ""
    return QuantizeError(f"{name}: {scheme.name} turns it into NaN or infinity", hint=f"--skip {name}{other}")
