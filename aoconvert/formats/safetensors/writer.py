"""A safetensors file written one tensor at a time: the header first, out of the plan, then the data as they come.

The header has to come first, and says where everything lies. So it is made of the plan: of tensors on meta, which have
the shapes, dtypes and attributes of those that will come. Format: the README of https://github.com/huggingface/safetensors;
torchao's tensors in it: ``torchao_tensors``. The reference implementation sorts the data by dtype and name. Here they
lie in the order in which they are read, which the format allows, so that nothing has to be held or moved.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aoconvert.errors import WriteError
from aoconvert.formats.base import FileOutline, SealedFile, StoredTensor, WrittenTensor
from aoconvert.formats.content import data_names, own_bytes
from aoconvert.formats.dtypes import dtype_name
from aoconvert.formats.hashing import Prefix
from aoconvert.formats.output_writer import OutputWriter
from aoconvert.formats.safetensors.contents import part_name
from aoconvert.formats.safetensors.header import DTYPES
from aoconvert.formats.safetensors.torchao_tensors import NAMES, CannotFlatten, flatten
from aoconvert.formats.torch_bin.pickle_tree import own_storage

SHARED = "aoconvert_shared"
"""Entry of the metadata: second names as JSON, and the tensor that each stands for. Their data are there twice."""

_NAMES_OF = {name: code for code, (name, _) in DTYPES.items()}
_CHUNK = 4 << 20


@dataclass(frozen=True)
class _Place:
    """Where a plain tensor goes: bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsWriter(OutputWriter):
    """Streams tensors into one ``.safetensors``, which torchao's own reader opens. See ``Writer``.

    Raises:
        WriteError: the file exists, does not exist, or cannot be created; its beginning is not what was planned.
    """

    @staticmethod
    def outline(
        tensors: Mapping[str, torch.Tensor],
        order: Sequence[str] | None = None,
        also: Mapping[str, str] | None = None,
        model: Mapping[str, torch.Tensor] | None = None,
    ) -> FileOutline:
        """The size and the header of a file, see ``Writer.outline``; no data is read."""
        entries: dict[str, Any] = {"__metadata__": _metadata(model or _sorted(tensors, order), also or {})}
        end = 0
        for name, tensor in (*tensors.items(), *((name, tensors[same]) for name, same in (also or {}).items())):
            for key, part in _flatten(name, tensor).items():
                if key in entries:
                    raise WriteError(f"two tensors would be stored as {key!r}", hint="rename one of them")
                begin, end = end, end + part.nbytes
                code = _code(name, part)
                entries[key] = {"dtype": code, "shape": list(part.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return FileOutline(len(head) + end, head)

    @staticmethod
    def restore(tensors: Sequence[StoredTensor], head: bytes = b"") -> list[StoredTensor]:
        """See ``Writer.restore``."""
        places, found, digest = iter(_places(head).values()), list[StoredTensor](), _sha256(head)
        for tensor in tensors:
            parts = list(itertools.islice(places, len(tensor.written.data_names or ("",))))
            if not parts or parts[-1].end != tensor.size or tensor.resume_state != digest:
                break
            found.append(tensor)
        return found

    def __init__(
        self, path: Path, stored: Sequence[StoredTensor] = (), prefix: Prefix | None = None, head: bytes = b""
    ) -> None:
        super().__init__(path, prefix if stored else None)
        self._head = head
        self._places = _places(head)
        self._written = {tensor.written.name: tensor.written for tensor in stored}
        self._last: WrittenTensor | None = None
        if not stored:
            self._write_head()
        elif os.pread(self._file.fileno(), len(head), 0) != head:
            self.leave()
            raise WriteError(f"{path}: its header is not the one that is planned", hint="use --no-resume")

    def add(self, name: str, tensor: torch.Tensor) -> WrittenTensor:
        """Write a tensor that is in host memory, see ``Writer.add``."""
        names = data_names(tensor)
        sink = self.begin(name, tensor)
        sink.put(own_storage(getattr(tensor, names[0]) if names else tensor).contiguous())
        return sink.finish({part: getattr(tensor, part) for part in names[1:]})

    def begin(self, name: str, like: torch.Tensor) -> SafetensorsSink:
        """Write a tensor whose rows come one after the other, see ``Writer.begin``."""
        self._expect(name, name in self._written)
        end = self._file.size
        for key, part in _flatten(name, like).items():
            if self._places.get(key) != _Place(_code(name, part), tuple(part.shape), end, end + part.nbytes):
                raise WriteError(
                    f"{self._path}: {key!r} of {list(part.shape)} is not what its header has at byte {end}"
                )
            end += part.nbytes
        self._whole = False
        return SafetensorsSink(self, name, like)

    def last(self) -> StoredTensor:
        """The tensor that was written last, see ``Writer.last``."""
        assert self._last is not None and self._whole
        return StoredTensor(self._last, _sha256(self._head), self._file.size, self._file.sha256())

    def seal(self, order: Sequence[str] | None = None, also: Mapping[str, str] | None = None) -> SealedFile:
        """Write the second names' data, and flush the file to the disk, see ``Writer.seal``.

        Raises:
            WriteError: disk full or another write error; the header names other tensors than were written.
        """
        try:
            for name, same in (also or {}).items():
                self._copy(name, self._written[same])
            if self._file.size != max((place.end for place in self._places.values()), default=len(self._head)):
                raise WriteError(f"{self._path}: its header names more tensors than were written")
            self._file.flush()
            self._file.close()
        except OSError as error:
            raise self._failed("finishing the file", error) from error
        self._sealed = True
        return SealedFile(self._path, self._file.size, self._file.sha256(), ())

    def _write_head(self) -> None:
        try:
            self._file.write(self._head)
        except OSError as error:
            raise self._failed("creating the file", error) from error

    def _copy(self, name: str, written: WrittenTensor) -> None:
        """Write what a tensor holds again, under another name."""
        for part in written.data_names or (None,):
            first = self._places[part_name(written.name, part) if part else written.name]
            if self._places[part_name(name, part) if part else name].begin != self._file.size:
                raise WriteError(f"{self._path}: {name!r} is not what its header has at byte {self._file.size}")
            for start in range(first.begin, first.end, _CHUNK):
                self._file.write(os.pread(self._file.fileno(), min(_CHUNK, first.end - start), start))


class SafetensorsSink:
    """Takes the rows of one tensor; made by ``SafetensorsWriter.begin``."""

    def __init__(self, writer: SafetensorsWriter, name: str, like: torch.Tensor) -> None:
        self._writer = writer
        self._name = name
        self._like = like
        self._parts = {part: getattr(like, part) for part in data_names(like)} or {"": like}
        self._content = hashlib.sha256()
        self._rows = 0

    def put(self, rows: torch.Tensor) -> None:
        """Write the next rows, see ``TensorSink.put``."""
        first = next(iter(self._parts.values()))
        self._rows += rows.shape[0] if rows.dim() else 1
        right = (rows.dtype, rows.shape[1:], rows.device.type) == (first.dtype, first.shape[1:], "cpu")
        if not right or not rows.is_contiguous() or self._rows > (first.shape[0] if first.dim() else 1):
            raise self._misfit(f"rows of {rows.dtype} {list(rows.shape)}")
        self._write(rows)

    def finish(self, rest: Mapping[str, torch.Tensor]) -> WrittenTensor:
        """Write the other inner tensors, see ``TensorSink.finish``."""
        (_, first), *others = self._parts.items()
        if self._rows != (first.shape[0] if first.dim() else 1):
            raise self._misfit(f"only {self._rows} rows")
        if set(rest) != {part for part, _ in others}:
            raise self._misfit(f"inner tensors {sorted(rest)}")
        for part, like in others:
            data = rest[part]
            if (data.dtype, data.shape, data.device.type) != (like.dtype, like.shape, "cpu"):
                raise self._misfit(f"{part} of {data.dtype} {list(data.shape)}")
            self._write(own_storage(data).contiguous())
        kind = type(self._like)
        written = WrittenTensor(
            name=self._name,
            class_name=f"{kind.__module__}.{kind.__qualname__}",
            data_names=data_names(self._like),
            nbytes=sum(part.nbytes for part in self._parts.values()),
            sha256=self._content.hexdigest(),
            globals=frozenset(),
        )
        writer = self._writer
        writer._written[self._name] = writer._last = written
        writer._whole = True
        return written

    def _write(self, data: torch.Tensor) -> None:
        view = own_bytes(data)
        self._content.update(view)
        try:
            self._writer._file.write(view)
        except OSError as error:
            raise self._writer._failed(f"writing tensor {self._name!r}", error) from error

    def _misfit(self, what: str) -> WriteError:
        return WriteError(f"{self._writer._path}: tensor {self._name!r} of {list(self._like.shape)} got {what}")


def _flatten(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return _described(name, tensor)[0]


def _described(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
    """What is stored of a tensor, and its entry.

    Raises:
        WriteError: it cannot be stored.
    """
    if tensor.device.type not in ("cpu", "meta"):
        raise WriteError(f"tensor {name!r} is on {tensor.device}, not in host memory")
    try:
        return flatten(name, tensor)
    except CannotFlatten as error:
        raise WriteError(f"tensor {name!r}: {error}", hint=_HINT) from error


def _code(name: str, part: torch.Tensor) -> str:
    if (code := _NAMES_OF.get(dtype_name(part.dtype))) is None:
        raise WriteError(f"tensor {name!r}: safetensors have no {dtype_name(part.dtype)}", hint=_HINT)
    return code


_HINT = "leave this tensor unquantized, choose another scheme, or use --format bin"


def _metadata(model: Mapping[str, torch.Tensor], also: Mapping[str, str]) -> dict[str, str]:
    """What torchao's reader looks for, of all tensors of the model; nothing of it where none is quantized."""
    found = {"format": "pt"}
    if any(data_names(tensor) for tensor in model.values()):
        found |= {name: _described(name, tensor)[1] for name, tensor in model.items()}
        found[NAMES] = json.dumps(list(model))
    if also:
        found[SHARED] = json.dumps(dict(also))
    return found


def _sorted(tensors: Mapping[str, torch.Tensor], order: Sequence[str] | None) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in order or tensors if name in tensors}


def _places(head: bytes) -> dict[str, _Place]:
    """Where the header has each plain tensor, in the order of their data."""
    entries = json.loads(head[8:] or b"{}")
    entries.pop("__metadata__", None)
    return {
        key: _Place(entry["dtype"], tuple(entry["shape"]), *(len(head) + offset for offset in entry["data_offsets"]))
        for key, entry in entries.items()
    }


def _sha256(head: bytes) -> str:
    return hashlib.sha256(head).hexdigest()
