"""What readers of formats share in which each tensor lies in one piece, row after row."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch

from aoconvert.formats.base import Observe, OpenFile, TensorInfo, open_file, read_bytes


class ContiguousReader(ABC):
    """Reads a file one tensor at a time, without mapping it.

    Args:
        path: the file.
        observe: is told of the bytes of the header, and of those that tensors are made of.

    Raises:
        SourceError: the header is refused.
    """

    def __init__(self, path: Path, observe: Observe | None = None) -> None:
        self._path = path
        self._observe = observe
        self._descriptor = open_file(path)
        try:
            self._infos = self._list(OpenFile(self._descriptor, path, observe))
        except BaseException:
            os.close(self._descriptor)
            raise

    @abstractmethod
    def _list(self, file: OpenFile) -> Mapping[str, TensorInfo]:
        """Find the tensors in the header, in the order of their data; raises as the class."""

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
        """Rows ``start`` to ``stop`` (dimension 0) of a tensor of at least one dimension; as ``read``."""
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
