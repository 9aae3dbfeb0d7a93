"""What a scheme is: values only. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig


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
class Int4:
    """How the weights of ``int4wo`` are made: see :mod:`aoconvert.schemes.int4`.

    Attributes:
        group_size: how many values share a scale and a zero point.
        device: ``cuda``, ``cpu``, ``xpu`` or ``plain``.
        algorithm: ``tinygemm`` or ``hqq``.
    """

    group_size: int
    device: str
    algorithm: str


@dataclass(frozen=True)
class Scheme:
    """A scheme with its settings: everything that planning, quantizing and the manifest need to know.

    Attributes:
        name: canonical name.
        config: torchao's config.
        config_dict: the same as ``torchao.core.config.config_to_dict`` gives it, for config.json and the manifest.
        meta_config: a config whose result has the same class, shapes and dtypes, and that also works on the ``meta``
            device (HQQ looks at values, so it does not); equal to ``config`` otherwise.
        tensor_class: torchao's class of a quantized weight.
        weight_dtype: what a weight becomes, such as ``int4``.
        activation: what activations become at run time (``int8 per token, dynamic``), ``None`` for weight-only.
        granularity: what shares one scale: ``per row``, ``per group of 32``, ``per tensor``.
        group_size: ``in_features`` must be a multiple of it; ``None`` where there are no groups.
        unit: blocks of a multiple of so many rows, quantized one by one and put together, are bit for bit the whole;
            1: every row is quantized on its own. ``None``: the weight cannot be cut.
        shared: all rows share a scale, which follows from their smallest and their largest value; a block then needs
            these beside it. Each of stacked experts has its own.
        needs_rows: dies at run time (``torch._int_mm``) in layers that see a single row of input.
        single_values: a row of a single value can be quantized.
        ranks: how many dimensions a weight may have.
        layout: what the stored weights are made for.
        min_torchao: oldest torchao that loads it and computes the right thing.
        summary: one line, when to choose it.
        bits: stored bits a weight, without scales and zero points (8 for every intx).
        notes: what whoever chooses it should know first.
        bytes_per_parameter: of a weight of 4096 rows and about as many columns, scales and padding included.
        dtypes: dtypes that a weight may have before.
        multiples: out_features and in_features must be multiples of these.
        embeddings: rows can be looked up in it, so that the weight of an ``nn.Embedding`` can take it.
        unconfirmed: why nobody can be sure of the packed bytes yet; ``None`` where somebody can.
        source: where the summary comes from.
        int4: for ``int4wo`` how it is packed, which its config does not say for every device; else ``None``.
    """

    name: str
    config: AOBaseConfig
    config_dict: dict[str, Any]
    meta_config: AOBaseConfig
    tensor_class: str
    weight_dtype: str
    activation: str | None
    granularity: str
    group_size: int | None
    unit: int | None
    shared: bool
    needs_rows: bool
    single_values: bool
    ranks: tuple[int, ...]
    layout: Layout
    min_torchao: str
    summary: str
    bits: float
    notes: tuple[str, ...]
    bytes_per_parameter: float
    dtypes: tuple[str, ...]
    multiples: tuple[int, int]
    embeddings: bool
    unconfirmed: str | None
    source: str
    int4: Int4 | None = None

    @property
    def rowwise(self) -> bool:
        """Whether blocks of rows can be quantized without a look at the others."""
        return self.unit is not None and not self.shared

    @property
    def single_rows(self) -> bool:
        """Whether every row is quantized on its own: only then torchao's arithmetic is compiled."""
        return self.unit == 1 and not self.shared

    @property
    def cpu_only(self) -> bool:
        """Whether torchao quantizes to it on a CPU, whatever other devices there are."""
        return self.int4 is not None and self.int4.device == "cpu"

    def block(self, rows: int) -> int:
        """The largest number of rows, not above ``rows`` where possible, of a block that is cut off."""
        unit = math.lcm(self.unit or 1, self.multiples[0])
        return max(unit, rows - rows % unit)

    @cached_property
    def key(self) -> str:
        """The same for schemes that make the same of every weight."""
        return json.dumps([self.config_dict, self.layout.device, self.layout.packing], sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key)
