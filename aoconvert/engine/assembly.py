"""A tensor put together out of blocks of its rows: once, in the memory that it is written from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from aoconvert import accelerators
from aoconvert.engine.blocks import matrix_shape
from aoconvert.formats.torch_bin.pickle_tree import is_wrapper
from aoconvert.schemes.apply import flatten, quantize_weight, unflatten

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme


@functools.lru_cache(maxsize=512)
def quantized_on_meta(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme | None) -> torch.Tensor:
    """What torchao makes of a weight of this shape and dtype, without its values; made once for all layers alike."""
    weight = torch.empty(shape, dtype=dtype, device="meta")
    return weight if scheme is None else quantize_weight(weight, scheme)


def _names(tensor: torch.Tensor) -> tuple[str, ...]:
    """Names of the inner tensors; the only one of a plain tensor has none."""
    return flatten(tensor)[0] if is_wrapper(tensor) else ("",)


def _inner(tensor: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = getattr(tensor, name) if name else tensor
    return found


def _unflatten(like: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return unflatten(like, parts) if is_wrapper(like) else parts[""]


@dataclass
class Assembly:
    """The inner tensors of a tensor, in host memory: filled slice by slice, block by block, in any order.

    Attributes:
        like: what it will be, on meta.
        dtype: base dtype, or a plain tensor's own.
        scheme: what its rows are quantized to; ``None`` for a plain tensor.
        streamed: the first inner tensor is not held: each slice has its rows.
        pinned: page-locked memory, filled asynchronously; whoever reads it waits for the device first.
        parts: the inner tensors by name; the only one of a plain tensor has none.
    """

    like: torch.Tensor
    dtype: torch.dtype
    scheme: Scheme | None = None
    streamed: bool = False
    pinned: bool = False
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scheme: Scheme | None,
        streamed: bool = False,
        pinned: bool = False,
    ) -> Assembly:
        """Make that of a tensor of this shape."""
        return cls(quantized_on_meta(shape, dtype, scheme), dtype, scheme, streamed, pinned)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the inner tensors, in torchao's order."""
        return _names(self.like)

    @cached_property
    def places(self) -> Mapping[str, _Place]:
        """Where rows of dimension 0 lie in each."""
        return _places(self.like, self.dtype, self.scheme)

    def rows(self, start: int, stop: int) -> Part:
        """The place of a slice: rows ``start`` to ``stop`` of dimension 0."""
        shape = tuple(self.like.shape)
        whole = not shape or stop - start == shape[0]
        like = self.like if whole else quantized_on_meta((stop - start, *shape[1:]), self.dtype, self.scheme)
        if self.streamed:
            return Part(self, like, start, self.names[:1], {})
        return Part(self, like, start, self.names if whole else (), self.parts)

    def result(self) -> torch.Tensor:
        """The whole tensor."""
        return _unflatten(self.like, self.parts)

    def rest(self) -> Mapping[str, torch.Tensor]:
        """The inner tensors that are not streamed."""
        return {name: self.parts[name] for name in self.names[1:]}

    def memory(self, like: torch.Tensor, name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """An inner tensor of ``parts``, which gets memory when it is first asked for."""
        if name not in parts:  # two threads may make it, and both take the first
            whole = _inner(like, name)
            make = accelerators.page_locked if self.pinned else _ordinary
            parts.setdefault(name, make(whole.shape, whole.stride(), whole.dtype))
        return parts[name]


def _ordinary(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


@dataclass
class Part:
    """The place of a slice in its tensor.

    Attributes:
        assembly: the tensor's.
        like: what the slice will be, on meta.
        start: its first row.
        owned: inner tensors that no other slice fills; a block that is the whole slice becomes them, without a copy.
        parts: these.
    """

    assembly: Assembly
    like: torch.Tensor
    start: int
    owned: tuple[str, ...]
    parts: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self._count, self._shape = matrix_shape(tuple(self.like.shape), self.assembly.scheme)
        same = len(self._shape) == self.like.dim()
        dtype, scheme = self.assembly.dtype, self.assembly.scheme
        self._matrix = self.like if same else quantized_on_meta(self._shape, dtype, scheme)

    def put(self, block: torch.Tensor, start: int, rows: int, ahead: int = 0, matrix: int = 0) -> None:
        """Copy a block of rows; several threads may do so.

        Args:
            block: what torchao made, or rows of a plain tensor in any dtype.
            start: its first row in its matrix, see :func:`aoconvert.engine.blocks.matrix_shape`.
            rows: how many: to where the tensor can be cut, or to its end.
            ahead: rows of the block before these, which are left out, as are those behind them.
            matrix: which of the slice's matrices it is of.
        """
        to_end = not self._shape or start + rows == self._shape[0]
        whole = start == 0 and to_end and self._count == 1 and block.device.type == "cpu"
        for name in _names(block):
            inner = _inner(block, name)
            if whole and name in self.owned:
                self.parts[name] = _fit(inner, _inner(self.like, name))
                continue
            target = self.inner(name)
            if self._matrix is not self.like:
                target = target.view(self._count, *_inner(self._matrix, name).shape)[matrix]
            place = self._places[name]
            if place.dim is not None:
                inner = place.of(inner, ahead, rows)
                target = target.narrow(place.dim, place.index(start), inner.shape[place.dim])
            elif not to_end:
                continue  # all blocks have the same
            # what lies apart is filled by way of a temporary, which an Intel GPU would not have filled yet
            target.copy_(inner, non_blocking=self.assembly.pinned and target.is_contiguous())

    @cached_property
    def _places(self) -> Mapping[str, _Place]:
        if self._matrix is self.like:
            return self.assembly.places
        return _places(self._matrix, self.assembly.dtype, self.assembly.scheme)

    def inner(self, name: str) -> torch.Tensor:
        """The slice's rows of an inner tensor."""
        if name in self.owned:
            return self.assembly.memory(self.like, name, self.parts)
        whole = self.assembly.memory(self.assembly.like, name, self.assembly.parts)
        count = self.like.shape[0]
        return whole if count == len(self.assembly.like) else self.assembly.places[name].of(whole, self.start, count)

    def first(self) -> torch.Tensor:
        """The slice's rows of the first inner tensor, or of a plain tensor."""
        return self.inner(self.assembly.names[0])

    def result(self) -> torch.Tensor:
        """The slice; what is changed in it, is changed in the tensor."""
        return _unflatten(self.like, {name: self.inner(name) for name in self.assembly.names})


def _fit(inner: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    inner = inner.to(like.dtype)
    return inner if inner.shape == like.shape else inner.reshape(like.shape)


@dataclass(frozen=True)
class _Place:
    """Where the rows of an inner tensor are: ``size`` along ``dim`` for every ``rows`` rows of the whole.

    ``dim`` is ``None`` for what all rows share.
    """

    dim: int | None = 0
    size: int = 1
    rows: int = 1

    def index(self, row: int) -> int:
        """Where a row begins, at which the tensor can be cut."""
        return row // self.rows * self.size

    def of(self, inner: torch.Tensor, start: int, rows: int) -> torch.Tensor:
        """Rows of an inner tensor: to where it can be cut, or to its end."""
        if self.dim is None:
            return inner
        at = self.index(start)
        return inner.narrow(self.dim, at, inner.shape[self.dim] - at if rows % self.rows else self.index(rows))


def _places(like: torch.Tensor, dtype: torch.dtype, scheme: Scheme | None) -> Mapping[str, _Place]:
    """Read off the shapes of one and of two blocks; the first dimension of stacked experts counts these."""
    if scheme is None or not is_wrapper(like) or like.dim() == 3:
        return dict.fromkeys(_names(like), _Place())
    rows = scheme.block(1)
    one, two = (quantized_on_meta((count, like.shape[1]), dtype, scheme) for count in (rows, 2 * rows))
    return {name: _place(_inner(one, name).shape, _inner(two, name).shape, rows) for name in _names(one)}


def _place(one: torch.Size, two: torch.Size, rows: int) -> _Place:
    dim = next((dim for dim in range(len(one)) if one[dim] != two[dim]), None)
    return _Place(dim) if dim is None else _Place(dim, two[dim] - one[dim], rows)
