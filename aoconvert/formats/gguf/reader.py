"""GGUF files, read one tensor at a time: as they are stored, blocks as bytes. ``originals.gguf`` makes values of them.

The types, the size of their blocks and what stands for how many values come from ``gguf``'s own table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch

from aoconvert.environment import version_of
from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.formats.base import FileContents, Observe, OpenFile, TensorInfo
from aoconvert.formats.contiguous_reader import ContiguousReader
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


class GgufReader(ContiguousReader):
    """Reads a ``.gguf`` file one tensor at a time, without mapping it.

    Args:
        path: the file.
        observe: is told of the bytes of the header, and of those that tensors are made of.
        header: that the file had; it is not parsed again where the file still has it.

    Raises:
        SourceError: see ``contents``.
    """

    def __init__(self, path: Path, observe: Observe | None = None, header: GgufHeader | None = None) -> None:
        self._header = header
        super().__init__(path, observe)

    def _list(self, file: OpenFile) -> Mapping[str, TensorInfo]:
        where = str(self._path)
        return _infos(read_header(file, where, self._header), where, where)
