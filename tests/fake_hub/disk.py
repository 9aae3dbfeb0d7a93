"""A folder of JSON files that several processes read and write: whole files only, changes under one lock."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Disk:
    """The folder and its lock.

    A file is replaced, never rewritten, so whoever reads it sees a whole one. What reads, decides and writes does so
    inside ``lock()``, which excludes other threads and other processes (``flock``), and may be entered again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()

    @contextmanager
    def lock(self) -> Iterator[None]:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            self._local.descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._local.descriptor, fcntl.LOCK_EX)
        self._local.depth = depth + 1
        try:
            yield
        finally:
            self._local.depth = depth
            if depth == 0:
                os.close(self._local.descriptor)

    def read(self, file: Path, default: Any = None) -> Any:
        try:
            return json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return default

    def write(self, file: Path, value: object) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.scratch(file)
        partial.write_text(json.dumps(value))
        partial.replace(file)

    def scratch(self, file: Path) -> Path:
        """A name beside a file that nobody else writes to."""
        return file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
