"""Integers of old torchao, one code a byte or packed → ``Int8Tensor`` or ``IntxUnpackedToInt8Tensor``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, SchemeName, dtype_of
from aoconvert.rewriting.old_torchao.activations import Activations
from aoconvert.rewriting.old_torchao.weight import (
    DIFFERENT_ROUNDING,
    Weight,
    as_values,
    per_row_or_group,
)


def plain(weight: Weight, activations: Activations) -> Outcome:
    """One code a byte."""
    data = weight.part("int_data")
    if data.shape != weight.shape:
        raise CannotMigrate(f"its codes have the shape {data.shape}, it {weight.shape}")
    if weight.domain == "FLOAT":
        return _float_zero_points(weight)
    bits = _bits(weight, data.dtype)
    if data.dtype == "int8" and bits == 8 and weight.zero_points() is None:
        return _int8(weight, activations)
    return _intx(weight, bits, data.dtype == "uint8", lambda read: read(data), activations)


def _bits(weight: Weight, dtype: str) -> int:
    """How many bits a code has, by its limits.

    Raises:
        CannotMigrate: limits that no dtype of today has.
    """
    if dtype not in ("int8", "uint8"):
        raise CannotMigrate(f"its codes are {dtype}")
    unsigned = dtype == "uint8"
    if weight.limits is None or weight.limits == (-127, 127):
        return 8
    low, high = weight.limits
    bits = (high - low).bit_length()
    if (low, high) != ((0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) or bits > 8:
        raise CannotMigrate(f"its codes go from {low} to {high}")
    return bits


def _int8(weight: Weight, activations: Activations) -> Outcome:
    """``Int8Tensor``: symmetric, a scale per row or per group."""
    group = per_row_or_group(weight.block, weight.shape)
    data, scale = weight.part("int_data"), weight.scale_part()
    settings: dict[str, str] = {}
    if activations.kind == "none":
        name = SchemeName("int8wo", group)
    elif activations.kind in ("int8_symmetric", "int8_asymmetric") and group is None:
        settings = {"act_mapping_type": "asymmetric"} if activations.kind == "int8_asymmetric" else {}
        name = SchemeName("int8dq", settings=settings)
    else:
        raise CannotMigrate(f"int8 weights {_with(group)} and activations by {activations.function}")

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        kwargs = None
        if activations.kind != "none":
            mapping = MappingType.ASYMMETRIC if settings else MappingType.SYMMETRIC
            kwargs = QuantizeTensorToInt8Kwargs(granularity=PerRow(), mapping_type=mapping)
        scales = read(scale).reshape(weight.groups)
        made: torch.Tensor = Int8Tensor(
            qdata=read(data),
            scale=scales,
            block_size=list(weight.block),
            dtype=weight.dtype,
            zero_point=torch.zeros_like(scales, dtype=torch.int8),
            act_quant_kwargs=kwargs,
        )
        return made

    return Outcome(make, name, DIFFERENT_ROUNDING if activations.kind != "none" else None)


def _with(group: int | None) -> str:
    return "with a scale per row" if group is None else f"in groups of {group}"


def _intx(
    weight: Weight, bits: int, unsigned: bool, codes: Callable[[Read], torch.Tensor], activations: Activations
) -> Outcome:
    """``IntxUnpackedToInt8Tensor``; unsigned codes and their zero points move down by half of their range."""
    group = per_row_or_group(weight.block, weight.shape)
    zeros = weight.zero_points()
    half = 2 ** (bits - 1) if unsigned else 0
    if zeros is not None and not _are_codes(zeros, half):
        raise CannotMigrate(f"its zero points are not whole numbers from {-128 + half} to {127 + half}")
    symmetric = zeros is None and not unsigned
    scale = weight.scale_part()
    asked = None
    if activations.kind in ("int8_symmetric", "int8_asymmetric"):
        asked = "int8_asym_per_token"
    name = _intx_name(bits, group, symmetric=symmetric, dynamic=asked is not None)

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization import IntxUnpackedToInt8Tensor

        scales = read(scale).reshape(weight.groups)
        found = weight.zero_part
        if found is None or not found.shape:
            moved = torch.full_like(scales, -half, dtype=torch.int8)
        else:
            moved = (read(found).reshape(weight.groups).to(torch.int16) - half).to(torch.int8)
        values = codes(read)
        made: torch.Tensor = IntxUnpackedToInt8Tensor(
            qdata=(values.to(torch.int16) - half).to(torch.int8) if half else values,
            scale=scales,
            zero_point=moved,
            target_dtype=getattr(torch, f"int{bits}"),
            block_size=weight.block,
            dtype=weight.dtype,
            activation_quantization=asked,
        )
        return made

    return Outcome(make, name, _said(activations))


def _are_codes(zeros: torch.Tensor, half: int) -> bool:
    """Whether zero points, some of which are stored as floats, are whole, and fit a byte."""
    values = zeros.double()
    return bool(((values == values.round()) & (values - half >= -128) & (values - half <= 127)).all())


def _intx_name(bits: int, group: int | None, *, symmetric: bool, dynamic: bool) -> SchemeName:
    if not dynamic:
        return SchemeName(f"intx{bits}wo" if symmetric else f"uint{bits}wo", group)
    settings = {} if symmetric else {"weight_mapping_type": "asymmetric"}
    if group is None:
        settings["weight_granularity"] = "per_axis:0"
    return SchemeName("int4dq" if bits == 4 else f"int8dq_int{bits}", group, settings)


def _said(activations: Activations) -> str | None:
    """What is computed differently, though codes and scales are the same."""
    if activations.kind == "none":
        return None
    if activations.kind == "int8_asymmetric":
        return DIFFERENT_ROUNDING
    if activations.kind == "int8_symmetric":
        return "its codes and scales are the same; activations were symmetric int8, and are asymmetric int8 now"
    return "its codes and scales are the same; activations were 4-bit integers, and are not quantized now"


def _float_zero_points(weight: Weight) -> Outcome:
    """Zero points that are values, not codes (``ZeroPointDomain.FLOAT``, of HQQ): no class of today has them."""
    data, scale, zero = weight.part("int_data"), weight.scale_part(), weight.zero_part
    low, high = weight.limits or (None, None)

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

        found: torch.Tensor = _dequantize_affine_tinygemm(
            read(data),
            weight.block,
            read(scale),
            read(zero) if zero is not None else None,
            dtype_of(data),
            low,
            high,
            output_dtype=weight.dtype,
        )
        return found

    return as_values(make, "its zero points are values (HQQ), which no tensor class of today takes for these codes")


def uintx(weight: Weight, activations: Activations) -> Outcome:
    """Codes of 1 to 7 bits, in shards of 1, 2 and 4 bits; torchao's own code puts them together."""
    packed = weight.part("int_data")
    bits, dim = packed.attributes.get("bit_width"), packed.attributes.get("pack_dim")
    shards = [packed.inner.get(f"int{size}_shard") for size in _SHARDS.get(bits if type(bits) is int else 0, ())]
    if type(bits) is not int or type(dim) is not int or not shards or None in shards or packed.shape != weight.shape:
        raise CannotMigrate("its shards of bits are not as torchao packed them")

    def codes(read: Read) -> torch.Tensor:
        from torchao.prototype.dtypes.uintx.bitpacking import unpack

        found = [read(shard) for shard in shards if shard is not None]
        values: torch.Tensor = unpack(found, bits, dim=dim)
        return values

    if weight.domain == "FLOAT":
        raise CannotMigrate("its zero points are values, beside packed codes")
    return _intx(weight, bits, True, codes, activations)


_SHARDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def int4_packed(weight: Weight, activations: Activations) -> Outcome:
    """Signed 4-bit codes for CUTLASS, two a byte, the lower half first (``CutlassInt4PackedLayout``)."""
    data = weight.part("int_data")
    if data.shape != (weight.shape[0], weight.shape[1] // 2) or data.dtype != "int8":
        raise CannotMigrate(f"its packed codes are {data.dtype} of shape {data.shape}")

    def codes(read: Read) -> torch.Tensor:
        both = read(data)
        return torch.stack((both << 4 >> 4, both >> 4), dim=-1).reshape(weight.shape)

    return _intx(weight, 4, False, codes, activations)
