"""What is on the Hub now, and what of it stands in the way. Nothing here changes anything."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert import manifest as manifests
from aoconvert.cards import PICTURE_NAME
from aoconvert.errors import AoconvertError
from aoconvert.hub.types import MARKER, PushOptions, RemoteFile, Sent
from aoconvert.manifest import MANIFEST_NAME
from aoconvert.sources.hub_errors import translated
from aoconvert.verification.files import LOADED
from aoconvert.verification.report import REPORT_NAME, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SMALL = 64_000_000  # bytes; a manifest has some hundred kilobytes
_MOST_PULL_REQUESTS = 50
# kept, whoever wrote them: no loader looks at them
_KEPT = re.compile(r"README\.md|\.gitattributes|(.*/)?(LICEN[CS]E|NOTICE)[^/]*", re.IGNORECASE)
_HARMLESS = re.compile(_KEPT.pattern + r"|.*\.(svg|png|jpe?g|gif|webp|mp4)", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One push: the client, the repo and what it is to hold.

    Attributes:
        api: the Hub client, with its token.
        repo_id: ``user/repo``.
        user: whose token it is.
        files: what the repo is to hold.
        manifest_sha256: of the manifest among them.
        options: how to publish.
    """

    api: HfApi
    repo_id: str
    user: str
    files: tuple[Sent, ...]
    manifest_sha256: str
    options: PushOptions

    @property
    def branch(self) -> str:
        """Where the commit goes, or what the pull request is for."""
        return self.options.revision or "main"

    @property
    def marker(self) -> str:
        """The line of a commit's description by which its pull request is found again."""
        return MARKER + self.manifest_sha256

    def weights(self, paths: Iterable[str]) -> set[str]:
        """Those of ``paths`` that a loader could take in place of ours, or together with them."""
        folders = {path.rpartition("/")[0] for path in self.paths if _is_weights(path)}
        return {
            path
            for path in paths
            if path not in self.paths and _is_weights(path) and path.rpartition("/")[0] in folders
        }

    @cached_property
    def paths(self) -> frozenset[str]:
        """Paths of the files."""
        return frozenset(file.path for file in self.files)


@dataclass(frozen=True)
class Tip:
    """A branch or a pull request as it is now.

    Attributes:
        revision: its name, to commit to.
        commit: ``None`` where there is no commit at all.
        files: what it holds.
        earlier: paths that an earlier push of aoconvert wrote.
        exists: whether the revision is there; else it is to be made from main, which the rest describes.
        pull_request: number of the pull request it belongs to.
    """

    revision: str
    commit: str | None
    files: Mapping[str, RemoteFile]
    earlier: frozenset[str]
    exists: bool = True
    pull_request: int | None = None


@dataclass(frozen=True)
class Changes:
    """What a commit has to change.

    Attributes:
        missing: files that are not there, or with another content.
        deleted: files that an earlier push wrote and that have no place any more, or that are to be replaced.
        foreign: weights of somebody else that a loader would take in place of ours.
        others: files of somebody else that stay, pictures and licences not counted.
    """

    missing: tuple[Sent, ...]
    deleted: tuple[str, ...]
    foreign: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def none(self) -> bool:
        """Whether the branch holds exactly what it should."""
        return not (self.missing or self.deleted)


def find_tip(job: Job) -> Tip:
    """The branch, or the pull request, that the commit goes to.

    Raises:
        HubError: also where a pull request is named that does not exist.
    """
    number = _own_pull_request(job) if job.options.create_pr else None
    if number is not None:
        return _read_tip(job, f"refs/pr/{number}", number)
    return _read_tip(job, job.branch, _number(job.branch))


def _number(revision: str) -> int | None:
    found = re.fullmatch(r"refs/pr/(\d+)", revision)
    return int(found[1]) if found else None


def _read_tip(job: Job, revision: str, pull_request: int | None) -> Tip:
    from huggingface_hub.errors import RevisionNotFoundError

    with translated(job.repo_id, revision, doing="write"):
        try:
            commit = job.api.model_info(job.repo_id, revision=revision).sha
            exists = True
        except RevisionNotFoundError:
            if pull_request is not None:
                raise
            exists = False
    if not exists and revision != "main":
        base = _read_tip(job, "main", None)
        return Tip(revision, base.commit, base.files, base.earlier, exists=False)
    if not exists or commit is None:
        return Tip(revision, None, {}, frozenset(), exists=False)
    files = list_files(job, commit)
    return Tip(revision, commit, files, _earlier(job, commit, files), pull_request=pull_request)


def list_files(job: Job, commit: str) -> dict[str, RemoteFile]:
    """Every file of a commit."""
    from huggingface_hub.hf_api import RepoFile

    with translated(job.repo_id, commit, doing="write"):
        return {
            item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
            for item in job.api.list_repo_tree(job.repo_id, recursive=True, revision=commit)
            if isinstance(item, RepoFile)
        }


def _earlier(job: Job, commit: str, files: Mapping[str, RemoteFile]) -> frozenset[str]:
    """What an earlier push wrote, by the manifest on the branch; nothing where there is none that can be read."""
    there = files.get(MANIFEST_NAME)
    if there is None or there.size > _SMALL:
        return frozenset()
    own = {MANIFEST_NAME, REPORT_NAME, PICTURE_NAME}
    ours = next((file for file in job.files if file.path == MANIFEST_NAME), None)
    if ours is not None and there.holds(ours):
        return frozenset(own | job.paths)
    with tempfile.TemporaryDirectory() as folder:
        with translated(job.repo_id, commit, doing="write"):
            job.api.hf_hub_download(job.repo_id, MANIFEST_NAME, revision=commit, local_dir=folder)
        try:
            found = manifests.load(Path(folder))
        except AoconvertError:
            return frozenset()
    return frozenset(own | {entry.path for entry in found.files()})


def _own_pull_request(job: Job) -> int | None:
    """The number of an open pull request that this account opened for the same manifest."""
    with translated(job.repo_id, None, doing="write"):
        found = job.api.get_repo_discussions(
            job.repo_id, author=job.user, discussion_type="pull_request", discussion_status="open"
        )
        for _, item in zip(range(_MOST_PULL_REQUESTS), found, strict=False):
            if not item.is_pull_request or item.status not in ("open", "draft") or item.author != job.user:
                continue
            events = job.api.get_discussion_details(job.repo_id, item.num).events
            if any(job.marker in getattr(event, "content", "") for event in events):
                return item.num
    return None


def pull_request_url(job: Job, number: int) -> str:
    """The page of a pull request."""
    return f"{job.api.endpoint}/{job.repo_id}/discussions/{number}"


def changes(job: Job, tip: Tip) -> Changes:
    """What a commit on this tip has to change for the branch to hold the checkpoint."""
    missing = tuple(file for file in job.files if file.path not in tip.files or not tip.files[file.path].holds(file))
    old = {path for path in tip.files if path in tip.earlier and path not in job.paths and not _KEPT.fullmatch(path)}
    foreign = job.weights(tip.files) - old
    deleted = old | foreign if job.options.replace else old
    others = {path for path in set(tip.files) - job.paths - old - foreign if not _HARMLESS.fullmatch(path)}
    return Changes(
        missing,
        tuple(sorted(deleted)),
        () if job.options.replace else tuple(sorted(foreign)),
        tuple(sorted(others)),
    )


def _is_weights(path: str) -> bool:
    return LOADED.fullmatch(path.rpartition("/")[2]) is not None


def differences(job: Job, found: Mapping[str, RemoteFile]) -> list[str]:
    """What a commit holds that was not meant, one line each."""
    problems = []
    for file in job.files:
        there = found.get(file.path)
        if there is None:
            problems.append(f"{file.path} is missing")
        elif there.size != file.size:
            problems.append(f"{file.path} has {there.size} bytes, not {file.size}")
        elif not there.holds(file):
            problems.append(f"{file.path} has another content")
    return problems + [f"{path} is there too" for path in sorted(job.weights(found))]


def foreign_problem(job: Job, paths: tuple[str, ...]) -> str:
    """What to say about weights that would be mixed up with ours."""
    return (
        f"{job.repo_id} has other weights, which a loader could take in place of these: {some(list(paths))} "
        "(--replace deletes them in the same commit)"
    )


def conflict(job: Job, before: Tip, now: Tip) -> list[str]:
    """Files of ours that somebody else changed in the meantime, so that a commit would undo it."""

    def other(tip: Tip, file: Sent) -> Any:
        there = tip.files.get(file.path)
        return None if there is None or there.holds(file) else there

    return [file.path for file in job.files if other(now, file) is not None and other(now, file) != other(before, file)]
