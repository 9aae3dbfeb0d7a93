"""A checkpoint of several files as one mapping of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from aoconvert.errors import SourceError
from aoconvert.readers.base import TensorInfo, TensorReader
from aoconvert.readers.safetensors import SafetensorsReader
from aoconvert.readers.torch_bin import TorchBinReader

_READERS: Mapping[str, type[SafetensorsReader | TorchBinReader]] = {
    ".safetensors": SafetensorsReader,
    ".bin": TorchBinReader,
    ".pt": TorchBinReader,
}


def open_reader(path: Path) -> TensorReader:
    """The reader for a weights file, by its extension.

    Raises:
        SourceError: an unknown extension, or a file its reader refuses.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise SourceError(f"{path}: unknown kind of weights file", hint=f"aoconvert reads {', '.join(_READERS)}")
    return reader(path)


class CheckpointReader:
    """Reads the tensors of several files; at most one file is open at a time.

    All headers are read at once, so a damaged shard is found before any work. Reading in ``names_in_order`` opens each
    file once more.

    Args:
        root: the folder.
        files: weights files relative to ``root``, in the order they are to be read.
        index: tensor name -> file, where the checkpoint has one; decides between files that hold the same name.

    Raises:
        SourceError: a file that its reader refuses, a tensor in two files that no index decides, an index that does not
            fit the files.
    """

    def __init__(self, root: Path, files: Sequence[str], index: Mapping[str, str] | None = None) -> None:
        self._root = root
        self._current: tuple[str, TensorReader] | None = None
        self._infos: dict[str, TensorInfo] = {}
        index = index or {}
        by_file = {file: self._file_infos(file) for file in files}
        for name, file in index.items():
            if name not in by_file.get(file, {}):
                missing = "holds no such tensor" if file in by_file else "is not among the checkpoint's files"
                raise SourceError(
                    f"{root}: the index puts tensor {name!r} in {file}, which {missing}",
                    hint="download the checkpoint again, index and weights of the same revision",
                )
        for file, infos in by_file.items():
            for name, info in infos.items():
                if index.get(name, file) != file:
                    continue
                if name in self._infos:
                    raise SourceError(
                        f"{root}: tensor {name!r} is in both {self._infos[name].file} and {file}",
                        hint="remove one of the files, or add an index that says which one counts",
                    )
                self._infos[name] = info

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors by name; ``file`` is relative to the root."""
        return self._infos

    def names_in_order(self) -> tuple[str, ...]:
        """Names in the order that reads every file front to back: by file as given, then by offset."""
        rank: dict[str, int] = {}
        for info in self._infos.values():
            rank.setdefault(info.file, len(rank))
        infos = sorted(self._infos.values(), key=lambda info: (rank[info.file], info.offset))
        return tuple(info.name for info in infos)

    def read(self, name: str) -> torch.Tensor:
        """One contiguous CPU tensor that owns its memory.

        Raises:
            ReadError: the data could not be read.
            SourceError: the file is gone or was replaced.
        """
        file = self._infos[name].file
        if self._current is None or self._current[0] != file:
            self.close()
            self._current = (file, open_reader(self._root / file))
        return self._current[1].read(name)

    def close(self) -> None:
        """Release the open file."""
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def _file_infos(self, file: str) -> dict[str, TensorInfo]:
        reader = open_reader(self._root / file)
        try:
            return {name: replace(info, file=file) for name, info in reader.infos().items()}
        finally:
            reader.close()
