"""One weight of int4 from one layout to another, without requantizing."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from aoconvert.formats.content import own_bytes
from aoconvert.formats.dtypes import dtype_name
from aoconvert.schemes import int4
from aoconvert.schemes.int4_parts import Parts, opaque, pad_shape, parameters, plain_int32, tile_packed


class CannotCarry(Exception):
    """The other layout cannot hold this weight's values exactly; says why."""


def carry(parts: Parts, device: str) -> Parts:
    """The same weight with the kind of zero points that a layout has.

    Args:
        parts: a weight taken apart.
        device: ``cuda``, ``cpu`` or ``xpu``.

    Raises:
        CannotCarry: its zero points or the dtype of its scales have no exact counterpart there.
    """
    dtype = dtype_name(parts.scale.dtype)
    if device == "cuda" and parts.scale.dtype != torch.bfloat16:
        raise CannotCarry(f"its scales are {dtype}, but the layout for cuda needs bfloat16")
    if device == "xpu" and parts.scale.dtype not in (torch.bfloat16, torch.float16):
        raise CannotCarry(f"its scales are {dtype}, but the layout for xpu needs bfloat16 or float16")
    if parts.whole == (device == "xpu"):
        return parts
    # exact in float64: products of two 11-bit values
    scale, zero = parts.scale.double(), parts.zero.double()
    if device == "xpu":
        exact = 8 - zero / scale
        found = exact.round().clamp(-128, 127).to(torch.int8)
        same = (8 - found.double()) * scale == zero
        what = "a zero point that is not a whole number of steps, which the layout for xpu needs"
    else:
        found = ((8 - zero) * scale).to(parts.scale.dtype)
        same = (8 - zero) * scale == found.double()
        what = f"a zero point that {dtype}, the dtype that the layout for {device} needs, cannot represent exactly"
    if not bool(same.all()):
        row, group = (int(at) for at in (~same).nonzero()[0])
        raise CannotCarry(f"row {row}, group {group} has {what}")
    return replace(parts, zero=found, whole=not parts.whole)


def pack(parts: Parts, device: str, algorithm: str) -> torch.Tensor:
    """torchao's tensor for a device. What the layout fills up has the values that quantizing for it gives.

    Args:
        parts: with the kind of zero points that the layout has, see :func:`carry`.
        device: ``cuda``, ``cpu`` (as this machine reads it) or ``xpu``.
        algorithm: that chose the parameters; it also says those of the zeros that a weight is filled up with.
    """
    if device == "xpu":
        return plain_int32(parts.codes, parts.scale, parts.zero, parts.group_size)
    if device == "cpu":
        return opaque(parts, int4.machine_layout())
    size, shape = parts.group_size, tuple(parts.codes.shape)
    rows, columns = pad_shape(shape)
    fill = parameters(torch.zeros(1, size, dtype=parts.scale.dtype), size, algorithm)
    whole = []
    for part, value, width in zip(
        (parts.codes, parts.scale, parts.zero), fill, (columns, *[columns // size] * 2), strict=True
    ):
        filled = torch.full((rows, width), value.flatten()[0].item(), dtype=part.dtype)
        filled[: shape[0], : part.shape[1]] = part
        whole.append(filled)
    codes, scale, zero = whole
    return tile_packed(codes, scale, zero, size, shape)


def digest(parts: Parts) -> str:
    """SHA-256 of codes, scales and zero points."""
    found = hashlib.sha256(f"{parts.group_size} {parts.scale.dtype} {parts.zero.dtype}".encode())
    for part in (parts.codes, parts.scale, parts.zero):
        found.update(own_bytes(part.contiguous()))
    return found.hexdigest()
