"""Compiled kernels, where the optional package :mod:`aoconvert.kernels` is there; without it all weights go eager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from aoconvert.planning.types import TensorPlan

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme
    from aoconvert.schemes.error_stats import ErrorStats


class Kernel(Protocol):
    """Quantizes rows of a weight to torchao's own bits, faster than eager torchao."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ErrorStats] | None:
        """Quantize (rows, in_features) on the CPU; ``None``: eager torchao has to do it."""


class KernelSource(Protocol):
    """Gives kernels for the tensors of one pass."""

    def for_tensor(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> Kernel | None:
        """Find the kernel for tensors of dtype ``source`` that are cast to ``base``; ``None``: there is none."""

    def prepare(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> None:
        """Start building the kernel, where later runs would use it and this one could not."""


class NoKernels:
    """All weights go eager."""

    def for_tensor(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> None:
        """Find none."""

    def prepare(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> None:
        """Build none."""


def open_kernels(device: str, bytes_to_quantize: Mapping[str, int]) -> AbstractContextManager[KernelSource]:
    """Open the kernels of one pass.

    Args:
        device: where the arithmetic runs.
        bytes_to_quantize: a scheme's key → bytes of the source in this pass.
    """
    try:
        from aoconvert.kernels import Kernels
    except ImportError as error:
        if error.name != "aoconvert.kernels":
            raise
        return nullcontext(NoKernels())
    return Kernels(device, bytes_to_quantize)


def prepare_kernels(device: str, tensors: Iterable[TensorPlan]) -> None:
    """Start building what later runs of the same kind would use, now that nothing of this run waits for the CPU."""
    wanted = [(tensor.scheme, tensor) for tensor in tensors if tensor.scheme is not None]
    with open_kernels(device, count_bytes(tensor for _, tensor in wanted)) as kernels:
        for scheme, tensor in wanted:
            kernels.prepare(scheme, getattr(torch, tensor.source_dtype), getattr(torch, tensor.dtype))


def count_bytes(tensors: Iterable[TensorPlan]) -> Counter[str]:
    """Count the source's bytes that each scheme takes, by the scheme's key."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.scheme is not None:
            counts[tensor.scheme.key] += tensor.bytes_in
    return counts
