"""How far other code has read files, for a progress bar.

The Hub client offers no hook for uploads: its own bars are drawn or not, and Xet reads inside a Rust library. Linux
tells the position of every open file of a process (``/proc/self/fdinfo``, man proc_pid_fdinfo), as ``pv --watchfd``
uses it. Elsewhere the bar moves file by file.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

_PERIOD = 0.2  # seconds
_OPEN = Path("/proc/self/fd")


class FileWatch:
    """Reports bytes of some files as they are read in this process. A context manager.

    Args:
        sizes: size in bytes by file.
        report: is called with the number of further bytes and a file's name, from a thread.
    """

    def __init__(self, sizes: Mapping[Path, int], report: Callable[[int, str], None]) -> None:
        self._sizes = {os.path.realpath(path): size for path, size in sizes.items()}
        self._report = report
        self._read: dict[str, int] = dict.fromkeys(self._sizes, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> FileWatch:
        if _OPEN.is_dir():
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if kind is None:  # what was there already was not read, and is done too
            for path, size in self._sizes.items():
                self._note(path, size)

    def _work(self) -> None:
        while not self._over.wait(_PERIOD):
            for path, position in positions():
                if path in self._read:
                    self._note(path, position)

    def _note(self, path: str, position: int) -> None:
        """A retry reads from the start again: only what is further than before counts."""
        more = min(position, self._sizes[path]) - self._read[path]
        if more > 0:
            self._read[path] += more
            self._report(more, Path(path).name)


def positions() -> Iterator[tuple[str, int]]:
    """Path and position of each file that this process has open."""
    for link in list(_OPEN.iterdir()):
        with contextlib.suppress(OSError, ValueError):  # closed in the meantime
            path = str(link.readlink())
            first = (_OPEN.parent / "fdinfo" / link.name).read_text().splitlines()[0]
            yield path, int(first.removeprefix("pos:"))
