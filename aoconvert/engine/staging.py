"""The output folder: built beside its name, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from aoconvert.checkpoint.lock import hold_output
from aoconvert.checkpoint.manifest import MANIFEST_NAME, FileEntry
from aoconvert.checkpoint.unfinished import (
    DRAFT_NAME,
    FILES_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    file_list,
    find_replaced,
    journal_aside,
    list_files,
    partial_folder,
    split_files,
)
from aoconvert.errors import (
    DeviceError,
    HostMemoryError,
    Interrupted,
    ReadError,
    SourceError,
    WriteError,
    is_out_of_memory,
)
from aoconvert.files import write_whole, writing
from aoconvert.formats.index import write_index
from aoconvert.humanize import size
from aoconvert.planning.overwriting import others_problem, overwrite_problem, remove_result

_AWAY = "move it away, or choose another --output"
_RESUMABLE = (WriteError, ReadError, SourceError, DeviceError)


@contextmanager
def staged_output(output: Path, host_bytes: int | None = None) -> Iterator[Stage]:
    """Build a result in a folder beside ``output``; the block ends with ``stage.publish``.

    Where it does not come to that, what is finished stays for the next run, and the hint says so: after Ctrl-C or
    SIGTERM, ``WriteError``, ``ReadError``, ``SourceError``, ``DeviceError``, and where memory runs out. After any other
    error nothing is left.

    Args:
        output: the folder that the result goes to.
        host_bytes: memory that the run was expected to take.

    Raises:
        PlanError: another process is writing to the same output.
        WriteError: the folder cannot be made.
        Interrupted: for ``KeyboardInterrupt``.
        HostMemoryError: for whatever says that the host's memory is used up.
    """
    stage = Stage(output)
    try:
        yield stage
    except KeyboardInterrupt:
        raise _interrupted(stage) from None
    except _RESUMABLE as error:
        error.hint = "; ".join(filter(None, [error.hint, _keep_or_discard(stage)])) or None
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            stage.discard()
            raise
        raise _out_of_memory(stage, host_bytes) from error
    except BaseException:
        stage.discard()
        raise


def _keep_or_discard(stage: Stage) -> str | None:
    """Leave what is finished, and say what the next run has of it; discard the folder where nothing is."""
    if stage.published:
        return None
    if stage.holds_unchecked_work:
        stage.leave()
        return f"the work of an earlier run is still in {stage.root}; --no-resume starts over"
    if not stage.kept:
        stage.discard()
        return None
    stage.leave()
    kept = f"{stage.kept} of {stage.total} tensors are kept in {stage.root}"
    return f"the same command continues: {kept}; --no-resume starts over"


def _interrupted(stage: Stage) -> Interrupted:
    if stage.published:
        return Interrupted("interrupted; the output is complete")
    kept = _keep_or_discard(stage)
    if kept is None:
        return Interrupted("interrupted; the unfinished output was removed")
    if not stage.kept:
        return Interrupted("interrupted", hint=kept)
    message = f"interrupted; {stage.kept} of {stage.total} tensors are kept, run the same command again to continue"
    return Interrupted(message, hint=f"they are in {stage.root}; --no-resume starts over")


def _out_of_memory(stage: Stage, host_bytes: int | None) -> HostMemoryError:
    takes = f": this run needs about {size(host_bytes)} of it" if host_bytes is not None else ""
    hint = "close other programs or raise the limit; on fewer cores (taskset) a run needs less"
    return HostMemoryError(f"out of memory{takes}", hint="; ".join(filter(None, [hint, _keep_or_discard(stage)])))


class Stage:
    """A folder beside the output in which the result grows.

    Nothing appears under the output's name before ``publish``. What an earlier run left in it stays until ``clear``; a
    folder that a living run holds is not touched.

    Attributes:
        root: the folder.
        published: it has the output's name.
        kept: tensors in it that a next run need not make again.
        total: tensors that the result will have.

    Raises:
        PlanError: another process is writing to the same output.
        WriteError: the folder cannot be made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.root = partial_folder(output)
        self._aside = find_replaced(output)
        self._journal_aside = journal_aside(output)
        self._made = [folder for folder in self.output.parents if not folder.exists()]
        self.published = False
        self.kept = 0
        self.total = 0
        self._is_checked = False
        self._known: frozenset[str] = frozenset()
        with writing(self.root):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = hold_output(output)
            try:
                self._mend()
            except BaseException:
                os.close(self._lock)
                raise
        with contextlib.suppress(OSError):  # it is only for the message that another process shows
            write_whole(self.root / LOCK_NAME, f"{os.getpid()}\n".encode())

    def _mend(self) -> None:
        """Put back what a run that was killed in the middle of ``publish`` had moved."""
        if self._aside.is_symlink():
            self._aside.unlink()
        if self._aside.is_dir() and not self.output.exists():
            self._aside.rename(self.output)
        if self._aside.is_dir() and (problem := remove_result(self._aside)):
            raise WriteError(problem, hint=_AWAY)
        if self._journal_aside.exists():
            there = any(self.root.iterdir()) and not (self.root / JOURNAL_NAME).exists()
            self._journal_aside.rename(self.root / JOURNAL_NAME) if there else self._journal_aside.unlink()

    def announce(self, paths: Collection[str]) -> None:
        """Write down which files this run writes, before it does: of what it leaves, a later run removes no others.

        Args:
            paths: relative to the folder.

        Raises:
            WriteError: disk full.
        """
        self._known |= frozenset(paths)
        target = self.root / FILES_NAME
        with writing(target):
            write_whole(target, file_list(self._ours()))
            _sync(target)

    @property
    def holds_unchecked_work(self) -> bool:
        """Whether an earlier run left something that this one has not come to look at."""
        return not self._is_checked and (self.root / JOURNAL_NAME).exists()

    def _ours(self) -> frozenset[str]:
        """Files that this run, or the one before it, may have written."""
        return self._known | list_files(self.root)

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
        self._is_checked = True

    def _remove(self, paths: Iterable[str]) -> None:
        """Remove files, and the folders that hold nothing then; a path with a slash at its end is such a folder."""
        for path in paths:
            target = self.root / path
            target.rmdir() if path.endswith("/") else target.unlink()
            for folder in target.parents:
                if folder == self.root or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _check_output(self) -> None:
        """Look again whether what is at the output's name may be replaced: somebody may have come since the plan."""
        if self.output.is_dir() and any(self.output.iterdir()) and (problem := overwrite_problem(self.output)):
            raise WriteError(problem, hint=_AWAY)

    def publish(self, manifest: bytes | bytearray) -> None:
        """Flush everything, write the manifest, and move the folder to the output's name, replacing what is there.

        The journal goes last, and comes back where something fails. An earlier result is set aside first and removed
        last, so that at no moment both are gone.

        Raises:
            WriteError: disk full, no permission, or the output's folder holds what aoconvert did not write.
        """
        self._check_output()
        try:
            self._publish(manifest)
        finally:
            if self.published:
                os.close(self._lock)
                with contextlib.suppress(OSError):
                    remove_result(self._aside)
                with contextlib.suppress(OSError):
                    self._journal_aside.unlink(missing_ok=True)

    def _publish(self, manifest: bytes | bytearray) -> None:
        draft, journal = self.root / DRAFT_NAME, self.root / JOURNAL_NAME
        with writing(self.output):
            _sync_tree(self.root)
            write_whole(draft, manifest)
            _sync(draft)
            with _undisturbed():
                if journal.exists():
                    journal.rename(self._journal_aside)
                try:
                    draft.rename(self.root / MANIFEST_NAME)  # it lists the files from here on
                    for name in (LOCK_NAME, FILES_NAME):
                        (self.root / name).unlink(missing_ok=True)
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
            self.published = True
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
        return _entry(path, content)

    def write_index(self, path: str, where: Mapping[str, str], total_size: int) -> FileEntry:
        """Write the index of sharded weights, and give its entry; arguments as for ``formats.index.write_index``."""
        return _entry(path, write_index(self.root / path, where, total_size))


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


def _entry(path: str, content: bytes) -> FileEntry:
    return FileEntry(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _is_plain(path: Path) -> bool:
    """Whether it is a file of one name."""
    facts = path.lstat()
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


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
