"""torchao's own arithmetic, block of rows by block of rows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from aoconvert.engine.assembly import Assembly, quantized_on_meta
from aoconvert.engine.blocks import Blocks, cut, quantize_block, torchao_at_work
from aoconvert.planning.slices import at_once
from aoconvert.schemes.apply import flatten, unflatten
from aoconvert.schemes.error_stats import ErrorStats
from aoconvert.schemes.tensors import repair

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

# What torchao made of a block, how many rows of it are before the block's own, and the figures of these
Made = tuple[torch.Tensor, int, ErrorStats]
T = TypeVar("T")
R = TypeVar("R")


def threads(count: int) -> ThreadPoolExecutor:
    """Threads that work on a block each, with no threads of torch's below them; they start when they are wanted."""
    return ThreadPoolExecutor(count, thread_name_prefix="aoconvert-block", initializer=lambda: torch.set_num_threads(1))


@dataclass(frozen=True)
class Eager:
    """How one weight is quantized.

    Attributes:
        name: for messages.
        dtype: base dtype.
        scheme: what it is quantized to.
        device: where the arithmetic runs.
        elements: values of a block.
        pool: threads for several blocks at a time, on a CPU.
    """

    name: str
    dtype: torch.dtype
    scheme: Scheme
    device: str
    elements: int
    pool: Executor | None = None

    def matrix(self, weight: torch.Tensor) -> tuple[torch.Tensor, ErrorStats]:
        """Quantize a weight that is a matrix, or stacked experts that torchao takes together.

        Raises:
            QuantizeError: torchao failed on it.
        """
        blocks = cut(weight, self.scheme, self.elements)
        starts = range(0, len(weight), blocks.step)
        if len(starts) == 1 and self.device == "cpu":
            quantized, _, figures = self._block(weight, blocks, 0)
            return quantized, figures  # not through torchao's .to(), which casts scales as well
        assembly = None
        error = ErrorStats()
        for start, (quantized, ahead, figures) in zip(starts, self._all(weight, blocks, starts), strict=True):
            error.merge(figures)
            assembly = assembly or Assembly(quantized_on_meta(weight.shape, self.dtype, self.scheme), self.scheme)
            assembly.put_all(quantized, start, min(blocks.step, len(weight) - start), ahead)
        assert assembly is not None
        if self.scheme.rows.shared_scale:  # every block has found the one scale that was missing
            error.repaired = min(error.repaired, 1)
        return assembly.result(), error

    def experts(self, weight: torch.Tensor) -> tuple[torch.Tensor, ErrorStats]:
        """Quantize stacked matrices one by one: each has a scale of its own; as ``matrix``."""
        error = ErrorStats()
        made = []
        for at, one in enumerate(weight):
            quantized, figures = replace(self, name=f"{self.name}[{at}]").matrix(one)
            error.merge(figures)
            made.append(quantized)
        return stacked(made, weight, self.dtype, self.scheme), error

    def _all(self, weight: torch.Tensor, blocks: Blocks, starts: Iterable[int]) -> Iterable[Made]:
        def work(start: int) -> Made:
            with torch.no_grad():  # a thread has its own
                return self._block(weight, blocks, start)

        if self.pool is None or weight.dim() != 2 or self.device != "cpu":
            return map(work, starts)
        return _in_order(self.pool, work, starts, at_once(self.scheme, weight.shape[1]))

    def _block(self, weight: torch.Tensor, blocks: Blocks, start: int) -> Made:
        original = weight[start : start + blocks.step].to(self.device)
        with torchao_at_work(f"{self.name} {list(weight.shape)}", self.scheme):
            block, ahead = blocks.completed(original.to(self.dtype))
            quantized = quantize_block(self.name, block, self.scheme)
            return quantized, ahead, _measured(original, quantized, ahead)


def stacked(pieces: Sequence[torch.Tensor], weight: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> torch.Tensor:
    """Rows of stacked experts, or the experts, as torchao's tensor of the stack: inner tensors of another shape."""
    like = quantized_on_meta(weight.shape, dtype, scheme)
    parts = {}
    for name in flatten(like)[0]:
        inner = [getattr(piece, name) for piece in pieces]
        parts[name] = (inner[0] if len(inner) == 1 else torch.stack(inner)).reshape(getattr(like, name).shape)
    return unflatten(like, parts)


def _measured(original: torch.Tensor, quantized: torch.Tensor, ahead: int) -> ErrorStats:
    """The error of a block; rows of zeros that have become NaN are repaired in place."""
    error = ErrorStats()
    error.add(original, quantized, ahead)
    if math.isfinite(error.signal) and not error.finite and (rows := repair(quantized)):
        error = ErrorStats(repaired=rows)
        error.add(original, quantized, ahead)
    return error


def _in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """What ``work`` makes of each, in order, with no more than ``most`` under way or waiting to be taken."""
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(under_way) >= most:
                yield under_way.popleft().result()
            under_way.append(pool.submit(work, item))
        while under_way:
            yield under_way.popleft().result()
    finally:  # nobody looks at the weight any more when this is left
        for future in under_way:
            future.cancel()
        wait(under_way)
