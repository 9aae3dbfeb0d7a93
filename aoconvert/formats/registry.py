"""The file formats. To add one, write its package and put an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.errors import SourceError
from aoconvert.sources.weights import Format

if TYPE_CHECKING:
    from aoconvert.formats.base import Observe, TensorReader, Writer


@dataclass(frozen=True)
class FileFormat:
    """A kind of weights file. Nothing of torch is imported before a reader or writer is asked for.

    Attributes:
        name: what a manifest calls it.
        suffixes: of its files; the first one is the one that is written.
        import_reader: imports what opens a file of it: a function of the path and of who observes what is read.
        import_writer: imports its writer; ``None`` where it is only read.
    """

    name: Format
    suffixes: tuple[str, ...]
    import_reader: Callable[[], Callable[[Path, Observe | None], TensorReader]]
    import_writer: Callable[[], type[Writer]] | None = None

    @property
    def writer(self) -> type[Writer]:
        """The class that writes it."""
        assert self.import_writer is not None
        return self.import_writer()

    @property
    def suffix(self) -> str:
        """Of the files that are written."""
        return self.suffixes[0]

    def writes(self, path: str) -> bool:
        """Whether a file has the suffix that is written."""
        return path.endswith(self.suffix)


def _safetensors_reader() -> Callable[[Path, Observe | None], TensorReader]:
    from aoconvert.formats.safetensors import SafetensorsReader

    return SafetensorsReader


def _torch_bin_reader() -> Callable[[Path, Observe | None], TensorReader]:
    from aoconvert.formats.torch_bin.reader import TorchBinReader

    return TorchBinReader


def _torch_bin_writer() -> type[Writer]:
    from aoconvert.formats.torch_bin.writer import TorchBinWriter

    return TorchBinWriter


SAFETENSORS = FileFormat("safetensors", (".safetensors",), _safetensors_reader)
TORCH_BIN = FileFormat("bin", (".bin", ".pt"), _torch_bin_reader, _torch_bin_writer)

FORMATS: Mapping[str, FileFormat] = {entry.name: entry for entry in (SAFETENSORS, TORCH_BIN)}
"""By name, in the order in which a checkpoint's files are looked for."""

OUTPUT = TORCH_BIN
"""What is written."""


def open_reader(path: Path, observe: Observe | None = None) -> TensorReader:
    """The reader for a weights file, by its extension; ``observe`` is told of the bytes that tensors are made of.

    Raises:
        SourceError: an unknown extension, or a file its reader refuses.
    """
    for entry in FORMATS.values():
        if path.suffix in entry.suffixes:
            return entry.import_reader()(path, observe)
    known = ", ".join(suffix for entry in FORMATS.values() for suffix in entry.suffixes)
    raise SourceError(f"{path}: unknown kind of weights file", hint=f"aoconvert reads {known}")
