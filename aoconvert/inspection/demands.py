"""What a header does not say in one place: the device that can run the weights, and which integers have a zero point.

A tensor's class tells most packed layouts (``schemes.tensor_classes``). For the others its scheme does: it says whether
activations are quantized too, and which GPU can multiply them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aoconvert.formats.torch_bin.contents import BinTensor, Instance
from aoconvert.inspection.compat import layout_of_classes, parts
from aoconvert.inspection.scheme import scheme_name, scheme_of
from aoconvert.inspection.types import FileFacts, TensorFact
from aoconvert.schemes.table import catalogue
from aoconvert.schemes.tensor_classes import PackedLayout, WeightFacts
from aoconvert.schemes.tensor_classes.current import INTX

_EMULATED = "emulated"


def demand_of(files: Sequence[FileFacts]) -> PackedLayout | None:
    """What the weights of a component need to run; ``None``: any device will do."""
    tensors = [tensor for file in files for tensor in file.tensors if tensor.scheme is not None]
    return _first(_of_classes(tensors), ((fact.scheme, fact.entry) for fact in tensors))


def demand_of_entries(entries: Iterable[BinTensor]) -> PackedLayout | None:
    """As :func:`demand_of`, for the tensors of a finished file."""
    quantized = [entry for entry in entries if entry.inner]
    classes = {part.class_name.rpartition(".")[2] for entry in quantized for part in parts(entry)}
    return _first(layout_of_classes(classes), ((scheme_of(entry), entry) for entry in quantized))


def _of_classes(tensors: Sequence[TensorFact]) -> PackedLayout | None:
    classes = {tensor.class_name.rpartition(".")[2] for tensor in tensors}
    classes |= {
        part.class_name.rpartition(".")[2] for fact in tensors if fact.entry is not None for part in parts(fact.entry)
    }
    return layout_of_classes(classes)


def _first(
    by_class: PackedLayout | None, tensors: Iterable[tuple[str | None, BinTensor | None]]
) -> PackedLayout | None:
    """The layout of a packed class, else the narrowest demand of a scheme."""
    if by_class is not None:
        return by_class
    found = [
        _demands()[scheme] for scheme, entry in tensors if scheme and scheme in _demands() and not _is_emulated(entry)
    ]
    return max(found, key=lambda layout: (layout.device != "any", layout.min_capability or (0, 0)), default=None)


@functools.cache
def _demands() -> Mapping[str, PackedLayout]:
    return {
        entry.name: PackedLayout(entry.device, entry.min_capability, packed=False)
        for entry in catalogue()
        # what --layout-device chooses has one name for several layouts: their classes tell
        if entry.layout_device is None and (entry.device != "any" or entry.min_capability is not None)
    }


def _is_emulated(entry: BinTensor | None) -> bool:
    """Whether the tensor itself asks for products in its original dtype, which every device has."""
    if entry is None:
        return False
    kernels = (entry.attributes.get(name) for name in ("kernel_preference", "_gemm_kernel_choice"))
    return any(isinstance(kernel, Instance) and kernel.args == (_EMULATED,) for kernel in kernels)


def signs(files: Sequence[FileFacts], quantization: Mapping[str, Any]) -> tuple[FileFacts, ...]:
    """The files with the scheme that has zero points in place of the one without where the model's config says so.

    The class is the same: only the zero points differ, and those are not read. A config in which the same width has
    both kinds leaves the name as it is.
    """
    kinds: dict[str, set[bool]] = {}
    for dtype, asymmetric in _mappings(quantization):
        kinds.setdefault(dtype, set()).add(asymmetric)
    renamed = {
        scheme_name(WeightFacts(INTX, dtype)): scheme_name(WeightFacts(INTX, dtype, asymmetric=True))
        for dtype, found in kinds.items()
        if found == {True}
    }
    return tuple(
        replace(file, tensors=tuple(replace(t, scheme=renamed.get(t.scheme, t.scheme)) for t in file.tensors))
        if renamed
        else file
        for file in files
    )


def _mappings(quantization: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """(dtype, asymmetric) of every weight-only integer config in a ``quantization_config``."""
    for config in _configs(quantization.get("quant_type")):
        data = config.get("_data")
        if config.get("_type") != "IntxWeightOnlyConfig" or not isinstance(data, Mapping):
            continue
        dtype = str(_inner(data.get("weight_dtype")))
        if re.fullmatch(r"int[1-8]", dtype):
            yield dtype, _inner(data.get("mapping_type")) == "ASYMMETRIC"


def _configs(quant_type: Any) -> Iterator[Mapping[str, Any]]:
    default = quant_type.get("default") if isinstance(quant_type, Mapping) else None
    if not isinstance(default, Mapping):
        return
    yield default
    data = default.get("_data")
    entries = data.get("fqn_to_config") if isinstance(data, Mapping) else None
    if isinstance(entries, Mapping):
        yield from (entry for entry in entries.values() if isinstance(entry, Mapping))


def _inner(value: Any) -> Any:
    """The value of ``{"_type": ..., "_data": value}``."""
    return value.get("_data") if isinstance(value, Mapping) else value
