"""A tensor's settings (block size, how activations are quantized) in one form, whatever the file's format."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, cast

from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.formats.torch_bin.contents import Instance, Symbol, Value


def value_of_metadata(item: Any) -> Value:
    """A value of torchao's safetensors metadata as a pickle would hold it.

    Source of the form: ``torchao.prototype.safetensors.safetensors_utils.TensorSubclassAttributeJSONEncoder``: an enum
    by its member's name, a named tuple and a dataclass by their fields.
    """
    if isinstance(item, list):
        return tuple(value_of_metadata(part) for part in item)
    if not isinstance(item, Mapping):
        return cast("Value", item)
    kind, data = str(item.get("_type")), item.get("_data")
    if kind == "torch.dtype":
        return Symbol(f"torch.{str(data).removeprefix('torch.')}")
    cls = _classes().get(kind)
    if not isinstance(data, Mapping):
        members = cls.__members__ if isinstance(cls, type) and issubclass(cls, enum.Enum) else {}
        member = members.get(str(data))
        return Instance(kind, (value_of_metadata(data) if member is None else member.value,))
    state: dict[str | int, Value] = {str(name): value_of_metadata(part) for name, part in data.items()}
    if isinstance(cls, type) and issubclass(cls, tuple):
        return Instance(kind, tuple(state.values()))
    return Instance(kind, state=state)


def settle(value: Value) -> object:
    """A setting without what may differ between formats and releases: modules, and unset against absent."""
    if isinstance(value, Symbol):
        return value.name.rpartition(".")[2]
    if isinstance(value, tuple):
        return tuple(settle(item) for item in value)
    if isinstance(value, Mapping):
        return settle_all({str(name): item for name, item in value.items()})
    if isinstance(value, Instance):
        state = {str(name): item for name, item in value.state.items()}
        return value.class_name.rpartition(".")[2], settle(value.args), settle_all(state)
    return None if value is False else value


def settle_all(values: Mapping[str, Value]) -> Mapping[str, object]:
    """Settings by name; those that are not set are left out."""
    settled = {name: settle(item) for name, item in values.items()}
    return {name: item for name, item in settled.items() if item is not None}


def _classes() -> Mapping[str, Any]:
    """The classes whose objects torchao puts into its metadata."""
    return cast("Mapping[str, Any]", import_metadata().ALLOWED_CLASSES)


def import_metadata() -> Any:
    """The module in which torchao says how a tensor is written into safetensors metadata."""
    import_torchao()
    with quiet_imports():  # it imports prototypes
        from torchao.prototype.safetensors import safetensors_utils
    return safetensors_utils
