"""torch files (``.bin``, ``.pt``), read without torch's unpickler: what they hold is described by our own reader.

``torch.load(mmap=True)`` would do for the data, but the kernel refuses a private mapping larger than RAM (``ENOMEM``);
and a pickle of a megabyte can make torch's unpickler take gigabytes. So the description comes from
``formats.torch_bin.header``, which runs nothing and has bounds, and a tensor's bytes are read when asked for.
Format: ``torch/serialization.py``, ``_load`` and ``_legacy_load``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from aoconvert.errors import DAMAGED_HINT, AoconvertError, SourceError, UnsafeFileError
from aoconvert.formats.base import FileContents, Observe, OpenFile, TensorInfo, open_file, read_bytes
from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Value
from aoconvert.formats.torch_bin.header import read_source
from aoconvert.sources import Source

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_BUFFER = 1 << 20
_LEGACY_PICKLES = 4  # magic number, protocol, sizes of C types, the dict
_LEGACY_OPCODES = 1_000_000
_LEGACY_NAMES = re.compile(
    r"collections OrderedDict|torch (\w+Storage|b?float\w+|u?int\d+|bool|complex\d+|Size)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(tensor(_v[23])?|parameter)|torch\.nn\.parameter Parameter"
)
_REFUSED = re.compile(r"\bGLOBAL (\S+)")
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

    Files in torch's format from before 1.6 (no zip) are loaded whole; they cannot be read in parts.

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
        self._loaded: dict[str, torch.Tensor] = {}
        self._descriptor = open_file(path)
        try:
            if os.pread(self._descriptor, 4, 0) == _ZIP_MAGIC:
                self._places, self.others = _places(OpenFile(self._descriptor, path, observe), path)
                self._infos = {name: _info(name, place, path) for name, place in self._places.items()}
            else:
                content = _load_legacy(self._descriptor, path, observe)
                self._loaded, self.others = _state_dict(content, path)
                self._infos = _legacy_infos(self._loaded, path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name. In a file that is not a zip, offsets only tell the order."""
        return self._infos

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One contiguous CPU tensor; in ``into`` where its data lie in the file in that order.

        Raises:
            ReadError: the data could not be read.
        """
        if name in self._loaded:
            return _own(self._loaded[name])
        return self._read(name, self._places[name], into)

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor of at least one dimension; as ``read``."""
        rows = self._infos[name].shape[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {rows}")
        if name in self._loaded:
            return _own(self._loaded[name][start:stop])
        return self._read(name, self._places[name].rows(start, stop), into)

    def _read(self, name: str, place: _StoragePosition, into: torch.Tensor | None) -> torch.Tensor:
        if not place.in_order:
            into = None  # what is read is not what is given
        where = f"{self._path}: tensor {name!r}"
        data = read_bytes(self._descriptor, place.offset, place.span, where, into, self._observe)
        return data.view(place.dtype).as_strided(place.shape, place.stride, 0).contiguous()

    def close(self) -> None:
        """Release the file and what was loaded from it."""
        self._loaded = {}
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


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _places(source: OpenFile, path: Path) -> tuple[dict[str, _StoragePosition], dict[str, str]]:
    """The tensors by name, and what else there is; one enclosing ``{"state_dict": ...}`` is opened."""
    try:
        contents = read_source(source, str(path), expanded=True)
    except UnsafeFileError as error:
        raise SourceError(error.message, hint=error.hint or DAMAGED_HINT) from error
    for use in contents.globals:
        if use.name.startswith("torchao."):
            raise _unsafe(path, use.name)
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


class _Observed(io.RawIOBase):
    """An open file whose readers are observed. It shows no descriptor, past which torch would read."""

    def __init__(self, descriptor: int, observe: Observe | None) -> None:
        self._descriptor = descriptor
        self._observe = observe
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = os.preadv(self._descriptor, [view], self._position)
        if self._observe is not None:
            self._observe(self._position, view[:count])
        self._position += count
        return count


def _load_legacy(descriptor: int, path: Path, observe: Observe | None) -> object:
    try:
        _check_legacy(descriptor, path)
        with warnings.catch_warnings(action="ignore"):  # of a plain pickle's protocol; the error says more
            file = io.BufferedReader(_Observed(descriptor, observe), _LEGACY_BUFFER)
            return torch.load(file, map_location="cpu", weights_only=True)
    except AoconvertError:
        raise
    except Exception as error:  # as above
        raise _refused(path, error) from error


def _check_legacy(descriptor: int, path: Path) -> None:
    """Refuse pickles that ``torch.save`` of that time never wrote, before torch's unpickler makes anything of them.

    Raises:
        SourceError: a name that has no business there, or too many opcodes.
        ValueError: damaged.
    """
    file = io.BufferedReader(_Observed(descriptor, None), _LEGACY_BUFFER)
    count = 0
    for _ in range(_LEGACY_PICKLES):
        for opcode, argument, _position in pickletools.genops(file):
            count += 1
            if count > _LEGACY_OPCODES:
                _bad(path, f"its pickle has more than {_LEGACY_OPCODES:,} opcodes")
            if opcode.name == "GLOBAL" and not _LEGACY_NAMES.fullmatch(str(argument)):
                raise _unsafe(path, str(argument).replace(" ", "."))


def _refused(path: Path, error: Exception) -> SourceError:
    """One line for a pickle that cannot be read, naming what was refused."""
    found = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found is None:
        return SourceError(f"{path}: is damaged, or is not a torch checkpoint", hint=DAMAGED_HINT)
    return _unsafe(path, found[1])


def _unsafe(path: Path, name: str) -> SourceError:
    if name.startswith("torchao."):
        return SourceError(f"{path}: is already quantized: it holds {name}", hint=_QUANTIZED_HINT)
    return SourceError(
        f"{path}: its pickle asks for {name}, which is not safe to load",
        hint="use a checkpoint that holds only tensors, preferably in safetensors format",
    )


def _state_dict(content: object, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors by name, and what else there is; one enclosing ``{"state_dict": ...}`` is opened."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        _bad(path, f"holds a {type(content).__name__}, not a dict of tensors", _DICT_HINT)
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, str] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            _bad(path, f"the key {name!r} is not a tensor name", _DICT_HINT)
        if not isinstance(value, torch.Tensor):
            others[name] = _other(type(value).__name__)
        elif type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_quantized:
            kind = "quantized torch.Tensor" if value.is_quantized else type(value).__qualname__
            _bad(path, f"is already quantized: {name!r} is a {kind}", hint=_QUANTIZED_HINT)
        elif value.layout is not torch.strided or value.is_conj() or value.is_neg():
            others[name] = "not a dense tensor"
        else:
            tensors[name] = value
    _require_tensors(tensors, others, path)
    return tensors, others


def _legacy_infos(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, TensorInfo]:
    infos, offset = {}, 0
    for name, tensor in tensors.items():
        infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.size()), tensor.nbytes, str(path), offset)
        offset += tensor.nbytes
    return infos
