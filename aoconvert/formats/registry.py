"""The file formats. To add one, write its package and put an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.sources.weights import Format

if TYPE_CHECKING:
    from aoconvert.formats.base import FileContents, Observe, StoredFile, TensorReader, Writer
    from aoconvert.formats.torch_bin.contents import BinContents
    from aoconvert.sources import Source

    OpenReader = Callable[[Path, Observe | None, Any], TensorReader]
    ReadStored = Callable[[Path], BinContents]
    ReadContents = Callable[[Source, str], FileContents | None]


@dataclass(frozen=True)
class SourceFormat:
    """A kind of weights file that is read. Nothing of torch is imported before a reader is asked for.

    Attributes:
        suffixes: of its files.
        import_reader: imports what opens a file (its path, who observes what is read, what ``Source.headers`` has of it
            or ``None``), and what says what a file of a source holds (``None``: it must be here for that).
    """

    suffixes: tuple[str, ...]
    import_reader: Callable[[], tuple[OpenReader, ReadContents]]

    def contents(self, source: Source, path: str) -> FileContents | None:
        """What a file of a source holds; ``None`` where that cannot be said of one that is not on this machine.

        Raises:
            SourceError: its reader refuses it.
        """
        return self.import_reader()[1](source, path)


@dataclass(frozen=True)
class FileFormat(SourceFormat):
    """A kind of weights file that is also written; of its suffixes, the first one is.

    Attributes:
        name: what a manifest calls it.
        import_writer: imports its writer.
        import_stored: imports what says what a finished file holds, having checked it without torch, and what imports
            its reader.
    """

    name: Format
    import_writer: Callable[[], type[Writer]]
    import_stored: Callable[[], tuple[ReadStored, Callable[[], type[StoredFile]]]]

    @property
    def suffix(self) -> str:
        """Of the files that are written."""
        return self.suffixes[0]

    @property
    def writer(self) -> type[Writer]:
        """The class that writes it."""
        return self.import_writer()

    def writes(self, path: str) -> bool:
        """Whether a file has the suffix that is written."""
        return path.endswith(self.suffix)


def _safetensors_reader() -> tuple[OpenReader, ReadContents]:
    from aoconvert.formats.safetensors.reader import SafetensorsReader, contents

    return SafetensorsReader, contents


def _torch_bin_reader() -> tuple[OpenReader, ReadContents]:
    from aoconvert.formats.torch_bin.reader import TorchBinReader, contents

    return lambda path, observe, _header: TorchBinReader(path, observe), contents


def _gguf_reader() -> tuple[OpenReader, ReadContents]:
    from aoconvert.formats.gguf.reader import GgufReader, contents

    return GgufReader, contents


def _torch_bin_writer() -> type[Writer]:
    from aoconvert.formats.torch_bin.writer import TorchBinWriter

    return TorchBinWriter


def _torch_bin_stored() -> tuple[ReadStored, Callable[[], type[StoredFile]]]:
    from aoconvert.formats.torch_bin.header import read_loadable

    def import_reader() -> type[StoredFile]:
        from aoconvert.formats.torch_bin.stored import StoredBin

        return StoredBin

    return read_loadable, import_reader


def _safetensors_writer() -> type[Writer]:
    from aoconvert.formats.safetensors.writer import SafetensorsWriter

    return SafetensorsWriter


def _safetensors_stored() -> tuple[ReadStored, Callable[[], type[StoredFile]]]:
    from aoconvert.formats.safetensors.contents import read_stored

    def import_reader() -> type[StoredFile]:
        from aoconvert.formats.safetensors.stored import StoredSafetensors

        return StoredSafetensors

    return read_stored, import_reader


SAFETENSORS = FileFormat(
    (".safetensors",), _safetensors_reader, "safetensors", _safetensors_writer, _safetensors_stored
)
TORCH_BIN = FileFormat((".bin", ".pt", ".pth", ".ckpt"), _torch_bin_reader, "bin", _torch_bin_writer, _torch_bin_stored)
GGUF = SourceFormat((".gguf",), _gguf_reader)

FORMATS: Mapping[str, FileFormat] = {entry.name: entry for entry in (SAFETENSORS, TORCH_BIN)}
"""By name, in the order in which a checkpoint's files are looked for."""

SOURCE_FORMATS: Mapping[str, SourceFormat] = {**FORMATS, "gguf": GGUF}
"""By name, with those that are only read."""


def written_as(path: str) -> FileFormat | None:
    """The format of a finished checkpoint's weights file, by its suffix; ``None``: it is not one."""
    return next((entry for entry in FORMATS.values() if entry.writes(path)), None)


def _written_as(path: Path) -> FileFormat:
    if (found := written_as(path.name)) is None:
        raise SourceError(f"{path}: is not a weights file of a finished checkpoint")
    return found


def read_stored(path: Path) -> BinContents:
    """What a finished weights file holds, by its header, which is checked; torch is not imported.

    Raises:
        SourceError: missing or damaged; not a format that is written.
        UnsafeFileError: it must not be loaded.
    """
    return _written_as(path).import_stored()[0](path)


def open_stored(path: Path) -> StoredFile:
    """A finished weights file, to be read tensor by tensor; raises as ``read_stored``."""
    return _written_as(path).import_stored()[1]()(path)


def open_reader(path: Path, observe: Observe | None = None, header: Any = None) -> TensorReader:
    """The reader for a weights file, by its extension.

    Args:
        path: the file.
        observe: is told of the bytes that tensors are made of.
        header: what ``Source.headers`` has of the file: what has not changed of it is not parsed again.

    Raises:
        SourceError: an unknown extension, or a file its reader refuses.
    """
    for entry in SOURCE_FORMATS.values():
        if path.suffix in entry.suffixes:
            return entry.import_reader()[0](path, observe, header)
    known = ", ".join(suffix for entry in SOURCE_FORMATS.values() for suffix in entry.suffixes)
    raise SourceError(f"{path}: unknown type of weights file", hint=f"aoconvert reads {known}")
