"""SHA-256 of a weights file, taken while its tensors are read anyway."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from aoconvert.errors import ReadError

_CHUNK = 1 << 22


class FileDigest:
    """Hashes a file front to back from the tensors that are read from it, and from the file where they leave gaps.

    Tensors that come in another order than they lie in the file cost a second read of it at the end.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._position = 0
        self._ordered = True

    def feed(self, offset: int, data: torch.Tensor) -> None:
        """``data`` is contiguous and holds the file's bytes from ``offset``."""
        if offset < self._position or not self._ordered:
            self._ordered = False
            return
        self._read_to(offset)
        if data.numel():
            view = data.reshape(-1).view(torch.uint8).numpy().data
            self._digest.update(view)
            self._position += view.nbytes

    def finish(self) -> str:
        """The hex digest of the whole file.

        Raises:
            ReadError: the file cannot be read.
        """
        if not self._ordered:
            self._digest, self._position = hashlib.sha256(), 0
        self._read_to(None)
        return self._digest.hexdigest()

    def _read_to(self, end: int | None) -> None:
        if end is not None and end <= self._position:
            return
        try:
            with self._path.open("rb", buffering=0) as file:
                stop = os.fstat(file.fileno()).st_size if end is None else end
                file.seek(self._position)
                while self._position < stop:
                    chunk = file.read(min(_CHUNK, stop - self._position))
                    if not chunk:
                        raise ReadError(f"{self._path.name} became shorter while it was read", hint="run again")
                    self._digest.update(chunk)
                    self._position += len(chunk)
        except OSError as error:
            raise ReadError(f"{self._path.name} cannot be read: {error.strerror}") from error
