"""The values of ``--set KEY=VALUE``, parsed by the type of the torchao config's field.

torch and torchao are imported when a value is parsed, not before.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

from aoconvert.errors import UsageError

# Below 2 torchao fails on its own (blocks of one value are not reduced); far above any in_features is a slip
GROUP_SIZES = range(2, 65537)

_GRANULARITY = re.compile(r"(?:per_?)?(row|tensor|group|axis)(?:\((?:\w+=)?([0-9]{1,9})\)|\(\)|:([0-9]{1,9}))?")
_BLOCK = re.compile(r"(?:per_?)?block:([0-9]{1,5})x([0-9]{1,5})")
_GRANULARITIES = "per_row, per_tensor, per_group:N, per_axis:0"
# torchao has 6-bit floats, torch has no dtype for them
_FLOAT6 = ("fp6_e2m3", "fp6_e3m2")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class _Refused(Exception):
    """A text that a type cannot take; holds what it would."""


def parse(config_class: type, key: str, text: str) -> Any:
    """The value of field ``key`` of a torchao config class.

    bool (``true``), int, torch.dtype (``int4``, ``torch.int4``), enum by name (``ASYMMETRIC``), granularity
    (``per_row``, ``PerGroup(64)``, ``group:64``), two granularities with a comma (activation, weight), ``none``.

    Raises:
        UsageError: no such field, or a text that is no value of its type.
    """
    fields = [field.name for field in dataclasses.fields(config_class)]
    if key not in fields:
        hint = "use --group-size N" if key == "group_size" else f"its fields: {', '.join(fields)}"
        raise UsageError(f"{config_class.__name__} has no field {key!r}", hint=hint)
    accepted = []
    for parser in _parsers(typing.get_type_hints(config_class)[key]):
        try:
            return parser(text.strip())
        except _Refused as refused:
            accepted.append(str(refused))
    takes = " or ".join(dict.fromkeys(accepted))
    raise UsageError(f"{key}={text!r} is not a value of this field", hint=f"{key} can be {takes}")


def group(size: int) -> Any:
    """torchao's ``PerGroup(size)``.

    Raises:
        UsageError: a size that cannot be meant.
    """
    from torchao.quantization import PerGroup

    if size not in GROUP_SIZES:
        raise UsageError(
            f"group size {size} is out of range",
            hint=f"use {GROUP_SIZES.start} to {GROUP_SIZES.stop - 1}; usual are 32, 64, 128",
        )
    return PerGroup(size)


def _parsers(annotation: Any) -> list[Callable[[str], Any]]:
    """One parser for each member of a field's type."""
    import torch
    from torchao.quantization.granularity import Granularity

    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [parser for member in typing.get_args(annotation) for parser in _parsers(member)]
    if typing.get_origin(annotation) is list:
        (member,) = typing.get_args(annotation)
        return [partial(_list, parser) for parser in _parsers(member)]
    simple: dict[Any, Callable[[str], Any]] = {
        bool: _bool,
        int: _int,
        float: _float,
        type(None): _none,
        torch.dtype: _dtype,
        Granularity: _granularity,
    }
    if annotation in simple:
        return [simple[annotation]]
    if isinstance(annotation, type) and issubclass(annotation, Granularity):
        return [_granularity]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [partial(_enum, annotation)]
    return [_no_text]


def _bool(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise _Refused("true, false")
    return _BOOLEANS[text.lower()]


def _int(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise _Refused("a whole number")
    return int(text)


def _float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _Refused("a number") from None
    if not math.isfinite(value):
        raise _Refused("a finite number")
    return value


def _none(text: str) -> None:
    if text.lower() != "none":
        raise _Refused("none")


def _dtype(text: str) -> Any:
    import torch

    if text.lower() in _FLOAT6:
        return text.lower()
    value = getattr(torch, text.lower().removeprefix("torch."), None)
    if not isinstance(value, torch.dtype):
        raise _Refused("a torch dtype (int4, float8_e4m3fn, bfloat16 …)")
    return value


def _granularity(text: str) -> Any:
    from torchao.quantization import PerAxis, PerRow
    from torchao.quantization.granularity import PerBlock, PerTensor

    plain = text.lower().replace("-", "_").replace(" ", "")
    if block := _BLOCK.fullmatch(plain):
        return PerBlock([int(block[1]), int(block[2])])
    match = _GRANULARITY.fullmatch(plain)
    kind, number = (match[1], match[2] or match[3] or "") if match else ("", "")
    if number and kind in ("group", "axis"):
        return group(int(number)) if kind == "group" else PerAxis(int(number))
    if kind in ("row", "tensor") and not number:
        return PerRow() if kind == "row" else PerTensor()
    raise _Refused(_GRANULARITIES)


def _list(parser: Callable[[str], Any], text: str) -> list[Any]:
    parts = text.split(",")
    if len(parts) != 2:
        raise _Refused("two of them separated by a comma (activation, weight)")
    return [parser(part.strip()) for part in parts]


def _enum(members: type[enum.Enum], text: str) -> enum.Enum:
    names = {member.name.lower(): member for member in members}
    name = text.lower().removeprefix(members.__name__.lower() + ".")
    if name not in names:
        raise _Refused(", ".join(member.name for member in members))
    return names[name]


def _no_text(text: str) -> None:
    raise _Refused("nothing on the command line")
