"""A tensor put together out of blocks of its rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from aoconvert import accelerators
from aoconvert.formats.torch_bin.pickle_tree import is_wrapper
from aoconvert.schemes.apply import flatten, quantize_weight, unflatten

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme


@functools.lru_cache(maxsize=512)
def quantized_on_meta(shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme) -> torch.Tensor:
    """What torchao makes of a weight of this shape and dtype, without its values; made once for all layers alike."""
    return quantize_weight(torch.empty(shape, dtype=dtype, device="meta"), scheme)


def _ordinary(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


@dataclass(frozen=True)
class _Place:
    """Where the rows of an inner tensor are: ``size`` along ``dim`` for every ``rows`` rows of the whole.

    ``dim`` is ``None`` for what all rows share.
    """

    dim: int | None = 0
    size: int = 1
    rows: int = 1


@dataclass
class Assembly:
    """Inner tensors in host memory, filled block by block.

    Attributes:
        like: what it will be, on meta.
        scheme: what its rows are quantized to; ``None`` for a plain tensor.
        pinned: page-locked memory, filled asynchronously; whoever reads it waits for the device first.
        parts: the inner tensors by name; the only one of a plain tensor has none.
    """

    like: torch.Tensor
    scheme: Scheme | None = None
    pinned: bool = False
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = _places(self.like, self.scheme)

    def put(self, name: str, inner: torch.Tensor, start: int, rows: int, ahead: int = 0) -> None:
        """Copy an inner tensor of a block of rows.

        Args:
            name: its name.
            inner: its values.
            start: the first row in the whole tensor.
            rows: how many: to where the tensor can be cut, or to its end.
            ahead: rows of the block before these, which are left out, as are those behind them.
        """
        place = self._places[name]
        if name not in self.parts:
            whole = getattr(self.like, name) if name else self.like
            memory = accelerators.page_locked if self.pinned else _ordinary
            self.parts[name] = memory(whole.shape, whole.stride(), inner.dtype)
        target = self.parts[name]
        if place.dim is not None:
            skipped, at = (count // place.rows * place.size for count in (ahead, start))
            own, end = divmod(rows, place.rows)
            inner = inner.narrow(place.dim, skipped, inner.shape[place.dim] - skipped if end else own * place.size)
            target = target.narrow(place.dim, at, inner.shape[place.dim])
        # what lies apart is filled by way of a temporary, which an Intel GPU would not have filled yet
        target.copy_(inner, non_blocking=self.pinned and target.is_contiguous())

    def put_all(self, block: torch.Tensor, start: int, rows: int, ahead: int = 0) -> None:
        """As ``put``, with every inner tensor of a block."""
        for name in flatten(block)[0]:
            self.put(name, getattr(block, name), start, rows, ahead)

    def result(self) -> torch.Tensor:
        """The whole tensor."""
        return unflatten(self.like, self.parts) if is_wrapper(self.like) else self.parts[""]


def _places(like: torch.Tensor, scheme: Scheme | None) -> dict[str, _Place]:
    """Read off the shapes of one and of two blocks; the first dimension of stacked experts counts these."""
    if scheme is None or not is_wrapper(like):
        return {"": _Place()}
    if like.dim() == 3:
        return {name: _Place() for name in flatten(like)[0]}
    rows = scheme.block(1)
    one, two = (quantized_on_meta((count, like.shape[1]), like.dtype, scheme) for count in (rows, 2 * rows))
    return {name: _place(getattr(one, name).shape, getattr(two, name).shape, rows) for name in flatten(one)[0]}


def _place(one: torch.Size, two: torch.Size, rows: int) -> _Place:
    dim = next((dim for dim in range(len(one)) if one[dim] != two[dim]), None)
    return _Place(dim) if dim is None else _Place(dim, two[dim] - one[dim], rows)
