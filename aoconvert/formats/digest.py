"""SHA-256 of a weights file, taken from the very bytes that are read of it.

Bytes that come in the file's order are hashed as they come. Bytes that were hashed before they came (ahead of the run,
in a gap that was skipped, by the check of an earlier run) are compared with what was hashed, chunk by chunk. So each
tensor is bound to the digest, whatever happens to the file. That the file itself stayed one and the same is a question
of its own, which ``finish`` answers: a change that the kernel noticed, or could have missed, is settled by hashing
the file again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from aoconvert.errors import ReadError
from aoconvert.files import open_regular
from aoconvert.formats.hashing import forget

Buffer = bytes | memoryview

_STEP = 32 << 20  # bytes between two looks at whether to go on ahead
_READ = 4 << 20
_CHUNK = 1 << 17
"""Bytes that are compared together. A CRC-32 finds a change by accident all but once in 4 billion chunks, and whoever
could forge one could as well change the result."""

_UNSURE_NS = 1_000_000_000
"""A change this soon after another may get the same time stamp: the kernel's clock ticks, some disks count seconds."""


@dataclass(frozen=True)
class Mark:
    """How far a file was hashed front to back, in bytes, and the SHA-256 of its bytes up to there."""

    position: int
    sha256: str


@dataclass(frozen=True)
class _State:
    """What the kernel says of a file; ``changed`` is the time of its last change, which no program can set."""

    device: int
    inode: int
    size: int
    written: int
    changed: int

    @classmethod
    def of(cls, facts: os.stat_result) -> _State:
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def changed_while_read(name: str) -> ReadError:
    """What is said of a source file that is not what it was when the run began with it."""
    return ReadError(
        f"{name} changed while it was read", hint="wait until the program that writes it has finished, and run again"
    )


def damaged_in_cache(name: str) -> ReadError:
    """What is said of a file whose digest is not the one the Hub names."""
    return ReadError(
        f"{name} is damaged: its SHA-256 is not the one on the Hub",
        hint="delete it from the Hub cache and run again",
    )


class FileDigest:
    """Hashes a file front to back from what is read of it, and from the file where that leaves gaps.

    What lies in a gap is read twice: for the digest, and later for its tensor.

    Args:
        path: the file. An error of a first look is left to whoever reads it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.time_ns()
        self._state = self._look()
        self._reset()

    def _reset(self) -> None:
        self._digest = hashlib.sha256()
        self._position = 0
        self._fed = False
        self._chunks = array("I")  # CRC-32 of each chunk that is hashed whole
        self._partial = 0  # CRC-32 of what is hashed of the next one

    @classmethod
    def resume(cls, path: Path, marks: Sequence[Mark], report: Callable[[int], None]) -> Self | None:
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
        for position, sha256 in sorted({(mark.position, mark.sha256) for mark in marks}):
            while made._position < position:
                start, stop = made._position, min(position, made._position + _STEP)
                if made._hash_file(stop) < stop:
                    return None
                report(stop - start)
            if made._position != position or made._digest.hexdigest() != sha256:
                return None
        return made

    def ahead(self, stop: int, given_up: threading.Event) -> None:
        """Hash the file's first ``stop`` bytes before anything is read, leaving them in the page cache.

        In steps, until ``given_up`` is set. An error is left to whoever reads the file.
        """
        if self._state is None:
            return
        stop = min(stop, self._state.size)
        try:
            while self._position < stop and not given_up.is_set():
                until = min(stop, self._position + _STEP)
                if self._hash_file(until, keep=True) < until:
                    return
        except ReadError:
            self._reset()

    def feed(self, offset: int, data: Buffer) -> None:
        """``data`` are the file's bytes from ``offset``, as they are used.

        Raises:
            ReadError: they are not what was hashed before, or what lies before them cannot be read.
        """
        self._fed = True
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        seen = max(0, min(len(view), self._position - offset))
        if seen:
            self._compare(offset, view[:seen])
        if seen < len(view):
            self._read_to(offset)
            self._take(view[seen:])

    def mark(self, *, again: bool = False) -> Mark | None:
        """How far it is; ``None`` where nothing was read since the last call, unless ``again``."""
        if not (self._fed or again):
            return None
        self._fed = False
        return Mark(self._position, self._digest.hexdigest())

    def read_all(self) -> None:
        """Hash the rest of the file.

        Raises:
            ReadError: it cannot be read.
        """
        self._read_to(None)

    def finish(self, expected: str | None = None) -> str:
        """The hex digest of the whole file.

        Args:
            expected: what the Hub says; bytes that have it need no further proof.

        Raises:
            ReadError: the file cannot be read, or is not one and the same from the first look to this one.
        """
        self._read_to(None)
        found = self._digest.hexdigest()
        if found != expected and not self._is_untouched() and FileDigest(self._path)._whole() != found:
            raise changed_while_read(self._path.name)
        return found

    def _whole(self) -> str:
        self._read_to(None)
        return self._digest.hexdigest()

    def _look(self) -> _State | None:
        try:
            facts = self._path.stat()
        except OSError:
            return None
        return _State.of(facts) if stat.S_ISREG(facts.st_mode) else None

    def _is_untouched(self) -> bool:
        """Whether the kernel saw no change, and would have seen one."""
        state = self._state
        return state is not None and state == self._look() and state.changed < self._began - _UNSURE_NS

    def _take(self, view: memoryview) -> None:
        """The file's next bytes."""
        self._digest.update(view)
        while len(view):
            room = _CHUNK - self._position % _CHUNK
            part, view = view[:room], view[room:]
            self._partial = zlib.crc32(part, self._partial)
            self._position += len(part)
            if len(part) == room:
                self._chunks.append(self._partial)
                self._partial = 0

    def _compare(self, offset: int, view: memoryview) -> None:
        """Bytes before the position, chunk by chunk; the file is asked for what belongs to the first and the last.

        Raises:
            ReadError: they are not what was hashed.
        """
        end = offset + len(view)
        descriptor = self._open()
        try:
            for chunk in range(offset // _CHUNK, -(-end // _CHUNK)):
                first, last = chunk * _CHUNK, min((chunk + 1) * _CHUNK, self._position)
                crc = zlib.crc32(os.pread(descriptor, max(0, offset - first), first))
                crc = zlib.crc32(view[max(0, first - offset) : max(0, last - offset)], crc)
                crc = zlib.crc32(os.pread(descriptor, max(0, last - end), end), crc)
                if crc != (self._chunks[chunk] if chunk < len(self._chunks) else self._partial):
                    raise changed_while_read(self._path.name)
        except OSError as error:
            raise self._fail(error) from error
        finally:
            os.close(descriptor)

    def _read_to(self, end: int | None) -> None:
        """Hash the file up to ``end``, or to where it ends."""
        if end is None:
            state = self._look()
            end = state.size if state is not None else self._position + 1  # opening it says why there is none
            if self._state is not None and end != self._state.size:
                raise changed_while_read(self._path.name)
        if self._hash_file(end) < end:
            raise changed_while_read(self._path.name)

    def _hash_file(self, stop: int, *, keep: bool = False) -> int:
        """Hash the file from where it is to ``stop``, or to the file's end, and say where that is."""
        if self._position >= stop:
            return self._position
        descriptor = self._open()
        try:
            while self._position < stop:
                start = self._position
                data = os.pread(descriptor, min(_READ, stop - start), start)
                if not data:
                    break
                self._take(memoryview(data))
                if not keep:
                    forget(descriptor, start, len(data))
        except OSError as error:
            raise self._fail(error) from error
        finally:
            os.close(descriptor)
        return self._position

    def _open(self) -> int:
        try:
            return open_regular(self._path)
        except OSError as error:
            raise self._fail(error) from error

    def _fail(self, error: OSError) -> ReadError:
        return ReadError(f"{self._path.name} cannot be read: {error.strerror}")
