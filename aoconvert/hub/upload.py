"""Sending: the weights first, then everything in one commit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.checkpoint.files import other_content
from aoconvert.checkpoint.report import some
from aoconvert.errors import HubError, HubRefusal, PlanError
from aoconvert.hub.remote import BranchHead, Changes, Job, changes, conflict, find_head, refusals
from aoconvert.hub.types import UploadFile
from aoconvert.hub.upload_progress import FileWatch
from aoconvert.progress import Progress
from aoconvert.sources.hub_errors import AGAIN_HINT, failed_status, never_answered, retry_after, translate_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

TRIES = 4  # of the commit alone; the client repeats uploads by itself
_WAITS = (1.0, 2.0, 4.0)  # seconds
_LONGEST_WAIT = 120  # seconds; who is asked to wait longer is told
_LARGE = 10_000_000  # bytes; such files are uploaded one by one, see _upload


@dataclass
class Sending:
    """How far it has come, for the message after Ctrl-C.

    Attributes:
        prepared: operations by path; a second try does not hash and upload again.
        state: what is known about the branch, as part of a sentence.
    """

    job: Job
    progress: Progress
    prepared: dict[str, CommitOperationAdd] = field(default_factory=dict)
    state: str = "nothing was committed"


@dataclass(frozen=True)
class CommitRef:
    """The commit that holds everything, and the pull request it is in."""

    commit: str
    pull_request: int | None


def hash_files(sending: Sending, files: Sequence[UploadFile], hashed: frozenset[str]) -> None:
    """Let the client take the SHA-256 of each file, and compare it with the manifest's before anything leaves.

    Raises:
        PlanError: files were changed.
    """
    from huggingface_hub import CommitOperationAdd

    if not files:
        return
    problems = []
    sizes = {file.content: file.size for file in files if isinstance(file.content, Path) and file.path not in hashed}
    sending.progress.start("hash", sum(sizes.values()))
    with FileWatch(sizes, sending.progress.advance):
        for file in files:
            content = file.content if isinstance(file.content, bytes) else str(file.content.absolute())
            addition = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content)
            if file.path in hashed:
                addition.upload_info.sha256 = bytes.fromhex(file.sha256)
            elif addition.upload_info.sha256.hex() != file.sha256 or addition.upload_info.size != file.size:
                problems.append(other_content(file.path))
            sending.prepared[file.path] = addition
    sending.progress.finish()
    if problems:
        raise PlanError(problems, hint="make the checkpoint again, or verify it as it is now")


def send(sending: Sending, first: BranchHead) -> CommitRef:
    """Bring the branch from what it is to the whole checkpoint, in one commit.

    The commit names the head it was made for, so it can never be made twice. Where nobody knows what became of it, the
    branch is looked at: either it holds exactly this now, or the commit is tried again on the new head.

    Raises:
        HubError: the Hub said no, or it cannot be reached; the branch is unchanged, or holds everything.
    """
    job, head, attempt = sending.job, first, 1
    while True:
        todo = changes(job, head)
        if todo.none and head.commit is not None and head.exists:
            return CommitRef(head.commit, head.pull_request)
        try:
            _upload(sending, head, todo)
            info = _commit(sending, head, todo)
        except HubError as error:
            if sending.state != _COMMITTING or not _may_try_again(error) or attempt == TRIES:
                raise
            failure = error
        else:
            return CommitRef(info.oid, info.pr_num if info.pr_num is not None else head.pull_request)
        head = _look_again(sending, first, failure, attempt)
        attempt += 1


_COMMITTING = "the commit had been requested, and may exist"


def _may_try_again(error: HubError) -> bool:
    """Whether the commit may have been made, or may be made another time."""
    status = failed_status(error.__cause__)
    if status is None:
        return never_answered(error.__cause__)
    return status in (408, 409, 412, 429) or status >= 500


def _look_again(sending: Sending, first: BranchHead, failure: HubError, attempt: int) -> BranchHead:
    """The head after a commit that failed, or of which nobody knows.

    Raises:
        HubError: somebody else changed what this commit would change; or the Hub cannot be asked.
    """
    time.sleep(_wait(failure, attempt))
    try:
        head = find_head(sending.job)
    except HubError:
        raise failure from failure.__cause__
    sending.state = "nothing was committed"
    if head.commit == first.commit:
        return head
    problems = changes(sending.job, head)
    others = conflict(sending.job, first, head)
    if others:
        raise HubError(
            f"{sending.job.repo_id}: another user committed in the meantime, and changed {some(others)}",
            hint="check the repo, then run the command again",
        )
    if refused := refusals(sending.job, problems):
        raise HubRefusal(refused)
    return head


def _wait(failure: HubError, attempt: int) -> float:
    """Seconds before the next try: what the Hub asked for, if it did.

    Raises:
        HubError: the failure itself, where the Hub asks for more than anybody waits for.
    """
    response = getattr(failure.__cause__, "response", None)
    asked = retry_after(response.headers) if response is not None else None
    if asked is not None and asked > _LONGEST_WAIT:
        raise failure
    return asked if asked is not None else _WAITS[min(attempt, len(_WAITS)) - 1]


def _upload(sending: Sending, head: BranchHead, todo: Changes) -> None:
    """Upload what is no plain git file. Files that have arrived are not sent again.

    Large files go one by one: the client waits for all files of a call before it lets Ctrl-C through.
    """
    job = sending.job
    hash_files(sending, [file for file in todo.missing if file.path not in sending.prepared], frozenset())
    large = [[file] for file in todo.missing if file.size > _LARGE]
    small = [file for file in todo.missing if file.size <= _LARGE]
    sizes = {file.content: file.size for file in todo.missing if isinstance(file.content, Path)}
    sending.progress.start("upload", sum(sizes.values()))
    with FileWatch(sizes, sending.progress.advance):
        for group in [small, *large]:
            with translate_errors(job.repo_id, None, doing="write"):
                job.api.preupload_lfs_files(
                    job.repo_id,
                    additions=[sending.prepared[file.path] for file in group],
                    revision=head.revision,
                    create_pr=_opens(job, head),
                    free_memory=False,
                )
    sending.progress.finish()


def _opens(job: Job, head: BranchHead) -> bool:
    """Whether the commit is to open a pull request."""
    return job.options.create_pr and head.pull_request is None


def _commit(sending: Sending, head: BranchHead, todo: Changes) -> CommitInfo:
    from huggingface_hub import CommitOperationDelete

    job = sending.job
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        sending.prepared[file.path] for file in todo.missing
    ]
    operations += [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in todo.deleted]
    description = "\n\n".join(filter(None, [job.options.commit_description, job.marker]))
    sending.state = _COMMITTING
    sending.progress.start("commit", 0)
    with translate_errors(job.repo_id, None, doing="write"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Hub's advice about the card, as a Python warning
        info = job.api.create_commit(
            job.repo_id,
            operations,
            commit_message=message(job),
            commit_description=description,
            revision=head.revision,
            parent_commit=head.commit,
            create_pr=_opens(job, head),
        )
    sending.progress.finish()
    return info


def message(job: Job) -> str:
    """The commit's first line."""
    return job.options.commit_message or "Upload a torchao checkpoint made by aoconvert"


def again(message: str) -> HubError:
    """An error after which the same command goes on."""
    return HubError(message, hint=AGAIN_HINT, retryable=True)
