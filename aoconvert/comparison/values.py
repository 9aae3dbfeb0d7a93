"""The numbers that stored tensors stand for, by torchao's own ``dequantize``, some rows at a time."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from aoconvert.comparison.reading import OpenFiles
from aoconvert.comparison.tensors import StoredTensor
from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.errors import ReadError, is_out_of_memory
from aoconvert.formats.torch_bin.contents import Symbol, Value
from aoconvert.formats.torch_bin.safe_names import Kind, list_names
from aoconvert.schemes import int4_parts
from aoconvert.schemes.error_stats import ErrorStats
from aoconvert.schemes.tensor_classes import class_named
from aoconvert.schemes.tensors import dequantize, take_apart

Rows = Callable[[int, int], torch.Tensor]
"""Rows ``start`` to ``stop`` of a tensor, as float32."""

_ELEMENTS = 1 << 20  # that are dequantized at once
_ROW_BY_ROW = frozenset({"Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"})
"""Classes whose inner tensors have a row for each of the weight's, or one element for all."""


class NoValues(Exception):
    """A tensor's numbers cannot be had here; says why."""


def measure(files: OpenFiles, a: StoredTensor, b: StoredTensor, packings: tuple[str | None, str | None]) -> ErrorStats:
    """How far ``b`` is from ``a``, two tensors of one shape.

    Args:
        files: that hold them.
        a, b: where only one is plain, that is the reference.
        packings: for weights that are packed for a CPU: which, see ``int4.cpu_layout``.

    Raises:
        NoValues: one of them has a class that this torchao does not know, or holds no real numbers.
        ReadError: the disk fails, or the file changed.
    """
    try:
        first, second = _open(files, a, packings[0]), _open(files, b, packings[1])
        if b.is_plain and not a.is_plain:
            first, second = second, first
        return _sum(first, second, a.shape or (1,))
    except (NoValues, ReadError):
        raise
    except Exception as error:  # torchao raises whatever its handlers raise
        if is_out_of_memory(error):
            raise
        kinds = " and ".join(dict.fromkeys(side.kind for side in (a, b) if not side.is_plain))
        raise NoValues(f"{kinds or a.dtype} cannot be turned into numbers here") from error


def _sum(first: Rows, second: Rows, shape: tuple[int, ...]) -> ErrorStats:
    step = max(1, _ELEMENTS // max(1, math.prod(shape[1:])))
    found = ErrorStats()
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        reference, other = (rows(start, stop).reshape(stop - start, -1) for rows in (first, second))
        found.add(reference, other)
    return found


def _open(files: OpenFiles, tensor: StoredTensor, packing: str | None) -> Rows:
    return _plain(files, tensor) if tensor.has_values else _quantized(files, tensor, packing)


def _plain(files: OpenFiles, tensor: StoredTensor) -> Rows:
    leaf = tensor.leaves[""]
    dtype = getattr(torch, leaf.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.is_complex or leaf.dtype.startswith("float4"):
        raise NoValues(f"{leaf.dtype} has no real numbers to compare")
    if not leaf.shape:
        return lambda start, stop: files.read(leaf).reshape(1).to(torch.float32)
    return lambda start, stop: files.read_rows(leaf, start, stop).to(torch.float32)


def _quantized(files: OpenFiles, tensor: StoredTensor, packing: str | None) -> Rows:
    build, leaves = _builder(tensor), tensor.leaves.values()
    if tensor.kind in _ROW_BY_ROW and all(leaf.shape[:1] in ((), (1,), tensor.shape[:1]) for leaf in leaves):
        return lambda start, stop: dequantize(build(_rows(files, tensor, start, stop), start, stop))
    whole = build({name: files.read(leaf) for name, leaf in tensor.leaves.items()}, 0, tensor.shape[0])
    if class_named(tensor.kind).take_apart is None:
        return lambda start, stop: dequantize(whole[start:stop])
    parts = take_apart(whole, packing)
    return lambda start, stop: int4_parts.dequantize(
        replace(parts, codes=parts.codes[start:stop], scale=parts.scale[start:stop], zero=parts.zero[start:stop])
    )


def _rows(files: OpenFiles, tensor: StoredTensor, start: int, stop: int) -> dict[str, torch.Tensor]:
    return {
        name: files.read_rows(leaf, start, stop) if leaf.shape[:1] == tensor.shape[:1] else files.read(leaf)
        for name, leaf in tensor.leaves.items()
    }


def _builder(tensor: StoredTensor) -> Callable[[Mapping[str, torch.Tensor], int, int], Any]:
    """What makes torchao's tensor of some of its rows, without what only products with it need."""
    cls = _find_class(tensor.class_name)
    attributes = {name: _plain_value(value) for name, value in tensor.attributes.items()}
    attributes["dtype"] = getattr(torch, tensor.dtype)

    def build(parts: Mapping[str, torch.Tensor], start: int, stop: int) -> Any:
        given = {**attributes, "shape": torch.Size((stop - start, *tensor.shape[1:]))}
        block = given.get("block_size")
        if isinstance(block, list) and block and block[0] == tensor.shape[0]:
            given["block_size"] = [stop - start, *block[1:]]
        names = [*cls.tensor_data_names, *getattr(cls, "optional_tensor_data_names", ())]
        settings = [*cls.tensor_attribute_names, *getattr(cls, "optional_tensor_attribute_names", ())]
        return cls(
            **{name: parts.get(name) for name in names}, **{name: given[name] for name in settings if name in given}
        )

    return build


def _find_class(class_name: str) -> Any:
    """torchao's class of this name, by the list of names that a checkpoint may hold.

    Raises:
        NoValues: there is none in this torchao.
    """
    import_torchao()
    last = class_name.rpartition(".")[2]
    known = {name: entry for name, entry in list_names().items() if entry.kind is Kind.TENSOR and not entry.legacy}
    for dotted in known:
        if class_name in (dotted, f"torchao.{last}") and dotted.endswith(f".{last}"):
            with quiet_imports():
                return getattr(importlib.import_module(dotted.rpartition(".")[0]), last)
    raise NoValues(f"{last} is a class of an older torchao, which cannot be dequantized here")


def _plain_value(value: Value) -> Any:
    """A number, a dtype or a list of them; other objects say how products are computed, not what a weight is."""
    if isinstance(value, Symbol):
        found = getattr(torch, value.name.removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else None
    if isinstance(value, tuple):
        return [_plain_value(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else None
