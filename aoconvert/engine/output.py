"""The output folder: built beside its place, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoconvert.errors import PlanError, WriteError
from aoconvert.manifest import FileEntry
from aoconvert.planning.types import CopyPlan
from aoconvert.progress import Progress
from aoconvert.sources import Source

_LINK_FROM = 1 << 20  # smaller files are copied: people edit configs
_CHUNK = 1 << 22


class Stage:
    """A folder beside the output in which the result grows.

    Nothing appears under the output's name before ``place``. A folder left by a killed run is removed by the next
    one; a folder that a living run holds is not touched.

    Raises:
        PlanError: another process is writing to the same output.
        WriteError: the folder cannot be made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.root = self.output.parent / f".{self.output.name}.aoconvert-partial"
        self._aside = self.output.parent / f".{self.output.name}.aoconvert-replaced"
        self._made = [folder for folder in self.output.parents if not folder.exists()]
        self.placed = False
        with _writing(self.root):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(exist_ok=True)
            self._lock = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise PlanError(
                [f"another aoconvert is writing to {output}"], hint="wait for it, or choose another --output"
            ) from None
        except OSError:
            logging.getLogger(__name__).debug("no locks on the file system of %s", self.root)
        for left in self.root.iterdir():  # by a run that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        if self._aside.exists():  # killed while it replaced an earlier result
            shutil.rmtree(self._aside) if self.output.exists() else self._aside.rename(self.output)

    def place(self) -> None:
        """Flush everything and move the folder to the output's name, replacing what is there.

        An earlier result is set aside first and removed last, so that at no moment both are gone.
        """
        with _writing(self.output):
            _sync_tree(self.root)
            with _undisturbed():
                if self.output.is_dir():
                    self.output.rename(self._aside)
                try:
                    self.root.rename(self.output)
                    self.placed = True
                except OSError:
                    if self._aside.exists():
                        self._aside.rename(self.output)
                    raise
            _sync(self.output.parent)
        os.close(self._lock)
        shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the unfinished folder, and the folders above it that were made for it."""
        shutil.rmtree(self.root, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)
        with contextlib.suppress(OSError):  # somebody else may use them by now
            for folder in self._made:
                folder.rmdir()

    def write_text(self, path: str, text: str) -> FileEntry:
        """Write a small file, and give its entry."""
        target = self.root / path
        content = text.encode("utf-8")
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return FileEntry(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def take_over(self, source: Source, files: Iterable[CopyPlan], progress: Progress) -> list[FileEntry]:
        """Link or copy files from the source; large ones are hard links where the file system allows.

        Raises:
            WriteError: disk full, or no permission.
            SourceError: a file vanished.
        """
        entries = []
        for item in files:
            if item.drop is not None and item.path.endswith(".json"):
                text = _renamed_index(source.read_text(item.source), item.drop)
                entries.append(self.write_text(item.path, text))
                progress.advance(item.size, item.path)
                continue
            origin = source.local(item.source).resolve()  # a file of the Hub cache is a link to its blob
            target = self.root / item.path
            with _writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                digest = _link_or_copy(origin, target, progress, item.path)
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


def _renamed_index(text: str, variant: str) -> str:
    """A shard index whose file names have lost the variant."""
    index = json.loads(text)
    index["weight_map"] = {name: path.replace(f".{variant}", "", 1) for name, path in index["weight_map"].items()}
    return json.dumps(index, indent=2) + "\n"


def _link_or_copy(origin: Path, target: Path, progress: Progress, name: str) -> str:
    linked = False
    if origin.stat().st_size >= _LINK_FROM:
        with contextlib.suppress(OSError):  # another file system, or one without hard links
            os.link(origin, target)
            linked = True
    digest = hashlib.sha256()
    with origin.open("rb") as reading, contextlib.ExitStack() as stack:
        writing = None if linked else stack.enter_context(target.open("xb"))
        while chunk := reading.read(_CHUNK):
            digest.update(chunk)
            if writing is not None:
                writing.write(chunk)
            progress.advance(len(chunk), name)
    return digest.hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free space on this disk, or choose another --output" if error.errno == errno.ENOSPC else None
        raise WriteError(f"{error.filename or path}: {error.strerror or error}", hint=hint) from error


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


def model_config(library: str, config: Mapping[str, Any], quantization: Mapping[str, Any], dtype: str) -> str:
    """``config.json`` of the quantized model: the source's, with ``quantization_config`` and the dtype it now has."""
    values = dict(config)
    if library == "transformers":
        values.pop("torch_dtype", None)
        if dtype != "auto":
            values["dtype"] = dtype
    values["quantization_config"] = dict(quantization)
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def quantization_config(library: str, config: Any, skipped: Iterable[str]) -> dict[str, Any]:
    """The canonical ``quantization_config``, written by the library's own ``TorchAoConfig``."""
    if library == "diffusers":
        from aoconvert.environment import import_diffusers

        import_diffusers()
        from diffusers import TorchAoConfig
    else:
        from transformers import TorchAoConfig
    values: dict[str, Any] = TorchAoConfig(config, modules_to_not_convert=list(skipped)).to_dict()
    return values
