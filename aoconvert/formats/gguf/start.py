"""The start of a GGUF file: what it is, from its first kilobytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.sources.byte_source import ByteSource

GGUF_MAGIC = b"GGUF"
_GGUF_FIRST = 1 << 16  # the scalars that matter stand before the tokenizer, which can have megabytes
_GGUF_STRING = 8
_GGUF_ARRAY = 9
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufStart:
    """The start of a GGUF file.

    Attributes:
        version: of the format.
        tensors: how many there are.
        values: the scalars and strings before the first array (``general.architecture``, ``general.file_type``).
    """

    version: int
    tensors: int
    values: Mapping[str, str]


def read_gguf(source: ByteSource, label: str) -> GgufStart:
    """The start of a GGUF file, little- or big-endian.

    Raises:
        SourceError: truncated, or not a GGUF file.
    """
    head = source.read(0, min(source.size, _GGUF_FIRST))
    if len(head) < 24 or head[:4] != GGUF_MAGIC:
        raise SourceError(f"{label} is truncated or not a GGUF file", hint=DAMAGED_HINT)
    order = "<" if head[4:6] != b"\0\0" else ">"
    version, tensors, count = struct.unpack_from(f"{order}IQQ", head, 4)
    if version not in (2, 3):
        raise SourceError(f"{label} is a GGUF file of version {version}, which aoconvert does not know")
    return GgufStart(version, tensors, _gguf_values(head, order, count))


def _gguf_values(head: bytes, order: str, count: int) -> dict[str, str]:
    """Key-value pairs up to the first array, or to where ``head`` ends."""
    values: dict[str, str] = {}
    place = 24

    def text() -> str:
        nonlocal place
        (length,) = struct.unpack_from(f"{order}Q", head, place)
        raw = head[place + 8 : place + 8 + length]
        if len(raw) != length:
            raise struct.error
        place += 8 + length
        return raw.decode("utf-8", "replace")

    try:
        for _ in range(count):
            key = text()
            (kind,) = struct.unpack_from(f"{order}I", head, place)
            place += 4
            if kind == _GGUF_STRING:
                values[key] = text()
            elif kind in _GGUF_SCALARS:
                code = order + _GGUF_SCALARS[kind]
                values[key] = str(struct.unpack_from(code, head, place)[0])
                place += struct.calcsize(code)
            else:
                break
    except struct.error:
        pass
    return values
