"""Names that need a setting, and names that bring a group size."""

from __future__ import annotations

from aoconvert.schemes.table.entry import Family, Preset
from aoconvert.schemes.table.integers import INT4_GROUPS

FAMILIES = (
    Family(
        names=("intx", "intxwo", "intx_weight_only", "IntxWeightOnlyConfig"),
        field="weight_dtype",
        members=tuple((f"int{bits}", f"intx{bits}wo") for bits in range(1, 9)),
        default=None,
    ),
    Family(
        names=("uintx", "uintxwo", "uintx_weight_only"),
        field="weight_dtype",
        members=tuple((f"int{bits}", f"uint{bits}wo") for bits in range(1, 9)),
        default=None,
    ),
    Family(
        names=("int8dq_intx", "int8_dynamic_activation_intx_weight", "Int8DynamicActivationIntxWeightConfig"),
        field="weight_dtype",
        members=tuple((f"int{bits}", "int4dq" if bits == 4 else f"int8dq_int{bits}") for bits in range(1, 9)),
        default=None,
    ),
    Family(
        names=("Float8WeightOnlyConfig",),
        field="weight_dtype",
        members=(("float8_e4m3fn", "float8wo"), ("float8_e5m2", "float8wo_e5m2")),
        default="float8wo",
    ),
    Family(
        names=("Float8DynamicActivationFloat8WeightConfig",),
        field="granularity",
        members=(
            *(("per_tensor", "float8dq"), ("tensor", "float8dq")),
            *(("per_row", "float8dq_row"), ("row", "float8dq_row")),
        ),
        default="float8dq",
    ),
    Family(
        names=("mx", "MXDynamicActivationMXWeightConfig", "MXFPInferenceConfig"),
        field="weight_dtype",
        members=(
            ("float8_e4m3fn", "mxfp8"),
            ("float8_e5m2", "mxfp8_e5m2"),
            ("float4_e2m1fn_x2", "mxfp4"),
            ("fp6_e2m3", "mxfp6_e2m3"),
            ("fp6_e3m2", "mxfp6_e3m2"),
        ),
        default="mxfp8",
    ),
)

PRESETS = (
    *(
        Preset(name, "int4wo", size)
        for size in INT4_GROUPS
        for name in (f"int4wo_{size}", f"int4wo_g{size}", f"int4_weight_only_{size}")
    ),
    # Quanto: groups of 128, with a shift (facts, legacy-checkpoints)
    *(Preset(f"quanto_{kind}4", "int4wo", 128) for kind in ("int", "qint")),
    *(Preset(f"quanto_{kind}2", "uint2wo", 128) for kind in ("int", "qint")),
)
