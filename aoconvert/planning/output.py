"""What keeps a result from the folder that it is to go to: what is there already, the folder's name, the disk."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.checkpoint.lock import refuse_held
from aoconvert.checkpoint.manifest import MANIFEST_NAME
from aoconvert.checkpoint.unfinished import partial_folder
from aoconvert.errors import PlanError
from aoconvert.humanize import first, size
from aoconvert.planning.overwriting import overwrite_problem, unfinished_problem

if TYPE_CHECKING:
    from aoconvert.sources import Source


def refuse_output(source: Source, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that the result cannot go to.

    Raises:
        PlanError: with every problem, or another process is writing to it.
    """
    if problems := output_problems(source, output, overwrite=overwrite):
        raise PlanError(problems)
    refuse_held(output)


def output_problems(source: Source, output: Path, *, overwrite: bool) -> list[str]:
    """Find everything that is wrong with the folder that the result is to go to."""
    try:
        output.lstat()
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return [f"output {output}: {getattr(error, 'strerror', None) or error}"]
    return [
        *_name_problems(output),
        *_content_problems(output, overwrite=overwrite),
        *_place_problems(source, output),
    ]


def space_problems(output: Path, disk_bytes: int) -> list[str]:
    """Find out whether so many bytes fit on the disk of ``output``; the problem, if they do not."""
    try:
        free = shutil.disk_usage(_existing_parent(output)).free + _count_held(output)
    except (OSError, ValueError):  # not a path at all, which is a problem of its own
        return []
    if free >= disk_bytes:
        return []
    return [f"output {output}: {size(disk_bytes)} needed, {size(free)} free on that disk"]


def _name_problems(output: Path) -> Iterator[str]:
    if output.absolute().name in ("", ".."):  # what is built beside it needs a name
        yield f"output {output} has no name; give the folder itself"


def _content_problems(output: Path, *, overwrite: bool) -> Iterator[str]:
    """What is at the output's name, and what an unfinished run left beside it."""
    if output.is_symlink():
        yield f"output {output} is a link, which the result would replace; give the folder itself"
    elif output.exists() and not output.is_dir():
        yield f"output {output} exists and is not a folder"
    elif output.is_dir() and any(output.iterdir()):
        if not (output / MANIFEST_NAME).is_file():
            held = first(sorted(path.name for path in output.iterdir()))
            yield (
                f"output {output} exists and is not empty: it holds {held}, and is not a result of aoconvert "
                "(choose another --output)"
            )
        elif not overwrite:
            yield f"output {output} exists and is not empty (--overwrite replaces an earlier result)"
        elif problem := overwrite_problem(output):
            yield f"{problem} (move it away, or choose another --output)"
    if problem := unfinished_problem(partial_folder(output)):
        yield f"{problem} (move it away)"


def _place_problems(source: Source, output: Path) -> Iterator[str]:
    """Where the output is: not in the source, nor around it, and where this process may write."""
    resolved = output.resolve()
    if (single := source.weights_file) is not None and resolved == (source.root / single).resolve():
        yield f"output {output} would replace the source"
    if source.kind == "folder":
        root = source.root.resolve()
        if resolved == root or resolved in root.parents:
            yield f"output {output} would replace the source"
        elif root in resolved.parents:
            yield f"output {output} is inside the source"
    parent = _existing_parent(output)
    if not parent.is_dir():
        yield f"output {output}: {parent} is not a folder"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield f"output {output}: no permission to write in {parent}"


def _count_held(output: Path) -> int:
    """Bytes that an unfinished run holds there; the next one uses or frees them."""
    facts = [path.lstat() for path in partial_folder(output).rglob("*")]
    return sum(found.st_blocks * 512 for found in facts if stat.S_ISREG(found.st_mode) and found.st_nlink == 1)


def _existing_parent(output: Path) -> Path:
    resolved = output.resolve()
    return next(folder for folder in (*resolved.parents, resolved) if folder.exists())  # the root is its own
