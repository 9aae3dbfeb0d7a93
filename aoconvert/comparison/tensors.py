"""Tensors as the headers of weights files describe them: class, settings, and where the bytes of their parts lie.

Nothing of a pickle is executed. A torchao tensor has the same form here, whether a ``.bin`` holds it or torchao's
safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoconvert.comparison.settings import settle_all, value_of_metadata
from aoconvert.errors import SourceError
from aoconvert.formats.safetensors.contents import Shards, codes_part
from aoconvert.formats.safetensors.header import DTYPES, HeaderEntry, read_header
from aoconvert.formats.torch_bin.contents import BinTensor, Symbol, Value
from aoconvert.formats.torch_bin.header import read_source
from aoconvert.inspection.files import prefix_of, read_described
from aoconvert.schemes.tensor_classes import class_named
from aoconvert.sources.byte_source import LocalFile

_PLAIN = "Tensor"
_CODES = frozenset(
    {"qdata", "int_data", "float8_data", "packed_weight", "packed_float_data", "quantized_data", "codes", "_data"}
)
FACTS = frozenset({"dtype", "shape"})
"""Attributes that every tensor has anyway."""


@dataclass(frozen=True)
class Leaf:
    """A dense array of numbers in a file.

    Attributes:
        file: that holds it.
        dtype: torch's name, without ``torch.``; the format's name of one that torch does not have.
        shape: of the array.
        offset: byte in the file of its first element.
        nbytes: of its elements.
        stride: elements from one index to the next, by dimension.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stride: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether its elements lie in row-major order, one after the other."""
        return all(
            size == 1 or step == wanted
            for size, step, wanted in zip(self.shape, self.stride, row_major(self.shape), strict=True)
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        class_name: dotted for a torchao class, ``Tensor`` for a plain one.
        dtype, shape: what it appears as.
        leaves: its inner tensors by name, dotted where they are nested; a plain tensor is its own, called ``""``.
        settings: its other attributes, in the form of :func:`settle_all`.
        attributes: the same as they were stored.
        entry: what the pickle says of it, where a torch file holds it.
        file: that holds it; its codes, where there are several.
    """

    class_name: str
    dtype: str
    shape: tuple[int, ...]
    leaves: Mapping[str, Leaf]
    settings: Mapping[str, object] = field(default_factory=dict, repr=False)
    attributes: Mapping[str, Value] = field(default_factory=dict, repr=False, compare=False)
    entry: BinTensor | None = field(default=None, repr=False, compare=False)
    file: Path = Path()

    @property
    def is_plain(self) -> bool:
        """Whether it is no torchao tensor."""
        return self.class_name == _PLAIN

    @property
    def has_values(self) -> bool:
        """Whether its only array holds its values themselves."""
        return "" in self.leaves

    @property
    def kind(self) -> str:
        """The last component of its class."""
        return self.class_name.rpartition(".")[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(leaf.nbytes for leaf in self.leaves.values())


def is_codes(leaf: str) -> bool:
    """Whether an inner tensor holds the quantized values themselves."""
    return leaf.rpartition(".")[2] in _CODES


def read_tensors(path: Path, label: str) -> dict[str, StoredTensor]:
    """The tensors that a weights file describes, by name.

    Args:
        path: the file, whose header was found safe.
        label: what messages call it.

    Raises:
        SourceError: damaged, or of a form that cannot be compared.
        UnsafeFileError: a pickle that no checkpoint needs.
    """
    with LocalFile(path) as file:
        if path.suffix == ".safetensors":
            header = read_header(file, label)
            return _flat(header.entries, header.metadata, path)
        contents = read_source(file, label)
    if contents.byteorder != "little":
        raise SourceError(f"{label}: was saved on a big-endian machine", hint="save it again on this machine")
    nested = contents.others.get("state_dict")
    values = nested if isinstance(nested, Mapping) else contents.tensors
    return {str(name): _of_bin(value, path) for name, value in values.items() if isinstance(value, BinTensor)}


def _of_bin(tensor: BinTensor, path: Path) -> StoredTensor:
    leaves = {name: leaf_of(leaf, path) for name, leaf in tensor.leaves()}
    if tensor.data is not None:
        return StoredTensor(_PLAIN, tensor.dtype, tensor.shape, {"": leaves[""]})
    attributes = dict(_nested_attributes(tensor))
    settings = settle_all({name: value for name, value in attributes.items() if name not in FACTS})
    return StoredTensor(tensor.class_name, tensor.dtype, tensor.shape, leaves, settings, attributes, tensor, path)


def _nested_attributes(tensor: BinTensor, prefix: str = "") -> list[tuple[str, Value]]:
    """Attributes of a tensor and of those within it, by dotted name."""
    found = [(f"{prefix}{name}", value) for name, value in tensor.attributes.items()]
    for name, inner in tensor.inner.items():
        if inner.data is None:
            found += _nested_attributes(inner, f"{prefix}{name}.")
    return found


def leaf_of(tensor: BinTensor, path: Path) -> Leaf:
    """Where the elements of a plain tensor of a torch file are."""
    assert tensor.data is not None
    assert tensor.data.offset is not None
    return Leaf(path, tensor.dtype, tensor.shape, tensor.data.offset, tensor.data.nbytes, tensor.data.stride)


def _flat(entries: Mapping[str, HeaderEntry], metadata: Mapping[str, str], path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file; those that torchao took apart are put together by its metadata.

    One whose parts are in several shards is in that which has its codes.
    """
    shards = Shards(path)
    leaves = {name: _leaf_of_entry(entry, path) for name, entry in entries.items()}
    found: dict[str, StoredTensor] = {}
    for name, values in read_described(metadata).items():
        names = values.get("_tensor_data_names")
        data = values.get("_data")
        if values["_type"] == _PLAIN or not isinstance(names, list) or not isinstance(data, Mapping):
            continue
        prefix = prefix_of(name)
        keys = {part: f"{prefix}{part}" for part in map(str, names)}
        if shards.paths and not keys.values() & leaves.keys():
            continue  # each shard describes all tensors of the model
        is_here = bool(keys) and keys[codes_part(list(keys))] in leaves
        parts = {part: leaf for part, key in keys.items() if (leaf := leaves.pop(key, None) or _elsewhere(shards, key))}
        if len(parts) != len(names):
            raise SourceError(
                f"{path.name}: {name} lacks one of its parts: {', '.join(map(str, names))}",
                hint="download the file again, or point aoconvert at an intact copy",
            )
        if is_here:
            found[name] = _of_metadata(str(values["_type"]), data, parts)
    plain = {name: StoredTensor(_PLAIN, leaf.dtype, leaf.shape, {"": leaf}) for name, leaf in leaves.items()}
    return found | plain


def _elsewhere(shards: Shards, key: str) -> Leaf | None:
    """An array in another shard."""
    found = shards.find(key)
    return _leaf_of_entry(found[1], found[0]) if found is not None else None


def _of_metadata(class_name: str, data: Mapping[str, Any], parts: Mapping[str, Leaf]) -> StoredTensor:
    attributes = {str(name): value_of_metadata(item) for name, item in data.items()}
    settings = settle_all({name: value for name, value in attributes.items() if name not in FACTS})
    dtype = attributes.get("dtype", attributes.get("orig_dtype"))
    codes = next((leaf for name, leaf in parts.items() if is_codes(name)), None)
    shape = attributes.get("shape")
    whole = tuple(side for side in shape if isinstance(side, int)) if isinstance(shape, tuple) else None
    seen = whole if whole is not None else codes.shape if codes is not None else ()
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Symbol) else _scale_dtype(parts)
    return StoredTensor(
        f"torchao.{class_name}", name, _unpack_shape(class_name, seen, codes), parts, settings, attributes
    )


def _scale_dtype(parts: Mapping[str, Leaf]) -> str:
    """What a tensor appears as whose metadata do not say it: torchao takes the dtype of its scales."""
    return next((leaf.dtype for name, leaf in parts.items() if name.startswith("scale")), "unknown")


def _unpack_shape(class_name: str, shape: tuple[int, ...], codes: Leaf | None) -> tuple[int, ...]:
    """The shape of the weight, where two values are in an element and only the codes tell it."""
    packed = codes is not None and shape == codes.shape and codes.dtype in class_named(class_name).packed_in
    return (*shape[:-1], shape[-1] * 2) if packed and shape else shape


def _leaf_of_entry(entry: HeaderEntry, path: Path) -> Leaf:
    if entry.dtype not in DTYPES:  # torch has no such numbers: their bytes are compared
        return Leaf(path, entry.dtype, (entry.end - entry.begin,), entry.begin, entry.end - entry.begin, (1,))
    nbytes = entry.end - entry.begin
    return Leaf(path, DTYPES[entry.dtype][0], entry.shape, entry.begin, nbytes, row_major(entry.shape))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of elements that lie one after the other."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
