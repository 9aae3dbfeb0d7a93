"""The header of a safetensors file: 8 bytes of length (little-endian), then JSON.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aoconvert.errors import SourceError
from aoconvert.files import open_regular

# The limit of the safetensors library itself; a longer header is damage or an attack.
MAX_HEADER_BYTES = 100_000_000


def read_local_header(file: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read and check the header of a file on this machine; no tensor data is read.

    Args:
        file: where it lies.
        name: what messages call it.

    Returns:
        ``{tensor name: {"dtype", "shape", "data_offsets"}}``, offsets in bytes into the data section.

    Raises:
        SourceError: unreadable, truncated, or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with os.fdopen(open_regular(file), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise SourceError(f"{name} is truncated or not a safetensors file", hint=REPLACE_HINT)
            if length > MAX_HEADER_BYTES:
                raise SourceError(f"{name} is not a safetensors file: its header would be {length:,} bytes long")
            raw = stream.read(length)
    except OSError as error:
        raise SourceError(f"{name} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name} is not a safetensors file: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise SourceError(f"{name} is not a safetensors file: its header is not a JSON object")
    entries.pop("__metadata__", None)
    check_entries(entries, size - 8 - length, name)
    return entries


REPLACE_HINT = "the copy or download may have been cut short: fetch the file again"


def check_entries(entries: dict[str, Any], data_bytes: int, name: str) -> None:
    """Check that every header entry is well-formed and lies within the data section.

    Args:
        entries: the header without ``__metadata__``.
        data_bytes: bytes that the data section can have at most.
        name: what messages call the file.

    Raises:
        SourceError: names the tensor.
    """
    for tensor, entry in entries.items():
        if not _is_entry(entry):
            raise SourceError(f"{name}: the header entry of tensor {tensor!r} is malformed")
        end = entry["data_offsets"][1]
        if end > data_bytes:
            raise SourceError(
                f"{name} is truncated: tensor {tensor!r} ends {end - data_bytes:,} bytes past the end of the file",
                hint=REPLACE_HINT,
            )


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    # bool is an int for Python, not for the format.
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return False
    return bool(offsets[0] <= offsets[1])
