"""torch files (``.bin``, ``.pt``): the pickle through torch's weights-only unpickler, the data by plain reads.

``torch.load(mmap=True)`` would do, but the kernel refuses a private mapping larger than RAM (``ENOMEM``), and
``map_location="meta"`` computes record offsets from torch's own write order instead of looking them up. So the pickle
is read onto the meta device with the record's name kept on each storage, and a tensor's bytes are read when asked for.
Format: ``torch/serialization.py``, ``_load``.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._weights_only_unpickler import Unpickler

from aoconvert.errors import AoconvertError, SourceError
from aoconvert.readers.base import DAMAGED_HINT, Observe, TensorInfo, open_file, read_bytes

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30
_LEGACY_BUFFER = 1 << 20
_REFUSED = re.compile(r"\bGLOBAL (\S+)")
_QUANTIZED_HINT = "aoconvert quantizes floating-point checkpoints; take the original one"


def _bad(path: Path, what: str, hint: str = DAMAGED_HINT) -> NoReturn:
    raise SourceError(f"{path}: {what}", hint=hint)


class TorchBinReader:
    """Reads a torch file one tensor at a time. Memory does not depend on the file's size.

    Files in torch's format from before 1.6 (no zip) are loaded whole; they cannot be read in parts.

    Args:
        path: the file.
        observe: is told of the bytes that tensors are made of.

    Raises:
        SourceError: missing, damaged, not a dict of tensors, already quantized, or its pickle names a class or
            function that weights-only loading refuses.
    """

    def __init__(self, path: Path, observe: Observe | None = None) -> None:
        self._path = path
        self._observe = observe
        self._descriptor = open_file(path)
        try:
            if os.pread(self._descriptor, 4, 0) == _ZIP_MAGIC:
                self._records = _records(path)
                self._tensors = _state_dict(_unpickle(path, self._records), path)
                self._infos = {name: self._info(name, tensor) for name, tensor in self._tensors.items()}
            else:
                self._tensors = _state_dict(_load_legacy(self._descriptor, path, observe), path)
                self._infos = _legacy_infos(self._tensors, path)
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
        return self._read(name, self._tensors[name], into)

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor of at least one dimension; as ``read``."""
        tensor = self._tensors[name]
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {tensor.shape[0]}")
        return self._read(name, tensor[start:stop], into)

    def _read(self, name: str, part: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """``part`` is the tensor or some of its rows: a view, on meta or in memory."""
        if part.device.type != "meta":
            return part.detach().clone(memory_format=torch.contiguous_format)
        whole = self._tensors[name]
        skip = (int(part.storage_offset()) - int(whole.storage_offset())) * part.element_size()
        if not part.is_contiguous():
            into = None  # what is read is not what is given
        where = f"{self._path}: tensor {name!r}"
        data = read_bytes(self._descriptor, self._infos[name].offset + skip, _span(part), where, into, self._observe)
        return data.view(part.dtype).as_strided(part.size(), part.stride(), 0).contiguous()

    def close(self) -> None:
        """Release the file and what was loaded from it."""
        self._tensors = {}
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _info(self, name: str, tensor: torch.Tensor) -> TensorInfo:
        key: str = tensor.untyped_storage()._record  # type: ignore[attr-defined]
        record = self._records.get(f"data/{key}")
        if record is None:
            _bad(self._path, f"tensor {name!r}: its data, record data/{key}, is not in the file")
        skip = int(tensor.storage_offset()) * tensor.element_size()
        if skip + _span(tensor) > record.file_size:
            _bad(self._path, f"tensor {name!r}: needs {skip + _span(tensor)} bytes, its record has {record.file_size}")
        offset = self._data_offset(record) + skip
        nbytes = tensor.numel() * tensor.element_size()
        shape = tuple(tensor.size())
        return TensorInfo(name, tensor.dtype, shape, nbytes, str(self._path), offset)

    def _data_offset(self, record: zipfile.ZipInfo) -> int:
        """Where a record's data starts: its local header repeats name and extra field, in lengths of its own."""
        header = os.pread(self._descriptor, _LOCAL_HEADER_BYTES, record.header_offset)
        if len(header) != _LOCAL_HEADER_BYTES or not header.startswith(_ZIP_MAGIC):
            _bad(self._path, f"is damaged: no record at byte {record.header_offset}, where {record.filename} should be")
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        return record.header_offset + _LOCAL_HEADER_BYTES + name + extra


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first to its last element, whatever its strides."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _records(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by their name below its top folder. The directory is read, no data."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise SourceError(
            f"{path}: is damaged or truncated: its directory cannot be read", hint=DAMAGED_HINT
        ) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        _bad(path, "has compressed records, which torch never writes", hint="save it again with torch.save")
    records = {entry.filename.partition("/")[2]: entry for entry in entries}
    if "data.pkl" not in records:
        _bad(path, "is a zip file but no torch checkpoint: it has no data.pkl", hint="name a file made by torch.save")
    return records


def _unpickle(path: Path, records: Mapping[str, zipfile.ZipInfo]) -> object:
    """The pickled object, its tensors on the meta device, each storage with its record's key as ``_record``."""

    def persistent_load(identifier: tuple[Any, ...]) -> torch.TypedStorage:
        _, kind, key, _, numel = identifier
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        storage = torch.UntypedStorage(numel * dtype.itemsize, device="meta")  # type: ignore[no-untyped-call]
        storage._record = str(key)  # type: ignore[attr-defined]
        return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(records["data.pkl"])
            order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
        if order != b"little":
            _bad(path, "was saved on a big-endian machine", hint="save it again with torch.save on this machine")
        unpickler = Unpickler(io.BytesIO(content), encoding="utf-8")
        unpickler.persistent_load = persistent_load  # type: ignore[method-assign]
        return unpickler.load()  # type: ignore[no-untyped-call]
    except SourceError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _refused(path, error) from error


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
        with warnings.catch_warnings(action="ignore"):  # of a plain pickle's protocol; the error says more
            file = io.BufferedReader(_Observed(descriptor, observe), _LEGACY_BUFFER)
            return torch.load(file, map_location="cpu", weights_only=True)
    except AoconvertError:
        raise
    except Exception as error:  # as above
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> SourceError:
    """One line for a pickle that cannot be read, naming what was refused."""
    found = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found is None:
        return SourceError(f"{path}: is damaged, or no torch checkpoint", hint=DAMAGED_HINT)
    name = found[1]
    if name.startswith("torchao."):
        return SourceError(f"{path}: is already quantized: it holds {name}", hint=_QUANTIZED_HINT)
    return SourceError(
        f"{path}: its pickle asks for {name}, which is not safe to load",
        hint="take a checkpoint that holds only tensors, best in safetensors format",
    )


def _state_dict(content: object, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name; one enclosing ``{"state_dict": ...}`` is opened."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    hint = "aoconvert reads a dict of tensors, or one under the key 'state_dict'"
    if not isinstance(content, dict):
        _bad(path, f"holds a {type(content).__name__}, not a dict of tensors", hint)
    for name, value in content.items():
        if not isinstance(name, str):
            _bad(path, f"the key {name!r} is not a tensor name", hint)
        if not isinstance(value, torch.Tensor):
            _bad(path, f"{name!r} is a {type(value).__name__}, not a tensor", hint)
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_quantized:
            kind = "quantized torch.Tensor" if value.is_quantized else type(value).__qualname__
            _bad(path, f"is already quantized: {name!r} is a {kind}", hint=_QUANTIZED_HINT)
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            _bad(path, f"tensor {name!r} is not dense", hint="save it again as an ordinary tensor")
    return dict(content)


def _legacy_infos(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, TensorInfo]:
    infos, offset = {}, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.size()), nbytes, str(path), offset)
        offset += nbytes
    return infos
