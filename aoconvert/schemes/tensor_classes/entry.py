"""What an entry of the table of torchao's tensor classes says. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol, Value

if TYPE_CHECKING:
    from aoconvert.schemes.int4_parts import Parts


@dataclass(frozen=True)
class PackedLayout:
    """What packed weights are made for.

    Attributes:
        device: the only device type that can use them.
        min_capability: CUDA compute capability.
        note: what to know first.
        packed: the bytes are laid out for the device; otherwise only the product with them needs it.
    """

    device: str
    min_capability: tuple[int, int] | None = None
    note: str | None = None
    packed: bool = True


@dataclass(frozen=True)
class WeightFacts:
    """What a header says of a quantized weight, enough to find its scheme in the catalogue.

    Attributes:
        tensor_class: the class of which today's torchao makes such weights.
        weight_dtype: as the catalogue has it; ``None`` where the rest tells the scheme.
        dynamic: activations are quantized, too.
        granularity: how the catalogue's begins; ``None`` where the rest tells the scheme.
        asymmetric: values have a zero point.
        unlike: what the scheme's name gets, as no torchao of today makes such weights.
    """

    tensor_class: TensorClass
    weight_dtype: str | None = None
    dynamic: bool = False
    granularity: str | None = None
    asymmetric: bool = False
    unlike: str = ""


Within = Mapping[str, BinTensor]
"""A tensor of torchao and those within it, outermost first, by the last component of their class's name."""


@dataclass(frozen=True, kw_only=True)
class TensorClass:
    """A tensor class of torchao, of today or of an older release.

    Where its names are in which release was measured: :mod:`aoconvert.inspection.release_names`. Which names a pickle
    may hold is a fact of files: :mod:`aoconvert.formats.torch_bin.safe_names`.

    Attributes:
        name: the last component of its dotted name.
        layout: the one device that can use it; ``None``: any can.
        describe: a header and what lies within it → facts, or a name that is no scheme of this version; ``None``: not
            known well enough.
        take_apart: a 4-bit weight in groups, and for the CPU its layout → codes, scales and zero points; ``None``:
            torchao's own ``dequantize`` runs everywhere.
        repair: gives values without a scale one, in place, and counts them; ``None``: torchao leaves none without.
        fields: (first release, last release, inner tensors and attributes without ``dtype`` and ``shape``) of
            ``tensor_data_names`` and its like, measured in the released classes.
        strict: attributes were renamed: another release unpickles it and then misses what it needs (measured).
        safetensors_since: the release whose ``torchao.prototype.safetensors`` first took it.
        groups_since: the release that first computes right with groups and with asymmetric activations; those before
            load them without an error (measured).
        row_scales_until: the last release that takes scales of one dimension for one a row; later ones expect two
            (measured: dequantize fails, or mixes rows and columns).
        group_size: values that share a scale, where its format and no config says so.
        packed_in: dtypes of ``qdata`` in which an element is two values.
        zero_inputs_fail: torchao gives activations that are all zero no scale: they become NaN.
        byte_per_value: it keeps a value of any number of bits in a whole byte.
        casting: for the model card: what ``.to(torch.float32)`` does to it.
    """

    name: str
    layout: PackedLayout | None = None
    describe: Callable[[BinTensor, Within], WeightFacts | str | None] | None = None
    take_apart: Callable[[Any, str | None], Parts] | None = None
    repair: Callable[[Any], int] | None = None
    fields: tuple[tuple[str, str, str], ...] = ()
    strict: bool = False
    safetensors_since: str | None = None
    groups_since: str | None = None
    row_scales_until: str | None = None
    group_size: int | None = None
    packed_in: tuple[str, ...] = ()
    zero_inputs_fail: bool = False
    byte_per_value: bool = False
    casting: str | None = None


def is_dynamic(part: BinTensor) -> bool:
    """Whether a tensor says how activations are quantized."""
    return part.attributes.get("act_quant_kwargs") is not None


def symbol(value: Value) -> str:
    """The name of a dtype; empty where it is none."""
    return value.name if isinstance(value, Symbol) else value if isinstance(value, str) else ""


def integer(value: Value) -> str | None:
    """``torch.int4`` and ``torch.uint4`` → ``int4``."""
    match = re.fullmatch(r"(?:torch\.)?u?int(\d)", symbol(value))
    return f"int{match[1]}" if match else None


def granularity(kwargs: Value) -> str | None:
    """Of the activations: the last component of its class's name."""
    found = kwargs.state.get("granularity") if isinstance(kwargs, Instance) else None
    return found.class_name.rpartition(".")[2] if isinstance(found, Instance) else None
