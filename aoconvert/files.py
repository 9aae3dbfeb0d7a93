"""Reading and writing in folders that somebody else may have made: regular files only, and never through a link.

A downloaded folder may hold a FIFO where a report should be, or a link to a file of the user. Opening the first would
wait for ever, writing to the second would overwrite what it points to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aoconvert.errors import WriteError

_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

NOT_REGULAR = "is not a regular file"


def open_regular(path: Path, *, follow: bool = True) -> int:
    """A descriptor of a regular file, for reading; a FIFO, a device or a folder is refused at once.

    Args:
        path: the file.
        follow: go through a link.

    Raises:
        OSError: no such file, no permission, ``EINVAL``: it is not a regular file, or ``ELOOP``: it is a link.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    descriptor = os.open(path, os.O_RDONLY | _CLOEXEC | _NO_WAIT | (0 if follow else _NO_FOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced in between
        os.close(descriptor)
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return descriptor


def is_there(path: Path) -> bool:
    """Whether anything has this name, a broken link too."""
    return path.is_symlink() or path.exists()


def read_limited(path: Path, most: int, *, follow: bool = True) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: as ``open_regular``, ``EFBIG``: it is larger, or ``EAGAIN``: it grew meanwhile.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"is larger than {most:,} bytes", str(path))
        content = file.read(size + 1)  # not ``most``: memory for all that may be read is taken at once
    if len(content) > size:
        raise OSError(errno.EAGAIN, "changed while it was read", str(path))
    return content


def write_whole(path: Path, content: bytes | bytearray) -> None:
    """Put a file in place of what is there, at once: a reader sees the old content or the new.

    A link is replaced, not followed. Anything else that is not a regular file is left alone.

    Raises:
        OSError: disk full, no permission, or ``EINVAL``: something else has this name.
    """
    folder = os.open(path.parent, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC)
    try:
        _check(path, folder)
        draft = f".{path.name[:200]}.{secrets.token_hex(8)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _CLOEXEC, 0o666, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(draft, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=folder)
            raise
    finally:
        os.close(folder)


def check_replaceable(path: Path) -> None:
    """Whether ``write_whole`` could put a file there, as far as can be told before.

    Raises:
        OSError: ``EINVAL``: something that is not a file has this name.
    """
    _check(path, None)


def _check(path: Path, folder: int | None) -> None:
    try:
        mode = os.stat(path if folder is None else path.name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An ``OSError`` inside becomes a ``WriteError`` that names the file."""
    try:
        yield
    except OSError as error:
        hint = "free space on this disk, or choose another --output" if error.errno == errno.ENOSPC else None
        raise WriteError(f"{error.filename or path}: {error.strerror or error}", hint=hint) from error
