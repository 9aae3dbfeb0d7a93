"""The catalogue: one entry a scheme. To add a scheme, add an entry here and a row to ``tests/schemes``.

Everything that depends on the settings (granularity, group size, stored bits) is not here: :mod:`.resolve` reads it
off a weight that torchao quantized.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchemeEntry:
    """A scheme as the catalogue lists it.

    Attributes:
        name: the canonical name.
        aliases: other names; names are compared without regard to case and to ``-`` or ``_``.
        config: dotted name of the torchao config class.
        fields: what the name fixes, as ``(field, value)`` in the syntax of ``--set``; settings cannot change these.
        group_field: the config field that takes a group size as ``PerGroup``, ``None`` where torchao has no groups.
        tensor_class: torchao's class of a quantized weight.
        weight_dtype: what a weight becomes.
        ranks: how many dimensions a weight may have (3 for the stacked experts of a mixture of experts).
        needs_rows: dies at run time in layers that see a single row of input.
        packing: torchao's packing format.
        requires: what has to be installed to quantize, as PEP 508 requirements.
        min_torchao: oldest torchao that loads it, with default settings, and runs it.
        summary: one line, when to choose it.
    """

    name: str
    aliases: tuple[str, ...]
    config: str
    fields: tuple[tuple[str, str], ...]
    group_field: str | None
    tensor_class: str
    weight_dtype: str
    ranks: tuple[int, ...]
    needs_rows: bool
    packing: str
    requires: tuple[str, ...]
    min_torchao: str
    summary: str

    @property
    def config_class(self) -> str:
        """The name of the torchao config class, without its module."""
        return self.config.rpartition(".")[2]


@dataclass(frozen=True)
class Family:
    """Names that stand for several schemes; one setting says which.

    Attributes:
        names: the names.
        field: the setting that chooses.
        members: the setting's value -> the scheme's canonical name.
        default: the scheme when the setting is not given; ``None``: it must be given.
    """

    names: tuple[str, ...]
    field: str
    members: tuple[tuple[str, str], ...]
    default: str | None


@dataclass(frozen=True)
class Missing:
    """A well-known name that is no scheme here.

    Attributes:
        pattern: regular expression for the whole normalized name.
        reason: why, in a few words.
        nearest: what to take instead.
    """

    pattern: str
    reason: str
    nearest: str


_TORCHAO = ("torchao>=0.18",)
_QUANTIZATION = "torchao.quantization."
_UNPACKED = ("intx_packing_format", "unpacked_to_int8")


def _float8wo(name: str, aliases: tuple[str, ...], dtype: str, summary: str) -> SchemeEntry:
    return SchemeEntry(
        name=name,
        aliases=aliases,
        config=_QUANTIZATION + "Float8WeightOnlyConfig",
        fields=(("weight_dtype", dtype),),
        group_field="granularity",
        tensor_class="Float8Tensor",
        weight_dtype=dtype,
        ranks=(2, 3),
        needs_rows=False,
        packing="plain",
        requires=_TORCHAO,
        min_torchao="0.13",
        summary=summary,
    )


def _intxwo(bits: int) -> SchemeEntry:
    # int4wo and int8wo are other schemes: packed int4 and Int8WeightOnlyConfig
    short = () if bits in (4, 8) else (f"int{bits}wo", f"int{bits}_weight_only")
    purpose = (
        "8-bit values with scales in the weight's dtype, for export to ExecuTorch; int8wo is the usual choice"
        if bits == 8
        else f"{bits}-bit values, one in a byte: to study {bits} bits or to export them, not to save space"
    )
    return SchemeEntry(
        name=f"intx{bits}wo",
        aliases=(f"intx{bits}", f"intx{bits}_weight_only", *short),
        config=_QUANTIZATION + "IntxWeightOnlyConfig",
        fields=(("weight_dtype", f"int{bits}"), _UNPACKED),
        group_field="granularity",
        tensor_class="IntxUnpackedToInt8Tensor",
        weight_dtype=f"int{bits}",
        ranks=(2,),
        needs_rows=False,
        packing="unpacked_to_int8",
        requires=_TORCHAO,
        min_torchao="0.14.1",
        summary=purpose,
    )


_CATALOGUE = (
    SchemeEntry(
        name="int8wo",
        aliases=("int8_weight_only", "Int8WeightOnlyConfig"),
        config=_QUANTIZATION + "Int8WeightOnlyConfig",
        fields=(),
        group_field="granularity",
        tensor_class="Int8Tensor",
        weight_dtype="int8",
        ranks=(2, 3),
        needs_rows=False,
        packing="plain",
        requires=_TORCHAO,
        min_torchao="0.15",
        summary="the safe default: half the size of bfloat16, little error, any device",
    ),
    SchemeEntry(
        name="int8dq",
        aliases=(
            "int8_dynamic",
            "int8_dynamic_activation_int8_weight",
            "int8da_int8w",
            "Int8DynamicActivationInt8WeightConfig",
        ),
        config=_QUANTIZATION + "Int8DynamicActivationInt8WeightConfig",
        fields=(),
        group_field=None,
        tensor_class="Int8Tensor",
        weight_dtype="int8",
        ranks=(2, 3),
        needs_rows=True,
        packing="plain",
        requires=_TORCHAO,
        min_torchao="0.15",
        summary="multiplies in int8: for speed under torch.compile with many tokens; costs more accuracy than int8wo",
    ),
    # diffusers up to 0.33 took "float8wo" for e5m2; torchao, and diffusers' "float8_weight_only", for e4m3
    _float8wo(
        "float8wo",
        (
            "fp8wo",
            "float8_weight_only",
            "fp8_weight_only",
            "float8wo_e4m3",
            "fp8wo_e4m3",
            "float8_weight_only_e4m3",
            "fp8_weight_only_e4m3",
        ),
        "float8_e4m3fn",
        "half the size of bfloat16; coarser steps than int8wo, but small values beside outliers survive",
    ),
    _float8wo(
        "float8wo_e5m2",
        ("fp8wo_e5m2", "float8_weight_only_e5m2", "fp8_weight_only_e5m2"),
        "float8_e5m2",
        "float8 with more range and half the precision of float8wo: only for weights that need the range",
    ),
    SchemeEntry(
        name="int4dq",
        aliases=(
            "int8_dynamic_activation_int4_weight",
            "int8da_int4w",
            "8da4w",
            "Int8DynamicActivationInt4WeightConfig",  # torchao's name for it before Intx
        ),
        config=_QUANTIZATION + "Int8DynamicActivationIntxWeightConfig",
        fields=(("weight_dtype", "int4"), _UNPACKED),
        group_field="weight_granularity",
        tensor_class="IntxUnpackedToInt8Tensor",
        weight_dtype="int4",
        ranks=(2,),
        needs_rows=False,
        packing="unpacked_to_int8",
        requires=_TORCHAO,
        min_torchao="0.14.1",
        summary="4-bit values, one in a byte, with int8 activations: for export to ExecuTorch, not to save space",
    ),
    *(_intxwo(bits) for bits in range(1, 9)),
)

FAMILIES = (
    Family(
        names=("intx", "intxwo", "intx_weight_only", "IntxWeightOnlyConfig"),
        field="weight_dtype",
        members=tuple((f"int{bits}", f"intx{bits}wo") for bits in range(1, 9)),
        default=None,
    ),
    Family(
        names=("int8_dynamic_activation_intx_weight", "Int8DynamicActivationIntxWeightConfig"),
        field="weight_dtype",
        members=(("int4", "int4dq"),),
        default=None,
    ),
    Family(
        names=("Float8WeightOnlyConfig",),
        field="weight_dtype",
        members=(("float8_e4m3fn", "float8wo"), ("float8_e5m2", "float8wo_e5m2")),
        default="float8wo",
    ),
)

_NOT_YET = "not in this version of aoconvert"
_GONE = "gone from torchao 0.18"
MISSING = (
    Missing(
        r"int4wo(_?\d+)?|int4_weight_only|int4weightonlyconfig",
        f"{_NOT_YET}: packed int4 depends on the device that loads it",
        "intx4wo (4-bit values, one in a byte), or int8wo for the same size and less error",
    ),
    Missing(
        r"(float8|fp8)(dq|_?dynamic_?activation|_?static_?activation|da_).*",
        f"{_NOT_YET}: float8 activations need a GPU of capability 8.9",
        "float8wo (the same weights, activations untouched)",
    ),
    Missing(r"(fp[1-7]|float[3-7])_e\d+m\d+|fpx.*|fp6.*", _GONE, "float8wo, or intx4wo to intx7wo"),
    Missing(r"uint([1-7])(wo|_weight_only)", _GONE, r"intx\1wo with --set mapping_type=ASYMMETRIC"),
    Missing(r"uintx.*|gemlite.*", _GONE, "intx1wo to intx7wo with --set mapping_type=ASYMMETRIC"),
    Missing(r"auto_?quant.*", _GONE, "int8wo; int8dq where speed under torch.compile counts"),
    Missing(
        r"sparsify|.*marlin.*|.*semi_?sparse.*",
        f"{_NOT_YET}: torchao 0.18 has no int4 or int8 2:4 sparse weights",
        "int8dq",
    ),
    Missing(r"nf4.*", _NOT_YET, "intx4wo (4-bit values, one in a byte), or int8wo"),
    Missing(r"mx_?(fp|int|dynamic).*|nv_?fp4.*", f"{_NOT_YET}: made for GPUs of capability 10.0", "float8wo"),
)


def catalogue() -> tuple[SchemeEntry, ...]:
    """Every scheme of this version, most used first. Imports no torch."""
    return _CATALOGUE
