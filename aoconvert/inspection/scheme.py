"""What a tensor is quantized to, from what the header says of it; the names are those of ``aoconvert schemes``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol, Value
from aoconvert.inspection.compat import parts
from aoconvert.schemes.table import INT4, SchemeEntry, catalogue
from aoconvert.schemes.tensor_classes import WeightFacts, class_named

_DEPTH = 4  # of an object within a tensor's attributes that is looked at


def scheme_of(tensor: BinTensor) -> str | None:
    """The scheme of a tensor of a torchao class; ``None`` where its class is not known well enough."""
    within = {part.class_name.rpartition(".")[2]: part for part in parts(tensor)}
    for name, part in within.items():
        describe = class_named(name).describe
        facts = describe(part, within) if describe is not None else None
        if (scheme := scheme_name(facts) if isinstance(facts, WeightFacts) else facts) is not None:
            return scheme
    return None


def scheme_name(facts: WeightFacts) -> str | None:
    """The scheme of the catalogue that makes such weights, the first of several."""
    found = next((entry.name for entry in (*catalogue(), *INT4.values()) if _makes(entry, facts)), None)
    return found and found + facts.unlike


def _makes(entry: SchemeEntry, facts: WeightFacts) -> bool:
    return (
        entry.tensor_class is facts.tensor_class
        and facts.weight_dtype in (None, entry.weight_dtype)
        and facts.dynamic == (entry.activation is not None)
        and facts.asymmetric == (("mapping_type", "asymmetric") in entry.fields)
        and entry.granularity.startswith(facts.granularity or "")
    )


def tensor_of_metadata(class_name: str, data: Mapping[str, Any], stored: str | None) -> BinTensor:
    """A tensor of torchao's safetensors as if it had been in a ``.bin``.

    Args:
        class_name: ``_type`` of the metadata entry.
        data: ``_data``, its attributes: plain values, ``{"_type", "_data"}`` objects and ``torch.`` names.
        stored: dtype of ``qdata``.
    """
    attributes = {name: _value(item, _DEPTH) for name, item in data.items()}
    inner = {"qdata": _tensor("torch.Tensor", stored, {}, {})} if stored else {}
    return _tensor(f"torchao.{class_name}", stored, inner, attributes)


def _tensor(
    class_name: str, dtype: str | None, inner: Mapping[str, BinTensor], attributes: Mapping[str, Value]
) -> BinTensor:
    return BinTensor(class_name, dtype or "unknown", (), None, inner, attributes, False, "cpu")


def _value(item: Any, depth: int) -> Value:
    """A value of the metadata as a pickle would hold it; what lies deeper is left out."""
    if isinstance(item, Mapping):
        kind, data = str(item.get("_type")), item.get("_data")
        if kind == "torch.dtype":
            return Symbol(f"torch.{str(data).removeprefix('torch.')}")
        if not isinstance(data, Mapping):
            return Instance(kind, (_value(data, 0),))
        return Instance(kind, state={name: _value(part, depth - 1) for name, part in data.items()} if depth else {})
    return item if isinstance(item, bool | int | float | str | None) else None
