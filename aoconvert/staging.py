"""The names that a run uses beside its output, and what one that was killed at its very end leaves there."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from aoconvert.manifest import MANIFEST_NAME

JOURNAL_NAME = "aoconvert.journal"


def partial_folder(output: Path) -> Path:
    """Where a run builds what will be ``output``, and leaves what it has when it is stopped."""
    return _beside(output, "aoconvert-partial")


def replaced_folder(output: Path) -> Path:
    """Where an earlier result is, while another takes its place."""
    return _beside(output, "aoconvert-replaced")


def journal_aside(output: Path) -> Path:
    """Where the journal is, while the result is moved to its place."""
    return _beside(output, JOURNAL_NAME)


def _beside(output: Path, name: str) -> Path:
    place = output.absolute()
    return place.parent / f".{place.name}.{name}"


def tidy(output: Path) -> None:
    """Remove what a run left that was killed when its output was in place, and what it had replaced not yet removed.

    Where that run is still at it, it does the same. Nothing is removed while there is no whole output.
    """
    with contextlib.suppress(OSError):
        if not (output / MANIFEST_NAME).is_file() or partial_folder(output).exists():
            return
        journal_aside(output).unlink(missing_ok=True)
        if not replaced_folder(output).is_symlink():
            shutil.rmtree(replaced_folder(output), ignore_errors=True)
