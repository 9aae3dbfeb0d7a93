"""torch files (``.bin``, ``.pt``), read without torch's unpickler: what they hold is described by our own reader.

``torch.load(mmap=True)`` would do for the data, but the kernel refuses a private mapping larger than RAM (``ENOMEM``);
and a pickle of a megabyte can make torch's unpickler take gigabytes. So the description comes from
``formats.torch_bin.header``, which runs nothing and has bounds, and a tensor's bytes are read when asked for.
Format: ``torch/serialization.py``, ``_load`` and ``_legacy_load``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from aoconvert.errors import DAMAGED_HINT, SourceError, UnsafeFileError
from aoconvert.formats.base import FileContents, Observe, OpenFile, TensorInfo, open_file, read_bytes
from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Value
from aoconvert.formats.torch_bin.header import read_source
from aoconvert.sources import Source

_QUANTIZED_HINT = "aoconvert quantizes floating-point checkpoints; take the original one"
_DICT_HINT = "aoconvert reads a dict of tensors, or one under the key 'state_dict'"
_PLAIN = ("torch.Tensor", "torch.nn.parameter.Parameter")


def _bad(path: Path, what: str, hint: str = DAMAGED_HINT) -> NoReturn:
    raise SourceError(f"{path}: {what}", hint=hint)


@dataclass(frozen=True)
class _StoragePosition:
    """Where a tensor's elements lie: absolute byte offset of the first, and elements from one index to the next."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def span(self) -> int:
        """Bytes from the first to the last element."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def in_order(self) -> bool:
        """Whether they lie in row-major order, one after the other."""
        return (
            self.span == math.prod(self.shape) * self.dtype.itemsize
            and torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()
        )

    def rows(self, start: int, stop: int) -> _StoragePosition:
        """Those of some rows."""
        skip = start * self.stride[0] * self.dtype.itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + skip)


class TorchBinReader:
    """Reads a torch file one tensor at a time. Memory does not depend on the file's size.

    Args:
        path: the file.
        observe: is told of the bytes that are read of it.

    Attributes:
        others: what the file holds beside tensors that can be read: name → what it is.

    Raises:
        SourceError: missing, damaged, not a dict of tensors, already quantized, or its pickle holds what does not
            belong in a checkpoint.
    """

    others: Mapping[str, str]

    def __init__(self, path: Path, observe: Observe | None = None) -> None:
        self._path = path
        self._observe = observe
        self._places: dict[str, _StoragePosition] = {}
        self._descriptor = open_file(path)
        try:
            self._places, self.others = _places(OpenFile(self._descriptor, path, observe), path)
            self._infos = {name: _info(name, place, path) for name, place in self._places.items()}
        except BaseException:
            os.close(self._descriptor)
            raise

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name."""
        return self._infos

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One contiguous CPU tensor; in ``into`` where its data lie in the file in that order.

        Raises:
            ReadError: the data could not be read.
        """
        return self._read(name, self._places[name], into)

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor of at least one dimension; as ``read``."""
        rows = self._infos[name].shape[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {rows}")
        return self._read(name, self._places[name].rows(start, stop), into)

    def _read(self, name: str, place: _StoragePosition, into: torch.Tensor | None) -> torch.Tensor:
        if not place.in_order:
            into = None  # what is read is not what is given
        where = f"{self._path}: tensor {name!r}"
        data = read_bytes(self._descriptor, place.offset, place.span, where, into, self._observe)
        return data.view(place.dtype).as_strided(place.shape, place.stride, 0).contiguous()

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def contents(source: Source, path: str) -> FileContents | None:
    """What a file of a source holds; ``None`` where it is not on this machine.

    Raises:
        SourceError: as ``TorchBinReader``.
    """
    if not source.is_local(path):
        return None
    reader = TorchBinReader(source.local(path))
    reader.close()
    return FileContents(reader.infos(), reader.others)


def _places(source: OpenFile, path: Path) -> tuple[dict[str, _StoragePosition], dict[str, str]]:
    """The tensors by name, and what else there is; one enclosing ``{"state_dict": ...}`` is opened."""
    try:
        contents = read_source(source, str(path), expanded=True)
    except UnsafeFileError as error:
        raise SourceError(error.message, hint=error.hint or DAMAGED_HINT) from error
    for use in contents.globals:
        if use.name.startswith("torchao."):
            _bad(path, f"is already quantized: it holds {use.name}", _QUANTIZED_HINT)
    if contents.byteorder != "little":
        _bad(path, "was saved on a big-endian machine", hint="save it again with torch.save on this machine")
    inner = contents.others.get("state_dict")
    top: dict[str | int, Value] = dict(contents.others)
    top.update(contents.tensors)
    found = inner if isinstance(inner, Mapping) else top
    tensors: dict[str, _StoragePosition] = {}
    others: dict[str, str] = {}
    for name, value in found.items():
        if not isinstance(name, str):
            _bad(path, f"the key {name!r} is not a tensor name", _DICT_HINT)
        if isinstance(value, BinTensor):
            tensors[name] = _place(name, value)
        else:
            others[name] = _other(_kind(value))
    _require_tensors(tensors, others, path)
    return tensors, others


def _other(kind: str) -> str:
    """What to say of a value that is not a tensor."""
    return "None" if kind == "NoneType" else f"a {kind}, not a tensor"


def _require_tensors(tensors: Mapping[str, object], others: Mapping[str, str], path: Path) -> None:
    if others and not tensors:
        _bad(path, f"holds no tensor, but {', '.join(sorted(others)[:3])}", _DICT_HINT)


def _place(name: str, value: BinTensor) -> _StoragePosition:
    if value.class_name not in _PLAIN or value.data is None or value.data.offset is None:
        raise AssertionError(f"{name!r} is a {value.class_name}, but nothing of torchao is in the file")
    return _StoragePosition(getattr(torch, value.dtype), value.shape, value.data.stride, value.data.offset)


def _kind(value: Value) -> str:
    if isinstance(value, Mapping):
        return "dict"
    return value.class_name.rpartition(".")[2] if isinstance(value, Instance) else type(value).__name__


def _info(name: str, place: _StoragePosition, path: Path) -> TensorInfo:
    nbytes = math.prod(place.shape) * place.dtype.itemsize
    return TensorInfo(name, place.dtype, place.shape, nbytes, str(path), place.offset, place.stride)
