"""May this account do what a push is to do? Every problem is found before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoconvert.checkpoint.report import some
from aoconvert.errors import HubError, HubRefusal
from aoconvert.hub.ownership import BranchFile
from aoconvert.hub.remote import BranchHead, Changes, Job, Target, changes, find_head, refusals
from aoconvert.hub.types import PushOptions
from aoconvert.sources.hub_errors import LOGIN_HINT, WRITE_HINT, failed_status, translate_errors

if TYPE_CHECKING:
    from huggingface_hub import GitRefs, HfApi, ModelInfo

_ROLES_THAT_CREATE = ("admin", "write", "contributor")
# What git forbids in a branch's name: https://git-scm.com/docs/git-check-ref-format
_BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|/\.|[/.]$|\.lock(/|$)|^@$")


@dataclass(frozen=True)
class Preflight:
    """What the Hub allows and holds.

    Attributes:
        exists: whether the repo is there.
        head: where the commit goes.
        changes: what it has to change.
        warnings: one line each.
    """

    exists: bool
    head: BranchHead
    changes: Changes
    warnings: tuple[str, ...]


def ref_problem(option: str, name: str | None) -> list[str]:
    """What is wrong with the name of a branch or tag, if something is."""
    if name is None or (option == "--revision" and re.fullmatch(r"refs/pr/\d+", name)):
        return []
    if _BAD_REF.search(name) or not name or name.startswith("refs/") or re.fullmatch("[0-9a-f]{40}", name):
        return [f"{option} {name!r} is not a name for a {'tag' if option == '--tag' else 'branch'}"]
    return []


def name_problems(repo_id: str) -> list[str]:
    """What is wrong with the name of a repo, if something is."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return [f"{repo_id!r} is not a name for a repo: user/name, with letters, digits, '-', '_' and '.'"]
    return []


def check_access(job: Job, me: Mapping[str, Any]) -> Preflight:
    """Ask the Hub for everything that could stand in the way.

    Args:
        job: the push.
        me: what ``whoami`` answered.

    Raises:
        HubRefusal: with every problem at once.
        HubError: the Hub cannot be asked.
    """
    problems = _role_problems(me)
    info = _info(job)
    problems += _collection_problems(job)
    if info is None:
        problems += _namespace_problems(job, me)
        head = BranchHead(job.branch, None, {}, BranchFile(), exists=False)
        found = changes(job, head)
    else:
        problems += _repo_problems(job, info, asked=not _role_problems(me))
        head = find_head(job)
        found = changes(job, head)
        problems += _ref_problems(job, head, found)
    problems += refusals(job, found)
    if problems:
        raise HubRefusal(problems, hint=WRITE_HINT if any("may not write" in line for line in problems) else None)
    warnings = []
    if not found.none:
        warnings += [f"{job.repo_id}: {line}" for line in head.held.notes]
        warnings += [f"it replaces another model: {head.held.model}"] if head.held.model is not None else []
    if found.others:
        warnings.append(f"{job.repo_id} keeps files that are not part of this push: {some(list(found.others))}")
    return Preflight(info is not None, head, found, tuple(warnings))


def check_repos(api: HfApi, repo_ids: Iterable[str], options: PushOptions) -> None:
    """May this account publish to these repos? Asked before there is anything to publish.

    Raises:
        HubRefusal: with every problem of all of them.
        HubError: the Hub cannot be asked.
    """
    me = whoami(api)
    problems = _role_problems(me)
    asked = not problems
    for repo_id in repo_ids:
        target = Target(api, repo_id if "/" in repo_id else f"{me['name']}/{repo_id}", me["name"], options)
        info = _info(target)
        problems += _namespace_problems(target, me) if info is None else _repo_problems(target, info, asked=asked)
    if problems:
        raise HubRefusal(problems, hint=WRITE_HINT if any("may not" in line for line in problems) else None)


def _role_problems(me: Mapping[str, Any]) -> list[str]:
    role = (me.get("auth") or {}).get("accessToken", {}).get("role")
    return [f"this token of {me['name']} is read-only"] if role == "read" else []


def whoami(api: HfApi) -> dict[str, Any]:
    """Whose token it is.

    Raises:
        HubError: no token, one that the Hub does not know, or the Hub cannot be asked.
    """
    with translate_errors("Hugging Face Hub", None, doing="write"):
        answer = api.whoami()
        if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            raise HubError(f"{api.endpoint} does not answer like a Hub", hint="check HF_ENDPOINT and the proxy")
        return answer


def _info(target: Target) -> ModelInfo | None:
    """The repo, if it is there and this token may see it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with translate_errors(target.repo_id, None, doing="write"):
        try:
            return target.api.model_info(target.repo_id)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None


def _namespace_problems(target: Target, me: Mapping[str, Any]) -> list[str]:
    """Whether a repo may be made there; a fine-grained token is only known to fit when it is tried."""
    namespace = target.repo_id.split("/")[0]
    if namespace == target.user:
        return []
    orgs = {org.get("name"): org.get("roleInOrg") for org in me.get("orgs") or []}
    if namespace not in orgs:
        return [
            f"{target.repo_id} does not exist (or is hidden), and {target.user} may not create repos under {namespace}"
        ]
    if orgs[namespace] is not None and orgs[namespace] not in _ROLES_THAT_CREATE:
        return [f"{target.user} is only '{orgs[namespace]}' in {namespace}, and may not create {target.repo_id}"]
    return []


def _repo_problems(target: Target, info: ModelInfo, *, asked: bool) -> list[str]:
    """What is wrong with a repo that is there."""
    problems = []
    if info.id != target.repo_id:
        problems.append(f"{target.repo_id} is now called {info.id}: give that name")
    wanted = target.options.private
    if wanted is not None and info.private is not None and wanted != info.private:
        now, asked_for = ("private", "--public") if info.private else ("public", "--private")
        problems.append(
            f"{target.repo_id} is {now}, and {asked_for} was asked for (change it at {target.api.endpoint}/"
            f"{target.repo_id}/settings, or leave {asked_for} out)"
        )
    if asked and not _may_write(target):
        problems.append(f"{target.user} may not write to {target.repo_id} with this token")
    return problems


def _may_write(target: Target) -> bool:
    """Whether the token may commit; for a pull request, whether it may see the repo's files."""
    proposes = target.options.create_pr or (target.options.revision or "").startswith("refs/pr/")
    try:
        with translate_errors(target.repo_id, None, doing="write"):
            target.api.auth_check(target.repo_id, write=not proposes)
    except HubError as error:
        if failed_status(error.__cause__) in (401, 403, 404):
            return False
        raise
    return True


def _ref_problems(job: Job, head: BranchHead, found: Changes) -> list[str]:
    """Names of branches and tags that do not fit."""
    with translate_errors(job.repo_id, None, doing="write"):
        refs: GitRefs = job.api.list_repo_refs(job.repo_id)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    problems = []
    if job.branch in tags:
        problems.append(f"{job.branch} is a tag of {job.repo_id}, but a commit needs a branch")
    tag = job.options.tag
    if tag is not None and tag in {branch.name for branch in refs.branches}:
        problems.append(f"{tag} is a branch of {job.repo_id}, and cannot be a tag too")
    if tag in tags and not (found.none and tags[tag] == head.commit):
        problems.append(f"{job.repo_id} has a tag {tag} already, on another commit ({tags[tag][:12]})")
    return problems


def _collection_problems(job: Job) -> list[str]:
    slug = job.options.collection
    if slug is None:
        return []
    try:
        with translate_errors(slug, None, doing="write"):
            job.api.get_collection(slug)
    except HubError as error:
        if failed_status(error.__cause__) not in (401, 403, 404):
            raise
        return [f"the collection {slug} does not exist, or this token may not see it"]
    return []


def no_token() -> HubError:
    """The error for whoever is not logged in."""
    return HubError("not logged in to the Hub: there is no token", hint=LOGIN_HINT)
