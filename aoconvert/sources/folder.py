"""A source that is a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from aoconvert.errors import CHECK_PERMISSIONS, SourceError
from aoconvert.sources.base import FetchProgress, Source, SourceFile, is_safe_path

# A model folder has tens of files; this many means that someone gave a home folder or a disk.
MAX_FILES = 100_000

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # a pointer file is smaller


class FolderSource(Source):
    """A folder, listed once, when the first file is asked for."""

    kind: Literal["hub", "folder", "file"] = "folder"
    repo_id = None
    revision = None

    def __init__(self, root: Path, label: str | None = None) -> None:
        self.root = root.absolute()
        # normpath, not resolve: the name the user gave, but "." and ".." have none of their own.
        self.label = label or Path(os.path.normpath(self.root)).name or "folder"
        self._files: dict[str, SourceFile] | None = None

    def __repr__(self) -> str:
        return f"FolderSource({self.label!r})"

    def files(self) -> Mapping[str, SourceFile]:
        """Every file below the folder, hidden folders and linked folders left out."""
        if self._files is None:
            self._files = list_folder(self.root, self.label)
        return self._files

    def hidden_folders(self) -> Sequence[str]:
        """Those that ``list_folder`` passes by; see :meth:`Source.hidden_folders`."""
        found = []
        for folder, subfolders, _ in os.walk(self.root):
            hidden = [name for name in subfolders if name.startswith(".")]
            found += [Path(folder, name).relative_to(self.root).as_posix() for name in hidden]
            subfolders[:] = [name for name in subfolders if name not in hidden]
        return sorted(found)

    def has(self, path: str) -> bool:
        """Whether something by this name is there, also a link that :meth:`require` refuses."""
        return path in self.files() or self._refused_link(path) is not None

    def require(self, path: str) -> SourceFile:
        """As :meth:`Source.require`; a link must also end inside the folder.

        Raises:
            SourceError: also for a broken link, a link out of the folder, and a file in a linked folder.
        """
        refusal = None if path in self.files() else self._refused_link(path)
        if refusal is not None:
            raise refusal
        entry = super().require(path)
        if not stays_inside(self.root, path):
            raise SourceError(
                f"{self.label}: {path} is a link that leaves the folder",
                hint="give the folder that holds the file itself, or copy the file",
            )
        return entry

    def local(self, path: str) -> Path:
        """The file's place below the folder; see :meth:`Source.local`.

        Raises:
            SourceError: also for a git-lfs pointer, which stands where the file should.
        """
        place = self.root / self.require(path).path
        if is_pointer(place):
            raise SourceError(
                f"{self.label}: {path} is a git-lfs pointer, not the file",
                hint="run 'git lfs pull' in the folder, or give the Hub's repo id",
            )
        return place

    def fetch(self, paths: Sequence[str], progress: FetchProgress | None = None) -> None:
        """Check that the files are there and may be read; see :meth:`Source.fetch`. There is no progress to report."""
        for path in paths:
            if not os.access(self.local(path), os.R_OK):
                raise SourceError(f"{self.label}: {path} cannot be read: no permission", hint=CHECK_PERMISSIONS)

    def _refused_link(self, path: str) -> SourceError | None:
        """What to say about a file that is not listed because of a link on the way to it."""
        if not is_safe_path(path):
            return None
        place = self.root
        for part in path.split("/"):
            place = place / part
            if not place.is_symlink():
                continue
            link = place.relative_to(self.root).as_posix()
            if not place.exists():
                return SourceError(f"{self.label}: {link} is a broken link")
            if (self.root / path).is_file():
                return SourceError(
                    f"{self.label}: {link} is a link to a folder, which aoconvert does not follow",
                    hint="give the real folder, or copy it in place of the link",
                )
        return None


def is_pointer(place: Path) -> bool:
    """Whether a file is what git leaves in place of a large one that was not fetched.

    Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    try:
        if place.stat().st_size > _POINTER_BYTES:
            return False
        with place.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def list_folder(root: Path, label: str) -> dict[str, SourceFile]:
    """The regular files below a folder, sorted by path; links to files count, broken ones do not.

    Raises:
        SourceError: the folder cannot be read, or holds far too many files to be a model.
    """

    def unreadable(error: OSError) -> None:
        where = Path(error.filename).name if error.filename else label
        what = label if where == label else f"{label}: folder {where}"
        raise SourceError(f"{what} cannot be read: {error.strerror}", hint=CHECK_PERMISSIONS) from error

    found: dict[str, SourceFile] = {}
    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        # In place, which is how os.walk is told where not to go: .git, .cache, .locks.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            if is_safe_path(path) and file.is_file():
                found[path] = SourceFile(path, file.stat().st_size)
        if len(found) > MAX_FILES:
            raise SourceError(
                f"{label} holds more than {MAX_FILES:,} files: it is not a model folder",
                hint="give the folder that has model_index.json or config.json in it",
            )
    return dict(sorted(found.items()))


def stays_inside(root: Path, path: str) -> bool:
    """Whether a file, all links followed, lies in the folder, or in the blob store of the Hub cache the folder is in.

    The cache's layout: ``models--user--repo/snapshots/<commit>/config.json -> ../../blobs/<etag>``, and a blob may be
    a link itself, into ``blobs/`` beside ``models--user--repo`` (files shared between repos).
    Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    real_root = root.resolve()
    real_file = (root / path).resolve()
    allowed = [real_root]
    for folder in (real_root, *real_root.parents):
        repo = folder.parent.parent
        if folder.parent.name == "snapshots" and repo.name.startswith("models--"):
            allowed += [repo / "blobs", repo.parent / "blobs"]
    return any(real_file.is_relative_to(place) for place in allowed)
