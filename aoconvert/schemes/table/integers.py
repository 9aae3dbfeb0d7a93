"""Schemes with integer weights."""

from __future__ import annotations

import dataclasses

from aoconvert.schemes import cpu_packing, tile_packing
from aoconvert.schemes.table.entry import SchemeEntry
from aoconvert.schemes.tensor_classes.current import INT4_OPAQUE, INT4_PLAIN, INT4_PLAIN_INT32, INT4_TILES
from aoconvert.schemes.tensor_classes.current import INT8 as INT8_TENSOR
from aoconvert.schemes.tensor_classes.current import INTX as INTX_TENSOR

_QUANTIZATION = "torchao.quantization."
_UNPACKED = ("intx_packing_format", "unpacked_to_int8")
_EXPORT = "torchao's docstring of IntxPackingFormat; facts, ecosystem: file sizes"
INT4_GROUPS = (32, 64, 128, 256)

INT8 = (
    SchemeEntry(
        name="int8wo",
        aliases=("int8_weight_only", "Int8WeightOnlyConfig", "quanto_int8", "quanto_qint8"),
        config=_QUANTIZATION + "Int8WeightOnlyConfig",
        group_field="granularity",
        tensor_class=INT8_TENSOR,
        weight_dtype="int8",
        ranks=(2, 3),
        embeddings=True,
        min_torchao="0.15",
        summary="the safe default: half the size of bfloat16, little error, any device",
        source="diffusers-torchao's README: best results with int8 and fp8",
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
        tensor_class=INT8_TENSOR,
        weight_dtype="int8",
        activation="int8 per token, dynamic",
        ranks=(2, 3),
        fails_on_single_row=True,
        embeddings=True,
        min_torchao="0.15",
        summary="multiplies in int8: for speed under torch.compile with many tokens; costs more accuracy than int8wo",
        source="diffusers-torchao's README: fastest of the int8 schemes when compiled, slowest when not",
    ),
)

_INT4 = SchemeEntry(
    name="int4wo",
    aliases=("int4_weight_only", "Int4WeightOnlyConfig", "PrototypeInt4WeightOnlyConfig"),
    config=_QUANTIZATION + "Int4WeightOnlyConfig",
    group_field="group_size",
    tensor_class=INT4_OPAQUE,
    weight_dtype="int4",
    granularity="per group of 128",
    bytes_per_parameter=0.53,
    packing="opaque",
    device="cpu",
    layout_device="cpu",
    tile=cpu_packing.BLOCK_ROWS,
    min_torchao="0.17",
    hqq_bytes=38,  # in more steps than the others
    summary="a quarter of bfloat16, for the kind of device that --layout-device names; more error than int8wo",
    source="torchao's docstring of Int4WeightOnlyConfig; diffusers-torchao's README: smallest, not fast in batches",
)

_UNCONFIRMED = "packed by aoconvert's own code; not yet compared with the bytes that {} writes"

# layout device -> entry; what the device can use is in aoconvert.schemes.int4
INT4 = {
    "cpu": _INT4,
    "cuda": dataclasses.replace(
        _INT4,
        tensor_class=INT4_TILES,
        packing="tile_packed_to_4d",
        device="cuda",
        layout_device="cuda",
        tile=tile_packing.ROWS,
        min_torchao="0.18",
        min_capability=(8, 0),
        dtypes=("bfloat16",),
        unconfirmed=_UNCONFIRMED.format("a GPU"),
    ),
    "xpu": dataclasses.replace(
        _INT4,
        tensor_class=INT4_PLAIN_INT32,
        packing="plain_int32",
        device="xpu",
        layout_device="xpu",
        tile=1,
        min_torchao="0.18",
        unconfirmed=_UNCONFIRMED.format("an Intel GPU"),
        dtypes=("bfloat16", "float16"),
    ),
    "plain": dataclasses.replace(
        _INT4,
        tensor_class=INT4_PLAIN,
        packing="plain",
        device="cuda",
        layout_device="plain",
        tile=1,
        min_torchao="0.18",
        requires=("torchao>=0.18", "mslk>=1.0.0"),
    ),
}


def _intxwo(bits: int) -> SchemeEntry:
    # int4wo and int8wo are other schemes: packed int4 and Int8WeightOnlyConfig
    short = () if bits in (4, 8) else (f"int{bits}wo", f"int{bits}_weight_only")
    purpose = (
        "8-bit values with scales in the weight's dtype, for export to ExecuTorch; int8wo is the usual choice"
        if bits == 8
        else f"{bits}-bit values, one per byte: for study or export, not to save space"
    )
    return SchemeEntry(
        name=f"intx{bits}wo",
        aliases=(f"intx{bits}", f"intx{bits}_weight_only", *short),
        config=_QUANTIZATION + "IntxWeightOnlyConfig",
        fields=(("weight_dtype", f"int{bits}"), _UNPACKED),
        group_field="granularity",
        tensor_class=INTX_TENSOR,
        weight_dtype=f"int{bits}",
        embeddings=True,
        packing="unpacked_to_int8",
        min_torchao="0.14.1",
        summary=purpose,
        source=_EXPORT,
    )


def _uintxwo(bits: int) -> SchemeEntry:
    return SchemeEntry(
        name=f"uint{bits}wo",
        aliases=(f"uint{bits}_weight_only", f"uintx{bits}wo", f"uintx{bits}_weight_only"),
        config=_QUANTIZATION + "IntxWeightOnlyConfig",
        fields=(("weight_dtype", f"int{bits}"), ("mapping_type", "asymmetric"), _UNPACKED),
        group_field="granularity",
        tensor_class=INTX_TENSOR,
        weight_dtype=f"int{bits}",
        embeddings=True,
        packing="unpacked_to_int8",
        min_torchao="0.14.1",
        summary=f"intx{bits}wo with a zero point: less error for rows not centred on 0; also one byte per value",
        source="facts, legacy-checkpoints: what torchao's UintxTensor maps to; its packed form is gone since 0.17",
    )


def _int8dq_intx(bits: int) -> SchemeEntry:
    int4 = (
        "int8_dynamic_activation_int4_weight",
        "int8da_int4w",
        "8da4w",
        "Int8DynamicActivationInt4WeightConfig",  # torchao's name for it before Intx
        "int8dq_int4",
    )
    purpose = (
        "4-bit values, one per byte, with int8 activations: for export to ExecuTorch, not to save space"
        if bits == 4
        else f"{bits}-bit values, one per byte, with int8 activations: for study or export, not to save space"
    )
    return SchemeEntry(
        name="int4dq" if bits == 4 else f"int8dq_int{bits}",
        aliases=(
            f"int8dq_intx{bits}",
            f"8da{bits}w",
            f"int8_dynamic_activation_intx{bits}_weight",
            *((f"int8_dynamic_activation_int{bits}_weight",) if bits < 4 or 4 < bits < 8 else ()),
        )
        if bits != 4
        else (*int4, "int8dq_intx4"),
        config=_QUANTIZATION + "Int8DynamicActivationIntxWeightConfig",
        fields=(("weight_dtype", f"int{bits}"), _UNPACKED),
        group_field="weight_granularity",
        tensor_class=INTX_TENSOR,
        weight_dtype=f"int{bits}",
        activation="int8 per token, asymmetric, dynamic",
        granularity="per group of 32",
        bytes_per_parameter=1.09,
        embeddings=True,
        packing="unpacked_to_int8",
        min_torchao="0.14.1",
        summary=purpose,
        source=_EXPORT,
    )


INTX = (
    _int8dq_intx(4),
    *(_intxwo(bits) for bits in range(1, 9)),
    *(_uintxwo(bits) for bits in range(1, 9)),
    *(_int8dq_intx(bits) for bits in range(1, 9) if bits != 4),
)
