"""What every reader gives: tensor facts without data, and one tensor at a time in memory of its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from aoconvert.errors import ReadError, SourceError
from aoconvert.files import open_regular
from aoconvert.formats.hashing import advise, forget

DAMAGED_HINT = "download the file again, or point aoconvert at an intact copy"

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
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int
    stride: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, ...] | None:
        """Offset and strides: tensors of one file with the same place, shape and dtype are one under several names."""
        return None if self.stride is None else (self.offset, *self.stride)


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
