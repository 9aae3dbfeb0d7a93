"""SHA-256 of a weights file, taken while its tensors are read anyway."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from aoconvert.errors import ReadError
from aoconvert.hashing import hash_on, matching

if TYPE_CHECKING:
    import torch

_STEP = 32 << 20  # bytes between two looks at whether to go on ahead


@dataclass(frozen=True)
class Mark:
    """How far a file was hashed front to back, in bytes, and the SHA-256 of its bytes up to there."""

    position: int
    sha256: str


class FileDigest:
    """Hashes a file front to back from the tensors that are read from it, and from the file where they leave gaps.

    What lies in a gap is read twice: for the digest, and later for its tensor.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._position = 0
        self._fed = False
        self._facts: tuple[int, int] | None = None

    @classmethod
    def resumed(cls, path: Path, marks: Sequence[Mark], report: Callable[[int], None]) -> Self | None:
        """The digest of a file that was read in part by an earlier run.

        Args:
            path: the file.
            marks: what the earlier run read.
            report: told how many more bytes were hashed.

        Returns:
            ``None`` where the file is not what it was.

        Raises:
            ReadError: the file cannot be read.
        """
        made = cls(path)
        prefixes = sorted({(mark.position, mark.sha256) for mark in marks})
        try:
            count, prefix = matching(path, prefixes, report)
        except OSError as error:
            raise made._failed(error) from error
        if count < len(prefixes):
            return None
        made._digest, made._position = prefix.digest, prefix.size
        return made

    def ahead(self, stop: int, given_up: threading.Event) -> None:
        """Hash the file's first ``stop`` bytes before anything is read, leaving them in the page cache.

        In steps, until ``given_up`` is set. An error is left to whoever reads the file.
        """
        try:
            with self._path.open("rb", buffering=0) as file:
                facts = os.fstat(file.fileno())
                self._facts = facts.st_size, facts.st_mtime_ns
                stop = min(stop, facts.st_size)
                while self._position < stop and not given_up.is_set():
                    until = min(stop, self._position + _STEP)
                    self._position = hash_on(file.fileno(), self._digest, self._position, until, keep=True)
        except OSError:
            self._digest, self._position = hashlib.sha256(), 0

    def feed(self, offset: int, data: torch.Tensor) -> None:
        """``data`` is contiguous and holds the file's bytes from ``offset``."""
        import torch  # here, because hashing ahead begins before torch is imported

        self._fed = True
        view = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else memoryview(b"")
        end = offset + view.nbytes
        if end <= self._position:
            return
        self._read_to(offset)
        self._digest.update(view[self._position - offset :])
        self._position = end

    def mark(self) -> Mark | None:
        """How far it is; ``None`` where nothing was read since the last call."""
        if not self._fed:
            return None
        self._fed = False
        return Mark(self._position, self._digest.hexdigest())

    def finish(self) -> str:
        """The hex digest of the whole file.

        Raises:
            ReadError: the file cannot be read, or changed after it was hashed ahead.
        """
        self._read_to(None)
        if self._facts is not None:
            facts = self._path.stat()
            if (facts.st_size, facts.st_mtime_ns) != self._facts:
                raise ReadError(f"{self._path.name} changed while it was read", hint="run again")
        return self._digest.hexdigest()

    def _read_to(self, end: int | None) -> None:
        if end is not None and end <= self._position:
            return
        try:
            with self._path.open("rb", buffering=0) as file:
                stop = os.fstat(file.fileno()).st_size if end is None else end
                self._position = hash_on(file.fileno(), self._digest, self._position, stop)
        except OSError as error:
            raise self._failed(error) from error
        if self._position < stop:
            raise ReadError(f"{self._path.name} became shorter while it was read", hint="run again")

    def _failed(self, error: OSError) -> ReadError:
        return ReadError(f"{self._path.name} cannot be read: {error.strerror}")
