"""A torch ``.bin`` written one tensor at a time: storages as they come, ``data.pkl`` last.

``torch.load`` finds records through the zip directory, so their order is free; writing the pickle last keeps memory
independent of the file's size. Format: ``torch/serialization.py``, ``_save`` and ``_load``. Of torch's records
``.format_version`` and ``.storage_alignment`` are left out on purpose: with the first one ``torch.load`` onto the meta
device *computes* offsets from the order in which torch itself writes, instead of looking them up.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from aoconvert.errors import WriteError
from aoconvert.formats.base import FileOutline, SealedFile, StoredTensor, WrittenTensor
from aoconvert.formats.content import bytes_of, content_sha256, data_names, own_bytes, update
from aoconvert.formats.hashing import Prefix
from aoconvert.formats.output_writer import OutputWriter
from aoconvert.formats.torch_bin.pickle_tree import (
    CannotDescribe,
    Node,
    Pairs,
    StoreTensor,
    describe,
    emit,
    globals_of,
    own_storage,
)
from aoconvert.formats.torch_bin.resume_state import PREFIX, decode_state, encode_state, record_name, restore
from aoconvert.formats.torch_bin.zip_writer import Entry, ZipStream, archive_size, local_header

_TAIL: Mapping[str, bytes] = {"byteorder": b"little", "version": b"3\n"}


def _describe_named(name: str, tensor: torch.Tensor, store: StoreTensor) -> Node:
    try:
        return describe(tensor, store)
    except CannotDescribe as error:
        raise WriteError(
            f"tensor {name!r} cannot be stored in a .bin file: {error}",
            hint="leave this tensor unquantized, or choose another scheme",
        ) from error


def _pickle(nodes: Mapping[str, Node], order: Sequence[str] | None) -> bytes:
    names = list(nodes) if order is None else list(order)
    if len(names) != len(nodes) or set(names) != set(nodes):
        wrong = sorted(set(names) ^ set(nodes)) or sorted({name for name in names if names.count(name) > 1})
        raise WriteError(f"the order names other tensors than were written, first {wrong[0]!r}")
    return emit(Pairs(tuple((name, nodes[name]) for name in names)))


class TorchBinWriter(OutputWriter):
    """Streams tensors into one ``.bin`` that ``torch.load(weights_only=True, mmap=True)`` reads.

    As a context manager it removes the file unless ``seal`` was reached. Same tensors in the same order give the same
    bytes.

    Args:
        path: the file to create, usually under a temporary name; must not exist.
        stored: what an earlier writer left in it, in order; then the file must exist, and is written on.
        prefix: how far it goes, with ``stored``.

    Raises:
        WriteError: the file exists, does not exist, or cannot be created.
    """

    @staticmethod
    def outline(
        tensors: Mapping[str, torch.Tensor],
        order: Sequence[str] | None = None,
        also: Mapping[str, str] | None = None,
        model: Mapping[str, torch.Tensor] | None = None,
    ) -> FileOutline:
        """Exact bytes of a file, see ``Writer.outline``; no data is read."""
        records: list[tuple[str, int]] = []

        def count(data: torch.Tensor) -> str:
            key = str(len(records))
            records.append((record_name(key), data.untyped_storage().nbytes()))
            return key

        nodes = {name: _describe_named(name, tensor, count) for name, tensor in tensors.items()}
        nodes |= {name: nodes[same] for name, same in (also or {}).items()}
        records.append((PREFIX + "data.pkl", len(_pickle(nodes, order))))
        records.extend((PREFIX + name, len(content)) for name, content in _TAIL.items())
        return FileOutline(archive_size(records))

    @staticmethod
    def restore(tensors: Sequence[StoredTensor], head: bytes = b"") -> list[StoredTensor]:
        """See ``Writer.restore``."""
        return restore(tensors)

    def __init__(
        self, path: Path, stored: Sequence[StoredTensor] = (), prefix: Prefix | None = None, head: bytes = b""
    ) -> None:
        super().__init__(path, prefix if stored else None)
        self._nodes: dict[str, Node] = {}
        self._last: tuple[WrittenTensor, int] | None = None
        self._zip = ZipStream(self._file.write)
        for tensor in stored:
            self._nodes[tensor.written.name], entries = decode_state(tensor.resume_state)
            for entry in entries:
                self._zip.append(entry)

    def add(self, name: str, tensor: torch.Tensor) -> WrittenTensor:
        """Write the storages of ``tensor`` (in host memory) now and keep only their description.

        Raises:
            WriteError: disk full or another write error; a name used twice; a tensor that cannot be stored.
        """
        first = self._start(name)
        try:
            node = _describe_named(name, tensor, self._store)
        except OSError as error:
            raise self._failed(f"writing tensor {name!r}", error) from error
        return self._end(name, tensor, node, first, content_sha256(tensor))

    def begin(self, name: str, like: torch.Tensor) -> TorchBinSink:
        """Write a tensor whose rows come one after the other; the file is the same as with ``add``.

        Args:
            name: its key.
            like: what it will be, on the meta device.

        Raises:
            WriteError: disk full or another write error; a name used twice; a tensor that cannot be stored so.
        """
        self._start(name)
        return TorchBinSink(self, name, like)

    def last(self) -> StoredTensor:
        """The tensor that was written last, see ``Writer.last``."""
        assert self._last is not None and self._whole
        written, first = self._last
        state = encode_state(self._nodes[written.name], self._zip.entries[first:])
        return StoredTensor(written, state, self._file.size, self._file.sha256())

    def seal(self, order: Sequence[str] | None = None, also: Mapping[str, str] | None = None) -> SealedFile:
        """Write ``data.pkl`` and the directory, and flush to the disk.

        Args:
            order: the order of names in the loaded dict; default: as they were added.
            also: second names, and the tensor that each stands for: the loaded two share their storage.

        Raises:
            WriteError: disk full or another write error; ``order`` does not name exactly the tensors written.
        """
        self._refuse_half_written()
        content = _pickle(self._nodes | {name: self._nodes[same] for name, same in (also or {}).items()}, order)
        try:
            self._zip.add(PREFIX + "data.pkl", content)
            for name, record in _TAIL.items():
                self._zip.add(PREFIX + name, record)
            self._zip.finish()
            self._file.flush()
            self._file.close()
        except OSError as error:
            raise self._failed("finishing the file", error) from error
        self._sealed = True
        names = {name for node in self._nodes.values() for name in globals_of(node)}
        return SealedFile(self._path, self._file.size, self._file.sha256(), tuple(sorted(names)))

    def _start(self, name: str) -> int:
        self._expect(name, name in self._nodes)
        self._whole = False
        return len(self._zip.entries)

    def _end(self, name: str, tensor: torch.Tensor, node: Node, first: int, sha256: str) -> WrittenTensor:
        kind = type(tensor)
        written = WrittenTensor(
            name=name,
            class_name=f"{kind.__module__}.{kind.__qualname__}",
            data_names=data_names(tensor),
            nbytes=sum(entry.size for entry in self._zip.entries[first:]),
            sha256=sha256,
            globals=frozenset(globals_of(node)),
        )
        self._nodes[name] = node
        self._last = (written, first)
        self._whole = True
        return written

    def _store(self, data: torch.Tensor) -> str:
        if data.device.type == "meta":
            raise CannotDescribe("it is on the meta device and has no data")
        key = str(len(self._zip.entries))
        self._zip.add(record_name(key), bytes_of(data))
        return key


class TorchBinSink:
    """Takes the rows of one tensor; made by ``TorchBinWriter.begin``.

    The record of the first inner tensor (of a plain one, its own) is written behind a gap, into which its header goes
    once its CRC-32 is known; the file's digest is then taken from what was written.
    """

    def __init__(self, writer: TorchBinWriter, name: str, like: torch.Tensor) -> None:
        self._writer = writer
        self._name = name
        self._like = like
        self._parts = {part: getattr(like, part) for part in data_names(like)} or {"": like}
        self._content = hashlib.sha256()
        self._crc = 0
        self._rows = 0
        self._before = len(writer._zip.entries)
        self._node, self._order, sizes = self._describe()
        self._entry = Entry(record_name(self._before), sizes[0], 0, writer._zip.offset)
        try:
            writer._file.skip(len(local_header(self._entry)))
        except OSError as error:
            raise self._failed(error) from error

    def put(self, rows: torch.Tensor) -> None:
        """Write the next rows: contiguous, in host memory, of the dtype and row shape that ``like`` has.

        Raises:
            WriteError: disk full or another write error; rows that do not belong here.
        """
        first = self._parts[self._order[0]]
        self._rows += rows.shape[0]
        right = (rows.dtype, rows.shape[1:], rows.device.type) == (first.dtype, first.shape[1:], "cpu")
        if not right or not rows.is_contiguous() or self._rows > first.shape[0]:
            raise self._misfit(f"rows of {rows.dtype} {list(rows.shape)}")
        view = own_bytes(rows)
        self._content.update(view)
        self._crc = zlib.crc32(view, self._crc)
        try:
            self._writer._file.append(view)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self, rest: Mapping[str, torch.Tensor]) -> WrittenTensor:
        """Write the other inner tensors, which are whole and in host memory.

        Raises:
            WriteError: as ``put``.
        """
        if self._rows != self._parts[self._order[0]].shape[0]:
            raise self._misfit(f"only {self._rows} rows")
        if set(rest) != set(self._order[1:]):
            raise self._misfit(f"inner tensors {sorted(rest)}")
        writer, entry = self._writer, replace(self._entry, crc=self._crc)
        try:
            writer._file.fill(entry.offset, local_header(entry))
            writer._zip.append(entry)
            for part in self._order[1:]:
                self._store(part, rest[part])
        except OSError as error:
            raise self._failed(error) from error
        for part in self._parts:
            if part != self._order[0]:
                update(self._content, rest[part])
        return writer._end(self._name, self._like, self._node, self._before, self._content.hexdigest())

    def _describe(self) -> tuple[Node, list[str], list[int]]:
        """The pickle's node, the inner tensors in the order of their records, and the records' sizes."""
        owners = {part.untyped_storage()._cdata: name for name, part in self._parts.items()}
        stored: list[tuple[int, int]] = []

        def store(data: torch.Tensor) -> str:
            storage = data.untyped_storage()
            stored.append((storage._cdata, storage.nbytes()))
            return str(self._before + len(stored) - 1)

        node = _describe_named(self._name, self._like, store)
        order = [owners.get(owner, "?") for owner, _ in stored]
        first = next(iter(self._parts.values()))
        plain = first.dim() > 0 and first.is_contiguous()
        if sorted(order) != sorted(self._parts) or order[0] != next(iter(self._parts)) or not plain:
            raise WriteError(
                f"tensor {self._name!r} cannot be written by rows: its parts do not lie one after the other",
                hint="leave this tensor unquantized, or choose another scheme",
            )
        return node, order, [size for _, size in stored]

    def _store(self, name: str, data: torch.Tensor) -> None:
        part, own = self._parts[name], own_storage(data)
        strides = [[step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (own, part)]
        if (own.dtype, own.shape) != (part.dtype, part.shape) or strides[0] != strides[1]:
            raise self._misfit(f"{name} of {own.dtype} {list(own.shape)}")
        self._writer._store(own)

    def _failed(self, error: OSError) -> WriteError:
        return self._writer._failed(f"writing tensor {self._name!r}", error)

    def _misfit(self, what: str) -> WriteError:
        return WriteError(f"{self._writer._path}: tensor {self._name!r} of {list(self._like.shape)} got {what}")
