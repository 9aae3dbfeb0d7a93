"""Files of the source that the result has unchanged: copied, and hashed on the way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.manifest import FileEntry
from aoconvert.engine.staging import Stage
from aoconvert.files import open_regular, writing
from aoconvert.formats.digest import FileDigest, damaged_in_cache
from aoconvert.json_text import INDEX_BYTES
from aoconvert.planning.types import CopyPlan
from aoconvert.progress import Progress
from aoconvert.sources import Source

_FICLONE = 0x40049409
_CHUNK = 1 << 22


def take_over(stage: Stage, source: Source, files: Iterable[CopyPlan], progress: Progress) -> list[FileEntry]:
    """Copy files from the source; where the file system can, a copy shares its blocks until one of the two changes.

    They are never hard links: whoever edits a file of the result would edit the source, or the Hub's cache.

    Raises:
        WriteError: disk full, or no permission.
        SourceError: a file vanished.
        ReadError: a file changed while it was read, or is not what the Hub said it is.
    """
    entries = []
    for item in files:
        if item.source in source.rewritten:
            entries.append(stage.write_text(item.path, json.dumps(source.read_json(item.source), indent=2) + "\n"))
            progress.advance(item.size, item.path)
            continue
        if item.drop is not None and item.path.endswith(".json"):
            text = _rename_index(source.read_json(item.source, INDEX_BYTES), item.drop)
            entries.append(stage.write_text(item.path, text))
            progress.advance(item.size, item.path)
            continue
        origin = source.local(item.source).resolve()  # a file of the Hub cache is a link to its blob
        target = stage.root / item.path
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            expected = source.files()[item.source].sha256
            digest = _copy(origin, target, progress, item.path, expected)
        if expected not in (None, digest):
            raise damaged_in_cache(item.source)
        entries.append(FileEntry(path=item.path, size=target.stat().st_size, sha256=digest))
    return entries


def _rename_index(index: Any, variant: str) -> str:
    """A shard index whose file names have lost the variant."""
    index["weight_map"] = {name: path.replace(f".{variant}", "", 1) for name, path in index["weight_map"].items()}
    return json.dumps(index, indent=2) + "\n"


def _copy(origin: Path, target: Path, progress: Progress, name: str, expected: str | None) -> str:
    """Copy a file, and give the SHA-256 of the bytes that were written.

    Raises:
        OSError: disk full, no permission.
        ReadError: it changed meanwhile.
    """
    digest = FileDigest(origin)
    with os.fdopen(open_regular(origin), "rb") as reading, target.open("x+b") as writing:
        cloned = _clone(reading.fileno(), writing.fileno())
        done = 0
        while chunk := (writing if cloned else reading).read(_CHUNK):
            digest.feed(done, chunk)
            if not cloned:
                writing.write(chunk)
            done += len(chunk)
            progress.advance(len(chunk), name)
    return digest.finish(expected)


def _clone(origin: int, target: int) -> bool:
    """Give an empty file the blocks of another, where the file system can (btrfs, XFS); see ioctl_ficlone(2)."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, origin)
        return True
    return False
