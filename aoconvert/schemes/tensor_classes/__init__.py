"""torchao's tensor classes, one entry each. To add one, add an entry to ``current``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from aoconvert.schemes.tensor_classes.current import CURRENT
from aoconvert.schemes.tensor_classes.entry import PackedLayout, TensorClass, WeightFacts
from aoconvert.schemes.tensor_classes.legacy import LEGACY

__all__ = ["CLASSES", "PackedLayout", "TensorClass", "WeightFacts", "class_named"]

CLASSES: Mapping[str, TensorClass] = {entry.name: entry for entry in (*CURRENT, *LEGACY)}


def class_named(name: str) -> TensorClass:
    """The entry of a class, by its name with or without its module; of an unknown class one that says nothing."""
    last = name.rpartition(".")[2]
    return CLASSES.get(last) or TensorClass(name=last)
