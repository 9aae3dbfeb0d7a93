"""What every reader gives: tensor facts without data, and one tensor at a time in memory of its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from aoconvert.errors import DAMAGED_HINT, ReadError, SourceError
from aoconvert.files import open_regular
from aoconvert.formats.hashing import Prefix, advise, forget
from aoconvert.formats.torch_bin.contents import BinContents

Observe = Callable[[int, memoryview], None]
"""Told of the bytes of a file that are used, and their offset, as soon as they are read."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor.

    Attributes:
        name: its key in the file.
        dtype: as stored.
        shape: of the tensor.
        nbytes: of its elements.
        file: the file that holds it.
        offset: absolute byte offset of its data in the file.
        stride: elements from one index to the next, by dimension, where tensors of the file may share their data;
            ``None`` where they cannot, or the file does not tell.
        packing: the format's name for blocks of values that are stored as bytes; ``None`` for values.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int
    stride: tuple[int, ...] | None = None
    packing: str | None = None

    @property
    def place(self) -> tuple[int, ...] | None:
        """Offset and strides: tensors of one file with the same place, shape and dtype are one under several names."""
        return None if self.stride is None else (self.offset, *self.stride)


@dataclass(frozen=True)
class FileContents:
    """What a file of a source holds: tensors by name, and what else, name → what it is."""

    tensors: Mapping[str, TensorInfo]
    others: Mapping[str, str]


class TensorReader(Protocol):
    """A file of named tensors."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name, without reading data."""

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One contiguous CPU tensor.

        Args:
            name: its key.
            into: uint8 memory that is large enough, for the data; by default it gets memory of its own.

        Raises:
            ReadError: the data could not be read.
        """

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor of at least one dimension; as ``read``."""

    def close(self) -> None:
        """Release the file. Reading is over."""


class StoredFile(Protocol):
    """A finished file of a checkpoint, read one tensor at a time: torchao's tensors, and plain ones.

    What it holds is checked before torch or torchao see it, and nothing of it is executed.

    Attributes:
        contents: what its header says.

    Raises:
        SourceError: missing or damaged.
        UnsafeFileError: it holds what no checkpoint of torchao holds.
    """

    contents: BinContents

    def __init__(self, path: Path) -> None: ...

    @property
    def order(self) -> list[str]:
        """The names of the tensors, as their data lie in the file; of those that are one, the first."""

    @property
    def second_names(self) -> Mapping[str, str]:
        """The other names, and the tensor that each stands for."""

    def like(self, name: str) -> torch.Tensor:
        """A tensor as ``read`` gives it, on meta. torchao's classes must be imported."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own. torchao's classes must be imported.

        Raises:
            ReadError: the disk fails, or the file changed.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class WrittenTensor:
    """What was written for one tensor.

    Attributes:
        name: its key in the file.
        class_name: dotted, ``torch.Tensor`` for a plain one.
        data_names: its inner tensors, in ``__tensor_flatten__`` order; empty for a plain tensor.
        nbytes: payload bytes of all its storages.
        sha256: of its content, see ``content_sha256``.
        globals: every dotted name that the file holds for it and a loader imports, torch's own included.
    """

    name: str
    class_name: str
    data_names: tuple[str, ...]
    nbytes: int
    sha256: str
    globals: frozenset[str]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in an unfinished file: all that is needed to write on behind it.

    Attributes:
        written: what was written.
        resume_state: what else its writer has to know to go on behind it, as JSON values.
        size: bytes of the file up to its end.
        sha256: their digest.
    """

    written: WrittenTensor
    resume_state: Any
    size: int
    sha256: str


@dataclass(frozen=True)
class SealedFile:
    """A finished file: its bytes, their SHA-256, and the sorted dotted names that a loader of it imports."""

    path: Path
    size: int
    sha256: str
    globals: tuple[str, ...]


@dataclass(frozen=True)
class FileOutline:
    """What can be said of a file before it is written.

    Attributes:
        size: of the whole file, exact.
        head: what the file begins with, where that depends on all that comes behind it.
    """

    size: int
    head: bytes = field(default=b"", repr=False)


class TensorSink(Protocol):
    """Takes the rows of one tensor, see ``Writer.begin``."""

    def put(self, rows: torch.Tensor) -> None:
        """Write the next rows of the first inner tensor, or of a plain tensor: contiguous, in host memory.

        Raises:
            WriteError: disk full or another write error; rows that do not belong here.
        """

    def finish(self, rest: Mapping[str, torch.Tensor]) -> WrittenTensor:
        """Write the other inner tensors, which are whole and in host memory.

        Raises:
            WriteError: as ``put``.
        """


class Writer(Protocol):
    """Writes a file front to back, one tensor after the other; same tensors in the same order, same bytes.

    As a context manager it removes the file unless ``seal`` was reached.

    Args:
        path: the file to create; must not exist.
        stored: what an earlier writer left in it, in order; then the file must exist, and is written on.
        prefix: how far it goes, with ``stored``.
        head: of the file's outline.

    Raises:
        WriteError: the file exists, does not exist, or cannot be created.
    """

    def __init__(
        self, path: Path, stored: Sequence[StoredTensor] = (), prefix: Prefix | None = None, head: bytes = b""
    ) -> None: ...

    @staticmethod
    def outline(
        tensors: Mapping[str, torch.Tensor],
        order: Sequence[str] | None = None,
        also: Mapping[str, str] | None = None,
        model: Mapping[str, torch.Tensor] | None = None,
    ) -> FileOutline:
        """Say what the file will be.

        Args:
            tensors: in the order in which they will be written; they may be on meta.
            order: as of ``seal``.
            also: as of ``seal``.
            model: all tensors of a model that is in several files; default: ``tensors``.

        Raises:
            WriteError: a tensor that cannot be stored.
        """

    @staticmethod
    def restore(tensors: Sequence[StoredTensor], head: bytes = b"") -> list[StoredTensor]:
        """What a journal says of a file, which may be made up, as far as it can be true; with the names of each.

        Args:
            tensors: in the order in which they are to lie in the file; ``written.globals`` is not looked at.
            head: of the file's outline.

        Returns:
            Those from the first on whose ``resume_state`` is sound, and behind which a writer can go on.
        """

    def add(self, name: str, tensor: torch.Tensor) -> WrittenTensor:
        """Write a tensor that is in host memory.

        Raises:
            WriteError: disk full or another write error; a name used twice; a tensor that cannot be stored.
        """

    def begin(self, name: str, like: torch.Tensor) -> TensorSink:
        """Write a tensor, ``like`` on meta, whose rows come one after the other; the file is the same as with ``add``.

        Raises:
            WriteError: as ``add``.
        """

    def last(self) -> StoredTensor:
        """The tensor that was written last, for a journal."""

    def seal(self, order: Sequence[str] | None = None, also: Mapping[str, str] | None = None) -> SealedFile:
        """Finish the file, and flush it to the disk.

        Args:
            order: the order of names in the loaded dict; default: as they were added.
            also: second names, and the tensor that each stands for.

        Raises:
            WriteError: disk full or another write error; ``order`` does not name exactly the tensors written.
        """

    def leave(self) -> None:
        """Close the file as it is; a later writer may go on with it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_file(path: Path) -> int:
    """A read-only descriptor of a regular file, advised for sequential reading.

    Raises:
        SourceError: no such file, a folder, a FIFO or a device, no permission.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise SourceError(
                f"{path}: is not a file", hint="name a weights file, .safetensors, .bin or .pt"
            ) from error
        raise SourceError(f"{path}: cannot be opened: {error.strerror}", hint="check the path") from error
    advise(descriptor, 0, 0, "SEQUENTIAL")
    return descriptor


def read_bytes(
    descriptor: int,
    offset: int,
    nbytes: int,
    where: str,
    into: torch.Tensor | None = None,
    observe: Observe | None = None,
) -> torch.Tensor:
    """``nbytes`` bytes at ``offset`` as a uint8 tensor.

    Read, not mapped: mapped pages count as resident memory, and the kernel refuses a private mapping larger than RAM.
    The pages are dropped from the page cache afterwards; each tensor is read once.

    Args:
        descriptor: of the open file.
        offset: absolute, in bytes.
        nbytes: how many.
        where: file and tensor, for the error.
        into: uint8 memory for them; fresh by default.
        observe: is told of them.

    Raises:
        ReadError: the disk fails, or the file ends early; what ``observe`` raises.
    """
    data = torch.empty(nbytes, dtype=torch.uint8) if into is None else into[:nbytes]
    view, done = data.numpy().data, 0
    while done < nbytes:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ReadError(f"{where}: {error.strerror}", hint="check the disk that holds the source") from error
        if count == 0:
            raise ReadError(
                f"{where}: the file ended after {done} of {nbytes} bytes; it changed while it was read",
                hint=DAMAGED_HINT,
            )
        done += count
    forget(descriptor, offset, nbytes)
    if observe is not None:
        observe(offset, view)
    return data


@dataclass(frozen=True)
class OpenFile:
    """An open file as a ``ByteSource``; ``observe`` is told of what is read of it."""

    descriptor: int
    path: Path
    observe: Observe | None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``."""
        return read_bytes(self.descriptor, offset, count, str(self.path), observe=self.observe).numpy().tobytes()
