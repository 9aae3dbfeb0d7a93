"""Schemes with floating-point weights: float8, microscaling (MX), NVFP4."""

from __future__ import annotations

from aoconvert.schemes.table.entry import SchemeEntry
from aoconvert.schemes.tensor_classes.current import FLOAT8 as FLOAT8_TENSOR
from aoconvert.schemes.tensor_classes.current import MX as MX_TENSOR
from aoconvert.schemes.tensor_classes.current import NVFP4 as NVFP4_TENSOR

_QUANTIZATION = "torchao.quantization."
_MX = "torchao.prototype.mx_formats."
_BLACKWELL = (10, 0)
_ADA = (8, 9)
_SWIZZLED_ROWS = 128  # of a tile of scales: torchao's to_blocked
_NVFP4_SCALES = "per group of 16, and per tensor"


def _float8wo(name: str, aliases: tuple[str, ...], dtype: str, summary: str) -> SchemeEntry:
    return SchemeEntry(
        name=name,
        aliases=aliases,
        config=_QUANTIZATION + "Float8WeightOnlyConfig",
        fields=(("weight_dtype", dtype),),
        group_field="granularity",
        tensor_class=FLOAT8_TENSOR,
        weight_dtype=dtype,
        ranks=(2, 3),
        embeddings=True,
        min_torchao="0.13",
        summary=summary,
        source="arXiv:2209.05433 (FP8 Formats for Deep Learning): e4m3 for weights, e5m2 where range counts",
    )


FLOAT8 = (
    # diffusers up to 0.33 took "float8wo" for e5m2; torchao, and diffusers' "float8_weight_only", for e4m3
    _float8wo(
        "float8wo",
        (
            *("fp8wo", "float8_weight_only", "fp8_weight_only"),
            *("float8wo_e4m3", "fp8wo_e4m3", "float8_weight_only_e4m3", "fp8_weight_only_e4m3"),
            *("quanto_float8", "quanto_qfloat8", "quanto_float8_e4m3fn", "quanto_qfloat8_e4m3fn"),
        ),
        "float8_e4m3fn",
        "half the size of bfloat16; coarser steps than int8wo, but small values beside outliers survive",
    ),
    _float8wo(
        "float8wo_e5m2",
        (
            *("fp8wo_e5m2", "float8_weight_only_e5m2", "fp8_weight_only_e5m2"),
            *("quanto_float8_e5m2", "quanto_qfloat8_e5m2"),
        ),
        "float8_e5m2",
        "float8 with more range and half the precision of float8wo: only for weights that need the extra range",
    ),
)


def _dynamic_names(*suffixes: str) -> tuple[str, ...]:
    """Every spelling of float8 with dynamic activations that torchao, diffusers or diffusers-torchao documented."""
    stems = (
        *("float8dq", "fp8dq", "float8da_float8w", "fp8da_fp8w"),
        *("float8_dynamic_activation_float8_weight", "fp8_dynamic_activation_fp8_weight"),
    )
    return tuple(stem + suffix for suffix in suffixes for stem in stems)


def _float8dq(
    name: str, aliases: tuple[str, ...], fields: tuple[tuple[str, str], ...], summary: str, **different: object
) -> SchemeEntry:
    values: dict[str, object] = {
        "config": _QUANTIZATION + "Float8DynamicActivationFloat8WeightConfig",
        "fields": (("weight_dtype", "float8_e4m3fn"), ("packing_format", "plain"), *fields),
        "tensor_class": FLOAT8_TENSOR,
        "weight_dtype": "float8_e4m3fn",
        "activation": "float8_e4m3fn per tensor, dynamic",
        "granularity": "per tensor",
        "multiples": (16, 16),
        "embeddings": True,
        "min_capability": _ADA,
        "min_torchao": "0.13",
        **different,
    }
    return SchemeEntry(name=name, aliases=aliases, summary=summary, **values)  # type: ignore[arg-type]


FLOAT8_DYNAMIC = (
    _float8dq(
        "float8dq",
        (
            *(name for name in _dynamic_names("", "_tensor", "_e4m3", "_e4m3_tensor") if name != "float8dq"),
            *("float8_dynamic", "fp8_dynamic"),
        ),
        (("granularity", "per_tensor"),),
        "multiplies in float8, with one scale per weight: for speed on Ada, Hopper and newer GPUs; see float8dq_row",
        source="diffusers-torchao's README: fp8dq on an H100; torchao's default granularity",
    ),
    _float8dq(
        "float8dq_row",
        (*(name for name in _dynamic_names("_row", "row", "_e4m3_row") if name != "float8dq_row"),),
        (("granularity", "per_row"),),
        "multiplies in float8, with one scale per row and token: the fastest on an H100; outliers cost less than in "
        "float8dq",
        source="diffusers-torchao's README: fp8dqrow, 2.966 s for Flux.1-dev on an H100",
        dtypes=("bfloat16",),
        activation="float8_e4m3fn per token, dynamic",
        granularity="per row",
        ranks=(2, 3),
    ),
    _float8dq(
        "float8dq_block",
        tuple(name for name in _dynamic_names("_block", "_blockwise", "_e4m3_block") if name != "float8dq_block"),
        (("granularity", "per_block:1x128,per_block:128x128"),),
        "float8 in blocks of 128 x 128: for outliers in few columns; its kernel needs Triton",
        source="torchao: _granularity_is_a_1_128_w_128_128; arXiv:2412.19437 (DeepSeek-V3), section 3.3.2",
        activation="float8_e4m3fn per group of 128, dynamic",
        granularity="per block of 128x128",
        ranks=(2, 3),
        multiples=(128, 128),
        tile=128,
        device="cuda",
        min_torchao="0.15",
    ),
)


def _mx(name: str, aliases: tuple[str, ...], dtype: str, label: str, *, emulated: bool, summary: str) -> SchemeEntry:
    kernel = (("kernel_preference", "emulated"),) if emulated else ()
    return SchemeEntry(
        name=name,
        aliases=aliases,
        config=_MX + "MXDynamicActivationMXWeightConfig",
        fields=(("weight_dtype", dtype), ("activation_dtype", dtype), ("block_size", "32"), *kernel),
        tensor_class=MX_TENSOR,
        weight_dtype=label,
        activation=f"{label} per group of 32, dynamic",
        granularity="per group of 32",
        bytes_per_parameter=0.53 if label == "float4_e2m1" else 1.03,
        dtypes=("bfloat16",),
        tile=_SWIZZLED_ROWS,
        packing="swizzled",
        device="any" if emulated else "cuda",
        min_capability=None if emulated else _BLACKWELL,
        min_torchao="0.16",
        device_block_bytes=26 if label.startswith("float8") else 38,
        summary=summary,
        source="OCP Microscaling Formats 1.0; torchao's docstring of MXDynamicActivationMXWeightConfig",
    )


_EMULATED = "torchao emulates it with bfloat16 products: for study, not for speed"

MICROSCALING = (
    _mx(
        "mxfp8",
        ("mx_fp8", "mxfp8_e4m3", "mxfp8_dynamic", "mxfp8dq", "mxfp8_dynamic_activation_mxfp8_weight"),
        "float8_e4m3fn",
        "float8_e4m3fn",
        emulated=False,
        summary="float8 with one power-of-two scale per 32 values: for Blackwell GPUs",
    ),
    _mx(
        "mxfp8_e5m2",
        ("mx_fp8_e5m2",),
        "float8_e5m2",
        "float8_e5m2",
        emulated=True,
        summary=f"mxfp8 with more range and less precision; {_EMULATED}",
    ),
    _mx(
        "mxfp4",
        ("mx_fp4", "mxfp4_e2m1", "mxfp4_dynamic", "mxfp4dq", "mxfp4_dynamic_activation_mxfp4_weight"),
        "float4_e2m1fn_x2",
        "float4_e2m1",
        emulated=False,
        summary="4-bit floats with one power-of-two scale per 32 values: a quarter of bfloat16, for Blackwell GPUs; "
        "nvfp4 has less error",
    ),
    *(
        _mx(
            f"mxfp6_{kind}",
            (f"mx_fp6_{kind}",),
            f"fp6_{kind}",
            f"float6_{kind}",
            emulated=True,
            summary=f"6-bit floats, one per byte; {_EMULATED}",
        )
        for kind in ("e2m3", "e3m2")
    ),
    SchemeEntry(
        name="nvfp4",
        aliases=(
            *("nvfp4dq", "nv_fp4", "nvfp4_dynamic", "nvfp4_dynamic_activation_nvfp4_weight"),
            *("NVFP4DynamicActivationNVFP4WeightConfig", "NVFP4InferenceConfig"),
        ),
        config=_MX + "NVFP4DynamicActivationNVFP4WeightConfig",
        fields=(("step", "none"),),
        # torchao's default needs the package mslk at run time
        defaults=(("use_triton_kernel", "false"),),
        tensor_class=NVFP4_TENSOR,
        weight_dtype="float4_e2m1",
        activation="float4_e2m1 per group of 16, dynamic",
        granularity=_NVFP4_SCALES,
        bytes_per_parameter=0.56,
        ranks=(2, 3),
        dtypes=("bfloat16", "float32"),
        multiples=(16, 16),
        tile=_SWIZZLED_ROWS,
        packing="swizzled",
        device="cuda",
        min_capability=_BLACKWELL,
        device_block_bytes=42,
        summary="multiplies in 4-bit floats, with one float8 scale per 16 values: a quarter of bfloat16, for "
        "Blackwell GPUs",
        source="torchao's docstring of NVFP4DynamicActivationNVFP4WeightConfig",
    ),
    SchemeEntry(
        name="nvfp4wo",
        aliases=("nvfp4_weight_only", "NVFP4WeightOnlyConfig"),
        config=_MX + "NVFP4WeightOnlyConfig",
        tensor_class=NVFP4_TENSOR,
        weight_dtype="float4_e2m1",
        granularity=_NVFP4_SCALES,
        bytes_per_parameter=0.56,
        dtypes=("bfloat16", "float32"),
        multiples=(16, 16),
        tile=_SWIZZLED_ROWS,
        packing="swizzled",
        device_block_bytes=42,
        summary="a quarter of bfloat16 that runs on any device: 4-bit floats, dequantized before every product",
        source="torchao's docstring of NVFP4WeightOnlyConfig; run on a CPU here",
    ),
)
