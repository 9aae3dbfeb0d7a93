"""A finished ``.bin`` of torchao tensors, read one tensor at a time.

``torch.load(mmap=True)`` maps the whole file, which the kernel refuses where the file is larger than RAM. Here torch
rebuilds the tensors on the meta device, which takes no data, and the bytes of one are read when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from aoconvert.formats.base import open_file, read_bytes
from aoconvert.formats.content import data_names
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.formats.torch_bin.header import read_loadable


class StoredBin:
    """See ``formats.base.StoredFile``. Its pickle is checked before torch sees it. torchao's classes must be imported.

    Raises:
        SourceError: missing or damaged.
        UnsafePickleError, UnsafeZipError: it holds what no checkpoint of torchao holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.contents = read_loadable(path)
        self._descriptor = open_file(path)
        self._tensors: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    @property
    def order(self) -> list[str]:
        """The names of the tensors, as their data lie in the file."""
        second = self.second_names
        names = (name for name in self.contents.tensors if name not in second)
        return sorted(names, key=lambda name: _first(self.contents.tensors[name]))

    @property
    def second_names(self) -> Mapping[str, str]:
        """Names of tensors whose data another one has, and that one."""
        first: dict[object, str] = {}
        found = {}
        for name, tensor in self.contents.tensors.items():
            place = (tensor.class_name, tensor.place)
            if tensor.nbytes and (same := first.setdefault(place, name)) != name:
                found[name] = same
        return found

    def like(self, name: str) -> torch.Tensor:
        """A tensor on meta."""
        if not self._tensors:
            self._tensors = torch.load(self._path, map_location="meta", weights_only=True)
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own.

        Raises:
            ReadError: the disk fails, or the file changed.
        """
        return self._filled(self.like(name), self.contents.tensors[name], name)

    def _filled(self, empty: torch.Tensor, entry: BinTensor, name: str) -> torch.Tensor:
        """A tensor like ``empty``, which is on meta, with its data."""
        if names := data_names(empty):
            parts = {part: self._filled(getattr(empty, part), entry.inner[part], f"{name}.{part}") for part in names}
            return _unflatten(empty, parts)
        assert entry.data is not None and entry.data.offset is not None
        span = sum((size - 1) * step for size, step in zip(empty.shape, empty.stride(), strict=True)) + 1
        nbytes = span * empty.element_size() if empty.numel() else 0
        data = read_bytes(self._descriptor, entry.data.offset, nbytes, f"{self._path}: tensor {name!r}")
        return data.view(empty.dtype).as_strided(empty.size(), empty.stride(), 0)


def _unflatten(empty: Any, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    _, context = empty.__tensor_flatten__()
    tensor: torch.Tensor = type(empty).__tensor_unflatten__(dict(parts), context, empty.shape, empty.stride())
    return tensor


def _first(tensor: BinTensor) -> int:
    """Where the data of a tensor begin."""
    return min((leaf.data.offset or 0 for _, leaf in tensor.leaves() if leaf.data is not None), default=0)
