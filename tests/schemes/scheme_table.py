"""What every scheme must be: one row a scheme, and the variants that the property tests run over."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

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
    ranks: tuple[int, ...] = (2, 3)
    needs_rows: bool = False


def _intx(bits: int) -> Row:
    short = () if bits in (4, 8) else (f"int{bits}wo", f"int{bits}-weight-only")
    return Row(
        f"intx{bits}wo",
        (f"intx{bits}", f"INTX{bits}_WEIGHT_ONLY", *short),
        "IntxWeightOnlyConfig",
        "IntxUnpackedToInt8Tensor",
        f"int{bits}",
        None,
        "per row",
        "0.14.1",
        ranks=(2,),
    )


ROWS = (
    Row(
        "int8wo",
        ("INT8WO", "int8_weight_only", "int8-weight-only", "Int8WeightOnlyConfig"),
        "Int8WeightOnlyConfig",
        "Int8Tensor",
        "int8",
        None,
        "per row",
        "0.15",
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
        needs_rows=True,
    ),
    Row(
        "float8wo",
        (
            "fp8wo",
            "float8_weight_only",
            "float8wo_e4m3",
            "float8_weight_only_e4m3",
            "fp8wo-e4m3",
            "Float8WeightOnlyConfig",
        ),
        "Float8WeightOnlyConfig",
        "Float8Tensor",
        "float8_e4m3fn",
        None,
        "per row",
        "0.13",
    ),
    Row(
        "float8wo_e5m2",
        ("fp8wo_e5m2", "float8-weight-only-e5m2", "FLOAT8WO-E5M2"),
        "Float8WeightOnlyConfig",
        "Float8Tensor",
        "float8_e5m2",
        None,
        "per row",
        "0.13",
    ),
    Row(
        "int4dq",
        ("int8_dynamic_activation_int4_weight", "int8da_int4w", "8da4w", "Int8DynamicActivationInt4WeightConfig"),
        "Int8DynamicActivationIntxWeightConfig",
        "IntxUnpackedToInt8Tensor",
        "int4",
        "int8 per token, asymmetric, dynamic",
        "per group of 32",
        "0.14.1",
        ranks=(2,),
    ),
    *(_intx(bits) for bits in range(1, 9)),
)

# (name, group size, settings): each kind of granularity, mapping and algorithm that a config can have
VARIANTS: tuple[tuple[str, int | None, dict[str, str]], ...] = (
    *((row.scheme, None, {}) for row in ROWS),
    ("int8wo", 2, {}),
    ("int8wo", 32, {}),
    ("int8wo", None, {"granularity": "per_tensor"}),
    ("int8dq", None, {"granularity": "per_tensor"}),
    ("int8dq", None, {"granularity": "per_tensor,per_row", "act_mapping_type": "asymmetric"}),
    ("int8dq", None, {"reduce_range": "true"}),
    ("float8wo", 16, {}),
    ("float8wo", None, {"granularity": "tensor"}),
    ("float8wo_e5m2", 3, {}),
    ("intx2wo", 8, {"mapping_type": "asymmetric"}),
    ("intx4wo", 32, {"mapping_type": "symmetric_no_clipping_err"}),
    ("intx4wo", 32, {"scale_dtype": "float32"}),
    ("intx3wo", 5, {"intx_choose_qparams_algorithm": "hqq_scale_only"}),
    ("intx8wo", None, {"intx_choose_qparams_algorithm": "hqq_scale_only"}),
    ("int4dq", 7, {"weight_mapping_type": "asymmetric"}),
    ("int4dq", None, {"weight_granularity": "per_axis:0"}),
)


def variant_id(variant: tuple[str, int | None, dict[str, str]]) -> str:
    name, group_size, settings = variant
    return "-".join([name, *([f"g{group_size}"] if group_size else []), *settings.values()])


def get(variant: tuple[str, int | None, dict[str, str]]) -> schemes.Scheme:
    name, group_size, settings = variant
    return schemes.get(name, group_size=group_size, settings=settings)


def quantize(weight: Any, config: Any) -> Any:
    """What torchao makes of the weight of a linear layer; inductor's process-wide settings stay alone."""
    import torch
    from torchao.quantization import quantize_

    if hasattr(config, "set_inductor_config"):
        config = dataclasses.replace(config, set_inductor_config=False)
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
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
