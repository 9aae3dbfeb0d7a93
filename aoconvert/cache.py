"""What is remembered between runs, in a folder of this user's alone.

``$AOCONVERT_CACHE_DIR``, or ``aoconvert`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. All of it can be made again; what
cannot be read or trusted is as if it were not there. ``AOCONVERT_CACHE_DIR=`` (empty) switches it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def folder(kind: str) -> Path | None:
    """The folder for one kind of thing, made with mode 0700; ``None`` where none can be trusted. Never raises."""
    own = os.environ.get("AOCONVERT_CACHE_DIR")
    if own == "":
        return None
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        root = Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "aoconvert"
        place = root / kind
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if trusted(place):
            return place
        _log.warning("%s is not used: it must be a folder of this user with mode 0700", place)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        _log.debug("no cache: %s", error)
    return None


def trusted(place: Path) -> bool:
    """Whether nobody but this user can have put anything there."""
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def key(facts: Any) -> str:
    """A file name for everything that a thing depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def remembered(kind: str, facts: Any, make: Callable[[], Any]) -> Any:
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
            return json.loads(file.read_text(encoding="utf-8"))
    value = make()
    if file is not None and value is not None:
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile("w", dir=place, delete=False) as stream:
            json.dump(value, stream)
            stream.close()
            Path(stream.name).replace(file)
    return value
