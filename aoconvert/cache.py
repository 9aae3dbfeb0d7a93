"""What is remembered between runs, in a folder of this user's alone.

``$AOCONVERT_CACHE_DIR``, or ``aoconvert`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. All of it can be made again; what
cannot be read or trusted is as if it were not there. ``AOCONVERT_CACHE_DIR=`` (empty) switches it off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert.errors import WriteError
from aoconvert.files import read_limited
from aoconvert.json_text import CONFIG_BYTES, parse_json

_log = logging.getLogger(__name__)

# what marks a folder as ours, and tells backup programs to pass it by: https://bford.info/cachedir/
_TAG = "CACHEDIR.TAG"
_SIGNATURE = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# written by aoconvert; it can be deleted: aoconvert "
    "recreates what it needs\n"
)


@dataclass(frozen=True)
class Kept:
    """One kind of thing in the cache: how many files, and their bytes."""

    name: str
    files: int
    nbytes: int


def root() -> Path | None:
    """The cache's folder, whether or not it is there; ``None`` where it is switched off.

    Raises:
        RuntimeError: there is no home folder.
    """
    own = os.environ.get("AOCONVERT_CACHE_DIR")
    if own == "":
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "aoconvert"


def contents() -> tuple[Kept, ...]:
    """What is in the cache, kind by kind. Links are not followed."""
    return tuple(_count(place) for place in _kinds())


def clear() -> None:
    """Remove what is in the cache: the folders that :func:`folder` made, and nothing else.

    Raises:
        WriteError: no permission.
    """
    for place in _kinds():
        try:
            shutil.rmtree(place)
        except FileNotFoundError:  # another process clears it too
            continue
        except OSError as error:
            raise WriteError(f"{error.filename or place}: {error.strerror}", hint="delete it by hand") from error


def _kinds() -> list[Path]:
    """The folders in the cache that we made: somebody may keep other things beside them."""
    base = root()
    if base is None or not base.is_dir():
        return []
    return sorted(
        place for place in base.iterdir() if not place.is_symlink() and (place / _TAG).is_file() and is_trusted(place)
    )


def _count(place: Path) -> Kept:
    found = [path.lstat() for path in place.rglob("*") if path.name != _TAG]
    files = [facts.st_size for facts in found if stat.S_ISREG(facts.st_mode)]
    return Kept(place.name, len(files), sum(files))


def folder(kind: str) -> Path | None:
    """The folder for one kind of thing, made with mode 0700; ``None`` where none can be trusted. Never raises."""
    try:
        base = root()
        if base is None:
            return None
        place = base / kind
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_trusted(place):
            if not (place / _TAG).exists():
                (place / _TAG).write_text(_SIGNATURE, encoding="ascii")
            return place
        _log.warning("%s is not used: it must be a folder that belongs to this user and has mode 0700", place)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _log.debug("no cache: %s", error)
    return None


@contextlib.contextmanager
def hold(kind: str, name: str) -> Iterator[Path | None]:
    """Give a folder of one kind, made where it is not there, that :func:`shrink` leaves alone meanwhile.

    Args:
        kind: of the thing.
        name: of the folder, see :func:`key`.

    Yields:
        ``None`` where the cache is not used.

    Raises:
        OSError: it cannot be made.
    """
    place = folder(kind)
    if place is None:
        yield None
        return
    lock = _lock_shared(place / name)
    try:
        os.utime(lock)
        yield place / name
        os.utime(lock)
    finally:
        os.close(lock)


def _lock_shared(place: Path) -> int:
    while True:
        place.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed in between
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
            except OSError:
                _log.debug("the file system of %s has no locks", place)
                return lock
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), place.stat(follow_symlinks=False)):
                    return lock
            os.close(lock)


def shrink(kind: str, limit: int) -> None:
    """Remove folders of one kind until they have ``limit`` bytes, the least recently used first, but none in use.

    Never raises: what cannot be removed stays.
    """
    place = folder(kind)
    if place is None:
        return
    with contextlib.suppress(OSError):
        found = [path for path in place.iterdir() if path.is_dir() and not path.is_symlink()]
        for path in found:
            if path.name.startswith("."):  # of a run that was killed while it removed it
                shutil.rmtree(path, ignore_errors=True)
        sizes = {path: (path.stat().st_mtime_ns, _count(path).nbytes) for path in found if path.name[0] != "."}
        total = sum(nbytes for _, nbytes in sizes.values())
        for path in sorted(sizes, key=lambda path: (sizes[path][0], path.name)):
            if total <= limit:
                break
            if _remove(path):
                total -= sizes[path][1]


def _remove(place: Path) -> bool:
    """Remove a folder that nobody holds; another name first, so that who wants to hold it makes a new one."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # somebody holds it, or there are no locks
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = place.with_name(f".{secrets.token_hex(8)}")
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    return False


def is_trusted(place: Path) -> bool:
    """Whether nobody but this user can have put anything there."""
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def key(facts: Any) -> str:
    """A file name for everything that a thing depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def remember(kind: str, facts: Any, make: Callable[[], Any]) -> Any:
    """The JSON value that ``make`` gives, out of the cache where it was made from the same ``facts`` before.

    Args:
        kind: its folder.
        facts: everything that it depends on, versions included.
        make: a pure function of them; ``None`` is not kept.
    """
    place = folder(kind)
    file = place / f"{key(facts)}.json" if place is not None else None
    if file is not None:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            return parse_json(read_limited(file, CONFIG_BYTES))
    value = make()
    if file is not None and value is not None:
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile("w", dir=place, delete=False) as stream:
            json.dump(value, stream)
            stream.close()
            Path(stream.name).replace(file)
    return value
