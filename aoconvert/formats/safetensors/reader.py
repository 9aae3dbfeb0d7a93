"""safetensors files, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from aoconvert.errors import SourceError
from aoconvert.formats.base import FileContents, Observe, OpenFile, TensorInfo
from aoconvert.formats.contiguous_reader import ContiguousReader
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


class SafetensorsReader(ContiguousReader):
    """Reads a ``.safetensors`` file one tensor at a time, without mapping it.

    Args:
        path: the file.
        observe: is told of the bytes of the header, and of those that tensors are made of.
        header: that the file had; it is not parsed again where the file still has it.

    Raises:
        SourceError: see ``read_header``; a dtype that is not known.
    """

    def __init__(self, path: Path, observe: Observe | None = None, header: SafetensorsHeader | None = None) -> None:
        self._header = header
        super().__init__(path, observe)

    def _list(self, file: OpenFile) -> Mapping[str, TensorInfo]:
        where = str(self._path)
        return _contents(read_header(file, where, self._header), where, where).tensors
