"""One weight by itself, the way the engine quantizes it in a pass."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from aoconvert.engine.acceleration import Kernel
from aoconvert.engine.assembly import Assembly
from aoconvert.engine.block_quantizer import BlockQuantizer, WeightSlice
from aoconvert.engine.blocks import torchao_at_work
from aoconvert.schemes import Scheme
from aoconvert.schemes.error_stats import ErrorStats


@dataclass(frozen=True)
class OneKernel:
    """Gives this kernel for whatever is asked."""

    kernel: Kernel | None

    def for_tensor(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> Kernel | None:
        return self.kernel

    def prepare(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> None:
        raise AssertionError


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight in host memory and its error against the source's weight."""

    tensor: torch.Tensor
    sqnr_db: float | None
    max_abs_error: float


def begin(
    quantizer: BlockQuantizer,
    name: str,
    weight: torch.Tensor,
    dtype: torch.dtype,
    scheme: Scheme,
    elements: int | None = None,
) -> Callable[[], tuple[torch.Tensor, ErrorStats]]:
    """Begin with a weight; what is returned waits for it."""
    with torchao_at_work(name, scheme):
        assembly = Assembly.of(weight.shape, dtype, scheme, pinned=quantizer.device.type != "cpu")
    into = assembly.rows(0, len(weight))
    finish = quantizer.start(WeightSlice(name, weight, dtype, scheme), into, elements)

    def wait() -> tuple[torch.Tensor, ErrorStats]:
        error = finish()
        return assembly.result(), error

    return wait


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
    """Quantize a weight in blocks of ``block`` values; its error is counted in ``error``."""
    quantizer = BlockQuantizer("cpu" if scheme.cpu_only else device, OneKernel(kernel), pool)
    tensor, found = begin(quantizer, name, weight, dtype, scheme, block)()
    error.merge(found)
    return tensor


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
    """Quantize a weight; as ``quantize_rows``."""
    error = ErrorStats()
    tensor = quantize_rows(name, weight, dtype, scheme, device, error, kernel=kernel, block=block, pool=pool)
    return QuantizedTensor(tensor, error.sqnr_db, error.largest)
