"""A torch ``.bin`` written one tensor at a time: storages as they come, ``data.pkl`` last.

``torch.load`` finds records through the zip directory, so their order is free; writing the pickle last keeps memory
independent of the file's size. Format: ``torch/serialization.py``, ``_save`` and ``_load``. Of torch's records
``.format_version`` and ``.storage_alignment`` are left out on purpose: with the first one ``torch.load`` onto the meta
device *computes* offsets from the order in which torch itself writes, instead of looking them up.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from aoconvert.errors import WriteError
from aoconvert.writers.pickle_tree import (
    CannotDescribe,
    Node,
    Pairs,
    StoreTensor,
    describe,
    emit,
    globals_of,
    is_wrapper,
    own_storage,
)
from aoconvert.writers.zip_stream import Buffer, ZipStream, archive_size

_PREFIX = "archive/"
_TAIL: Mapping[str, bytes] = {"byteorder": b"little", "version": b"3\n"}


@dataclass(frozen=True)
class WrittenTensor:
    """What was written for one tensor.

    Attributes:
        name: its key in the file.
        class_name: dotted class as pickled, ``torch.Tensor`` for a plain one.
        data_names: its inner tensors, in ``__tensor_flatten__`` order; empty for a plain tensor.
        nbytes: payload bytes of all its storages.
        sha256: of its content, see ``content_sha256``.
        globals: every dotted name that the pickle holds for it, torch's own included.
    """

    name: str
    class_name: str
    data_names: tuple[str, ...]
    nbytes: int
    sha256: str
    globals: frozenset[str]


@dataclass(frozen=True)
class SealedFile:
    """A finished file: its bytes, their SHA-256, and the sorted dotted globals of its pickle."""

    path: Path
    size: int
    sha256: str
    globals: tuple[str, ...]


def data_names(tensor: torch.Tensor) -> tuple[str, ...]:
    """Names of the inner tensors of a wrapper subclass, in ``__tensor_flatten__`` order; empty for a plain tensor."""
    return tuple(tensor.__tensor_flatten__()[0]) if is_wrapper(tensor) else ()  # type: ignore[attr-defined]


def content_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) over the elements in row-major order; of a subclass, over its inner tensors in their order.

    It names the content, whatever file or format holds it.
    """
    digest = hashlib.sha256()
    _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    if names := data_names(tensor):
        for name in names:
            _update(digest, getattr(tensor, name))
    else:
        digest.update(_bytes_of(own_storage(tensor).contiguous()))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's storage, not copied."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data


def predict_size(tensors: Mapping[str, torch.Tensor], order: Sequence[str] | None = None) -> int:
    """Exact bytes of the file that holds ``tensors``, added in the mapping's order and sealed with ``order``.

    The tensors may be on the meta device; no data is read.

    Raises:
        WriteError: a tensor that cannot be stored.
    """
    records: list[tuple[str, int]] = []

    def count(data: torch.Tensor) -> str:
        key = str(len(records))
        records.append((f"{_PREFIX}data/{key}", data.untyped_storage().nbytes()))
        return key

    nodes = {name: _describe_named(name, tensor, count) for name, tensor in tensors.items()}
    records.append((_PREFIX + "data.pkl", len(_pickle(nodes, order))))
    records.extend((_PREFIX + name, len(content)) for name, content in _TAIL.items())
    return archive_size(records)


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


class TorchBinWriter:
    """Streams tensors into one ``.bin`` that ``torch.load(weights_only=True, mmap=True)`` reads.

    As a context manager it removes the file unless ``seal`` was reached. Same tensors in the same order give the same
    bytes.

    Args:
        path: the file to create, usually under a temporary name; must not exist.

    Raises:
        WriteError: the file exists or cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sealed = False
        self._whole = True  # False once a tensor was left half-written
        self._size = 0
        self._digest = hashlib.sha256()
        self._nodes: dict[str, Node] = {}
        self._stored: list[int] = []  # payload bytes of each storage; its index is the storage's key
        self._zip = ZipStream(self._write)
        try:
            self._file = path.open("xb", buffering=0)
        except OSError as error:
            raise self._failed("creating the file", error) from error

    def add(self, name: str, tensor: torch.Tensor) -> WrittenTensor:
        """Write the storages of ``tensor`` (in host memory) now and keep only their description.

        Raises:
            WriteError: disk full or another write error; a name used twice; a tensor that cannot be stored.
        """
        if name in self._nodes:
            raise WriteError(f"{self._path}: tensor {name!r} was written twice")
        first = len(self._stored)
        self._whole = False
        try:
            node = _describe_named(name, tensor, self._store)
        except OSError as error:
            raise self._failed(f"writing tensor {name!r}", error) from error
        self._whole = True
        self._nodes[name] = node
        kind = type(tensor)
        return WrittenTensor(
            name=name,
            class_name=f"{kind.__module__}.{kind.__qualname__}",
            data_names=data_names(tensor),
            nbytes=sum(self._stored[first:]),
            sha256=content_sha256(tensor),
            globals=frozenset(globals_of(node)),
        )

    def seal(self, order: Sequence[str] | None = None) -> SealedFile:
        """Write ``data.pkl`` and the directory, and flush to the disk.

        Args:
            order: the order of names in the loaded dict; default: as they were added.

        Raises:
            WriteError: disk full or another write error; ``order`` does not name exactly the tensors written.
        """
        if not self._whole:
            raise WriteError(f"{self._path}: a tensor was left half-written")
        content = _pickle(self._nodes, order)
        try:
            self._zip.add(_PREFIX + "data.pkl", content)
            for name, record in _TAIL.items():
                self._zip.add(_PREFIX + name, record)
            self._zip.finish()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._failed("finishing the file", error) from error
        self._sealed = True
        names = {name for node in self._nodes.values() for name in globals_of(node)}
        return SealedFile(self._path, self._size, self._digest.hexdigest(), tuple(sorted(names)))

    def abort(self) -> None:
        """Close and remove the unfinished file; does nothing once it is sealed."""
        if not self._sealed:
            with contextlib.suppress(OSError):  # must not hide the error that brought us here
                self._file.close()
            with contextlib.suppress(OSError):
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _store(self, data: torch.Tensor) -> str:
        if data.device.type == "meta":
            raise CannotDescribe("it is on the meta device and has no data")
        key = str(len(self._stored))
        payload = _bytes_of(data)
        self._zip.add(f"{_PREFIX}data/{key}", payload)
        self._stored.append(payload.nbytes)
        return key

    def _write(self, buffer: Buffer) -> None:
        view = memoryview(buffer)
        self._digest.update(view)
        self._size += view.nbytes
        while view.nbytes:  # one write(2) takes at most 2 GiB, and less on a signal
            view = view[self._file.write(view) :]

    def _failed(self, doing: str, error: OSError) -> WriteError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free space on this disk, or choose another output folder"
        else:
            hint = "check the output folder's permissions, and that no other run writes there"
        return WriteError(f"{self._path}: {doing} failed: {error.strerror or error}", hint=hint)
