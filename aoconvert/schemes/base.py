"""What a scheme is: values only. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from aoconvert.schemes.table.entry import SchemeEntry


@dataclass(frozen=True)
class Layout:
    """What the stored weights are made for.

    Attributes:
        device: ``any``, or the one device type that can use the packed weights.
        packing: torchao's packing format; ``plain`` is one value after the other.
        min_capability: lowest CUDA compute capability that can use it, ``None`` for no demand.
        requires: what has to be installed to load it, as PEP 508 requirements.
    """

    device: str
    packing: str
    min_capability: tuple[int, int] | None
    requires: tuple[str, ...]


@dataclass(frozen=True)
class RowIndependence:
    """How far the rows of a weight can be quantized apart; blocks of rows, put together, are bit for bit the whole.

    Attributes:
        tile: rows that share scales or are packed together: a block has a multiple of so many. 1: none share anything.
            ``None``: the weight has to be quantized whole.
        shared_scale: all rows share a scale, which follows from their smallest and their largest value; a block needs
            these beside it. Each of stacked experts has its own.
    """

    tile: int | None = 1
    shared_scale: bool = False

    @property
    def by_tiles(self) -> bool:
        """Whether blocks of rows can be quantized without a look at the others."""
        return self.tile is not None and not self.shared_scale

    @property
    def complete(self) -> bool:
        """Whether every row is quantized on its own: only then torchao's arithmetic is compiled."""
        return self == RowIndependence()


@dataclass(frozen=True)
class WeightFormat:
    """What torchao made of a weight with a config: read off one, so that it cannot differ.

    Attributes:
        granularity: what shares one scale: ``per row``, ``per group of 32``, ``per tensor``.
        group_size: ``in_features`` must be a multiple of it; ``None`` where there are no groups.
        activation: what activations become at run time (``int8 per token, dynamic``), ``None`` for weight-only.
        bits: stored bits per weight, without scales and zero points (8 for every intx).
        bytes_per_parameter: of a weight of 4096 rows and about as many columns, scales and padding included.
    """

    granularity: str
    group_size: int | None
    activation: str | None
    bits: float
    bytes_per_parameter: float


@dataclass(frozen=True)
class Scheme:
    """A scheme with its settings: everything that planning, quantizing and the manifest need to know.

    Attributes:
        entry: the catalogue's entry: what holds whatever the settings are.
        config: torchao's config.
        format: what a weight is with these settings.
        layout: what the stored weights are made for.
        rows: how far they can be quantized apart.
        min_torchao: oldest torchao that loads it and computes the right thing.
        notes: what whoever chooses it should know first.
        quantize: makes torchao's tensor of a weight, on any device and on ``meta``: :mod:`aoconvert.schemes.apply`.
        own_blocker: why it cannot take a shape and a dtype, where :mod:`aoconvert.schemes.shapes` does not know.
    """

    entry: SchemeEntry
    config: AOBaseConfig
    format: WeightFormat
    layout: Layout
    rows: RowIndependence
    min_torchao: str
    notes: tuple[str, ...]
    quantize: Callable[[torch.Tensor], torch.Tensor] = field(compare=False)
    own_blocker: Callable[[tuple[int, ...], torch.dtype], str | None] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.entry.name

    @property
    def group_size(self) -> int | None:
        """How many values of a row share a scale; ``None`` where there are no groups."""
        return self.format.group_size

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many dimensions a weight may have: torchao cannot take one expert out of several that share a scale."""
        return tuple(rank for rank in self.entry.ranks if rank == 2 or self.format.granularity != "per tensor")

    @property
    def cpu_only(self) -> bool:
        """Whether torchao quantizes to it on a CPU, whatever other devices there are."""
        return self.layout.device == "cpu"

    def block(self, rows: int) -> int:
        """The largest number of rows, not above ``rows`` where possible, of a block that is cut off."""
        unit = math.lcm(self.rows.tile or 1, self.entry.multiples[0])
        return max(unit, rows - rows % unit)

    @cached_property
    def config_dict(self) -> dict[str, Any]:
        """The config as ``torchao.core.config.config_to_dict`` gives it, for config.json and the manifest."""
        from torchao.core.config import config_to_dict

        found: dict[str, Any] = config_to_dict(self.config)
        return found

    @cached_property
    def key(self) -> str:
        """The same for schemes that make the same of every weight."""
        return json.dumps([self.config_dict, self.layout.device, self.layout.packing], sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key)
