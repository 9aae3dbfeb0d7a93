"""Keeps what a job has made in its bucket, so that a later attempt goes on from there.

The bucket is a mounted folder in which files are read, written from begin to end, and deleted: no more is promised
(https://github.com/huggingface/hf-mount, "Consistency model"). So the work is done on the machine's own disk, and a
variant is copied when it is whole: its note (``NAME.made.json``) last, and an older note is deleted before the first
file is replaced. A report that comes later is added: a job that is killed meanwhile loses that report alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from aoconvert.files import writing
from aoconvert.releasing.page import PAGE_NAME
from aoconvert.releasing.record import RECORD_NAME
from aoconvert.releasing.variants import note_name

_Stamp = tuple[int, int]
_CHUNK = 1 << 24  # bytes


class Keeper:
    """Copies variants to a bucket and back.

    Args:
        work: the folder of a release on this machine.
        bucket: its folder in the bucket.
        names: of its variants' folders.
    """

    def __init__(self, work: Path, bucket: Path, names: Sequence[str]) -> None:
        self._work = work
        self._bucket = bucket
        self._names = list(names)
        self._kept: dict[str, _Stamp] = {}

    def restore(self) -> list[str]:
        """Bring back what earlier attempts made; gives the names of whole variants.

        Raises:
            WriteError: disk full.
        """
        found = [name for name in self._names if (self._bucket / note_name(name)).is_file()]
        for name in found:
            for path in _files(self._bucket / name, self._bucket):
                self._fetch(path)
            self._fetch(note_name(name))
        if (self._bucket / RECORD_NAME).is_file():
            self._fetch(RECORD_NAME)
        return found

    def keep(self) -> None:
        """Bring the bucket up to date with every variant that is whole.

        Raises:
            WriteError: the bucket cannot be written.
        """
        for name in self._names:
            if not (self._work / note_name(name)).is_file():
                continue
            try:
                here = list(_files(self._work / name, self._work))
                if any(self._is_new(path) for path in (*here, note_name(name))):
                    self._send(name, here)
            except FileNotFoundError:  # a worker writes there at this moment, and will say when it has
                continue
        for name in (RECORD_NAME, PAGE_NAME):
            if (self._work / name).is_file() and self._is_new(name):
                self._put(name)

    def _send(self, name: str, here: Sequence[str]) -> None:
        note = note_name(name)
        with writing(self._bucket):
            if self._is_new(note):
                (self._bucket / note).unlink(missing_ok=True)
            for path in set(_files(self._bucket / name, self._bucket)) - set(here):
                (self._bucket / path).unlink()
                self._kept.pop(path, None)
        for path in (*here, note):
            if self._is_new(path):
                self._put(path)

    def _is_new(self, path: str) -> bool:
        return self._kept.get(path) != _stamp(self._work / path)

    def _put(self, path: str) -> None:
        stamp = _stamp(self._work / path)
        _copy(self._work / path, self._bucket / path)
        self._kept[path] = stamp

    def _fetch(self, path: str) -> None:
        _copy(self._bucket / path, self._work / path)
        self._kept[path] = _stamp(self._work / path)


def _files(folder: Path, root: Path) -> Iterator[str]:
    """Paths of the files in a folder, relative to ``root``; none where it is not there."""
    for place in sorted(folder.rglob("*")):
        if place.is_file():
            yield place.relative_to(root).as_posix()


def _stamp(place: Path) -> _Stamp:
    found = place.stat()
    return found.st_size, found.st_mtime_ns


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as stream, writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(stream, out, _CHUNK)
