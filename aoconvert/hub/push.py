"""A push, step by step."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from aoconvert.checkpoint.report import Report, some
from aoconvert.errors import HubError, Interrupted, PlanError, UsageError
from aoconvert.hub.access import Preflight, check_access, name_problems, no_token, ref_problem, whoami
from aoconvert.hub.card import CardFiles, own_card, render_card, write_card
from aoconvert.hub.contents import VERIFY_HINT, UploadContents, read_contents
from aoconvert.hub.remote import BranchHead, Job, differences, find_head, list_files, pull_request_url
from aoconvert.hub.secrets import find_secrets, secrets_in
from aoconvert.hub.types import Pushed, PushOptions
from aoconvert.hub.upload import CommitRef, Sending, again, hash_files, send
from aoconvert.progress import Progress
from aoconvert.sources.hub_errors import AGAIN_HINT, check_token, failed_status, never_answered, translate_errors
from aoconvert.version import __version__


def push(folder: Path, repo_id: str, options: PushOptions, progress: Progress) -> Pushed:
    """Publish a checkpoint, and compare what arrived with what was sent.

    Args:
        folder: the output of ``quantize``, verified.
        repo_id: ``user/repo``, or a name alone for the token's own account.
        options: how to publish.
        progress: is told what happens.

    Raises:
        UsageError: options that exclude each other.
        PlanError: what is in the folder cannot be published as it is, with every problem.
        HubError: the Hub said no, or cannot be reached.
        Interrupted: Ctrl-C or SIGTERM; the message says what is known about the branch.
    """
    from huggingface_hub import get_token, is_offline_mode

    _check_usage(options)
    options = replace(options, token=options.token or get_token())
    check_token(options.token)
    try:
        contents, own = _local(folder, repo_id, options, progress)
        if not options.dry_run and is_offline_mode():
            raise HubError("HF_HUB_OFFLINE is set, but push needs the Hub", hint="unset it, or use --dry-run")
        if not options.dry_run and options.token is None:
            raise no_token()
        card = _card(folder, repo_id, options, own)
        if is_offline_mode() or options.token is None:
            why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "there is no token"
            return _plan_without_hub(repo_id, contents, card, f"the Hub was not asked: {why}")
        with _quiet_client(progress):
            return _publish(folder, repo_id, options, contents, card, progress)
    except HubError as error:
        if options.dry_run and failed_status(error.__cause__) is None and never_answered(error.__cause__):
            return _plan_without_hub(repo_id, contents, card, f"the Hub could not be asked: {error.message}")
        raise
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was sent") from None


def _check_usage(options: PushOptions) -> None:
    if options.create_pr and options.revision not in (None, "main"):
        raise UsageError("--create-pr opens a pull request against main", hint="omit --revision")
    if options.create_pr and options.tag is not None:
        raise UsageError(
            "--tag names a commit of a branch, and --create-pr makes none", hint="tag it once it is merged"
        )
    if options.tag is not None and (options.revision or "").startswith("refs/pr/"):
        raise UsageError("--tag names a commit of a branch, not of a pull request", hint="tag it once it is merged")


def _local(
    folder: Path, repo_id: str, options: PushOptions, progress: Progress
) -> tuple[UploadContents, CardFiles | None]:
    """Everything that can be wrong before the network is asked, and the folder's own card.

    Raises:
        PlanError: with every problem.
        SourceError: it is no folder with a manifest.
    """
    problems = name_problems(repo_id) + ref_problem("--revision", options.revision) + ref_problem("--tag", options.tag)
    contents = read_contents(folder, repo_id, options, progress)
    problems += contents.problems
    own = None
    try:
        own = own_card(folder, options)
    except PlanError as error:
        problems += error.problems
    if not contents.problems:
        problems += find_secrets(contents.files + (own.files if own is not None else ()), options.token)
    for name, text in (("message", options.commit_message), ("description", options.commit_description)):
        problems += [f"the commit {name} holds {kind}" for _, kind in secrets_in((text or "").encode(), options.token)]
    if problems:
        unverified = any(line.startswith(("not verified", "the verification failed")) for line in problems)
        raise PlanError(problems, hint=VERIFY_HINT if unverified else None)
    return contents, own


def _card(folder: Path, repo_id: str, options: PushOptions, own: CardFiles | None) -> CardFiles:
    """The folder's own card, or one that is made for this repo.

    Raises:
        PlanError: there are secrets in it.
        UsageError: metadata that the Hub does not know, or a template that fails.
    """
    card = own or render_card(folder, repo_id, options)
    problems = find_secrets(card.files, options.token)
    if problems:
        raise PlanError(problems)
    return card


def _publish(
    folder: Path,
    repo_id: str,
    options: PushOptions,
    contents: UploadContents,
    card: CardFiles,
    progress: Progress,
) -> Pushed:
    from huggingface_hub import HfApi

    api = HfApi(token=options.token, library_name="aoconvert", library_version=__version__)
    me = whoami(api)
    if "/" not in repo_id:
        repo_id = f"{me['name']}/{repo_id}"
        contents, own = _local(folder, repo_id, replace(options, rehash=False), progress)
        card = _card(folder, repo_id, options, own)
    files = contents.files + card.files
    job = Job(
        api, repo_id, me["name"], options, files, contents.manifest_sha256, contents.manifest, card_by_hand=card.kept
    )
    preflight = check_access(job, me)
    notes = [*contents.warnings, *card.warnings, *preflight.warnings]
    result = Pushed(
        repo_id=repo_id,
        url=_page(job),
        commit=None,
        pr_url=None,
        files=files,
        sent=frozenset(file.path for file in preflight.changes.missing),
        deleted=preflight.changes.deleted,
        warnings=tuple(notes),
        nothing_to_do=preflight.changes.none and preflight.head.exists,
        dry_run=options.dry_run,
        card=card.text,
    )
    if options.dry_run:
        return result
    failed = write_card(folder, card)
    arrived = _send(Sending(job, progress), preflight, contents.hashed)
    report = _open_again(folder, job, arrived.commit, progress) if options.verify_hub else None
    notes += [failed] if failed else []
    notes += _find_problems(job, arrived.commit, report) if report is not None else []
    return replace(
        result,
        commit=arrived.commit,
        pr_url=pull_request_url(job, arrived.pull_request) if arrived.pull_request is not None else None,
        warnings=tuple(notes),
        verification=report,
    )


def _open_again(folder: Path, job: Job, commit: str, progress: Progress) -> Report:
    """Verify what was pushed, opened from the Hub; the folder holds the same files, as the comparison has shown.

    The card's example runs where the card claims that it ran.
    """
    from aoconvert.cards.proof import prove
    from aoconvert.checkpoint.checkpoint import from_manifest
    from aoconvert.checkpoint.published import Published
    from aoconvert.options import VerifyOptions
    from aoconvert.verification.verify import verify

    total = sum(file.size for file in job.files)
    published = Published(job.repo_id, commit, job.options.branch, total, job.options.token)
    claimed = prove(folder, from_manifest(folder, job.manifest), job.manifest).example
    return verify(folder, job.repo_id, VerifyOptions(example=claimed), progress, published=published)


def _find_problems(job: Job, commit: str, report: Report) -> list[str]:
    """What is wrong with a commit that is there already, or was not looked at, and what to do."""
    if report.ok:
        reload = report.check("reload")
        skipped = reload is not None and reload.status == "skipped"
        return [f"the commit was not opened from the Hub: {reload.detail}"] if reload is not None and skipped else []
    failed = some([f"{check.name}: {check.detail}" for check in report.failed])
    again = shlex.join(["aoconvert", "verify", job.repo_id, "--revision", commit])
    return [
        f"{job.repo_id}: commit {commit[:12]} is on the Hub, but does not pass the verification from there: {failed}",
        f"check again with {again}; then push a repaired checkpoint, or revert to an earlier commit from the list at "
        f"{job.api.endpoint}/{job.repo_id}/commits/{job.branch}",
    ]


def _page(job: Job) -> str:
    page = f"{job.api.endpoint}/{job.repo_id}"
    return page if job.branch == "main" else f"{page}/tree/{job.branch}"


def _send(sending: Sending, preflight: Preflight, hashed: frozenset[str]) -> CommitRef:
    """Change the Hub: the repo, the branch, the commit, the tag, the collection."""
    job = sending.job
    try:
        if preflight.changes.none and preflight.head.commit is not None and preflight.head.exists:
            arrived = CommitRef(preflight.head.commit, preflight.head.pull_request)
        else:
            hash_files(sending, preflight.changes.missing, hashed)
            arrived = send(sending, _make_place(job, preflight))
        sending.state = f"the commit {arrived.commit[:12]} is on the Hub; run the same command again to finish"
        _compare(job, arrived.commit)
        _label(job, arrived.commit)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {job.repo_id}: {sending.state}", hint=AGAIN_HINT) from None
    return arrived


def _make_place(job: Job, preflight: Preflight) -> BranchHead:
    """The repo and the branch, made where they are not there."""
    head = preflight.head
    if not preflight.exists:
        _once(job, lambda: job.api.create_repo(job.repo_id, repo_type="model", private=job.options.private), _is_there)
        head = find_head(job)
    if not head.exists and head.revision != "main":
        _once(job, lambda: job.api.create_branch(job.repo_id, branch=head.revision), _has_branch)
        head = find_head(job)
    return head


def _once(job: Job, make: Callable[[], object], made: Callable[[Job], bool]) -> None:
    """Make something on the Hub; where that fails, it may be there nevertheless: the answer was lost."""
    try:
        with translate_errors(job.repo_id, None, doing="write"):
            make()
    except HubError as error:
        status = failed_status(error.__cause__)
        if status is not None and status < 500 and status not in (408, 409):
            raise
        try:
            there = made(job)
        except HubError:
            there = False
        if not there:
            raise


def _is_there(job: Job) -> bool:
    with translate_errors(job.repo_id, None, doing="write"):
        return bool(job.api.repo_exists(job.repo_id))


def _has_branch(job: Job) -> bool:
    with translate_errors(job.repo_id, None, doing="write"):
        return job.branch in {branch.name for branch in job.api.list_repo_refs(job.repo_id).branches}


def _compare(job: Job, commit: str) -> None:
    """Is what arrived what was sent?"""
    try:
        found = list_files(job, commit)
    except HubError as error:
        raise again(f"{error.message}; commit {commit[:12]} was made, but is not compared yet") from error.__cause__
    problems = differences(job, found)
    if problems:
        raise HubError(
            f"{job.repo_id}: commit {commit[:12]} is not what was sent: {some(problems)}",
            hint="is there a .gitignore in the repo, or another user's commit? Check the repo, then run the command "
            "again",
        )


def _label(job: Job, commit: str) -> None:
    """The tag and the collection."""
    if job.options.tag is not None:
        tag = job.options.tag
        with translate_errors(job.repo_id, None, doing="write"):
            job.api.create_tag(job.repo_id, tag=tag, revision=commit, exist_ok=True)
            tags = {found.name: found.target_commit for found in job.api.list_repo_refs(job.repo_id).tags}
        if tags.get(tag) != commit:
            raise HubError(
                f"{job.repo_id}: another user created the tag {tag} in the meantime", hint="choose another --tag"
            )
    if job.options.collection is not None:
        with translate_errors(job.options.collection, None, doing="write"):
            job.api.add_collection_item(job.options.collection, job.repo_id, "model", exists_ok=True)


def _plan_without_hub(repo_id: str, contents: UploadContents, card: CardFiles, why: str) -> Pushed:
    """A dry run that knows nothing about the Hub."""
    from huggingface_hub import constants

    files = contents.files + card.files
    return Pushed(
        repo_id=repo_id,
        url=f"{constants.ENDPOINT}/{repo_id}",
        commit=None,
        pr_url=None,
        files=files,
        sent=frozenset(file.path for file in files),
        deleted=(),
        warnings=(*contents.warnings, *card.warnings, f"{why}: access, and what the repo holds, are not known"),
        nothing_to_do=False,
        dry_run=True,
        card=card.text,
    )


class _Waits(logging.Handler):
    """Shows on the progress bar that the client waits; its other messages hold addresses that are signed."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        waits = re.search(r"(?:Waiting|Retrying in) (\d+)(?:\.\d+)?s", record.getMessage())
        if waits:
            self._progress.advance(0, f"the Hub does not answer; again in {waits[1]} s")


@contextlib.contextmanager
def _quiet_client(progress: Progress) -> Iterator[None]:
    """No bars and no log of the Hub client: errors come as one line, waits are shown on our bar."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, not in __all__

    logger = logging.getLogger("huggingface_hub")
    before, propagates = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [_Waits(progress)], False
    try:
        with disable_progress_bars():
            yield
    finally:
        logger.handlers, logger.propagate = before, propagates
