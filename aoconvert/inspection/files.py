"""One weights file: its header, what kind it is, and the tensors of the model in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from aoconvert.errors import UnsafeFileError
from aoconvert.formats.gguf.start import GGUF_MAGIC, read_gguf
from aoconvert.formats.safetensors.contents import codes_part
from aoconvert.formats.safetensors.header import DTYPES, read_header
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.formats.torch_bin.header import read_source
from aoconvert.inspection.foreign import classify
from aoconvert.inspection.scheme import scheme_of, tensor_of_metadata
from aoconvert.inspection.types import FileFacts, TensorFact
from aoconvert.schemes.tensor_classes import class_named
from aoconvert.sources.byte_source import ByteSource


def read_file(source: ByteSource, path: str, label: str, *, local: bool, config: Mapping[str, Any]) -> FileFacts:
    """What a weights file's header says. Nothing is executed, no tensor data is read.

    Args:
        source: the file.
        path: relative to what is inspected.
        label: what messages call it.
        local: on this machine: then every record of a ``.bin`` is looked at, not only its directory.
        config: ``quantization_config`` of the model, or empty.

    Raises:
        SourceError: truncated, or not what its name says. A ``.bin`` that must not be loaded raises nothing: see
            ``FileFacts.unsafe``.
    """
    magic = source.read(0, min(4, source.size))
    if path.endswith(".safetensors"):
        return _safetensors(source, path, label, config)
    if path.endswith(".gguf") or magic == GGUF_MAGIC:
        header = read_gguf(source, label)
        return FileFacts(path, source.size, "gguf", header.tensors, kind="gguf", metadata=header.values)
    return _bin(source, path, label, local=local, config=config)


def _bin(source: ByteSource, path: str, label: str, *, local: bool, config: Mapping[str, Any]) -> FileFacts:
    try:
        contents = read_source(source, label, local_headers=local)
    except UnsafeFileError as error:
        return FileFacts(path, source.size, "bin", kind="unreadable", unsafe=error.message)
    entries = {**_find_nested(contents.others), **contents.tensors}
    names = tuple(use.name for use in contents.globals)
    if any(name.startswith("torchao.") for name in names):
        facts = tuple(_torchao_fact(name, entry) for name, entry in entries.items())
        return FileFacts(path, source.size, "bin", len(entries), facts, "torchao", names)
    dtypes = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    kind, facts = classify(dtypes, config)
    return FileFacts(path, source.size, "bin", len(entries), facts, kind, names)


def _torchao_fact(name: str, entry: BinTensor) -> TensorFact:
    if entry.data is not None:
        return TensorFact(name, "torch.Tensor", entry.dtype, math.prod(entry.shape))
    return TensorFact(
        name, entry.class_name, _stored_dtype(entry), math.prod(entry.shape), scheme_of(entry) or "unknown", entry
    )


def _stored_dtype(entry: BinTensor) -> str:
    """The dtype of the largest plain tensor within."""
    leaves = [leaf for _, leaf in entry.leaves() if leaf.data is not None]
    return max(leaves, key=lambda leaf: leaf.nbytes).dtype if leaves else entry.dtype


def _find_nested(others: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, BinTensor]:
    """Tensors one or two dicts down: ``{"state_dict": {…}}``, ``{"model": …, "optimizer": …}``."""
    found: dict[str, BinTensor] = {}
    for key, value in others.items():
        if isinstance(value, BinTensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and depth < 2:
            found |= _find_nested(value, f"{prefix}{key}.", depth + 1)
    return found


def _safetensors(source: ByteSource, path: str, label: str, config: Mapping[str, Any]) -> FileFacts:
    header = read_header(source, label)
    entries, metadata = header.entries, header.metadata
    stored = {name: (_torch_name(entry.dtype), entry.shape) for name, entry in entries.items()}
    tensors = read_described(metadata)
    if tensors:
        facts = tuple(_flat(stored, tensors))
        return FileFacts(path, source.size, "safetensors", len(entries), facts, "torchao-safetensors", (), metadata)
    kind, facts = classify(stored, config)
    return FileFacts(path, source.size, "safetensors", len(entries), facts, kind, (), metadata)


def _torch_name(dtype: str) -> str:
    """torch's name of a dtype, without ``torch.``; of one that is not known, the format's."""
    return "float4_e2m1fn_x2" if dtype == "F4" else DTYPES.get(dtype, (dtype, 0))[0]


def read_described(metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """The tensors that torchao's metadata describe; empty where it is no file of torchao's.

    Source: ``torchao.prototype.safetensors``: ``tensor_names`` is a JSON list, and each tensor has an entry of its own.
    """
    try:
        names = json.loads(metadata.get("tensor_names", "null"))
        found = {name: json.loads(metadata[name]) for name in names or () if isinstance(name, str) and name in metadata}
    except (ValueError, RecursionError, TypeError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict) and "_type" in value}


def prefix_of(name: str) -> str:
    """What the names of a torchao tensor's parts begin with in a safetensors file: ``0.weight`` → ``0._weight_``."""
    module, _, weight = name.rpartition(".")
    return f"{module}._{weight}_" if module else f"_{weight}_"


def _flat(
    stored: Mapping[str, tuple[str, tuple[int, ...]]], described: Mapping[str, Mapping[str, Any]]
) -> Iterable[TensorFact]:
    helpers: set[str] = set()
    for name, entry in described.items():
        kind = str(entry["_type"])
        if kind == "Tensor":
            continue
        prefix = prefix_of(name)
        parts = entry.get("_tensor_data_names")
        names = list(map(str, parts)) if isinstance(parts, list) else []
        helpers.update(f"{prefix}{part}" for part in names)
        if names and f"{prefix}{codes_part(names)}" not in stored:
            continue  # in another shard: each one describes all tensors of the model
        data = entry.get("_data")
        attributes = data if isinstance(data, dict) else {}
        dtype, shape = stored.get(f"{prefix}qdata", (None, ()))
        scheme = scheme_of(tensor_of_metadata(kind, attributes, dtype)) or "unknown"
        numel = _shape_numel(attributes) or math.prod(shape) * (2 if dtype in class_named(kind).packed_in else 1)
        yield TensorFact(name, f"torchao.{kind}", dtype or "unknown", numel, scheme)
    for name, (dtype, shape) in stored.items():
        if name not in helpers:
            yield TensorFact(name, "torch.Tensor", dtype, math.prod(shape))


def _shape_numel(attributes: Mapping[str, Any]) -> int:
    shape = attributes.get("shape")
    if isinstance(shape, list) and shape and all(type(side) is int and side >= 0 for side in shape):
        return math.prod(shape)
    return 0
