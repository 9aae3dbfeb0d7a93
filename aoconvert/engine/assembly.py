"""A tensor put together out of rows of its inner tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from aoconvert.errors import QuantizeError
from aoconvert.schemes.apply import flatten


@dataclass
class Assembly:
    """Inner tensors in host memory, filled row by row.

    Attributes:
        rows: of the whole tensor.
        pinned: page-locked memory, filled asynchronously; whoever reads it waits for the device first.
        parts: the inner tensors by name.
    """

    rows: int
    pinned: bool = False
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    def put(self, name: str, inner: torch.Tensor, start: int, stop: int) -> None:
        """Copy what belongs to the rows ``start`` to ``stop``; a row may be several of the inner tensor.

        Raises:
            QuantizeError: the inner tensor does not go by rows.
        """
        per_row, rest = divmod(inner.shape[0], stop - start)
        if rest:
            raise QuantizeError(f"its {name} does not go by rows")
        if name not in self.parts:
            shape = (self.rows * per_row, *inner.shape[1:])
            self.parts[name] = torch.empty(shape, dtype=inner.dtype, pin_memory=self.pinned)
        self.parts[name][start * per_row : stop * per_row].copy_(inner, non_blocking=self.pinned)

    def put_all(self, block: torch.Tensor, start: int, stop: int) -> None:
        """As ``put``, with every inner tensor of a block of rows."""
        for name in flatten(block)[0]:
            self.put(name, getattr(block, name), start, stop)

    def result(self, like: torch.Tensor) -> torch.Tensor:
        """The whole tensor, of the class and with the attributes of ``like``, one of its blocks of rows."""
        _, context = flatten(like)
        shape = torch.Size((self.rows, *like.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        whole: torch.Tensor = type(like).__tensor_unflatten__(self.parts, context, shape, stride)  # type: ignore[attr-defined]
        return whole
