"""float8 weights of old torchao → ``Float8Tensor``."""

from __future__ import annotations

import torch

from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, SchemeName
from aoconvert.rewriting.old_torchao.activations import Activations
from aoconvert.rewriting.old_torchao.weight import (
    DIFFERENT_ROUNDING,
    Weight,
    as_values,
    per_row_or_group,
)


def float8(weight: Weight, activations: Activations) -> Outcome:
    """``Float8Tensor``, with activations by a scale of their own, or none."""
    data = weight.part("float8_data")
    weight.scale_part()  # there must be one
    if data.shape != weight.shape:
        raise CannotMigrate(f"its values have the shape {data.shape}, it {weight.shape}")
    if activations.is_static:
        return as_values(
            lambda read: _make_float8(weight, read, None).dequantize(),
            "its activations had a scale measured beforehand, for which torchao has no class today",
        )
    per_tensor = weight.block == weight.shape
    if not per_tensor and per_row_or_group(weight.block, weight.shape) is not None:
        raise CannotMigrate(f"float8 in groups of {weight.block[1]}")
    if activations.kind == "none":
        settings = {"granularity": "per_tensor"} if per_tensor else {}
        name = SchemeName("float8wo_e5m2" if "e5m2" in data.dtype else "float8wo", settings=settings)
    elif activations.kind == "float8" and data.dtype == "float8_e4m3fn" and activations.is_per_row != per_tensor:
        name = SchemeName("float8dq" if per_tensor else "float8dq_row")
    else:
        raise CannotMigrate(f"{data.dtype} weights and activations by {activations.function}")
    return Outcome(
        lambda read: _make_float8(weight, read, activations),
        name,
        DIFFERENT_ROUNDING if activations.kind != "none" else None,
    )


def _make_float8(weight: Weight, read: Read, activations: Activations | None) -> torch.Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    kwargs = None
    if activations is not None and activations.kind != "none":
        granularity = PerRow() if activations.is_per_row else PerTensor()
        kwargs = QuantizeTensorToFloat8Kwargs(getattr(torch, activations.dtype), granularity)
    found = weight.layout.get("mm_config")
    values = getattr(found, "args", None)
    made: torch.Tensor = Float8Tensor(
        qdata=read(weight.part("float8_data")),
        scale=read(weight.scale_part()).reshape(weight.groups).to(torch.float32),
        block_size=list(weight.block),
        mm_config=Float8MMConfig(*values) if values else None,
        act_quant_kwargs=kwargs,
        dtype=weight.dtype,
    )
    return made
