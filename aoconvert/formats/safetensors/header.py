"""The header of a safetensors file: 8 bytes of length (little-endian), then JSON.

Format: the README of https://github.com/huggingface/safetensors. Everything the header says is checked against the
file's size, so a damaged or truncated file is refused in the first millisecond, by name. torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.sources import Source
from aoconvert.sources.byte_source import ByteSource

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

_MAX_DIMS = 64  # torch's own limit
_MAX_INT = 2**63 - 1

DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}
"""The format's name of a dtype → torch's, without ``torch.``, and bytes per element."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor: its dtype as the format names it, and where in the file its data begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file holds.

    Attributes:
        entries: by name, in the order of their data.
        metadata: the strings beside them.
        file_size: bytes of the whole file.
        sha256: of the header's bytes, those of its length included.
    """

    entries: Mapping[str, HeaderEntry] = field(repr=False)
    metadata: Mapping[str, str]
    file_size: int
    sha256: str


def header_of(source: Source, path: str) -> SafetensorsHeader:
    """The header of a file of a source, here or on the Hub; it is parsed once.

    Raises:
        SourceError: the file is missing, truncated, damaged, or not a safetensors file.
        HubError: the Hub refused, or the connection broke.
    """
    known: SafetensorsHeader | None = source.headers.get(path)
    if known is None or source.is_local(path):
        with source.open(path) as file:
            known = source.headers[path] = read_header(file, label_of(source, path), known)
    return known


def label_of(source: Source, path: str) -> str:
    """What messages call a file of a source."""
    return str(source.local(path)) if source.is_local(path) else f"{source.label}: {path}"


def read_header(source: ByteSource, label: str, known: SafetensorsHeader | None = None) -> SafetensorsHeader:
    """The header of a file, after every check that the format allows.

    Args:
        source: the file.
        label: what messages call it.
        known: a header that the file had; where it still has it, that is given again.

    Raises:
        SourceError: truncated, damaged, or not a safetensors file.
    """
    if source.size < 8:
        _bad(label, f"is truncated: a safetensors file has at least 8 bytes, this one has {source.size}")
    raw = source.read(0, 8)
    length = int.from_bytes(raw, "little")
    if length > MAX_HEADER_BYTES:
        limit = f"the limit is {MAX_HEADER_BYTES}"
        _bad(label, f"is not a safetensors file: its header would be {length} bytes long, {limit}")
    start = 8 + length
    if start > source.size:
        _bad(label, f"is truncated: the header ends at byte {start}, the file has {source.size}")
    raw += source.read(8, length)
    sha256 = hashlib.sha256(raw).hexdigest()
    if known is not None and (known.file_size, known.sha256) == (source.size, sha256):
        return known
    return _parse(raw, source.size, sha256, label)


def _bad(label: str, what: str, hint: str = DAMAGED_HINT) -> NoReturn:
    raise SourceError(f"{label}: {what}", hint=hint)


def _parse(raw: bytes, file_size: int, sha256: str, label: str) -> SafetensorsHeader:
    header = _json(raw[8:], label)
    metadata = header.pop("__metadata__", None)  # null is none, as in the reference implementation
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _bad(label, "its __metadata__ is not a table of strings")
    found = [(name, _entry(name, values, len(raw), label)) for name, values in header.items()]
    found.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_layout(found, len(raw), file_size, label)
    return SafetensorsHeader(dict(found), metadata, file_size, sha256)


def _json(text: bytes, label: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in table if names.count(name) > 1)
            _bad(label, f"its header names {twice!r} twice")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, an integer of 5000 digits
        raise SourceError(f"{label}: its header is not valid JSON", hint=DAMAGED_HINT) from error
    if not isinstance(header, dict):
        _bad(label, "its header is not a JSON object")
    return header


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _entry(name: str, entry: object, start: int, label: str) -> HeaderEntry:
    """One tensor, checked on its own; ``start`` is where the data section begins."""
    where = f"tensor {name!r}"
    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        _bad(label, f"{where}: its name is not valid Unicode")
    if not isinstance(entry, dict):
        _bad(label, f"{where}: its header entry is not a JSON object")
    if missing := {"dtype", "shape", "data_offsets"} - entry.keys():
        _bad(label, f"{where}: its header entry has no {min(missing)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        _bad(label, f"{where}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        _bad(label, f"{where}: its shape is not a list of at most {_MAX_DIMS} sizes")
    # sizes beside a zero still have to fit torch's strides
    if math.prod(size for size in shape if size) > _MAX_INT:
        _bad(label, f"{where}: its shape {shape} is too large")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _bad(label, f"{where}: its data_offsets are not two byte offsets")
    begin, end = offsets
    if dtype in DTYPES:
        nbytes = math.prod(shape) * DTYPES[dtype][1]
        if end - begin != nbytes:
            _bad(label, f"{where}: {dtype} of shape {shape} takes {nbytes} bytes, its data_offsets span {end - begin}")
    return HeaderEntry(sys.intern(dtype), tuple(shape), start + begin, start + max(begin, end))


def _check_layout(entries: list[tuple[str, HeaderEntry]], start: int, file_size: int, label: str) -> None:
    """No overlap, no hole, and the data ends where the file ends. ``entries`` are sorted by offset."""
    end = start
    for name, entry in entries:
        if entry.begin < end:
            _bad(label, f"tensor {name!r}: its data overlaps the tensor before it")
        if entry.begin > end:
            _bad(label, f"tensor {name!r}: {entry.begin - end} bytes before its data belong to no tensor")
        end = entry.end
    if end > file_size:
        _bad(label, f"is truncated: the header promises {end} bytes, the file has {file_size}")
    if end < file_size:
        _bad(label, f"has {file_size - end} bytes after its last tensor that belong to no tensor")
