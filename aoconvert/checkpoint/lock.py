"""The lock on the folder in which a run builds its output: the kernel forgets it with the process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

from aoconvert.checkpoint.unfinished import LOCK_NAME, partial_folder
from aoconvert.errors import PlanError
from aoconvert.files import read_limited


def hold_output(output: Path) -> int:
    """Make the unfinished folder of an output, and lock it.

    Returns:
        A descriptor of the folder; closing it lets go.

    Raises:
        PlanError: another process holds it.
        OSError: the folder cannot be made.
    """
    folder = partial_folder(output)
    while True:
        folder.mkdir(exist_ok=True)
        lock = _lock(output, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), folder.stat(follow_symlinks=False)):
                return lock
        os.close(lock)  # its owner has just published it, or removed it


def refuse_held(output: Path) -> None:
    """Refuse an output that another process is writing to; nothing is made or changed.

    Raises:
        PlanError: another process is.
    """
    with contextlib.suppress(OSError):  # there is no such folder
        os.close(_lock(output, fcntl.LOCK_SH))


def _lock(output: Path, kind: int) -> int:
    folder = partial_folder(output)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise PlanError(
            [f"another aoconvert{_owner(folder)} is writing to {output}"],
            hint="wait for it, or choose another --output",
            retryable=True,
        ) from None
    except OSError:
        logging.getLogger(__name__).debug("the file system of %s has no locks", folder)
    return lock


def _owner(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (process {int(read_limited(folder / LOCK_NAME, 20, follow=False))})"
    return ""
