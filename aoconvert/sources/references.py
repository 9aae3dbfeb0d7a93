"""The ways to name a model repo on the Hub."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from aoconvert.errors import SourceError
from aoconvert.sources.base import show

EXPECTED_HINT = "give a folder, or a model on the Hub as user/repo"


def parse_repo(reference: str) -> tuple[str, str | None]:
    """Read a reference that is no existing folder or file.

    Args:
        reference: ``user/repo``, ``user/repo@revision``, ``hf://user/repo[@revision]``, or a model page's address, also
            with ``/tree/<revision>``.

    Returns:
        Repo id and revision, ``None`` where none is named.

    Raises:
        SourceError: it is a path that does not exist, or nothing that is known.
    """
    if "://" in reference:
        return _parse_address(reference)
    repo_id, at, revision = reference.partition("@")
    if at and revision and revision.isprintable() and _is_repo_id(repo_id):
        return repo_id, revision
    if reference.startswith(("/", "./", "../", "~")) or reference in (".", "..") or "\\" in reference:
        raise SourceError(f"no such folder: {show(reference)}", hint=EXPECTED_HINT)
    if reference.count("/") > 1:
        raise SourceError(f"no such folder: {show(reference)}", hint="a model on the Hub is user/repo")
    if not _is_repo_id(reference):
        raise SourceError(f"{show(reference)} is neither a folder nor a model on the Hub", hint=EXPECTED_HINT)
    return reference, None


def _parse_address(reference: str) -> tuple[str, str | None]:
    """Read ``hf://…`` and ``https://huggingface.co/…``."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri  # type: ignore[attr-defined]  # public, but not in __all__

    # What stands before an @ in an address may be a password.
    shown = show(re.sub(r"//[^/@]*:[^/@]*@", "//", reference))
    try:
        if not reference.startswith("hf://") and urlsplit(reference).username is not None:
            raise SourceError(f"{shown}: the address must not contain a user name or password", hint="use --token")
        uri = parse_hf_uri(reference, endpoint=constants.ENDPOINT)
    except (HfUriError, ValueError) as error:
        raise SourceError(f"{shown} is not the address of a model on the Hub", hint=EXPECTED_HINT) from error
    if uri.type != "model":
        raise SourceError(f"{shown} is a {uri.type}, not a model", hint=EXPECTED_HINT)
    if uri.path_in_repo:
        raise SourceError(
            f"{shown} names a file or folder in a repo", hint=f"give {uri.id}, and the folder with --subfolder"
        )
    return uri.id, uri.revision


def _is_repo_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
