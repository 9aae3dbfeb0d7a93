"""The header of a GGUF file: its values, and where its tensors are. Neither torch nor gguf is imported.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and length is checked against the file's
size before anything is made of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.formats.gguf.start import GGUF_MAGIC
from aoconvert.sources.base import show
from aoconvert.sources.byte_source import ByteSource

MAX_HEADER_BYTES = 1 << 28
"""Far more than a vocabulary and its merges take."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_WINDOW = 1 << 20
_MAX_NAME = 1 << 16  # a key may have 64 KB, says the format; a tensor's name is bounded alike
_MAX_STRING = 1 << 24
_KEPT = 64  # values of an array that are kept; longer ones are the tokenizer's
_MAX_NESTED = 4
_MAX_DIMS = 64  # torch's own limit
_MAX_INT = 2**63 - 1
_ALIGNMENT = "general.alignment"
_LEAST_VALUE, _LEAST_TENSOR = 13, 32  # bytes of the shortest key with a value, and of the shortest entry


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """A tensor: the number of its type, its shape with the slowest dimension first, and where its data begin."""

    type: int
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        values: scalars, strings and short arrays by key.
        entries: the tensors by name, as the header lists them.
        length: bytes of the header.
        file_size: bytes of the whole file.
        sha256: of the header's bytes.
    """

    values: Mapping[str, Any] = field(repr=False)
    entries: Mapping[str, GgufEntry] = field(repr=False)
    length: int
    file_size: int
    sha256: str

    @property
    def architecture(self) -> str:
        """``general.architecture``, empty where the file does not say it."""
        value = self.values.get("general.architecture")
        return value if isinstance(value, str) else ""

    @property
    def splits(self) -> int:
        """Into how many files the model was split, 1 where it is in one."""
        value = self.values.get("split.count")
        return value if isinstance(value, int) and value > 1 else 1


def read_header(source: ByteSource, label: str, known: GgufHeader | None = None) -> GgufHeader:
    """The header of a GGUF file, little-endian, of version 2 or 3.

    Args:
        source: the file.
        label: what messages call it.
        known: a header that the file had; where it still has it, that is given again.

    Raises:
        SourceError: truncated, damaged, or not a GGUF file that is read.
    """
    if known is not None and known.file_size == source.size:
        raw = source.read(0, known.length)
        if hashlib.sha256(raw).hexdigest() == known.sha256:
            return known
    cursor = _Cursor(source, label)
    if source.size < 24 or cursor.take(4) != GGUF_MAGIC:
        cursor.refuse("is truncated or not a GGUF file")
    (version,) = cursor.unpack("I")
    if version & 0xFFFF == 0:
        cursor.refuse("is a big-endian GGUF file, which is not read", hint="use the little-endian file")
    if version not in (2, 3):
        cursor.refuse(f"is a GGUF file of version {version}; 2 and 3 are read", hint="use a newer conversion")
    tensors, count = cursor.unpack("QQ")
    if count > source.size // _LEAST_VALUE or tensors > source.size // _LEAST_TENSOR:
        cursor.refuse(f"is damaged: its header announces {tensors:,} tensors and {count:,} values")
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text(_MAX_NAME)
        if key in values:
            cursor.refuse(f"is damaged: it has the key {show(key)} twice")
        (kind,) = cursor.unpack("I")
        values[key] = _value(cursor, kind, _MAX_NESTED)
    entries = _entries(cursor, tensors)
    start = _align(cursor, values.get(_ALIGNMENT, 32))
    placed = {name: GgufEntry(entry.type, entry.shape, start + entry.begin) for name, entry in entries.items()}
    return GgufHeader(values, placed, cursor.place, source.size, cursor.digest.hexdigest())


def _entries(cursor: _Cursor, count: int) -> dict[str, GgufEntry]:
    """The table of tensors; their data begin where it says, behind the header."""
    entries: dict[str, GgufEntry] = {}
    for _ in range(count):
        name = cursor.text(_MAX_NAME)
        if name in entries:
            cursor.refuse(f"is damaged: tensor {show(name)} is there twice")
        (dimensions,) = cursor.unpack("I")
        if not 0 < dimensions <= _MAX_DIMS:
            cursor.refuse(f"is damaged: tensor {show(name)} has {dimensions} dimensions")
        shape = cursor.unpack(f"{dimensions}Q")[::-1]
        if 0 in shape or prod(shape) > _MAX_INT:
            cursor.refuse(f"is damaged: tensor {show(name)} has the shape {list(shape)}")
        kind, begin = cursor.unpack("IQ")
        entries[name] = GgufEntry(kind, tuple(shape), begin)
    return entries


def _align(cursor: _Cursor, alignment: Any) -> int:
    """Where the data begin: at the next multiple of the alignment."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > _WINDOW:
        cursor.refuse(f"is damaged: its alignment is {alignment}, which is not a small power of two")
    return -(-cursor.place // alignment) * alignment


def _value(cursor: _Cursor, kind: int, depth: int) -> Any:
    """A value; of an array a tuple, or ``None`` where it is long, holds strings or further arrays."""
    if kind == _STRING:
        return cursor.text(_MAX_STRING)
    if kind in _SCALARS:
        (value,) = cursor.unpack(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value
    if kind != _ARRAY or depth == 0:
        cursor.refuse(f"is damaged: it has a value of type {kind}" if depth else "is damaged: it has nested arrays")
    inner, count = cursor.unpack("IQ")
    if inner in _SCALARS:
        size = struct.calcsize(f"<{_SCALARS[inner]}")
        if count <= _KEPT:
            return cursor.unpack(f"{count}{_SCALARS[inner]}")
        cursor.skip(count * size)
        return None
    if count > (cursor.left // 8):
        cursor.refuse(f"is damaged: it has an array of {count:,} values")
    for _ in range(count):
        if inner == _STRING:
            cursor.skip(cursor.unpack("Q")[0])
        else:
            _value(cursor, inner, depth - 1)
    return None


class _Cursor:
    """Reads a header from front to back, in windows.

    Attributes:
        place: bytes that are read.
        digest: of these.
    """

    def __init__(self, source: ByteSource, label: str) -> None:
        self._source, self._label = source, label
        self._window, self._start = b"", 0
        self.place = 0
        self.digest = hashlib.sha256()

    @property
    def left(self) -> int:
        """Bytes that a header may still have."""
        return min(self._source.size, MAX_HEADER_BYTES) - self.place

    def refuse(self, problem: str, hint: str = DAMAGED_HINT) -> NoReturn:
        """Raise what is said of the file."""
        raise SourceError(f"{self._label} {problem}", hint=hint)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left:
            if self._source.size > MAX_HEADER_BYTES:
                self.refuse(f"is damaged: its header is longer than {MAX_HEADER_BYTES >> 20} MB")
            self.refuse("is truncated: its header does not end in it")
        at = self.place - self._start
        if at + count > len(self._window):
            self._start, at = self.place, 0
            self._window = self._source.read(self.place, min(max(count, _WINDOW), self._source.size - self.place))
        data = self._window[at : at + count]
        self.place += count
        self.digest.update(data)
        return data

    def skip(self, count: int) -> None:
        """Go on behind the next bytes, which are part of the header all the same."""
        if count > self.left:
            self.take(count)
        while count > 0:
            count -= len(self.take(min(count, _WINDOW)))

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Little-endian numbers."""
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def text(self, most: int) -> str:
        """A string in UTF-8."""
        (length,) = self.unpack("Q")
        if length > most and length <= self.left:
            self.refuse(f"is damaged: it has a string of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.refuse("is damaged: it has a name or text that is not UTF-8")
