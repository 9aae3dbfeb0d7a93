"""safetensors files, read one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from aoconvert.errors import SourceError
from aoconvert.formats.base import FileContents, Observe, OpenFile, TensorInfo, open_file, read_bytes
from aoconvert.formats.safetensors.header import DTYPES, SafetensorsHeader, header_of, label_of, read_header
from aoconvert.sources import Source

OTHER_DTYPES: Mapping[str, str] = {
    name: f"of {name}, which torch has no dtype for" for name in ("F4", "F6_E2M3", "F6_E3M2")
}
"""Dtypes that the format knows and torch does not, with what to say of such a tensor."""


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for one of ``DTYPES``."""
    dtype: torch.dtype = getattr(torch, DTYPES[name][0])
    return dtype


def contents(source: Source, path: str) -> FileContents:
    """What a file of a source holds, here or on the Hub.

    Raises:
        SourceError: as ``header_of``; a dtype that is not known.
        HubError: the Hub refused, or the connection broke.
    """
    return _contents(header_of(source, path), path, label_of(source, path))


def _contents(header: SafetensorsHeader, path: str, label: str) -> FileContents:
    infos: dict[str, TensorInfo] = {}
    others: dict[str, str] = {}
    for name, entry in header.entries.items():
        if entry.dtype in OTHER_DTYPES:
            others[name] = OTHER_DTYPES[entry.dtype]
        elif entry.dtype not in DTYPES:
            raise SourceError(
                f"{label}: tensor {name!r}: unknown dtype {entry.dtype!r}", hint=f"aoconvert reads {', '.join(DTYPES)}"
            )
        else:
            nbytes = entry.end - entry.begin
            infos[name] = TensorInfo(name, torch_dtype(entry.dtype), entry.shape, nbytes, path, entry.begin)
    return FileContents(infos, others)


class SafetensorsReader:
    """Reads a ``.safetensors`` file one tensor at a time, without mapping it.

    Args:
        path: the file.
        observe: is told of the bytes of the header, and of those that tensors are made of.
        header: that the file had; it is not parsed again where the file still has it.

    Raises:
        SourceError: see ``read_header``; a dtype that is not known.
    """

    def __init__(self, path: Path, observe: Observe | None = None, header: SafetensorsHeader | None = None) -> None:
        self._path = path
        self._observe = observe
        self._descriptor = open_file(path)
        try:
            header = read_header(OpenFile(self._descriptor, path, observe), str(path), header)
            self._infos = _contents(header, str(path), str(path)).tensors
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
