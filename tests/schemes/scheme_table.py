"""What every scheme must be: one row a scheme, and the variants that the property tests run over."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from aoconvert import schemes


@dataclass(frozen=True)
class Row:
    scheme: str
    names: tuple[str, ...]
    config: str
    tensor_class: str
    weight_dtype: str
    activation: str | None
    granularity: str
    min_torchao: str
    ranks: tuple[int, ...] = (2,)
    needs_rows: bool = False
    bits: float = 8.0
    bytes: float = 1.0  # of one parameter, to 2 digits
    device: str = "any"
    capability: tuple[int, int] | None = None
    embeddings: bool = False


INTX_TENSOR = "IntxUnpackedToInt8Tensor"
INT8_TOKENS = "int8 per token, asymmetric, dynamic"


def _intx(bits: int) -> Row:
    short = () if bits in (4, 8) else (f"int{bits}wo", f"int{bits}-weight-only")
    names = (f"intx{bits}", f"INTX{bits}_WEIGHT_ONLY", *short)
    return Row(
        f"intx{bits}wo",
        names,
        "IntxWeightOnlyConfig",
        INTX_TENSOR,
        f"int{bits}",
        None,
        "per row",
        "0.14.1",
        embeddings=True,
    )


def _uint(bits: int) -> Row:
    names = (f"UINT{bits}WO", f"uint{bits}-weight-only", f"uintx{bits}wo")
    return Row(
        f"uint{bits}wo",
        names,
        "IntxWeightOnlyConfig",
        INTX_TENSOR,
        f"int{bits}",
        None,
        "per row",
        "0.14.1",
        embeddings=True,
    )


def _int8dq(bits: int) -> Row:
    return Row(
        "int4dq" if bits == 4 else f"int8dq_int{bits}",
        (f"int8dq-intx{bits}", f"int8dq-int{bits}", f"8da{bits}w"),
        "Int8DynamicActivationIntxWeightConfig",
        INTX_TENSOR,
        f"int{bits}",
        INT8_TOKENS,
        "per group of 32",
        "0.14.1",
        bytes=1.09,
        embeddings=True,
    )


def _float8(scheme: str, names: tuple[str, ...], dtype: str) -> Row:
    config = "Float8WeightOnlyConfig"
    return Row(scheme, names, config, "Float8Tensor", dtype, None, "per row", "0.13", (2, 3), embeddings=True)


def _float8dq(scheme: str, names: tuple[str, ...], granularity: str, per: str, **more: Any) -> Row:
    return Row(
        scheme,
        names,
        "Float8DynamicActivationFloat8WeightConfig",
        "Float8Tensor",
        "float8_e4m3fn",
        f"float8_e4m3fn {per}, dynamic",
        granularity,
        **{"min_torchao": "0.13", "embeddings": True, "capability": (8, 9), **more},
    )


def _mx(scheme: str, names: tuple[str, ...], dtype: str, **more: Any) -> Row:
    values = {"bytes": 1.03, "min_torchao": "0.16", **more}
    config, dynamic = "MXDynamicActivationMXWeightConfig", f"{dtype} per group of 32, dynamic"
    return Row(scheme, names, config, "MXTensor", dtype, dynamic, "per group of 32", **values)


def _nvfp4(scheme: str, names: tuple[str, ...], config: str, activation: str | None, **more: Any) -> Row:
    scales = "per group of 16, and per tensor"
    return Row(
        scheme, names, config, "NVFP4Tensor", "float4_e2m1", activation, scales, "0.18", bits=4.0, bytes=0.56, **more
    )


ROWS = (
    Row(
        "int8wo",
        ("INT8WO", "int8_weight_only", "int8-weight-only", "Int8WeightOnlyConfig", "quanto-int8", "quanto-qint8"),
        "Int8WeightOnlyConfig",
        "Int8Tensor",
        "int8",
        None,
        "per row",
        "0.15",
        (2, 3),
        embeddings=True,
    ),
    Row(
        "int8dq",
        (
            "int8_dynamic",
            "int8_dynamic_activation_int8_weight",
            "int8-dynamic-activation-int8-weight",
            "Int8DynamicActivationInt8WeightConfig",
        ),
        "Int8DynamicActivationInt8WeightConfig",
        "Int8Tensor",
        "int8",
        "int8 per token, dynamic",
        "per row",
        "0.15",
        (2, 3),
        needs_rows=True,
        embeddings=True,
    ),
    Row(
        "int4wo",
        ("INT4WO", "int4-weight-only", "Int4WeightOnlyConfig", "int4wo-128", "int4wo_g64", "quanto-int4"),
        "Int4WeightOnlyConfig",
        "Int4OpaqueTensor",
        "int4",
        None,
        "per group of 128",
        "0.17",
        bits=4.0,
        bytes=0.53,
        device="cpu",
    ),
    _float8(
        "float8wo",
        (
            *("fp8wo", "float8_weight_only", "float8wo_e4m3", "float8_weight_only_e4m3", "fp8wo-e4m3"),
            *("Float8WeightOnlyConfig", "quanto-float8"),
        ),
        "float8_e4m3fn",
    ),
    _float8(
        "float8wo_e5m2", ("fp8wo_e5m2", "float8-weight-only-e5m2", "FLOAT8WO-E5M2", "quanto-float8-e5m2"), "float8_e5m2"
    ),
    _float8dq(
        "float8dq",
        (
            *("fp8dq", "float8dq_e4m3", "float8dq_e4m3_tensor", "float8-dynamic-activation-float8-weight"),
            "Float8DynamicActivationFloat8WeightConfig",
        ),
        "per tensor",
        "per tensor",
    ),
    _float8dq(
        "float8dq_row",
        ("fp8dqrow", "fp8dq-row", "float8dq_e4m3_row", "float8_dynamic_activation_float8_weight_e4m3_row"),
        "per row",
        "per token",
        ranks=(2, 3),
    ),
    _float8dq(
        "float8dq_block",
        ("fp8dq_block", "float8dq-blockwise"),
        "per block of 128x128",
        "per group of 128",
        ranks=(2, 3),
        min_torchao="0.15",
        device="cuda",
    ),
    _mx(
        "mxfp8",
        ("MXFP8_E4M3", "mxfp8-dynamic", "MXDynamicActivationMXWeightConfig", "MXFPInferenceConfig"),
        "float8_e4m3fn",
        device="cuda",
        capability=(10, 0),
    ),
    _mx("mxfp8_e5m2", ("MXFP8-e5m2",), "float8_e5m2"),
    _mx("mxfp4", ("mxfp4_e2m1",), "float4_e2m1", bits=4.0, bytes=0.53, device="cuda", capability=(10, 0)),
    _mx("mxfp6_e2m3", ("mx-fp6-e2m3",), "float6_e2m3"),
    _mx("mxfp6_e3m2", ("mx-fp6-e3m2",), "float6_e3m2"),
    _nvfp4(
        "nvfp4",
        ("NVFP4-dynamic", "NVFP4DynamicActivationNVFP4WeightConfig"),
        "NVFP4DynamicActivationNVFP4WeightConfig",
        "float4_e2m1 per group of 16, dynamic",
        ranks=(2, 3),
        device="cuda",
        capability=(10, 0),
    ),
    _nvfp4("nvfp4wo", ("nvfp4_weight_only", "NVFP4WeightOnlyConfig"), "NVFP4WeightOnlyConfig", None),
    dataclasses.replace(
        _int8dq(4),
        names=(
            *("int8_dynamic_activation_int4_weight", "int8da_int4w", "8da4w", "int8dq-int4"),
            "Int8DynamicActivationInt4WeightConfig",
        ),
    ),
    *(_intx(bits) for bits in range(1, 9)),
    *(_uint(bits) for bits in range(1, 9)),
    *(_int8dq(bits) for bits in range(1, 9) if bits != 4),
)

Variant = tuple[str, int | None, dict[str, str]]

# (name, group size, settings): each kind of granularity, mapping and algorithm that a config can have. int4wo is not
# here: test_int4 holds it against torchao
VARIANTS: tuple[Variant, ...] = (
    *((row.scheme, None, {}) for row in ROWS if row.tensor_class not in (INTX_TENSOR, "Int4OpaqueTensor")),
    *((name, None, {}) for name in ("int4dq", "int8dq_int8", "intx1wo", "intx4wo", "intx8wo", "uint3wo", "uint8wo")),
    ("int8wo", 2, {}),
    ("int8wo", 32, {}),
    ("int8wo", None, {"granularity": "per_tensor"}),
    ("int8dq", None, {"granularity": "per_tensor"}),
    ("int8dq", None, {"granularity": "per_tensor,per_row", "act_mapping_type": "asymmetric"}),
    ("int8dq", None, {"reduce_range": "true"}),
    ("float8wo", 16, {}),
    ("float8wo", None, {"granularity": "tensor"}),
    ("float8wo_e5m2", 3, {}),
    ("float8dq_row", None, {"activation_value_ub": "100", "kernel_preference": "torch"}),
    ("mxfp4", None, {"scaling_mode": "floor"}),
    ("nvfp4", None, {"use_dynamic_per_tensor_scale": "false"}),
    ("nvfp4", None, {"use_triton_kernel": "true"}),
    ("nvfp4wo", None, {"use_dynamic_per_tensor_scale": "false"}),
    ("intx2wo", 8, {"mapping_type": "asymmetric"}),
    ("uint4wo", 32, {}),
    ("intx4wo", 32, {"mapping_type": "symmetric_no_clipping_err"}),
    ("intx4wo", 32, {"scale_dtype": "float32"}),
    ("intx3wo", 5, {"intx_choose_qparams_algorithm": "hqq_scale_only"}),
    ("intx8wo", None, {"intx_choose_qparams_algorithm": "hqq_scale_only"}),
    ("int4dq", 7, {"weight_mapping_type": "asymmetric"}),
    ("int4dq", None, {"weight_granularity": "per_axis:0"}),
)

# the same schemes with other numbers of bits
MORE: tuple[Variant, ...] = tuple(
    (row.scheme, None, {}) for row in ROWS if row.tensor_class == INTX_TENSOR and (row.scheme, None, {}) not in VARIANTS
)


def parameters() -> list[Any]:
    """Every variant for ``pytest.mark.parametrize``; those that differ in the number of bits only are exhaustive."""
    usual = [pytest.param(variant, id=variant_id(variant)) for variant in VARIANTS]
    return usual + [pytest.param(variant, id=variant_id(variant), marks=pytest.mark.exhaustive) for variant in MORE]


def variant_id(variant: Variant) -> str:
    name, group_size, settings = variant
    return "-".join([name, *([f"g{group_size}"] if group_size else []), *settings.values()])


_MADE: dict[str, schemes.Scheme] = {}


def get(variant: Variant) -> schemes.Scheme:
    name, group_size, settings = variant
    key = variant_id(variant)
    if key not in _MADE:
        _MADE[key] = schemes.get(name, group_size=group_size, settings=settings)
    return _MADE[key]


def quantize(weight: Any, config: Any) -> Any:
    """What torchao's own handler makes of the weight of a linear layer, as on a machine whose GPU can run it.

    The questions for the GPU's capability are answered with yes, all else is torchao's. Inductor's process-wide
    settings stay alone.
    """
    import torch
    from torchao.prototype.mx_formats import inference_workflow
    from torchao.quantization import quant_api, quantize_

    if hasattr(config, "set_inductor_config"):
        config = dataclasses.replace(config, set_inductor_config=False)
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
        patch.setattr(inference_workflow, "is_sm_at_least_100", lambda: True)
        quantize_(linear, config)
    return linear.weight


def inner(tensor: Any) -> dict[str, Any]:
    """Name -> inner tensor, those that are there."""
    names = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", [])]
    return {name: getattr(tensor, name) for name in names if getattr(tensor, name, None) is not None}


def attributes(tensor: Any) -> dict[str, Any]:
    """Name -> attribute that is no tensor."""
    names = [*tensor.tensor_attribute_names, *getattr(tensor, "optional_tensor_attribute_names", [])]
    return {name: getattr(tensor, name) for name in names}


def weight_shape(made: schemes.Scheme, rows: int, groups: int) -> tuple[int, int]:
    """A shape near this that the scheme takes: up to 128 rows more, and as many groups in a row."""
    out, into = made.entry.multiples
    columns = groups * (made.group_size or 1)
    return -(-rows // out) * out, -(-columns // into) * into
