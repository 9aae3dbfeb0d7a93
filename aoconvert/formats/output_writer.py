"""What the writers of all formats do alike with the file they write: open it, leave it, remove it, say what failed."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from types import TracebackType
from typing import Self

from aoconvert.errors import WriteError
from aoconvert.formats.hashing import Prefix
from aoconvert.formats.output_file import OutputFile


class OutputWriter:
    """The file of a ``Writer``. As a context manager it removes the file unless ``_sealed`` is set.

    Args:
        path: the file to create, usually under a temporary name; must not exist.
        prefix: how far an earlier writer wrote it; then it must exist, and is written on.

    Raises:
        WriteError: the file exists, does not exist, or cannot be created.
    """

    def __init__(self, path: Path, prefix: Prefix | None) -> None:
        self._path = path
        self._sealed = False
        self._whole = True  # False once a tensor was left half-written
        try:
            self._file = OutputFile(path, prefix)
        except OSError as error:
            raise self._failed("creating the file" if prefix is None else "opening the file", error) from error

    def leave(self) -> None:
        """Close the file as it is; a later writer may go on with it."""
        with contextlib.suppress(OSError):  # must not hide the error that brought us here
            self._file.close()

    def abort(self) -> None:
        """Close and remove the unfinished file; does nothing once it is sealed."""
        if not self._sealed:
            self.leave()
            with contextlib.suppress(OSError):
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _expect(self, name: str, written: bool) -> None:
        """Refuse a name that is used twice, and whatever comes behind a half-written tensor."""
        if written:
            raise WriteError(f"{self._path}: tensor {name!r} was written twice")
        self._refuse_half_written()

    def _refuse_half_written(self) -> None:
        if not self._whole:
            raise WriteError(f"{self._path}: a tensor was left half-written")

    def _failed(self, doing: str, error: OSError) -> WriteError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free space on this disk, or choose another output folder"
        else:
            hint = "check the output folder's permissions, and that no other run writes there"
        return WriteError(f"{self._path}: {doing} failed: {error.strerror or error}", hint=hint)
