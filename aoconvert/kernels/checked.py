"""When compiled kernels are used: where they pay, and only as long as their bits are torchao's own."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from aoconvert.kernels import library
from aoconvert.kernels.library import Building, Kernel
from aoconvert.schemes.apply import flatten, quantize_weight
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_log = logging.getLogger(__name__)

# Elements of a block that eager checks: they stay in the caches
_CHECK = 1 << 19
# Bytes of the source. One core of the machine of tests/benchmarks builds a kernel in 17 to 23 s, and quantizes a GB the
# eager way in 3 to 5 s: from 5 GB on a kernel pays in the run that builds it, from 2 GB on in the next one
_PAYS_NOW_BYTES = 5 * 10**9
_PAYS_LATER_BYTES = 2 * 10**9


class Checked:
    """A kernel under watch: one difference to eager, and it is not used again.

    Its first tensor is compared whole, then the first rows of every further in_features.
    """

    def __init__(self, kernel: Kernel, scheme: Scheme, base: torch.dtype) -> None:
        self._kernel: Kernel | None = kernel
        self._scheme, self._base = scheme, base
        # in_features -> torchao's class, the names of its inner tensors, and the rest of what it takes to build one
        self._built: dict[int, tuple[Any, tuple[str, ...], Any]] = {}

    @property
    def dropped(self) -> bool:
        """It has failed, or has given something else than eager."""
        return self._kernel is None

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ErrorStats] | None:
        """Quantize rows of a weight; ``None`` where the kernel may not be used, or just was dropped.

        Args:
            weight: (rows, in_features) in the source's dtype, on the CPU.
        """
        if self._kernel is None or not library.fits(weight, self._scheme):
            return None
        try:
            done = self._kernel.rows(weight)
            if not ErrorStats(done.signal, done.noise, done.largest).finite:
                return None  # what becomes of NaN is nobody's promise; eager will say where it comes from
            if weight.shape[1] not in self._built:
                self._check(self._kernel, weight, done)
        except (RuntimeError, _DifferenceError) as error:
            self._kernel = None
            _log.warning("the compiled kernel %s is no longer used: %s", self._scheme.name, error)
            return None
        kind, names, context = self._built[weight.shape[1]]
        parts = dict(zip(names, done.parts, strict=True))
        shape, stride = weight.shape, (weight.shape[1], 1)
        tensor: torch.Tensor = kind.__tensor_unflatten__(parts, context, shape, stride)
        return tensor, ErrorStats(done.signal, done.noise, done.largest)

    def _check(self, kernel: library.Kernel, weight: torch.Tensor, done: library.Rows) -> None:
        """Compare with eager, block by block."""
        rows, columns = weight.shape
        step = self._scheme.block(max(2, _CHECK // columns))
        checked = rows if not self._built else min(step, rows)
        figures = ErrorStats()
        for start in range(0, checked, step):
            block = weight[start : min(start + step, checked)]
            quantized = quantize_weight(block.to(self._base), self._scheme)
            names, context = flatten(quantized)
            for name, part in zip(names, done.parts, strict=True):
                expected = getattr(quantized, name)
                per_row = expected.shape[0] // len(block)
                _compare(name, part[start * per_row : (start + len(block)) * per_row], expected)
            figures.add(block, quantized)
        if checked < rows:
            done = kernel.rows(weight[:checked])
        _compare_figures(figures, done)
        self._built[columns] = type(quantized), names, context


class _DifferenceError(Exception):
    """A kernel's result is not eager's."""


def _compare(name: str, ours: torch.Tensor, expected: torch.Tensor) -> None:
    alike = (ours.dtype, ours.shape, ours.stride()) == (expected.dtype, expected.shape, expected.stride())
    if not alike or not torch.equal(ours.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)):
        raise _DifferenceError(f"its {name} is not torchao's")


def _compare_figures(eager: ErrorStats, done: library.Rows) -> None:
    """Sums in another order differ by some 1e-15 of themselves."""
    pairs = ((eager.signal, done.signal), (eager.noise, done.noise))
    if eager.largest != done.largest or not all(math.isclose(*pair, rel_tol=1e-12) for pair in pairs):
        raise _DifferenceError("its error figures are not eager's")


class Kernels:
    """The kernels of one component: from the cache, or compiled in the background while eager goes on, where that pays.

    ``AOCONVERT_COMPILE=0`` switches them off; ``1`` waits for every build before the first tensor.

    Args:
        device: where the arithmetic runs; kernels are for the CPU.
        bytes_to_quantize: a scheme's key → bytes of the source, as a kernel pays only for many.
    """

    def __init__(self, device: str, bytes_to_quantize: Mapping[str, int]) -> None:
        choice = os.environ.get("AOCONVERT_COMPILE", "auto")
        self._usable = device == "cpu" and choice != "0"
        self._wait = choice == "1"
        self._bytes = bytes_to_quantize
        self._found: dict[tuple[str, torch.dtype, torch.dtype], Checked | Building | None] = {}

    def for_tensor(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> Checked | None:
        """The kernel for a tensor of dtype ``source`` that is cast to ``base``; ``None``: eager."""
        if not self._usable or not scheme.rows.complete:
            return None
        key = scheme.key, source, base
        if key not in self._found:
            kernel = library.get(scheme, source, base)
            build = self._wait or self._bytes.get(scheme.key, 0) >= _PAYS_NOW_BYTES
            building = None if kernel or not build else library.start(scheme, source, base)
            self._found[key] = Checked(kernel, scheme, base) if kernel else building
        found = self._found[key]
        if isinstance(found, Building):
            kernel = found.wait() if self._wait else found.ready()
            if not found.done:
                return None
            found = self._found[key] = Checked(kernel, scheme, base) if kernel else None
        return found

    def prepare(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> None:
        """Start building a kernel that pays in the next run, but did not in this one, which is over."""
        key = scheme.key, source, base
        pays = _PAYS_LATER_BYTES <= self._bytes.get(scheme.key, 0) < _PAYS_NOW_BYTES
        if self._usable and scheme.rows.complete and pays and key not in self._found:
            kernel = library.get(scheme, source, base)
            self._found[key] = Checked(kernel, scheme, base) if kernel else library.start(scheme, source, base)

    def close(self) -> None:
        """Forget them. What is still compiling goes on at low priority, for the next run."""
        self._found.clear()

    def __enter__(self) -> Kernels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
