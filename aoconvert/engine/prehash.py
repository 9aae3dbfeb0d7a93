"""Hashing the source while the libraries are imported: Python needs one core for that, and the others are idle."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from aoconvert.formats.digest import FileDigest

_SHARE = 4  # of the memory that is available, a fourth may be page cache of what is read twice


class HashingAhead:
    """Digests of weights files, begun in a thread; ``stop`` hands them over as far as they are.

    Args:
        paths: the files, in the order in which they will be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._digests: dict[Path, FileDigest] = {}
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(tuple(paths),), name="aoconvert-ahead", daemon=True)
        self._thread.start()

    def _work(self, paths: Sequence[Path]) -> None:
        left = _available_bytes() // _SHARE
        for path in paths:
            if left <= 0 or self._given_up.is_set():
                return
            digest = FileDigest(path)
            digest.ahead(left, self._given_up)
            self._digests[path] = digest
            with contextlib.suppress(OSError):
                left -= path.stat().st_size

    def stop(self) -> Mapping[Path, FileDigest]:
        """End it, and give what was begun."""
        self._given_up.set()
        self._thread.join()
        return self._digests

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _available_bytes() -> int:
    """Memory that can be had without swapping (Linux); 0 elsewhere."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
