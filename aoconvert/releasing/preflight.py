"""What is in the way of a whole release, found before any work: its folder, its repos, who publishes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from aoconvert.errors import HubError, PlanError
from aoconvert.hub.access import check_repos, no_token
from aoconvert.hub.types import PushOptions
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.record import RECORD_NAME, read_record
from aoconvert.releasing.release_file import ReleaseFile
from aoconvert.releasing.variants import PlannedVariant
from aoconvert.version import __version__

_log = logging.getLogger(__name__)
_ELSEWHERE = "choose another --output-root"


def refuse_root(root: Path, found: ReleaseFile) -> None:
    """Refuse a folder that the release cannot go to, or that another release went to.

    Raises:
        PlanError: it is not a folder, cannot be written, or holds the record of another release.
    """
    with _explained(root):
        parent = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise PlanError([f"output root {root}: {parent} is not a folder"], hint=_ELSEWHERE)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PlanError([f"output root {root}: no permission to write in {parent}"], hint=_ELSEWHERE)
        record = root / RECORD_NAME
        if record.exists() and not record.is_file():
            raise PlanError([f"{record} is not a file"], hint=_ELSEWHERE)
    before = read_record(root)
    if before is not None and before.name != found.name:
        raise PlanError(
            [f"{root} holds the release {before.name!r}, and this one is {found.name!r}"],
            hint=f"{_ELSEWHERE}; if only the name was changed, remove {record}",
        )


@contextlib.contextmanager
def hold_root(root: Path) -> Iterator[None]:
    """Make the folder of a release, and keep other runs out while the block runs.

    Raises:
        PlanError: another run is at it, or the folder cannot be made.
    """
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = f"wait for it, or {_ELSEWHERE}"
            raise PlanError([f"another aoconvert makes a release in {root}"], hint=hint, retryable=True) from None
        except OSError:
            _log.debug("the file system of %s has no locks", root)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlanError([f"output root {root}: {error.strerror or error}"], hint=_ELSEWHERE) from error


def refuse_publishing(variants: Sequence[PlannedVariant], found: ReleaseFile, options: ReleaseOptions) -> None:
    """Refuse a release that may not be published, before hours of work.

    A Hub that does not answer now may do so when there is something to publish: that is only a warning.

    Raises:
        HubError: there is no token, it is not known, or it may not write to a repo.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, but a release is published on the Hub", hint="unset it, or --skip-push")
    token = options.token or get_token()
    if token is None:
        raise no_token()
    api = HfApi(token=token, library_name="aoconvert", library_version=__version__)
    repos = [each.repo_id for each in variants if each.repo_id is not None]
    try:
        check_repos(api, repos, PushOptions(token=token, private=found.private))
    except HubError as error:
        if not error.retryable:
            raise
        _log.warning("whether the repos can be written is not known yet: %s", error.message)
