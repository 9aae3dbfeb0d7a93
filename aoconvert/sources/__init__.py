"""A model reference → pinned files: a folder or file on this machine, or a repo on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aoconvert.errors import CHECK_PERMISSIONS, SourceError, UsageError
from aoconvert.options import DEFAULT_HUB, HubOptions
from aoconvert.sources.base import FetchProgress, Source, SourceFile, show
from aoconvert.sources.file import FileSource
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.hub import open_hub
from aoconvert.sources.references import parse_repo
from aoconvert.sources.weights import WeightFiles, find_weights

__all__ = ["FetchProgress", "Source", "SourceFile", "WeightFiles", "find_weights", "resolve"]

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"})
SINGLE_FILE_SUFFIXES = WEIGHT_SUFFIXES


def resolve(
    reference: str,
    hub: HubOptions = DEFAULT_HUB,
    *,
    trust_remote_code: bool = False,
    small_files: bool = True,
    single_file: bool = False,
) -> Source:
    """Find what a model reference means. A folder that exists wins over a repo of the same name.

    Args:
        reference: a folder, ``user/repo``, ``user/repo@revision``, ``hf://user/repo[@revision]``, or the address of a
            model page.
        hub: revision, token, cache and whether to use the network; for a repo.
        trust_remote_code: also fetch the repo's ``.py`` files.
        small_files: fetch a repo's configs, tokenizers and the like at once.
        single_file: the reference may also be a weights file on this machine.

    Raises:
        UsageError: a revision for a folder or file, or two revisions.
        SourceError: no such folder, a file where there must be none, or neither a folder nor a repo id.
        HubError: the Hub refused or could not be reached.
    """
    place = _local_place(reference)
    if place is not None and (place.is_dir() or (single_file and place.suffix in SINGLE_FILE_SUFFIXES)):
        what = "folder" if place.is_dir() else "file"
        if hub.revision is not None:
            raise UsageError(f"{show(reference)} is a {what}, which has no revisions", hint="omit --revision")
        return FolderSource(place) if place.is_dir() else FileSource(place)
    if place is not None:
        if place.suffix.lower() in WEIGHT_SUFFIXES:
            raise SourceError(
                f"{show(reference)} is a single weights file",
                hint="give the folder that holds the file and its config.json",
            )
        raise SourceError(f"{show(reference)} is a file", hint="give the folder that holds the model")
    repo_id, named_revision = parse_repo(reference)
    if hub.revision is not None and named_revision not in (None, hub.revision):
        raise UsageError(
            f"two revisions are given: {show(named_revision or '')} in {show(reference)}, and {show(hub.revision)}",
            hint="omit one",
        )
    return open_hub(
        repo_id,
        replace(hub, revision=hub.revision if hub.revision is not None else named_revision),
        trust_remote_code=trust_remote_code,
        small_files=small_files,
    )


def _local_place(reference: str) -> Path | None:
    """The existing file or folder a reference names; ``~`` is the home folder.

    Raises:
        SourceError: nobody may look whether it is there.
    """
    if not reference:
        return None
    try:
        place = Path(reference).expanduser()
        return place if place.exists() else None
    except PermissionError as error:  # something is there, so it is no model on the Hub
        said = f"{show(reference)} cannot be opened: {error.strerror}"
        raise SourceError(said, hint=CHECK_PERMISSIONS) from error
    except (OSError, ValueError, RuntimeError):
        # A name too long, a NUL, an unknown user: nothing that exists.
        return None
