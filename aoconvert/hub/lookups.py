"""What is asked of the Hub about a checkpoint that is there, apart from a push."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.checkpoint.manifest import MANIFEST_NAME, RELEASE_NAME
from aoconvert.checkpoint.release import Release, read_release
from aoconvert.errors import HubError
from aoconvert.sources.hub_errors import translate_errors
from aoconvert.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def find_weights_commit(repo_id: str, token: str | None) -> str | None:
    """The commit that holds the weights as they are now: the last one that changed the manifest, which lists them.

    Returns:
        ``None``: the Hub does not say.
    """
    from huggingface_hub.hf_api import RepoFile

    try:
        with translate_errors(repo_id, None):
            found = _client(token).get_paths_info(repo_id, [MANIFEST_NAME], expand=True)
    except HubError:
        return None
    for item in found:
        if isinstance(item, RepoFile) and item.last_commit is not None:
            return item.last_commit.oid
    return None


def find_release(repo_id: str, token: str | None) -> Release | None:
    """The record of a release that a repo holds; ``None``: it has none that can be used, or the Hub does not say."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with translate_errors(repo_id, None):
                _client(token).hf_hub_download(repo_id, RELEASE_NAME, local_dir=folder)
            return read_release(Path(folder))
        except (HubError, OSError, ValueError):
            return None


def is_there(repo_id: str, token: str | None) -> bool:
    """Whether a repo exists; where the Hub does not say, it does."""
    try:
        with translate_errors(repo_id, None):
            return bool(_client(token).repo_exists(repo_id))
    except HubError:
        return True


def find_collection(wanted: str, owner: str | None, token: str | None, *, private: bool | None) -> str:
    """The slug of a collection, which is made where a title is given and the owner has no such collection.

    Args:
        wanted: a slug (``owner/words-0123…``), or a title.
        owner: whose collection a title means; ``None``: the token's.
        private: visibility of a new one.

    Raises:
        HubError: the Hub said no, or cannot be reached.
    """
    if is_slug(wanted):
        return wanted
    with translate_errors(f"the collection {wanted!r}", None, doing="write"):
        made = _client(token).create_collection(wanted, namespace=owner, private=bool(private), exists_ok=True)
        return str(made.slug)


def is_slug(text: str) -> bool:
    """Whether it names a collection as its address does; else it is a title."""
    return re.fullmatch(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}", text) is not None


def _client(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="aoconvert", library_version=__version__)
