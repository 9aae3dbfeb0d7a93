"""What is on the Hub now, and what of it stands in the way. Nothing here changes anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from aoconvert.checkpoint.files import LOADED
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.checkpoint.report import some
from aoconvert.hub.ownership import Branch, BranchFile, look
from aoconvert.hub.types import MARKER, PushOptions, RemoteFile, UploadFile
from aoconvert.sources.hub_errors import translate_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MOST_PULL_REQUESTS = 50
# kept, whoever wrote them: no loader looks at them
_KEPT = re.compile(r"README\.md|\.gitattributes|(.*/)?(LICEN[CS]E|NOTICE)[^/]*", re.IGNORECASE)
_HARMLESS = re.compile(_KEPT.pattern + r"|.*\.(svg|png|jpe?g|gif|webp|mp4)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """Where a push goes.

    Attributes:
        api: the Hub client, with its token.
        repo_id: ``user/repo``.
        user: whose token it is.
        options: how to publish.
    """

    api: HfApi
    repo_id: str
    user: str
    options: PushOptions


@dataclass(frozen=True)
class Job(Target):
    """One push: where it goes, and what the repo is to hold.

    Attributes:
        files: what the repo is to hold.
        manifest_sha256: of the manifest among them.
        manifest: what it says.
        card_by_hand: the card among the files was written by somebody.
    """

    files: tuple[UploadFile, ...]
    manifest_sha256: str
    manifest: Manifest
    card_by_hand: bool = False

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
class BranchHead:
    """A branch or a pull request as it is now.

    Attributes:
        revision: its name, to commit to.
        commit: ``None`` where there is no commit at all.
        files: what it holds.
        held: what of it an earlier push of aoconvert wrote, and whether that is the same model.
        exists: whether the revision is there; else it is to be made from main, which the rest describes.
        pull_request: number of the pull request it belongs to.
    """

    revision: str
    commit: str | None
    files: Mapping[str, RemoteFile]
    held: BranchFile
    exists: bool = True
    pull_request: int | None = None


@dataclass(frozen=True)
class Changes:
    """What a commit has to change.

    Attributes:
        missing: files that are not there, or with another content.
        deleted: files that an earlier push wrote and that have no place any more, or weights that are to be replaced.
        foreign: weights of somebody else that a loader would take in place of ours.
        overwritten: files of somebody else at the place of ours.
        model: what the branch holds, where that is another model.
        others: files of somebody else that stay, pictures and licences not counted.
    """

    missing: tuple[UploadFile, ...]
    deleted: tuple[str, ...]
    foreign: tuple[str, ...]
    others: tuple[str, ...]
    overwritten: tuple[str, ...] = ()
    model: str | None = None

    @property
    def none(self) -> bool:
        """Whether the branch holds exactly what it should."""
        return not (self.missing or self.deleted)


def find_head(job: Job) -> BranchHead:
    """The branch, or the pull request, that the commit goes to.

    Raises:
        HubError: also where a pull request is named that does not exist.
    """
    number = _own_pull_request(job) if job.options.create_pr else None
    if number is not None:
        return _read_head(job, f"refs/pr/{number}", number)
    return _read_head(job, job.branch, _number(job.branch))


def _number(revision: str) -> int | None:
    found = re.fullmatch(r"refs/pr/(\d+)", revision)
    return int(found[1]) if found else None


def _read_head(job: Job, revision: str, pull_request: int | None) -> BranchHead:
    from huggingface_hub.errors import RevisionNotFoundError

    with translate_errors(job.repo_id, revision, doing="write"):
        try:
            commit = job.api.model_info(job.repo_id, revision=revision).sha
            exists = True
        except RevisionNotFoundError:
            if pull_request is not None:
                raise
            exists = False
    if not exists and revision != "main":
        base = _read_head(job, "main", None)
        return BranchHead(revision, base.commit, base.files, base.held, exists=False)
    if not exists or commit is None:
        return BranchHead(revision, None, {}, BranchFile(), exists=False)
    files = list_files(job, commit)
    branch = Branch(job.api, job.repo_id, commit, files)
    sent = {file.path: file for file in job.files}
    held = look(branch, sent, job.manifest, card_by_hand=job.card_by_hand)
    return BranchHead(revision, commit, files, held, pull_request=pull_request)


def list_files(job: Job, commit: str) -> dict[str, RemoteFile]:
    """Every file of a commit."""
    from huggingface_hub.hf_api import RepoFile

    with translate_errors(job.repo_id, commit, doing="write"):
        return {
            item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
            for item in job.api.list_repo_tree(job.repo_id, recursive=True, revision=commit)
            if isinstance(item, RepoFile)
        }


def _own_pull_request(job: Job) -> int | None:
    """The number of an open pull request that this account opened for the same manifest."""
    with translate_errors(job.repo_id, None, doing="write"):
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


def changes(job: Job, head: BranchHead) -> Changes:
    """What a commit on this head has to change for the branch to hold the checkpoint."""
    missing = tuple(file for file in job.files if file.path not in head.files or not head.files[file.path].holds(file))
    ours = head.held.ours
    old = {path for path in head.files if path in ours and path not in job.paths and not _KEPT.fullmatch(path)}
    foreign = job.weights(head.files) - old
    taken = {file.path for file in missing if file.path in head.files and file.path not in ours}
    asked = job.options.replace
    others = {path for path in set(head.files) - job.paths - old - foreign if not _HARMLESS.fullmatch(path)}
    return Changes(
        missing,
        tuple(sorted(old | foreign if asked else old)),
        () if asked else tuple(sorted(foreign)),
        tuple(sorted(others)),
        () if asked else tuple(sorted(taken)),
        None if asked else head.held.model,
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
            problems.append(f"{file.path} has different contents")
    return problems + [f"{path} is there, but was not sent" for path in sorted(job.weights(found))]


def refusals(job: Job, found: Changes) -> list[str]:
    """What of somebody else's a commit would destroy, one line each; nothing where ``--replace`` asks for it."""
    problems = []
    if found.model is not None:
        problems.append(f"{job.repo_id} holds another model: {found.model} (--replace replaces it)")
    if found.foreign:
        problems.append(
            f"{job.repo_id} has other weights, which a loader could use instead of these: "
            f"{some(list(found.foreign))} (--replace deletes them in the same commit)"
        )
    if found.overwritten and found.model is None:
        problems.append(
            f"{job.repo_id} has files of the same names that aoconvert did not write, or that were changed there "
            f"since: "
            f"{some(list(found.overwritten))} (--replace overwrites them; a README.md in the folder is sent unchanged)"
        )
    return problems


def conflict(job: Job, before: BranchHead, now: BranchHead) -> list[str]:
    """Files of ours that somebody else changed in the meantime, so that a commit would undo it."""

    def other(head: BranchHead, file: UploadFile) -> Any:
        there = head.files.get(file.path)
        return None if there is None or there.holds(file) else there

    return [file.path for file in job.files if other(now, file) is not None and other(now, file) != other(before, file)]
