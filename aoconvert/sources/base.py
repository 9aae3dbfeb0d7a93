"""What a source is: pinned files of one model repo or folder, and how they are read.

Three kinds exist: :class:`aoconvert.sources.folder.FolderSource`, :class:`aoconvert.sources.hub.HubSource` and
:class:`aoconvert.sources.file.FileSource`. A path is always relative to the root of the repo or folder and separated by
``/``; a subfolder is a longer path, nothing more.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from aoconvert.errors import DAMAGED_HINT, SourceError
from aoconvert.files import read_limited
from aoconvert.json_text import CONFIG_BYTES, parse_json
from aoconvert.sources.byte_source import ByteSource, LocalFile

FetchProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from several threads, but never from two at once."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: relative to the source's root, ``/``-separated.
        size: bytes.
        sha256: hex digest as the Hub's LFS metadata name it; ``None`` for folders and for files outside LFS.
    """

    path: str
    size: int
    sha256: str | None = None


class Source(ABC):
    """One model repo or folder, possibly a whole diffusers pipeline.

    Attributes:
        kind: ``"hub"``, ``"folder"`` or ``"file"``.
        label: what messages and the manifest call it: the repo id, or the base name of the folder or file, never an
            absolute path.
        repo_id: ``None`` but for a repo.
        revision: the commit hash (40 hex digits); ``None`` but for a repo.
        root: the folder on this machine below which fetched files lie.
        weights_file: of a single file, the file.
        elsewhere: of a single file with several models, model → names of tensors in it that are only of the others.
        rewritten: JSON files whose values are not those that lie on the disk.
    """

    kind: Literal["hub", "folder", "file"]
    label: str
    repo_id: str | None
    revision: str | None
    root: Path
    weights_file: str | None = None
    elsewhere: Mapping[str, frozenset[str]] = MappingProxyType({})
    rewritten: frozenset[str] = frozenset()

    @abstractmethod
    def files(self) -> Mapping[str, SourceFile]:
        """Every file the source holds, fetched or not, by path."""

    @abstractmethod
    def local(self, path: str) -> Path:
        """Where the file lies on this machine.

        Raises:
            SourceError: it is not in the source, not fetched yet, or leaves the source.
        """

    @abstractmethod
    def fetch(self, paths: Sequence[str], progress: FetchProgress | None = None) -> None:
        """Make these files local; a folder only checks that they are there.

        Raises:
            SourceError: one of them is not in the source.
            HubError: the Hub refused, or the connection broke.
        """

    @property
    def is_remote(self) -> bool:
        """Whether ``fetch`` brings files from elsewhere; otherwise all of them lie below ``root``."""
        return self.kind == "hub"

    def hidden_folders(self) -> Sequence[str]:
        """Folders of the source that are not looked into, such as ``.git``."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files().values())

    def has(self, path: str) -> bool:
        """Whether the source holds this file."""
        return path in self.files()

    def is_local(self, path: str) -> bool:
        """Whether the file lies on this machine already."""
        return self.has(path) and (self.root / path).is_file()

    def require(self, path: str) -> SourceFile:
        """The file's entry, without opening it.

        Raises:
            SourceError: the path is not a plain relative one, or the file is not in the source.
        """
        if not is_safe_path(path):
            raise SourceError(f"{self.label}: {show(path)} is not a path inside the source")
        if not self.has(path):
            raise SourceError(f"{self.label} has no file {path}")
        return self.files()[path]

    def read_bytes(self, path: str, most: int = CONFIG_BYTES) -> bytes:
        """The content of a small file.

        Raises:
            SourceError: not there, not fetched, unreadable, or larger than ``most`` bytes.
        """
        try:
            return read_limited(self.local(path), most)
        except OSError as error:
            raise SourceError(f"{self.label}: {path} cannot be read: {_because(error)}") from error

    def read_json(self, path: str, most: int = CONFIG_BYTES) -> Any:
        """The JSON value of a small file.

        Raises:
            SourceError: as :meth:`read_bytes`, or it is not valid JSON, or of absurd depth or length.
        """
        try:
            return parse_json(self.read_bytes(path, most))
        except ValueError as error:
            raise SourceError(f"{self.label}: {path} is {error}") from error

    @cached_property
    def headers(self) -> dict[str, Any]:
        """What a format's reader keeps of a file's header, by path: each is parsed once."""
        return {}

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        """A file at random access.

        Raises:
            SourceError: it is not in the source, or cannot be opened.
            HubError: it is not in the cache, and the Hub may not be asked.
        """
        return LocalFile(self.local(path))

    def read_range(self, path: str, offset: int, count: int) -> bytes:
        """Bytes of a file.

        Raises:
            SourceError: the file is missing or shorter than that.
        """
        where = f"{self.label}: {path}"
        try:
            with self.local(path).open("rb") as stream:
                stream.seek(offset)
                data = stream.read(count)
        except OSError as error:
            raise SourceError(f"{where} cannot be read: {error.strerror}") from error
        if len(data) != count:
            raise SourceError(f"{where} is truncated", hint=DAMAGED_HINT)
        return data


def _because(error: OSError) -> str:
    return f"it {error.strerror}" if error.errno in (errno.EINVAL, errno.EFBIG) else str(error.strerror)


def is_safe_path(path: str) -> bool:
    """Whether a path is relative, ``/``-separated and stays inside its root whatever the platform."""
    if not path or "\\" in path or not path.isprintable() or path[1:2] == ":":
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def show(text: str) -> str:
    """Text from outside, fit for one line of a message: quoted, control characters escaped, cut at 200 characters."""
    return repr(text if len(text) <= 200 else text[:200] + "…")
