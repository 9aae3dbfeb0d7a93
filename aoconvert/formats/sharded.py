"""A checkpoint of several files as one mapping of tensors."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aoconvert.errors import SourceError
from aoconvert.formats.base import TensorInfo, TensorReader
from aoconvert.formats.digest import changed_while_read
from aoconvert.formats.registry import SAFETENSORS, open_reader

_KEPT_OPEN = 4


def _is_loaded_whole(path: Path) -> bool:
    """A torch file from before torch 1.6, which its reader holds in memory."""
    return path.suffix != SAFETENSORS.suffix and not zipfile.is_zipfile(path)


class CheckpointReader:
    """Reads the tensors of several files; a few that were read last stay open.

    All headers are read at once, so a damaged shard is found before any work. Reading file by file opens each
    once more. Tensors of two shards in turn (experts of one layer) do not open them again and again.

    Args:
        root: the folder.
        files: weights files relative to ``root``, in the order they are to be read.
        index: tensor name -> file, where the checkpoint has one; decides between files that hold the same name.
        observe: is told of the bytes that tensors are made of: file, offset, bytes.
        headers: of files that were looked at before, see ``Source.headers``.

    Raises:
        SourceError: a file that its reader refuses, a tensor in two files that no index decides, an index that does not
            fit the files.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        index: Mapping[str, str] | None = None,
        observe: Callable[[str, int, memoryview], None] | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        self._root = root
        self._observe = observe
        self._headers = headers or {}
        self._open: dict[str, TensorReader] = {}  # the one that was read last comes last
        self._infos: dict[str, TensorInfo] = {}
        index = index or {}
        self._by_file = by_file = {file: self._file_infos(file) for file in files}
        for name, file in index.items():  # a shard may lack a tensor that is tied, or that the class makes itself
            if file not in by_file:
                raise SourceError(
                    f"{root}: the index puts tensor {name!r} in {file}, which is not among the checkpoint's files",
                    hint="download the checkpoint again, index and weights of the same revision",
                )
        for file, infos in by_file.items():
            for name, info in infos.items():
                if index.get(name, file) != file:
                    continue
                if name in self._infos:
                    raise SourceError(
                        f"{root}: tensor {name!r} is in both {self._infos[name].file} and {file}",
                        hint="remove one of the files, or add an index that says which one to use",
                    )
                self._infos[name] = info

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name; ``file`` is relative to the root."""
        return self._infos

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One contiguous CPU tensor, see ``TensorReader.read``.

        Raises:
            ReadError: the data could not be read, or the file is gone or was replaced.
        """
        return self._reader(name).read(name, into)

    def read_rows(self, name: str, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor; as ``read``."""
        return self._reader(name).read_rows(name, start, stop, into)

    def _reader(self, name: str) -> TensorReader:
        file = self._infos[name].file
        reader = self._open.pop(file, None)
        if reader is None:
            path = self._root / file
            keep = 0 if _is_loaded_whole(path) else _KEPT_OPEN - 1
            for other in list(self._open)[: max(0, len(self._open) - keep)]:
                self._open.pop(other).close()
            reader = self._open_again(file)
        self._open[file] = reader
        return reader

    def _open_again(self, file: str) -> TensorReader:
        """A file whose tensors are known; it must still hold them.

        Raises:
            ReadError: it does not.
        """
        observe = partial(self._observe, file) if self._observe is not None else None
        try:
            reader = open_reader(self._root / file, observe, self._headers.get(file))
        except SourceError as error:
            raise changed_while_read(file) from error
        if {name: replace(info, file=file) for name, info in reader.infos().items()} != self._by_file[file]:
            reader.close()
            raise changed_while_read(file)
        return reader

    def close(self) -> None:
        """Release the open files."""
        while self._open:
            self._open.popitem()[1].close()

    def _file_infos(self, file: str) -> dict[str, TensorInfo]:
        reader = open_reader(self._root / file, header=self._headers.get(file))
        try:
            return {name: replace(info, file=file) for name, info in reader.infos().items()}
        finally:
            reader.close()
