"""The classes of torchao 0.18 that are known in detail. Imports no torch.

Sources: torchao's classes; for layouts ``get_device_capability()[0] >= 8`` in int4_tile_packed_to_4d_tensor and the
device asserts of float8_opaque_tensor. Where torchao asserts no capability, none is claimed. For safetensors, and where
it fails on what a newer release writes: Int8Tensor by 0.18 was read in 0.16 and 0.17.
"""

from __future__ import annotations

from aoconvert.formats.torch_bin.contents import BinTensor, Symbol
from aoconvert.schemes.int4_parts import of_opaque, of_plain, of_plain_int32, of_tiles
from aoconvert.schemes.repair import repair_float8, repair_nvfp4
from aoconvert.schemes.tensor_classes.entry import (
    PackedLayout,
    TensorClass,
    WeightFacts,
    Within,
    granularity,
    integer,
    is_dynamic,
    symbol,
)

CUDA_8 = PackedLayout("cuda", (8, 0))
ONE_MACHINE = (
    "the packing depends on the machine that packed it (AVX512, AVX2 or neither), which the file does not record"
)
_ELEMENTS = {
    "float8_e4m3": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float4_e2m1": "float4_e2m1",
    "fp6_e2m3": "float6_e2m3",
    "fp6_e3m2": "float6_e3m2",
}


def _int8(part: BinTensor, within: Within) -> WeightFacts:
    return WeightFacts(INT8, dynamic=is_dynamic(part))


def _intx(part: BinTensor, within: Within) -> WeightFacts | None:
    dtype = integer(part.attributes.get("target_dtype"))
    dynamic = part.attributes.get("activation_quantization") is not None
    return WeightFacts(INTX, dtype, dynamic) if dtype else None


def describe_float8(part: BinTensor, within: Within) -> WeightFacts | None:
    """Of a class that keeps values in ``qdata``."""
    data, kwargs = part.inner.get("qdata"), part.attributes.get("act_quant_kwargs")
    return float8(data.dtype if data else None, kwargs is not None, granularity(kwargs))


def float8(dtype: str | None, dynamic: bool, granularity: str | None = None) -> WeightFacts | None:
    """Of weights in this dtype; ``granularity`` is the class of the activations'."""
    if dtype is None or not dtype.startswith("float8"):
        return None
    if not dynamic:
        return WeightFacts(FLOAT8, "float8_e5m2" if "e5m2" in dtype else "float8_e4m3fn")
    known = {"PerRow": "per row", "PerBlock": "per block"}
    return WeightFacts(FLOAT8, dynamic=True, granularity=known.get(granularity or "", "per tensor"))


def describe_int4(part: BinTensor, within: Within) -> WeightFacts:
    """Of a class for 4-bit weights in groups alone."""
    return WeightFacts(INT4_OPAQUE)


def _int4_plain(part: BinTensor, within: Within) -> WeightFacts | str:
    if part.attributes.get("activation_dtype") == Symbol("torch.float8_e4m3fn"):
        return "float8dq_int4"
    return WeightFacts(INT4_PLAIN)


def _nvfp4(part: BinTensor, within: Within) -> WeightFacts:
    return WeightFacts(NVFP4, dynamic=is_dynamic(part))


def _mx(part: BinTensor, within: Within) -> WeightFacts | str:
    """Today's torchao multiplies with activations in the same dtype; what older ones left alone is marked ``wo``."""
    element = symbol(part.attributes.get("elem_dtype", part.attributes.get("_elem_dtype")))
    found = next((dtype for text, dtype in _ELEMENTS.items() if text in element), None)
    unlike = "" if is_dynamic(part) else "wo"
    return WeightFacts(MX, found, dynamic=True, unlike=unlike) if found else f"mx{unlike}"


_INT8_016 = "qdata scale block_size act_quant_kwargs"
_INT8_017 = "qdata scale zero_point block_size act_quant_kwargs act_quant_scale act_quant_zero_point act_pre_scale"
INT8 = TensorClass(
    name="Int8Tensor",
    describe=_int8,
    fields=(
        ("0.15.0", "0.15.0", _INT8_016),
        ("0.16.0", "0.16.0", f"{_INT8_016} act_quant_scale act_pre_scale"),
        ("0.17.0", "0.17.0", _INT8_017),
        ("0.18.0", "0.18.0", f"{_INT8_017} reduce_range"),
    ),
    safetensors_since="0.16.0",
    groups_since="0.17",
    casting="`.to(torch.float32)` silently leaves the quantized weights in their dtype.",
)
FLOAT8 = TensorClass(
    name="Float8Tensor",
    describe=describe_float8,
    repair=repair_float8,
    fields=(
        (
            *("0.13.0", "0.13.0"),
            "qdata scale block_size mm_config hp_value_lb hp_value_ub act_quant_kwargs kernel_preference",
        ),
        ("0.14.1", "0.18.0", "qdata scale block_size mm_config act_quant_kwargs kernel_preference"),
    ),
    safetensors_since="0.15.0",
    zero_inputs_fail=True,
    casting="after `.to(torch.float32)` the quantized weights keep their dtype, and a forward pass fails.",
)
INTX = TensorClass(
    name="IntxUnpackedToInt8Tensor",
    describe=_intx,
    safetensors_since="0.15.0",
    byte_per_value=True,
)
INT4_TILES = TensorClass(
    name="Int4TilePackedTo4dTensor",
    layout=CUDA_8,
    describe=describe_int4,
    take_apart=of_tiles,
    safetensors_since="0.15.0",
)
INT4_OPAQUE = TensorClass(
    name="Int4OpaqueTensor",
    layout=PackedLayout("cpu", note=ONE_MACHINE),
    describe=describe_int4,
    take_apart=of_opaque,
)
INT4_PLAIN_INT32 = TensorClass(
    name="Int4PlainInt32Tensor",
    layout=PackedLayout("xpu", note="for XPU, or NPU"),
    describe=describe_int4,
    take_apart=of_plain_int32,
    safetensors_since="0.16.0",
)
INT4_PLAIN = TensorClass(
    name="Int4Tensor",
    layout=PackedLayout("cuda", note="torchao 0.18 needs the package mslk to run it"),
    describe=_int4_plain,
    take_apart=of_plain,
    fields=(
        ("0.13.0", "0.13.0", "qdata scale zero_point block_size"),
        ("0.14.1", "0.16.0", "qdata scale zero_point act_pre_scale block_size"),
        ("0.17.0", "0.18.0", "qdata scale zero_point act_pre_scale block_size activation_dtype"),
    ),
    safetensors_since="0.15.0",
    packed_in=("int8", "uint8"),
)
MX = TensorClass(
    name="MXTensor",
    describe=_mx,
    fields=(
        (
            *("0.13.0", "0.14.1"),
            "qdata _scale_e8m0 _elem_dtype _block_size _orig_dtype _gemm_kernel_choice _pack_fp6 act_quant_kwargs",
        ),
        (
            *("0.15.0", "0.15.0"),
            "qdata scale _elem_dtype block_size _orig_dtype kernel_preference act_quant_kwargs _is_swizzled_scales",
        ),
        (
            *("0.16.0", "0.18.0"),
            "qdata scale elem_dtype block_size orig_dtype kernel_preference act_quant_kwargs is_swizzled_scales",
        ),
    ),
    strict=True,
    safetensors_since="0.17.0",
    packed_in=("uint8", "float4_e2m1fn_x2"),
)
NVFP4 = TensorClass(
    name="NVFP4Tensor",
    describe=_nvfp4,
    repair=repair_nvfp4,
    fields=(
        (
            *("0.13.0", "0.14.1"),
            "qdata _scale_e4m3 _per_tensor_scale _act_per_tensor_scale _block_size _orig_dtype _is_swizzled_scales "
            "use_triton_kernel act_quant_kwargs",
        ),
        (
            *("0.15.0", "0.15.0"),
            "qdata scale per_tensor_scale act_per_tensor_scale block_size _orig_dtype _is_swizzled_scales "
            "use_triton_kernel act_quant_kwargs",
        ),
        (
            *("0.16.0", "0.18.0"),
            "qdata scale per_tensor_scale act_per_tensor_scale block_size orig_dtype is_swizzled_scales "
            "use_triton_kernel act_quant_kwargs",
        ),
    ),
    strict=True,
    safetensors_since="0.17.0",
    group_size=16,
    packed_in=("uint8", "float4_e2m1fn_x2"),
)

CURRENT = (
    INT8,
    FLOAT8,
    INTX,
    INT4_TILES,
    INT4_OPAQUE,
    INT4_PLAIN_INT32,
    INT4_PLAIN,
    MX,
    NVFP4,
    TensorClass(name="Int4PreshuffledTensor", layout=PackedLayout("cuda"), describe=describe_int4),
    TensorClass(name="Float8OpaqueTensor", layout=PackedLayout("cpu")),
    TensorClass(name="Float8TrainingTensor", describe=describe_float8),
    TensorClass(name="NF4Tensor", describe=lambda part, within: "nf4"),
)
