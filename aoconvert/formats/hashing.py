"""SHA-256 of files and of their beginnings, without filling the page cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_CHUNK = 1 << 22
_STEP = 32 << 20  # bytes between two reports


@dataclass(frozen=True)
class Prefix:
    """The first ``size`` bytes of a file, and their running SHA-256."""

    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


def advise(descriptor: int, start: int, size: int, advice: Literal["SEQUENTIAL", "DONTNEED"]) -> None:
    """Tell the kernel how a part of a file is used; a system or file system that takes no advice gets none."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, size, getattr(os, f"POSIX_FADV_{advice}"))


def forget(descriptor: int, start: int, size: int) -> None:
    """Drop clean pages from the page cache; dirty ones begin their way to the disk (Linux: mm/fadvise.c)."""
    advise(descriptor, start, size, "DONTNEED")


def hash_on(descriptor: int, digest: hashlib._Hash, start: int, stop: int, *, keep: bool = False) -> int:
    """Feed bytes ``start`` to ``stop`` of an open file to ``digest``; the page cache forgets them unless ``keep``.

    Returns:
        Where it ended: before ``stop`` only where the file does.

    Raises:
        OSError: the file cannot be read.
    """
    position = start
    while position < stop:
        chunk = os.pread(descriptor, min(_CHUNK, stop - position), position)
        if not chunk:
            break
        digest.update(chunk)
        if not keep:
            forget(descriptor, position, len(chunk))
        position += len(chunk)
    return position


def count_matching(
    path: Path, marks: Sequence[tuple[int, str]], report: Callable[[int], None] = lambda nbytes: None
) -> tuple[int, Prefix]:
    """How many of ``marks`` a file still bears out.

    Args:
        path: the file.
        marks: a number of bytes from the start, ascending, and their SHA-256 (hex).
        report: told how many more bytes were hashed.

    Returns:
        How many of the marks, from the first on, are right, and the prefix that the last of them names.

    Raises:
        OSError: the file cannot be read.
    """
    count, kept = 0, Prefix()
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        digest, position = hashlib.sha256(), 0
        for size, expected in marks:
            while position < size:
                stop = min(size, position + _STEP)
                if hash_on(descriptor, digest, position, stop) != stop:
                    return count, kept
                report(stop - position)
                position = stop
            if position != size or digest.hexdigest() != expected:
                return count, kept
            count, kept = count + 1, Prefix(size, digest.copy())
    finally:
        os.close(descriptor)
    return count, kept
