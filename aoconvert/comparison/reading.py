"""Reads the arrays that headers describe, some bytes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from aoconvert.comparison.tensors import Leaf
from aoconvert.formats.base import open_file, read_bytes
from aoconvert.formats.dtypes import dtype_name

CHUNK = 8 << 20  # bytes of each side that are compared at once
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class HeldLeaf(Leaf):
    """An array that is in memory, not in a file."""

    data: torch.Tensor = field(default_factory=lambda: torch.empty(0), compare=False)


@dataclass(frozen=True)
class ReadLeaf(Leaf):
    """An array that somebody else reads: all of it, or its rows (start, stop)."""

    source: Callable[[tuple[int, int] | None], torch.Tensor] = field(compare=False)


def hold(tensor: torch.Tensor) -> HeldLeaf:
    """A plain tensor as an array that is in memory."""
    data = tensor.detach().contiguous()
    return HeldLeaf(Path(), dtype_name(data.dtype), tuple(data.shape), 0, data.nbytes, data.stride(), data)


class OpenFiles:
    """The weights files of both sides, each opened once, as a context manager."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, leaf: Leaf) -> torch.Tensor:
        """A whole array, contiguous.

        Raises:
            ReadError: the disk fails, or the file changed.
        """
        if isinstance(leaf, HeldLeaf):
            return leaf.data
        if isinstance(leaf, ReadLeaf):
            return leaf.source(None).contiguous()
        last = sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride, strict=True))
        width = _dtype(leaf).itemsize
        data = self._bytes(leaf, 0, (last + 1) * width if leaf.nbytes else 0)
        return data.view(_dtype(leaf)).as_strided(leaf.shape, leaf.stride, 0).contiguous()

    def read_rows(self, leaf: Leaf, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of an array; as ``read``."""
        if isinstance(leaf, ReadLeaf):
            return leaf.source((start, stop)).contiguous()
        if isinstance(leaf, HeldLeaf) or not leaf.in_order:
            return self.read(leaf)[start:stop]
        row = leaf.nbytes // leaf.shape[0]
        data = self._bytes(leaf, start * row, (stop - start) * row)
        return data.view(_dtype(leaf)).reshape(stop - start, *leaf.shape[1:])

    def count_different(self, a: Leaf, b: Leaf) -> int:
        """How many elements of two arrays of one dtype and shape have other bits."""
        return sum(_different(*pair, _dtype(a).itemsize) for pair in self._pairs(a, b))

    def is_zero(self, leaf: Leaf) -> bool:
        """Whether all elements of an array are 0."""
        return not self.read(leaf).any()

    def _pairs(self, a: Leaf, b: Leaf) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of both in row-major order, some rows at a time."""
        if not (a.in_order and b.in_order) or not a.shape or not a.nbytes:
            yield _as_bytes(self.read(a)), _as_bytes(self.read(b))
            return
        rows = a.shape[0]
        step = max(1, CHUNK * rows // a.nbytes)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield _as_bytes(self.read_rows(a, start, stop)), _as_bytes(self.read_rows(b, start, stop))

    def _bytes(self, leaf: Leaf, start: int, count: int) -> torch.Tensor:
        if leaf.file not in self._open:
            self._open[leaf.file] = open_file(leaf.file)
        return read_bytes(self._open[leaf.file], leaf.offset + start, count, leaf.file.name)


def _dtype(leaf: Leaf) -> torch.dtype:
    """Its numbers; bytes where torch has none such."""
    found = getattr(torch, leaf.dtype, None)
    return found if isinstance(found, torch.dtype) else torch.uint8


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _different(a: torch.Tensor, b: torch.Tensor, width: int) -> int:
    if torch.equal(a, b):
        return 0
    if width in _INTEGERS:
        return int((a.view(_INTEGERS[width]) != b.view(_INTEGERS[width])).sum())
    return int((a.view(-1, width) != b.view(-1, width)).any(dim=1).sum())
