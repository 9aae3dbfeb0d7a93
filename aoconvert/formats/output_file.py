"""A file that grows front to back while its SHA-256 is taken, and that leaves the page cache as it found it."""

from __future__ import annotations

import os
from pathlib import Path

from aoconvert.formats.hashing import Prefix, forget, hash_on

Buffer = bytes | bytearray | memoryview

_WINDOW = 32 << 20
"""Bytes after which what was written is sent to the disk; three times as many are in the page cache at most."""


class OutputFile:
    """A new file, or one that is written on after ``prefix``; what lies behind that is cut off.

    Every method may raise ``OSError``.
    """

    def __init__(self, path: Path, prefix: Prefix | None = None) -> None:
        fresh = os.O_CREAT | os.O_EXCL
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | (fresh if prefix is None else os.O_NOFOLLOW)
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        prefix = prefix or Prefix()
        self._digest = prefix.digest.copy()
        self._written = self._hashed = self._sent = self._forgotten = prefix.size
        try:
            self._file.truncate(prefix.size)
            self._file.seek(prefix.size)
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._written

    def sha256(self) -> str:
        """Hex digest of the bytes so far; no gap may be open."""
        assert self._hashed == self._written
        return self._digest.hexdigest()

    def fileno(self) -> int:
        """The descriptor."""
        return self._file.fileno()

    def write(self, buffer: Buffer) -> None:
        """Append, and take in the digest."""
        self._digest.update(buffer)
        self.append(buffer)
        self._hashed = self._written

    def skip(self, size: int) -> None:
        """Leave a gap that ``fill`` fills later; until then ``append`` writes what comes behind it."""
        self._file.seek(size, os.SEEK_CUR)
        self._written += size

    def append(self, buffer: Buffer) -> None:
        """Write without a digest."""
        view = memoryview(buffer)
        while view.nbytes:  # one write(2) takes at most 2 GiB, and less on a signal
            count = self._file.write(view)
            self._written += count
            view = view[count:]
        if self._written - self._sent >= _WINDOW:
            self._send()

    def fill(self, start: int, buffer: Buffer) -> None:
        """Write the gap at ``start``, and take it and all behind it in the digest, read back from the file."""
        assert start == self._hashed
        view = memoryview(buffer)
        while view.nbytes:
            count = os.pwrite(self.fileno(), view, start)
            start += count
            view = view[count:]
        if hash_on(self.fileno(), self._digest, self._hashed, self._written) != self._written:
            raise OSError(0, "the file became shorter while it was written")
        self._hashed = self._written

    def flush(self) -> None:
        """Wait until everything is on the disk; the page cache keeps none of it."""
        os.fsync(self.fileno())
        forget(self.fileno(), self._forgotten, 0)

    def close(self) -> None:
        """Release it."""
        self._file.close()

    def _send(self) -> None:
        """Begin to write the last window to the disk, and forget the one before, which is there by now."""
        forget(self.fileno(), self._forgotten, self._written - self._forgotten)
        self._forgotten, self._sent = self._sent, self._written
