"""The open files of a component, hashed while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from aoconvert.formats.base import Observe
from aoconvert.formats.digest import FileDigest, Mark, damaged_in_cache
from aoconvert.sources import Source


class ObservedFile(Protocol):
    """An open file that tells what is read of it."""

    path: Path
    observe: Observe | None

    def close(self) -> None:
        """Release it."""


F = TypeVar("F", bound=ObservedFile)


class HashedFiles(Generic[F]):
    """What each kind of old weights does with its files beside reading them.

    Attributes:
        source: holds the files.
    """

    source: Source
    _files: dict[str, F]
    _digests: dict[str, FileDigest]

    def hash(self, begun: Mapping[str, FileDigest] = MappingProxyType({})) -> None:
        """From now on take the SHA-256 of the files, from what is read of them; some may be hashed in part already."""
        for path, file in self._files.items():
            self._digests[path] = begun.get(path) or FileDigest(file.path)
            file.observe = self._digests[path].feed

    def marks(self) -> Mapping[str, Mark]:
        """How far each file was hashed of which something was read since the last call."""
        found = ((path, digest.mark()) for path, digest in self._digests.items())
        return {path: mark for path, mark in found if mark is not None}

    def digests(self) -> Mapping[str, str]:
        """The SHA-256 of each file; what was not read is read now.

        Raises:
            ReadError: a file changed meanwhile, or is not what the Hub said it is.
        """
        found = {}
        for path, digest in self._digests.items():
            expected = self.source.files()[path].sha256
            found[path] = digest.finish(expected)
            if expected not in (None, found[path]):
                raise damaged_in_cache(path)
        return found

    def close(self) -> None:
        """Release the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
