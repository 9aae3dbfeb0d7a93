"""The original that a checkpoint is compared with: as it was when the checkpoint was made."""

from __future__ import annotations

from pathlib import Path

from aoconvert import manifest as manifests
from aoconvert.errors import SourceError, UsageError
from aoconvert.sources import Source, resolve
from aoconvert.sources.references import parse_repo


def check_reference(reference: str) -> None:
    """Refuse what names neither a folder nor a repo, before anything is fetched or loaded.

    Raises:
        UsageError: it does not.
    """
    if Path(reference).expanduser().is_dir():
        return
    try:
        parse_repo(reference)
    except SourceError as error:
        raise UsageError(f"--source: {error.message}", hint=error.hint) from error


def resolve_original(
    reference: str,
    checkpoint: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """The source to compare with.

    Args:
        reference: a folder or a repo.
        checkpoint: the checkpoint's folder. A repo that its manifest names is taken at the commit that was quantized.
        revision: in place of that commit.
        token, cache_dir, local_files_only, trust_remote_code: as for :func:`aoconvert.sources.resolve`.

    Raises:
        UsageError: neither a folder nor a repo; a revision of a folder.
        HubError: the Hub said no.
    """
    try:
        return resolve(
            reference,
            revision=revision or _pinned(reference, checkpoint),
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
    except SourceError as error:
        raise UsageError(f"--source: {error.message}", hint=error.hint) from error


def _pinned(reference: str, checkpoint: Path) -> str | None:
    """The commit that the manifest names, where it names this repo; what is wrong with a manifest is said later."""
    if Path(reference).expanduser().exists():
        return None
    try:
        source = manifests.load(checkpoint).source
    except SourceError:
        return None
    repo_id, revision = parse_repo(reference)
    return source.revision if revision is None and repo_id == source.repo_id else None
