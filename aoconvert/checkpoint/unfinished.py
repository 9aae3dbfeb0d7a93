"""The names that a run uses beside its output and in its unfinished folder, and what of that folder is ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.manifest import MANIFEST_NAME
from aoconvert.errors import SourceError
from aoconvert.files import read_limited
from aoconvert.json_text import INDEX_BYTES, parse_json

JOURNAL_NAME = "aoconvert.journal"
LOCK_NAME = "aoconvert.lock"
FILES_NAME = "aoconvert.files"
DRAFT_NAME = f"{MANIFEST_NAME}.partial"

_OWN = frozenset({JOURNAL_NAME, f"{JOURNAL_NAME}.new", LOCK_NAME, FILES_NAME, MANIFEST_NAME, DRAFT_NAME})
_DRAFT = re.compile(r"\.(.+)\.[0-9a-f]{16}")  # see ``files.write_whole``


def partial_folder(output: Path) -> Path:
    """Where a run builds what will be ``output``, and leaves what it has when it is stopped."""
    return _beside(output, "aoconvert-partial")


def find_replaced(output: Path) -> Path:
    """Where an earlier result is, while another takes its place."""
    return _beside(output, "aoconvert-replaced")


def journal_aside(output: Path) -> Path:
    """Where the journal is, while the result is moved to its place."""
    return _beside(output, JOURNAL_NAME)


def file_list(paths: Collection[str]) -> bytes:
    """What ``FILES_NAME`` holds: the paths, in an unfinished folder, of every file that its run writes there."""
    return json.dumps(sorted(paths)).encode()


def list_files(partial: Path) -> frozenset[str]:
    """List the paths of the files that the run wrote, or was to write, that left an unfinished folder.

    A result that is about to get its name has no such list any more; its manifest has them.
    """
    try:
        values = parse_json(read_limited(partial / FILES_NAME, INDEX_BYTES, follow=False))
    except FileNotFoundError:
        return _list_manifest(partial)
    except (OSError, ValueError):
        return frozenset()
    return frozenset(path for path in values if isinstance(path, str)) if isinstance(values, list) else frozenset()


def _list_manifest(partial: Path) -> frozenset[str]:
    try:
        return frozenset(entry.path for entry in manifests.load(partial).files())
    except SourceError:
        return frozenset()


def split_files(partial: Path, known: Collection[str]) -> tuple[list[str], list[str]]:
    """What is in an unfinished folder: files of ours, and what somebody else put there.

    Args:
        partial: the folder.
        known: paths of files that are ours.

    Returns:
        Both as paths in the folder; a folder that holds nothing has a slash at its end.

    Raises:
        OSError: the folder cannot be read.
    """
    folders = {parent.as_posix() for path in known for parent in Path(path).parents}
    ours: list[str] = []
    others: list[str] = []
    for path in _names(partial):
        place = partial / path
        is_ours = _is_own(path, known) or (path.rstrip("/") in folders and (place.is_symlink() or path.endswith("/")))
        (ours if is_ours else others).append(path)
    return ours, others


def _is_own(path: str, known: Collection[str]) -> bool:
    if path in _OWN or path in known:
        return True
    folder, slash, name = path.rpartition("/")
    draft = _DRAFT.fullmatch(name)
    return draft is not None and (draft[1] in _OWN or f"{folder}{slash}{draft[1]}" in known)


def _names(folder: Path) -> Iterator[str]:
    """Every file and link below a folder, and every folder that holds nothing, with a slash at its end."""

    def failed(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, onerror=failed):
        here = Path(at).relative_to(folder)
        links = [name for name in folders if Path(at, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (here / name).as_posix()
        if not files and not folders and here.parts:
            yield f"{here.as_posix()}/"


def _beside(output: Path, name: str) -> Path:
    place = output.absolute()
    return place.parent / f".{place.name}.{name}"
