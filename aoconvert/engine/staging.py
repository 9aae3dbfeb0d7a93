"""The output folder: built beside its place, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.manifest import MANIFEST_NAME, FileEntry
from aoconvert.checkpoint.unfinished import (
    DRAFT_NAME,
    FILES_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    file_list,
    journal_aside,
    listed_files,
    partial_folder,
    replaced_folder,
    split_files,
)
from aoconvert.errors import PlanError, WriteError
from aoconvert.files import open_regular, read_limited, write_whole, writing
from aoconvert.formats.digest import FileDigest, damaged_in_cache
from aoconvert.json_text import INDEX_BYTES
from aoconvert.planning.overwriting import others_problem, overwrite_problem, remove_result
from aoconvert.planning.types import CopyPlan
from aoconvert.progress import Progress
from aoconvert.sources import Source

_FICLONE = 0x40049409
_CHUNK = 1 << 22
_AWAY = "move it away, or choose another --output"


class Stage:
    """A folder beside the output in which the result grows.

    Nothing appears under the output's name before ``place``. What an earlier run left in it stays until ``clear``; a
    folder that a living run holds is not touched.

    Raises:
        PlanError: another process is writing to the same output.
        WriteError: the folder cannot be made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.root = partial_folder(output)
        self._aside = replaced_folder(output)
        self._journal_aside = journal_aside(output)
        self._made = [folder for folder in self.output.parents if not folder.exists()]
        self.placed = False
        self._known: frozenset[str] = frozenset()
        with writing(self.root):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold(output)
            try:
                self._mend()
            except BaseException:
                os.close(self._lock)
                raise
        with contextlib.suppress(OSError):  # it is only for the message that another process shows
            write_whole(self.root / LOCK_NAME, f"{os.getpid()}\n".encode())

    def _mend(self) -> None:
        """Put back what a run that was killed in the middle of ``place`` had moved."""
        if self._aside.is_symlink():
            self._aside.unlink()
        if self._aside.is_dir() and not self.output.exists():
            self._aside.rename(self.output)
        if self._aside.is_dir() and (problem := remove_result(self._aside)):
            raise WriteError(problem, hint=_AWAY)
        if self._journal_aside.exists():
            there = any(self.root.iterdir()) and not (self.root / JOURNAL_NAME).exists()
            self._journal_aside.rename(self.root / JOURNAL_NAME) if there else self._journal_aside.unlink()

    def _hold(self, output: Path) -> int:
        """The folder, made where it is not there, and locked: the kernel forgets the lock with the process."""
        while True:
            self.root.mkdir(exist_ok=True)
            lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise PlanError(
                    [f"another aoconvert{self._owner()} is writing to {output}"],
                    hint="wait for it, or choose another --output",
                    retryable=True,
                ) from None
            except OSError:
                logging.getLogger(__name__).debug("no locks on the file system of %s", self.root)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock), self.root.stat(follow_symlinks=False)):
                    return lock
            os.close(lock)  # its owner has just placed it, or removed it

    def _owner(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return f" (process {int(read_limited(self.root / LOCK_NAME, 20, follow=False))})"
        return ""

    def announce(self, paths: Collection[str]) -> None:
        """Write down which files this run writes, before it does: of what it leaves, a later run removes no others.

        Args:
            paths: relative to the folder.

        Raises:
            WriteError: disk full.
        """
        self._known |= frozenset(paths)
        place = self.root / FILES_NAME
        with writing(place):
            write_whole(place, file_list(self._ours()))
            _sync(place)

    def _ours(self) -> frozenset[str]:
        """Files that this run, or the one before it, may have written."""
        return self._known | listed_files(self.root)

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what an earlier run left, but for these files; a link never stays.

        Args:
            keep: relative to the folder.

        Raises:
            WriteError: no permission, or the folder holds what aoconvert did not write.
        """
        kept = {*keep, LOCK_NAME, FILES_NAME}
        with writing(self.root):
            ours, others = split_files(self.root, self._ours() | frozenset(keep))
        if others:
            raise WriteError(others_problem(self.root, others), hint=_AWAY)
        with writing(self.root):
            self._remove(path for path in ours if path not in kept or not _is_plain(self.root / path))

    def _remove(self, paths: Iterable[str]) -> None:
        """Remove files, and the folders that hold nothing then; a path with a slash at its end is such a folder."""
        for path in paths:
            place = self.root / path
            place.rmdir() if path.endswith("/") else place.unlink()
            for folder in place.parents:
                if folder == self.root or any(folder.iterdir()):
                    break
                folder.rmdir()

    def check_output(self) -> None:
        """Look again whether what is at the output's name may be replaced: somebody may have come since the plan.

        Raises:
            WriteError: it holds what aoconvert did not write.
        """
        if self.output.is_dir() and any(self.output.iterdir()) and (problem := overwrite_problem(self.output)):
            raise WriteError(problem, hint=_AWAY)

    def place(self, manifest: bytes | bytearray) -> None:
        """Flush everything, write the manifest, and move the folder to the output's name, replacing what is there.

        The journal goes last, and comes back where something fails. An earlier result is set aside first and removed
        last, so that at no moment both are gone.

        Raises:
            WriteError: disk full, or no permission.
        """
        try:
            self._place(manifest)
        finally:
            if self.placed:
                os.close(self._lock)
                with contextlib.suppress(OSError):
                    remove_result(self._aside)
                with contextlib.suppress(OSError):
                    self._journal_aside.unlink(missing_ok=True)

    def _place(self, manifest: bytes | bytearray) -> None:
        draft, journal = self.root / DRAFT_NAME, self.root / JOURNAL_NAME
        with writing(self.output):
            _sync_tree(self.root)
            write_whole(draft, manifest)
            _sync(draft)
            with _undisturbed():
                if journal.exists():
                    journal.rename(self._journal_aside)
                try:
                    for name in (LOCK_NAME, FILES_NAME):
                        (self.root / name).unlink(missing_ok=True)
                    draft.rename(self.root / MANIFEST_NAME)
                    _sync(self.root)
                    self._swap()
                except BaseException:
                    if self._journal_aside.exists():
                        self._journal_aside.rename(journal)
                    raise
            _sync(self.output.parent)

    def _swap(self) -> None:
        if self.output.is_dir():
            self.output.rename(self._aside)
        try:
            self.root.rename(self.output)
            self.placed = True
        except OSError:
            if self._aside.exists():
                self._aside.rename(self.output)
            raise

    def leave(self) -> None:
        """Let go of the folder; what is in it is for a later run."""
        with contextlib.suppress(OSError):
            (self.root / LOCK_NAME).unlink()
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def discard(self) -> None:
        """Remove the unfinished folder, and the folders above it that were made for it; what others put there stays."""
        with contextlib.suppress(OSError):
            self._remove(split_files(self.root, self._ours())[0])
            self.root.rmdir()
        with contextlib.suppress(OSError):
            os.close(self._lock)
        with contextlib.suppress(OSError):  # somebody else may use them by now
            for folder in self._made:
                folder.rmdir()

    def write_text(self, path: str, text: str) -> FileEntry:
        """Write a small file, and give its entry."""
        target = self.root / path
        self._known |= {path}
        content = text.encode("utf-8")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, content)
        return FileEntry(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def take_over(self, source: Source, files: Iterable[CopyPlan], progress: Progress) -> list[FileEntry]:
        """Copy files from the source; where the file system can, a copy shares its blocks until one of the two changes.

        They are never hard links: whoever edits a file of the result would edit the source, or the Hub's cache.

        Raises:
            WriteError: disk full, or no permission.
            SourceError: a file vanished.
            ReadError: a file changed while it was read, or is not what the Hub said it is.
        """
        entries = []
        for item in files:
            if item.drop is not None and item.path.endswith(".json"):
                text = _renamed_index(source.read_json(item.source, INDEX_BYTES), item.drop)
                entries.append(self.write_text(item.path, text))
                progress.advance(item.size, item.path)
                continue
            origin = source.local(item.source).resolve()  # a file of the Hub cache is a link to its blob
            target = self.root / item.path
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                expected = source.files()[item.source].sha256
                digest = _copy(origin, target, progress, item.path, expected)
            if expected not in (None, digest):
                raise damaged_in_cache(item.source)
            entries.append(FileEntry(path=item.path, size=target.stat().st_size, sha256=digest))
        return entries


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over.

    Handlers, not a signal mask: a masked signal goes to another thread, and Python handles it here all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda which, _: arrived.append(which))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    for which in arrived[:1]:
        signal.raise_signal(which)


def _is_plain(path: Path) -> bool:
    """Whether it is a file of one name."""
    facts = path.lstat()
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


def _renamed_index(index: Any, variant: str) -> str:
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
