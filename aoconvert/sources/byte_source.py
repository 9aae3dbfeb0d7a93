"""Where the bytes of a file come from: a file on this machine, or a server that answers ranged requests."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from aoconvert.errors import SourceError


class ByteSource(Protocol):
    """Bytes at random access."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``; the caller stays inside the file.

        Raises:
            SourceError: they could not be read.
        """


class LocalFile:
    """A regular file on this machine, as a context manager.

    Raises:
        SourceError: missing, unreadable, or no regular file (a pipe would block for ever).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not block
            facts = os.fstat(self._descriptor)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise SourceError(f"{path} cannot be read: {reason}", hint="check the path and its permissions") from error
        self.size = facts.st_size
        if not stat.S_ISREG(facts.st_mode):
            os.close(self._descriptor)
            raise SourceError(f"{path} is not a regular file", hint="give the path of a weights file")

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``.

        Raises:
            SourceError: a disk error, or the file became shorter.
        """
        parts: list[bytes] = []
        while count > 0:
            try:
                part = os.pread(self._descriptor, count, offset)
            except OSError as error:
                raise SourceError(f"{self._path} cannot be read: {error.strerror}") from error
            if not part:
                raise SourceError(f"{self._path} became shorter while it was read", hint="run again")
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
