"""safetensors files: 8 bytes little-endian header length, a JSON header, the data.

Format: the README of https://github.com/huggingface/safetensors. Everything the header says is checked against the
file before any tensor is read, so a damaged or truncated file is refused in the first millisecond, by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from aoconvert.errors import SourceError
from aoconvert.formats.base import DAMAGED_HINT, Observe, TensorInfo, open_file, read_bytes

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

_MAX_DIMS = 64  # torch's own limit
_MAX_INT = 2**63 - 1

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

_SUB_BYTE = "of {name}, which torch has no dtype for"
OTHER_DTYPES: Mapping[str, str] = {name: _SUB_BYTE.format(name=name) for name in ("F4", "F6_E2M3", "F6_E3M2")}
"""Dtypes that the format knows and torch does not, with what to say of such a tensor."""


def read_header(path: Path, others: dict[str, str] | None = None) -> dict[str, TensorInfo]:
    """All tensors of the file that torch can hold, in the order of their data, after every check the format allows.

    Args:
        path: the file.
        others: is given what else the file holds: name → what it is.

    Raises:
        SourceError: the file is missing, truncated, damaged, or no safetensors file.
    """
    descriptor = open_file(path)
    try:
        return _read_header(descriptor, path, None, others if others is not None else {})
    finally:
        os.close(descriptor)


def _bad(path: Path, what: str, hint: str = DAMAGED_HINT) -> NoReturn:
    raise SourceError(f"{path}: {what}", hint=hint)


def _read_header(descriptor: int, path: Path, observe: Observe | None, others: dict[str, str]) -> dict[str, TensorInfo]:
    file_size = os.fstat(descriptor).st_size
    if file_size < 8:
        _bad(path, f"is truncated: a safetensors file has at least 8 bytes, this one has {file_size}")
    length = int.from_bytes(read_bytes(descriptor, 0, 8, str(path), observe=observe).numpy().tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        _bad(path, f"is no safetensors file: its header would be {length} bytes long, the limit is {MAX_HEADER_BYTES}")
    start = 8 + length
    if start > file_size:
        _bad(path, f"is truncated: the header ends at byte {start}, the file has {file_size}")
    header = _parse(read_bytes(descriptor, 8, length, str(path), observe=observe).numpy().tobytes(), path)
    metadata = header.pop("__metadata__", None)  # null is none, as in the reference implementation
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _bad(path, "its __metadata__ is not a table of strings")
    infos = [_info(name, entry, start, path) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(infos, start, file_size, path)
    for name, entry in header.items():
        if isinstance(entry, dict) and entry["dtype"] in OTHER_DTYPES:
            others[name] = OTHER_DTYPES[entry["dtype"]]
    return {info.name: info for info in infos if info.name not in others}


def _parse(text: bytes, path: Path) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in table if names.count(name) > 1)
            _bad(path, f"its header names {twice!r} twice")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, an integer of 5000 digits
        raise SourceError(f"{path}: its header is not valid JSON", hint=DAMAGED_HINT) from error
    if not isinstance(header, dict):
        _bad(path, "its header is not a JSON object")
    return header


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _info(name: str, entry: object, start: int, path: Path) -> TensorInfo:
    """The facts of one tensor, each checked on its own; ``start`` is where the data section begins."""
    where = f"tensor {name!r}"
    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        _bad(path, f"{where}: its name is not valid Unicode")
    if not isinstance(entry, dict):
        _bad(path, f"{where}: its header entry is not a JSON object")
    if missing := {"dtype", "shape", "data_offsets"} - entry.keys():
        _bad(path, f"{where}: its header entry has no {min(missing)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in (*DTYPES, *OTHER_DTYPES):
        _bad(path, f"{where}: unknown dtype {dtype!r}", hint=f"aoconvert reads {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        _bad(path, f"{where}: its shape is not a list of at most {_MAX_DIMS} sizes")
    # sizes beside a zero still have to fit torch's strides
    if math.prod(size for size in shape if size) > _MAX_INT:
        _bad(path, f"{where}: its shape {shape} is too large")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _bad(path, f"{where}: its data_offsets are not two byte offsets")
    begin, end = offsets
    if dtype in OTHER_DTYPES:
        return TensorInfo(name, torch.uint8, tuple(shape), max(0, end - begin), str(path), start + begin)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        _bad(path, f"{where}: {dtype} of shape {shape} takes {nbytes} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), nbytes, str(path), start + begin)


def _check_layout(infos: list[TensorInfo], start: int, file_size: int, path: Path) -> None:
    """No overlap, no hole, and the data ends where the file ends. ``infos`` are sorted by offset."""
    end = start
    for info in infos:
        if info.offset < end:
            _bad(path, f"tensor {info.name!r}: its data overlaps the tensor before it")
        if info.offset > end:
            _bad(path, f"tensor {info.name!r}: {info.offset - end} bytes before its data belong to no tensor")
        end = info.offset + info.nbytes
    if end > file_size:
        _bad(path, f"is truncated: the header promises {end} bytes, the file has {file_size}")
    if end < file_size:
        _bad(path, f"has {file_size - end} bytes after its last tensor that belong to no tensor")


class SafetensorsReader:
    """Reads a ``.safetensors`` file one tensor at a time, without mapping it.

    Args:
        path: the file.
        observe: is told of the bytes of the header, and of those that tensors are made of.

    Raises:
        SourceError: see ``read_header``.
    """

    def __init__(self, path: Path, observe: Observe | None = None) -> None:
        self._path = path
        self._observe = observe
        self._descriptor = open_file(path)
        try:
            self._infos = _read_header(self._descriptor, path, observe, {})
        except BaseException:
            os.close(self._descriptor)
            raise

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name, in the order of their data."""
        return self._infos

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One CPU tensor, in memory of its own or in ``into``.

        Raises:
            ReadError: the data could not be read.
        """
        info = self._infos[name]
        return self._read(info, info.offset, info.shape, into)

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor of at least one dimension; as ``read``."""
        info = self._infos[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {info.shape[0]}")
        row = math.prod(info.shape[1:]) * info.dtype.itemsize
        return self._read(info, info.offset + start * row, (stop - start, *info.shape[1:]), into)

    def _read(self, info: TensorInfo, offset: int, shape: tuple[int, ...], into: torch.Tensor | None) -> torch.Tensor:
        nbytes = math.prod(shape) * info.dtype.itemsize
        data = read_bytes(self._descriptor, offset, nbytes, f"{self._path}: tensor {info.name!r}", into, self._observe)
        return data.view(info.dtype).reshape(shape)

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
