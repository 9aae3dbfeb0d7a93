"""torchao's tensors in a safetensors file: their inner tensors under names of their own, the rest as JSON beside them.

``block.weight`` of class ``Int8Tensor`` is stored as ``block._weight_qdata``, ``block._weight_scale``, and so on; the
header's ``__metadata__`` has an entry ``block.weight`` with the class and its attributes, and ``tensor_names``, the
names of all tensors. Format: ``torchao/prototype/safetensors``, whose own code makes and reads the entries here, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.formats.content import data_names
from aoconvert.formats.safetensors.contents import part_name
from aoconvert.formats.torch_bin.pickle_tree import CannotDescribe, describe, own_storage

NAMES = "tensor_names"
PLAIN = json.dumps({"_type": "Tensor"})
"""The entry of a tensor that is not quantized."""

TUPLES: Mapping[str, tuple[str, ...]] = {"IntxUnpackedToInt8Tensor": ("block_size",)}
"""Attributes that torchao's own quantization makes tuples, by class: JSON has lists only."""


class CannotFlatten(Exception):
    """torchao cannot store a tensor as safetensors, or cannot read it again; says why."""


def flatten(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
    """The inner tensors by the names under which they are stored, in ``__tensor_flatten__`` order, and the entry.

    Of a plain tensor itself. On meta it costs nothing.

    Raises:
        CannotFlatten: there is no way, or what torchao reads then is another tensor.
    """
    if not (names := data_names(tensor)):
        return {name: tensor}, PLAIN
    kind = type(tensor).__name__
    if "." not in name:
        raise CannotFlatten(f"torchao's safetensors have no name for the parts of {name!r}, which has no dot")
    entry = _entry(name, tensor)
    parts = {part: getattr(tensor, part) for part in names}
    if inner := next((part for part, value in parts.items() if data_names(value)), None):
        raise CannotFlatten(f"{inner} of {kind} is itself a tensor of parts")
    _check(name, tensor, parts, entry)
    return {part_name(name, part): value for part, value in parts.items()}, entry


def unflatten(name: str, parts: Mapping[str, torch.Tensor], entry: str) -> torch.Tensor:
    """torchao's tensor again.

    Args:
        name: its key.
        parts: inner tensors by their own names.
        entry: what the metadata says of it; its class and what lies in its attributes must be known names.

    Raises:
        CannotFlatten: torchao does not make a tensor of it.
    """
    import_torchao()
    with quiet_imports():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    full = name if "." in name else f"_.{name}"
    stored = {part_name(full, part): value for part, value in parts.items()}
    try:
        made, _ = unflatten_tensor_state_dict(stored, {full: entry, NAMES: json.dumps([full])})
    except Exception as error:  # of any kind, from the constructors of torchao's classes
        raise CannotFlatten(f"torchao cannot read its entry: {error}".splitlines()[0]) from error
    if full not in made:
        raise CannotFlatten(f"its parts are {', '.join(parts)}, which are not those that its entry lists")
    tensor: Any = made[full]
    for attribute in TUPLES.get(type(tensor).__name__, ()):
        value = getattr(tensor, attribute)
        setattr(tensor, attribute, tuple(value) if isinstance(value, list) else value)
    return tensor  # type: ignore[no-any-return]


def _entry(name: str, tensor: torch.Tensor) -> str:
    """What torchao's own writer says of it."""
    import_torchao()
    with quiet_imports():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    try:
        _, metadata = flatten_tensor_state_dict({name: tensor})
    except ValueError as error:
        raise CannotFlatten(f"torchao's safetensors do not support {type(tensor).__name__}") from error
    return str(metadata[name])


_Key = tuple[str, tuple[Any, ...]]
_checked: dict[_Key, str | None] = {}


def _check(name: str, tensor: torch.Tensor, parts: Mapping[str, torch.Tensor], entry: str) -> None:
    """See that torchao reads the same tensor again: same class, same attributes, same inner tensors.

    Raises:
        CannotFlatten: it does not.
    """
    shapes = tuple((part, value.dtype, tuple(value.shape), value.stride()) for part, value in parts.items())
    key = (entry, (tuple(tensor.shape), tensor.dtype, *shapes))
    if key not in _checked:
        _checked[key] = _difference(name, tensor, parts, entry)
    if (why := _checked[key]) is not None:
        raise CannotFlatten(why)


def _difference(name: str, tensor: torch.Tensor, parts: Mapping[str, torch.Tensor], entry: str) -> str | None:
    empty = {part: torch.empty(value.shape, dtype=value.dtype, device="meta") for part, value in parts.items()}
    kind = type(tensor).__name__
    try:
        made = unflatten(name, empty, entry)
        same = describe(made, lambda data: "") == describe(_on_meta(tensor), lambda data: "")
    except (CannotFlatten, CannotDescribe) as error:
        return f"torchao's safetensors cannot hold this {kind}: {error}"
    return None if same else f"torchao's safetensors do not give this {kind} back as it was"


def _on_meta(tensor: Any) -> torch.Tensor:
    names, context = tensor.__tensor_flatten__()
    parts = {name: torch.empty_like(own_storage(getattr(tensor, name)), device="meta") for name in names}
    made: torch.Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    return made
