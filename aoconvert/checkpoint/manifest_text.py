"""Reads the text of a manifest piece by piece: the entries of its tensors never exist as JSON values all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aoconvert.checkpoint.entries import Entry, StoredEntry, TensorEntry
from aoconvert.json_text import JsonStream

_ENTRIES: dict[str, type[Entry]] = {"components": TensorEntry, "unquantized": StoredEntry}


def parse(raw: bytes | bytearray, *, constants: bool = False) -> Any:
    """The value of a manifest's text, for ``Manifest.model_validate``; its tensors' entries are checked already.

    Args:
        raw: UTF-8, or a JSON text that may turn out to be something else.
        constants: as for ``parse_json``.

    Raises:
        ValueError: what is wrong, in a few words that follow "is": no JSON.
    """
    stream = JsonStream(raw, constants=constants)
    values = _read(stream, {key: partial(_models, TypeAdapter(entry)) for key, entry in _ENTRIES.items()})
    stream.finish()
    return values


def _read(stream: JsonStream, lists: Mapping[str, Callable[[JsonStream], list[Any]]]) -> Any:
    """What comes next; where that is an object, its lists of these keys by these functions."""
    if stream.peek() != "{":
        return stream.value()
    values = {}
    for key in stream.members():
        read_list = lists.get(key) if stream.peek() == "[" else None
        values[key] = stream.value() if read_list is None else read_list(stream)
    return values


def _models(entries: TypeAdapter[Entry], stream: JsonStream) -> list[Any]:
    return [_read(stream, {"tensors": partial(_tensors, entries)}) for _ in stream.items()]


def _tensors(entries: TypeAdapter[Entry], stream: JsonStream) -> list[Any]:
    """The entries; the first that is wrong as it stands there, and none after it."""
    found: list[Any] = []
    is_right = True
    for _ in stream.items():
        value = stream.value()
        if is_right:
            with suppress(ValidationError):
                found.append(entries.validate_python(value))
                continue
            is_right = False
            found.append(value)
    return found
