"""What an earlier result's folder holds that must not be deleted with it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.manifest import CARD_BYTES, CARD_NAME, MANIFEST_NAME, OWN_NAMES, FileEntry
from aoconvert.checkpoint.seals import is_sealed
from aoconvert.checkpoint.unfinished import find_replaced, journal_aside, list_files, partial_folder, split_files
from aoconvert.errors import SourceError
from aoconvert.files import read_limited
from aoconvert.humanize import first

# what a process that was killed leaves of a card or a report
_DRAFT = re.compile(
    r"\.(aoconvert\.(verify|bench|eval)\.json|README\.md|sqnr\.svg|eval\.png|release\.(json|svg))"
    r"(\.draft|\.[0-9a-f]{16})"
)
_MOST_READ = 1 << 20  # a larger file is no text that somebody edits


def foreign_files(folder: Path) -> list[str]:
    """Files that aoconvert did not write there, or that were changed since, by their paths in the folder.

    A folder of nothing else, or of nothing at all, is one entry, with a slash at its end. Links are foreign, wherever
    they lead.

    Raises:
        SourceError: there is no manifest, or it cannot be read, so that nobody can tell.
        OSError: the folder cannot be read.
    """
    listed = {entry.path: entry for entry in manifests.load(folder).files()}
    own = {path.partition("/")[0] for path in listed}
    found = [path for path in (*_files(folder), *_empty_folders(folder, listed)) if not _is_ours(folder, path, listed)]
    tops = (path.partition("/") for path in found)
    return list(
        dict.fromkeys(f"{top}/" if slash and top not in own else f"{top}{slash}{rest}" for top, slash, rest in tops)
    )


def overwrite_problem(folder: Path) -> str | None:
    """Why an earlier result must not be replaced, or ``None``."""
    try:
        found = foreign_files(folder)
    except SourceError as error:
        return f"output {folder} cannot be replaced: {error.message}"
    except OSError as error:
        return f"output {folder} cannot be replaced: {error.filename}: {error.strerror}"
    if not found:
        return None
    return f"output {folder} holds files that aoconvert did not write, or that were changed since: {', '.join(found)}"


def unfinished_problem(partial: Path) -> str | None:
    """Why what is in the folder in which a run builds its files must not be removed, or ``None``."""
    try:
        _, others = split_files(partial, list_files(partial))
    except OSError:  # it is not there, or whoever locks it says what is wrong with it
        return None
    return others_problem(partial, others) if others else None


def others_problem(partial: Path, others: Sequence[str]) -> str:
    """What to say of what somebody put into the folder of an unfinished run."""
    return f"{partial} holds files that aoconvert did not write: {first(others, 4)}"


def remove_result(folder: Path) -> str | None:
    """Remove an earlier result that was replaced, its manifest last: what is left of it can still be told.

    Returns:
        Why it is left alone, or ``None``.

    Raises:
        OSError: no permission.
    """
    if not folder.is_dir() or folder.is_symlink():
        return None
    if any(folder.iterdir()) and (problem := overwrite_problem(folder)):
        return problem
    for path in list(_files(folder)):
        if path != MANIFEST_NAME:
            (folder / path).unlink()
    for at, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            Path(at, name).rmdir()
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    folder.rmdir()
    return None


def tidy(output: Path) -> None:
    """Remove what a run left that was killed when its output was in place, and what it had replaced not yet removed.

    Where that run is still at it, it does the same. Nothing is removed while there is no whole output, or what is not
    ours.
    """
    with contextlib.suppress(OSError):
        if not (output / MANIFEST_NAME).is_file() or partial_folder(output).exists():
            return
        journal_aside(output).unlink(missing_ok=True)
        remove_result(find_replaced(output))


def _files(folder: Path) -> Iterator[str]:
    def failed(error: OSError) -> None:
        raise error

    for at, folders, names in os.walk(folder, onerror=failed):
        links = [name for name in folders if Path(at, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(at, name).relative_to(folder).as_posix()


def _empty_folders(folder: Path, listed: Collection[str]) -> Iterator[str]:
    """Folders that hold nothing, with a slash at their ends, but for those that held a listed file."""
    ours = {parent.as_posix() for path in listed for parent in Path(path).parents}
    for at, folders, names in os.walk(folder):
        path = Path(at).relative_to(folder).as_posix()
        if not folders and not names and path not in ours:
            yield f"{path}/"


def _is_ours(folder: Path, path: str, listed: Mapping[str, FileEntry]) -> bool:
    place = folder / path
    if place.is_symlink() or not place.is_file():
        return False
    if path in listed:
        entry = listed[path]
        if (size := place.stat().st_size) != entry.size:
            return False
        if size > _MOST_READ:
            return True
        return hashlib.sha256(read_limited(place, _MOST_READ)).hexdigest() == entry.sha256
    if path == CARD_NAME:
        return place.stat().st_size <= CARD_BYTES and is_sealed(read_limited(place, CARD_BYTES))
    return path in OWN_NAMES or _DRAFT.fullmatch(path) is not None
