"""Tensors to write: of every dtype, and quantized in every class that has a config."""

import torch
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)

INTX = {
    f"intx{bits}-{'sym' if mapping is MappingType.SYMMETRIC else 'asym'}-{type(granularity).__name__}": (
        IntxWeightOnlyConfig,
        {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": granularity, "mapping_type": mapping},
    )
    for bits in range(1, 9)
    for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC)
    for granularity in (PerGroup(32), PerAxis(0))
}
CONFIGS = {
    "int8wo": (Int8WeightOnlyConfig, {}),
    "int8wo-group": (Int8WeightOnlyConfig, {"granularity": PerGroup(32)}),
    "int8dq": (Int8DynamicActivationInt8WeightConfig, {}),
    "fp8wo-e4m3": (Float8WeightOnlyConfig, {"weight_dtype": torch.float8_e4m3fn}),
    "fp8wo-e5m2": (Float8WeightOnlyConfig, {"weight_dtype": torch.float8_e5m2}),
    "int8dq-int4": (
        Int8DynamicActivationIntxWeightConfig,
        {"weight_dtype": torch.int4, "weight_granularity": PerGroup(32)},
    ),
    "mx": (MXDynamicActivationMXWeightConfig, {}),
    "nvfp4": (NVFP4WeightOnlyConfig, {}),
    **INTX,
}
_NAMES = [
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
]
DTYPES = [getattr(torch, name) for name in _NAMES]


def quantized(name, device="cpu", shape=(64, 128)):
    config, fields = CONFIGS[name]
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16).to(device)
    quantize_(linear, config(**fields))
    return linear.weight.detach()


def filled(dtype, *shape):
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)
