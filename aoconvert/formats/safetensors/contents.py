"""What a safetensors file of torchao's holds, from its header alone: checked, and nothing of torchao imported.

torchao's reader (``torchao/prototype/safetensors``) makes objects of the classes that the metadata name. So each name
has to be one that it knows, each part has to be there, and nothing may be left over. Of a plain file, whose metadata
name no tensor of torchao's, the tensors are what the header says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aoconvert.errors import UnsafeFileError
from aoconvert.formats.safetensors.header import DTYPES, HeaderEntry, SafetensorsHeader, read_header
from aoconvert.formats.torch_bin.contents import BinContents, BinTensor, Instance, StoredData, Symbol, Value
from aoconvert.json_text import parse_json
from aoconvert.sources.byte_source import LocalFile

TENSOR_CLASSES: Mapping[str, str] = {
    "Float8Tensor": "torchao.quantization.Float8Tensor",
    "Int4Tensor": "torchao.quantization.Int4Tensor",
    "Int4TilePackedTo4dTensor": "torchao.quantization.Int4TilePackedTo4dTensor",
    "IntxUnpackedToInt8Tensor": "torchao.quantization.IntxUnpackedToInt8Tensor",
    "Int8Tensor": "torchao.quantization.Int8Tensor",
    "Int4PlainInt32Tensor": "torchao.quantization.Int4PlainInt32Tensor",
    "MXTensor": "torchao.prototype.mx_formats.mx_tensor.MXTensor",
    "NVFP4Tensor": "torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor",
}
"""The classes of tensors that torchao 0.18 reads, as the metadata name them, and their dotted names."""

ATTRIBUTE_CLASSES = frozenset(
    {
        "Float8MMConfig",
        "QuantizeTensorToFloat8Kwargs",
        "QuantizeTensorToInt8Kwargs",
        "QuantizeTensorToMXKwargs",
        "QuantizeTensorToNVFP4Kwargs",
        "PerRow",
        "PerTensor",
        "KernelPreference",
        "MappingType",
        "ScaleCalculationMode",
    }
)
"""The other classes that torchao 0.18 makes objects of: settings, and members of enumerations by name."""

_DTYPES = {name for name, _ in DTYPES.values()} | {
    "float4_e2m1fn_x2",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
}
_SHARD = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.safetensors)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
_DEPTH = 6
_MOST_VALUES = 64  # attributes of an object, items of a list
_MOST_PER_BYTE = 8  # elements that a stored byte can stand for
_HINT = "aoconvert inspect shows what the file holds; use a file that torchao's own writer made"


def read_stored(path: Path) -> BinContents:
    """Read and check the header of a file on this machine.

    Raises:
        SourceError: missing, truncated or damaged.
        UnsafeFileError: its metadata do not describe what it holds, or name what no checkpoint needs.
    """
    with LocalFile(path) as source:
        header = read_header(source, str(path))
    return contents_of(header, str(path), Shards(path))


class Shards:
    """The other shards of a model beside one, by their names: ``model-00001-of-00003.safetensors``.

    transformers and torchao's own functions cut a model between any two arrays, which may be parts of one tensor.

    Args:
        path: of the one.

    Attributes:
        paths: of the others.
    """

    def __init__(self, path: Path) -> None:
        match = _SHARD.fullmatch(path.name)
        self.paths: list[Path] = []
        if match is not None:
            names = (f"{match[1]}{number:05}{match[3]}" for number in range(1, int(match[4]) + 1))
            self.paths = [path.with_name(name) for name in names if name != path.name]
        self._headers: dict[Path, SafetensorsHeader] | None = None

    def find(self, key: str) -> tuple[Path, HeaderEntry] | None:
        """The shard that holds an array, and where; ``None``: none of them.

        Raises:
            SourceError: a shard is damaged.
        """
        if self._headers is None:
            self._headers = {path: _read(path) for path in self.paths if path.is_file()}
        found = ((path, header.entries.get(key)) for path, header in self._headers.items())
        return next(((path, entry) for path, entry in found if entry is not None), None)


def _read(path: Path) -> SafetensorsHeader:
    with LocalFile(path) as source:
        return read_header(source, str(path))


def contents_of(header: SafetensorsHeader, label: str, shards: Shards | None = None) -> BinContents:
    """The tensors that a header describes. One whose parts are in several shards is in that which has its codes.

    Args:
        header: of the file.
        label: what messages call it.
        shards: the other files of the model.

    Raises:
        UnsafeFileError: as ``read_stored``.
    """
    described = _described(header.metadata, label)
    tensors: dict[str, BinTensor] = {}
    used: set[str] = set()
    for name, entry in described.items():
        if entry.get("_type") == "Tensor":
            continue
        parts = _parts(name, entry, label)
        keys = {part: part_name(name, part) for part in parts}
        here = {part: key for part, key in keys.items() if key in header.entries}
        if not here:
            continue  # in another file of the model
        found = {part: header.entries[key] for part, key in here.items()}
        places: dict[str, str] = {}
        for part in sorted(keys.keys() - here.keys()):
            if shards is None or (other := shards.find(keys[part])) is None:
                _refuse(label, f"{name!r}: its part {part!r} is not in this file")
            places[part], found[part] = other[0].name, other[1]
        if used & set(keys.values()):
            _refuse(label, f"{name!r} and another tensor have the same parts")
        used |= set(keys.values())
        if codes_part(parts) in here:
            tensors[name] = _torchao_tensor(name, entry, {part: found[part] for part in parts}, places, label)
    plain = {name: _plain(entry) for name, entry in header.entries.items() if name not in used}
    if described and (twice := sorted(plain.keys() & tensors.keys())):
        _refuse(label, f"{twice[0]!r} is there twice, plain and in parts")
    tensors |= plain
    order = dict.fromkeys((*(name for name in described if name in tensors), *tensors))
    return BinContents({name: tensors[name] for name in order}, {}, (), {}, 0, "little")


def codes_part(parts: Sequence[str]) -> str:
    """The part whose file a tensor is counted to, where its parts are in several: its codes, by torchao's name."""
    return "qdata" if "qdata" in parts else parts[0]


def part_name(name: str, part: str) -> str:
    """Under which name an inner tensor is stored."""
    module, _, last = name.rpartition(".")
    return f"{module}._{last}_{part}" if module else f"_{last}_{part}"


def _refuse(label: str, what: str) -> NoReturn:
    raise UnsafeFileError(f"{label}: {what}", hint=_HINT)


def _described(metadata: Mapping[str, str], label: str) -> dict[str, Mapping[str, Any]]:
    """What the metadata say of each tensor; empty where they are not torchao's."""
    if "tensor_names" not in metadata:
        return {}
    names = _json(metadata["tensor_names"], label, "its tensor_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse(label, "its tensor_names are not a list of names")
    if len(set(names)) != len(names):
        _refuse(label, "its tensor_names have a name twice")
    found: dict[str, Mapping[str, Any]] = {}
    known: dict[str, Any] = {}
    for name in names:
        if name not in metadata:
            _refuse(label, f"its metadata have no entry for {name!r}")
        text = metadata[name]
        if text not in known:
            known[text] = _json(text, label, f"the entry of {name!r}")
        entry = known[text]
        if not isinstance(entry, dict) or entry.get("_type") not in ("Tensor", *TENSOR_CLASSES):
            kind = entry.get("_type") if isinstance(entry, dict) else entry
            _refuse(label, f"{name!r} is a {str(kind)[:100]!r}, which torchao's safetensors do not have")
        found[name] = entry
    return found


def _json(text: str, label: str, what: str) -> Any:
    try:
        return parse_json(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise UnsafeFileError(f"{label}: {what} is {error}", hint=_HINT) from error


def _parts(name: str, entry: Mapping[str, Any], label: str) -> list[str]:
    parts = entry.get("_tensor_data_names")
    if not isinstance(parts, list) or not 0 < len(parts) <= _MOST_VALUES:
        _refuse(label, f"{name!r}: its entry lists no parts")
    if not all(isinstance(part, str) and _WORD.fullmatch(part) for part in parts) or len(set(parts)) != len(parts):
        _refuse(label, f"{name!r}: its entry lists parts that are not names")
    return parts


def _torchao_tensor(
    name: str, entry: Mapping[str, Any], parts: Mapping[str, HeaderEntry], places: Mapping[str, str], label: str
) -> BinTensor:
    """A tensor in parts; ``places`` names the other files that hold some of them."""
    data = entry.get("_data")
    if not isinstance(data, dict):
        _refuse(label, f"{name!r}: its entry has no attributes")
    if both := sorted(data.keys() & parts.keys()):
        _refuse(label, f"{name!r}: {both[0]!r} is an attribute and a part")
    attributes = {key: _value(value, label, name, _DEPTH) for key, value in _named(data, label, name)}
    inner = {part: _plain(found, places.get(part, "")) for part, found in parts.items()}
    shape = _shape(attributes.get("shape"), sum(part.nbytes for part in inner.values()))
    if shape is None:
        _refuse(label, f"{name!r}: its shape is not one that its parts can have")
    if not shape and "qdata" in inner:
        shape = inner["qdata"].shape
    dtype = next((attributes[key] for key in ("dtype", "orig_dtype") if key in attributes), None)
    shown = dtype.name.removeprefix("torch.") if isinstance(dtype, Symbol) else "unknown"
    kind = TENSOR_CLASSES[entry["_type"]]
    return BinTensor(kind, shown, shape, None, inner, attributes, False, "cpu", 1 + len(inner), 1)


def _shape(value: Value, nbytes: int) -> tuple[int, ...] | None:
    """What an attribute says of the shape: nothing, or one that so many bytes can have; ``None``: neither."""
    if value is None:
        return ()
    sizes = tuple(size for size in value if type(size) is int and size >= 0) if isinstance(value, tuple) else ()
    if not isinstance(value, tuple) or len(sizes) != len(value) or math.prod(sizes) > nbytes * _MOST_PER_BYTE:
        return None
    return sizes


def _named(values: Mapping[str, Any], label: str, name: str) -> list[tuple[str, Any]]:
    if len(values) > _MOST_VALUES or not all(_WORD.fullmatch(key) for key in values):
        _refuse(label, f"{name!r}: its entry has attributes that are not names")
    return list(values.items())


def _value(value: Any, label: str, name: str, depth: int) -> Value:
    """An attribute as a pickle would hold it: what torchao's reader would make an object of is named, not made."""
    if depth == 0:
        _refuse(label, f"{name!r}: its attributes are nested too deeply")
    if isinstance(value, list):
        if len(value) > _MOST_VALUES:
            _refuse(label, f"{name!r}: an attribute is a list of {len(value)} values")
        return tuple(_value(item, label, name, depth - 1) for item in value)
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]  # JSON has nothing else
    kind, data = value.get("_type"), value.get("_data")
    if kind == "torch.dtype" and value.keys() == {"_type", "_data"} and data in _DTYPES:
        return Symbol(f"torch.{data}")
    if kind not in ATTRIBUTE_CLASSES or value.keys() != {"_type", "_data"}:
        _refuse(label, f"{name!r}: an attribute is a {str(kind)[:100]!r}, which torchao's safetensors do not have")
    if isinstance(data, dict):
        state: dict[str | int, Value] = {}
        state |= {key: _value(item, label, name, depth - 1) for key, item in _named(data, label, name)}
        return Instance(str(kind), state=state)
    if not isinstance(data, str) or not _WORD.fullmatch(data):
        _refuse(label, f"{name!r}: a {kind} is made of {str(data)[:100]!r}")
    return Instance(str(kind), (data,))


def _plain(entry: HeaderEntry, file: str = "") -> BinTensor:
    strides = [math.prod(entry.shape[place + 1 :]) for place in range(len(entry.shape))]
    data = StoredData(file, entry.begin, entry.end - entry.begin, 0, tuple(strides))
    dtype = DTYPES.get(entry.dtype, (entry.dtype, 0))[0]
    return BinTensor("torch.Tensor", dtype, entry.shape, data, {}, {}, False, "cpu")
