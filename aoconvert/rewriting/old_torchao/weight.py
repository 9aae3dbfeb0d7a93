"""An ``AffineQuantizedTensor`` of torchao 0.4 to 0.17, as its file describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Value
from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, dtype_of
from aoconvert.rewriting.old_torchao.activations import Activations, last_name

AGAIN = "quantize the original again"
DIFFERENT_ROUNDING = (
    "its codes and scales are the same; activations are rounded slightly differently than by its writer"
)

Build = Callable[["Weight", Activations], Outcome]


class Weight:
    """An ``AffineQuantizedTensor``: its implementation, and what it says of the codes.

    Attributes:
        outer: the tensor.
        impl: the tensor within that holds the codes; called ``layout_tensor`` up to torchao 0.6.1.
        read: gives elements.
    """

    def __init__(self, outer: BinTensor, read: Read, packed_on: str | None) -> None:
        found = outer.inner.get("tensor_impl") or outer.inner.get("layout_tensor")
        if found is None:
            raise CannotMigrate("its codes are not where torchao 0.4 to 0.17 kept them")
        self.outer = outer
        self.impl = found
        self.read = read
        self.packed_on = packed_on

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.outer.shape

    @property
    def dtype(self) -> torch.dtype:
        """What it dequantizes to."""
        return dtype_of(self.outer)

    @property
    def layout(self) -> Mapping[str | int, Value]:
        """The attributes of its layout."""
        found = self.impl.attributes.get("_layout", self.impl.attributes.get("layout_type"))
        return found.state if isinstance(found, Instance) else {}

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale.

        Raises:
            CannotMigrate: not of a matrix, or no whole number of blocks.
        """
        found = self.outer.attributes.get("block_size")
        if not (isinstance(found, tuple) and len(found) == len(self.shape) == 2):
            raise CannotMigrate(f"its scales are not for blocks of a matrix, but it has the shape {self.shape}")
        rows, columns = (int(size) if type(size) is int and size > 0 else length
                         for size, length in zip(found, self.shape, strict=True))  # fmt: skip
        if self.shape[0] % rows or self.shape[1] % columns:
            raise CannotMigrate(f"its blocks of {rows} x {columns} do not fill its shape {self.shape}")
        return rows, columns

    @property
    def groups(self) -> tuple[int, int]:
        """Scales down and across."""
        rows, columns = self.block
        return self.shape[0] // rows, self.shape[1] // columns

    @property
    def limits(self) -> tuple[int, int] | None:
        """The smallest and the largest code, where they are not those of the dtype."""
        low, high = (self.outer.attributes.get(name) for name in ("quant_min", "quant_max"))
        return (low, high) if isinstance(low, int) and isinstance(high, int) else None

    @property
    def domain(self) -> str:
        """Of the zero points: ``INT``, ``FLOAT`` or ``NONE``; an enum that is pickled by its value."""
        found = self.outer.attributes.get("zero_point_domain")
        value = found.args[0] if isinstance(found, Instance) and found.args else None
        return {1: "INT", 2: "FLOAT"}.get(value, "NONE") if isinstance(value, int) else "NONE"

    def part(self, name: str) -> BinTensor:
        """A tensor of the implementation.

        Raises:
            CannotMigrate: there is none of the name.
        """
        found = self.impl.inner.get(name)
        if found is None:
            raise CannotMigrate(f"its {last_name(self.impl.class_name)} has no {name}")
        return found

    def scale_part(self) -> BinTensor:
        """The scales, as many as there are blocks."""
        found, (down, across) = self.part("scale"), self.groups
        count = 1
        for size in found.shape:
            count *= size
        if count != down * across:
            raise CannotMigrate(f"it has {count} scales for {down * across} blocks")
        return found

    def zero_points(self) -> torch.Tensor | None:
        """The zero points, where one of them is not 0; symmetric files hold zeros, too. Read from the file."""
        found = self.impl.inner.get("zero_point")
        if found is None or not found.shape or 0 in found.shape:
            return None
        values = self.read(found)
        return values if bool((values != 0).any()) else None

    @property
    def zero_part(self) -> BinTensor | None:
        """The zero points."""
        return self.impl.inner.get("zero_point")


def per_row_or_group(block: tuple[int, int], shape: tuple[int, ...]) -> int | None:
    """The group size; ``None`` for a scale per row.

    Raises:
        CannotMigrate: blocks of several rows.
    """
    if block[0] != 1:
        raise CannotMigrate(f"its scales are for blocks of {block[0]} x {block[1]}")
    return None if block[1] == shape[1] else block[1]


def as_values(make: Callable[[Read], torch.Tensor], reason: str) -> Outcome:
    """An outcome that is dequantized."""
    return Outcome(make, None, reason)
