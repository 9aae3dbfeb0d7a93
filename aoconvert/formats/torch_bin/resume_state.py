"""What a ``.bin`` that is not finished yet has to remember of a tensor in it: its node of the pickle and its records.

As JSON: ``[node, [[name, size, CRC-32, offset], …]]``, the node as ``pickle_json`` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from aoconvert.formats.base import StoredTensor
from aoconvert.formats.torch_bin.pickle_json import decode, encode
from aoconvert.formats.torch_bin.pickle_tree import Node, globals_of, storages_of
from aoconvert.formats.torch_bin.safe_names import lookup
from aoconvert.formats.torch_bin.zip_writer import Entry, end_of

PREFIX = "archive/"
_MAX_CRC = 0xFFFFFFFF
_MAX_SIZE = 1 << 62


def record_name(key: str | int) -> str:
    """The record that holds a storage."""
    return f"{PREFIX}data/{key}"


def encode_state(node: Node, entries: Iterable[Entry]) -> list[Any]:
    """The state of a tensor, as values that ``json`` writes."""
    return [encode(node), [[entry.name, entry.size, entry.crc, entry.offset] for entry in entries]]


def decode_state(state: Any) -> tuple[Node, list[Entry]]:
    """The node and the records of a tensor.

    Raises:
        ValueError: no such thing.
    """
    match state:
        case [node, list(records)]:
            return decode(node), [_entry(record) for record in records]
    raise ValueError("not the state of a tensor")


def _entry(record: Any) -> Entry:
    match record:
        case [str(name), int(size), int(crc), int(start)] if 0 <= size <= _MAX_SIZE and 0 <= crc <= _MAX_CRC:
            return Entry(name, size, crc, start)
    raise ValueError("not a record")


def restore(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Those tensors, from the first on, that can lie in one file one after the other; see ``Writer.restore``."""
    found: list[StoredTensor] = []
    offset = records = 0
    for tensor in tensors:
        try:
            node, entries = decode_state(tensor.resume_state)
        except (ValueError, RecursionError):
            break
        for number, entry in enumerate(entries, records):
            if (entry.name, entry.offset) != (record_name(number), offset):
                return found
            offset = end_of(entry)
        keys = [str(number) for number in range(records, records + len(entries))]
        names = frozenset(globals_of(node))
        known = all(lookup(*_split(name)) for name in names)
        if not known or tensor.size != offset or sorted(keys) != sorted(storage.key for storage in storages_of(node)):
            break
        found.append(replace(tensor, written=replace(tensor.written, globals=names)))
        records += len(entries)
    return found


def _split(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last
