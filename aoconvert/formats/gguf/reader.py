"""GGUF files, read one tensor at a time: as they are stored, blocks as bytes. ``originals.gguf`` makes values of them.

The types, the size of their blocks and what stands for how many values come from ``gguf``'s own table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch

from aoconvert.environment import version_of
from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.formats.base import FileContents, Observe, OpenFile, TensorInfo, open_file, read_bytes
from aoconvert.formats.gguf.header import GgufEntry, GgufHeader, read_header
from aoconvert.sources import Source
from aoconvert.sources.base import show

PLAIN: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that are no blocks: torch's dtype of the same values."""

MISSING_HINT = "pip install gguf: its code gives the values back"


def header_of(source: Source, path: str) -> GgufHeader:
    """The header of a file of a source, which must be on this machine; it is parsed once.

    Raises:
        SourceError: as ``read_header``.
    """
    with source.open(path) as file:
        found = source.headers[path] = read_header(file, str(source.local(path)), source.headers.get(path))
    return found


def contents(source: Source, path: str) -> FileContents | None:
    """What a file of a source holds; ``None`` where it is not on this machine.

    Raises:
        SourceError: truncated or damaged; a type that gguf does not know; no gguf.
    """
    if not source.is_local(path):
        return None
    return FileContents(_infos(header_of(source, path), path, str(source.local(path))), {})


def _infos(header: GgufHeader, file: str, label: str) -> dict[str, TensorInfo]:
    """The tensors, in the order of their data.

    Raises:
        SourceError: as ``contents``.
    """
    if find_spec("gguf") is None:
        raise SourceError(f"{label} is a GGUF file, and gguf is not installed", hint=MISSING_HINT)
    if header.splits > 1:
        raise SourceError(
            f"{label} is one of {header.splits} files into which a model was split",
            hint="join them: llama-gguf-split --merge FIRST.gguf JOINED.gguf",
        )
    infos = sorted((_info(name, entry, file, label) for name, entry in header.entries.items()), key=lambda i: i.offset)
    for one, other in pairwise(infos):
        if one.offset + one.nbytes > other.offset:
            raise SourceError(
                f"{label} is damaged: tensors {show(one.name)} and {show(other.name)} overlap", hint=DAMAGED_HINT
            )
    for info in infos:
        if (end := info.offset + info.nbytes) > header.file_size:
            raise SourceError(
                f"{label} is truncated: tensor {show(info.name)} ends at byte {end}, the file has {header.file_size}",
                hint=DAMAGED_HINT,
            )
    return {info.name: info for info in infos}


def _info(name: str, entry: GgufEntry, file: str, label: str) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(entry.type)
        elements, nbytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise SourceError(
            f"{label}: tensor {show(name)} has the type {entry.type}, which gguf {version_of('gguf')} does not know",
            hint="pip install -U gguf",
        ) from None
    if (dtype := PLAIN.get(kind.name)) is not None:
        return TensorInfo(name, dtype, entry.shape, math.prod(entry.shape) * nbytes, file, entry.begin)
    *rows, row = entry.shape
    if row % elements:
        raise SourceError(
            f"{label} is damaged: tensor {show(name)} has rows of {row}, and {kind.name} has blocks of {elements}",
            hint=DAMAGED_HINT,
        )
    shape = (*rows, row // elements * nbytes)
    return TensorInfo(name, torch.uint8, shape, math.prod(shape), file, entry.begin, packing=kind.name)


class GgufReader:
    """Reads a ``.gguf`` file one tensor at a time, without mapping it.

    Args:
        path: the file.
        observe: is told of the bytes of the header, and of those that tensors are made of.
        header: that the file had; it is not parsed again where the file still has it.

    Raises:
        SourceError: see ``contents``.
    """

    def __init__(self, path: Path, observe: Observe | None = None, header: GgufHeader | None = None) -> None:
        self._path = path
        self._observe = observe
        self._descriptor = open_file(path)
        try:
            self._infos = _infos(
                read_header(OpenFile(self._descriptor, path, observe), str(path), header), str(path), str(path)
            )
        except BaseException:
            os.close(self._descriptor)
            raise

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name, in the order of their data."""
        return self._infos

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One CPU tensor as it is stored, in memory of its own or in ``into``.

        Raises:
            ReadError: the data could not be read.
        """
        info = self._infos[name]
        return self._read(info, info.offset, info.shape, into)

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor; as ``read``."""
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
