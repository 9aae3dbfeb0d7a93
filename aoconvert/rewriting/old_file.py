"""A torch file whose tensors may be of classes that are gone, read one plain tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from aoconvert.errors import SourceError
from aoconvert.formats.base import Observe, open_file, read_bytes
from aoconvert.formats.torch_bin.contents import BinContents, BinTensor
from aoconvert.formats.torch_bin.header import read_bin
from aoconvert.rewriting.migrate_types import dtype_of


class OldFile:
    """Nothing of it is executed or imported; its pickle was described by our own reader.

    Args:
        path: the file.
        observe: is told of what is read; it can be set later.

    Raises:
        SourceError: missing, or not a dict of tensors.
        UnsafePickleError, UnsafeZipError: it holds what no checkpoint holds.
    """

    def __init__(self, path: Path, observe: Observe | None = None) -> None:
        self.path = path
        self.contents: BinContents = read_bin(path)
        if self.contents.byteorder != "little":
            raise SourceError(f"{path} was saved on a big-endian machine", hint="save it again on this kind of machine")
        self.observe = observe
        self._descriptor = open_file(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def tensors(self) -> Mapping[str, BinTensor]:
        """By name; those of one enclosing ``{"state_dict": …}``, where nothing else is there."""
        inner = self.contents.others.get("state_dict")
        if self.contents.tensors or not isinstance(inner, Mapping):
            return self.contents.tensors
        return {str(name): value for name, value in inner.items() if isinstance(value, BinTensor)}

    @property
    def others(self) -> Iterator[str]:
        """Names of what is not a tensor."""
        inner = self.contents.others.get("state_dict")
        nested = not self.contents.tensors and isinstance(inner, Mapping)
        for name, value in (inner if nested and isinstance(inner, Mapping) else self.contents.others).items():
            if not isinstance(value, BinTensor):
                yield str(name)

    def read(self, tensor: BinTensor) -> torch.Tensor:
        """The elements of a plain tensor, in memory of their own.

        Raises:
            ReadError: the disk fails, or the file changed.
        """
        data, dtype = tensor.data, dtype_of(tensor)
        if data is None or data.offset is None:
            raise TypeError(f"a {tensor.class_name} has no elements of its own")
        steps = zip(tensor.shape, data.stride, strict=True)
        span = 0 if 0 in tensor.shape else 1 + sum((size - 1) * step for size, step in steps)
        raw = read_bytes(self._descriptor, data.offset, span * dtype.itemsize, str(self.path), observe=self.observe)
        return raw.view(dtype).as_strided(tensor.shape, data.stride, 0).contiguous()


def place_of(tensor: BinTensor) -> int:
    """Where the data of a tensor begin."""
    return min((leaf.data.offset or 0 for _, leaf in tensor.leaves() if leaf.data is not None), default=0)
