"""A finished safetensors file of torchao's tensors, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.formats.safetensors.contents import Shards, contents_of, part_name
from aoconvert.formats.safetensors.header import read_header
from aoconvert.formats.safetensors.reader import SafetensorsReader
from aoconvert.formats.safetensors.torchao_tensors import CannotFlatten, unflatten
from aoconvert.formats.safetensors.writer import SHARED
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.sources.byte_source import LocalFile


class StoredSafetensors:
    """See ``formats.base.StoredFile``. torchao makes its tensors of what was found to be harmless."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with LocalFile(path) as source:
            header = read_header(source, str(path))
        self.contents = contents_of(header, str(path), Shards(path))
        self._metadata = header.metadata
        self._readers = {"": SafetensorsReader(path, header=header)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers.values():
            reader.close()

    @property
    def order(self) -> list[str]:
        """The names of the tensors, as their data lie in the file."""
        tensors = self.contents.tensors
        second = self.second_names
        offsets = {
            name: min(leaf.data.offset or 0 for _, leaf in tensor.leaves() if leaf.data)
            for name, tensor in tensors.items()
        }
        return sorted((name for name in tensors if name not in second), key=lambda name: offsets[name])

    @property
    def second_names(self) -> Mapping[str, str]:
        """Names of tensors that were one in the file this one was made of, and the tensor that each stood for."""
        try:
            found = json.loads(self._metadata.get(SHARED, "{}"))
        except (ValueError, RecursionError):
            found = None
        tensors = self.contents.tensors
        if not isinstance(found, dict) or not all(
            isinstance(same, str) and name in tensors and same in tensors and same not in found
            for name, same in found.items()
        ):
            raise SourceError(f"{self._path}: its {SHARED} are not names of its tensors", hint=DAMAGED_HINT)
        return found

    def like(self, name: str) -> torch.Tensor:
        """A tensor on meta; raises as ``read``."""

        def empty(key: str, reader: SafetensorsReader) -> torch.Tensor:
            info = reader.infos()[key]
            return torch.empty(info.shape, dtype=info.dtype, device="meta")

        return self._made(name, empty)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own.

        Raises:
            ReadError: the disk fails, or the file changed.
            SourceError: torchao makes no tensor of it.
        """
        return self._made(name, lambda key, reader: reader.read(key))

    def _made(self, name: str, read: Callable[[str, SafetensorsReader], torch.Tensor]) -> torch.Tensor:
        tensor = self.contents.tensors[name]
        if tensor.data is not None:
            return read(name, self._readers[""])
        parts = {part: read(part_name(name, part), self._reader(inner)) for part, inner in tensor.inner.items()}
        try:
            return unflatten(name, parts, self._metadata[name])
        except CannotFlatten as error:
            raise SourceError(f"{self._path}: {name!r}: {error}", hint=DAMAGED_HINT) from error

    def _reader(self, part: BinTensor) -> SafetensorsReader:
        """Of the file that holds a part: another shard, which is opened then, or this one."""
        file = part.data.storage if part.data is not None else ""
        if file not in self._readers:
            self._readers[file] = SafetensorsReader(self._path.with_name(file))
        return self._readers[file]
