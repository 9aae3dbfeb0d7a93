"""torchao's tensor classes, one entry each. To add one, add an entry to ``current``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from packaging.version import Version

from aoconvert.schemes.tensor_classes.current import CURRENT
from aoconvert.schemes.tensor_classes.entry import PackedLayout, TensorClass, WeightFacts
from aoconvert.schemes.tensor_classes.legacy import LEGACY

__all__ = ["CLASSES", "PackedLayout", "TensorClass", "WeightFacts", "class_named", "oldest_reader"]

_DIFFUSERS_SINCE = "0.16"  # torchao_quantizer: it reads no safetensors of torchao's with an older one

CLASSES: Mapping[str, TensorClass] = {entry.name: entry for entry in (*CURRENT, *LEGACY)}


def class_named(name: str) -> TensorClass:
    """The entry of a class, by its name with or without its module; of an unknown class one that says nothing."""
    last = name.rpartition(".")[2]
    return CLASSES.get(last) or TensorClass(name=last)


def oldest_reader(format_name: str, classes: Iterable[str], library: str) -> str:
    """The oldest torchao with which a library reads tensors of today's torchao in files of a format.

    Of safetensors it was measured with files of 0.18 in 0.15.0, 0.16.0 and 0.17.0: an entry with a field that a release
    does not know is an error there. What a ``.bin`` needs depends on more than the classes, and is not said here.

    Args:
        format_name: of ``formats.registry``.
        classes: names of the tensors' classes, those of torchao among them.
        library: ``diffusers`` or ``transformers``.
    """
    if format_name != "safetensors":
        return "0.13"
    known = [found for found in map(class_named, classes) if found.safetensors_since is not None]
    oldest = [str(found.safetensors_since) for found in known]
    oldest += [first for found in known for first, _, _ in found.fields[-1:]]
    return max([*oldest, _DIFFUSERS_SINCE if library == "diffusers" else "0.15"], key=Version).removesuffix(".0")
