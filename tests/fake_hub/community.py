"""Discussions and pull requests.

``discussions.json`` of a repo: a list of ``{num, title, author, created, status, pull, base, events}``, where ``pull``
is whether it is a pull request, ``base`` the branch that it wants to change, and ``events`` are as the Hub sends them.
The head of number 3 is the ref ``refs/pr/3``.
"""

from __future__ import annotations

import difflib
import secrets
from typing import Any

from fake_hub.access import Repo, open_repo, open_to_propose, open_to_write, repo_key
from fake_hub.state import Entry, now
from fake_hub.wire import Exchange, Failure, Routes

routes = Routes()


def _read(repo: Repo) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = repo.state.disk.read(repo.state.folder(repo.key) / "discussions.json", [])
    return found


def _write(repo: Repo, discussions: list[dict[str, Any]]) -> None:
    repo.state.disk.write(repo.state.folder(repo.key) / "discussions.json", discussions)


def _find(discussions: list[dict[str, Any]], number: str) -> dict[str, Any]:
    for discussion in discussions:
        if str(discussion["num"]) == number:
            return discussion
    raise Failure(404, None, f"Discussion {number} not found")


def _event(kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    made = {"id": secrets.token_hex(12), "type": kind, "createdAt": now(), "data": data}
    return {**made, "author": {"name": author, "type": "user"}}


def _comment(text: str, author: str) -> dict[str, Any]:
    latest = {"raw": text, "html": "", "updatedAt": now(), "author": {"name": author}}
    return _event("comment", author, {"edited": False, "hidden": False, "latest": latest, "history": [latest]})


def author_of(repo: Repo, ref: str) -> str | None:
    """Who opened the pull request that a ref belongs to."""
    for discussion in _read(repo):
        if discussion["pull"] and ref == f"refs/pr/{discussion['num']}":
            return str(discussion["author"])
    return None


def _open(repo: Repo, title: str, text: str, author: str, *, pull: bool, status: str, base: str) -> int:
    with repo.state.disk.lock():
        discussions = _read(repo)
        number = len(discussions) + 1
        made = {"num": number, "title": title, "author": author, "created": now(), "status": status, "pull": pull}
        _write(repo, [*discussions, {**made, "base": base, "events": [_comment(text, author)]}])
    return number


def add_pull_request(repo: Repo, title: str, text: str, author: str, base: str, parent: str | None, sha: str) -> int:
    """Open a pull request for a commit; returns its number."""
    number = _open(repo, title, text, author, pull=True, status="open", base=base)
    repo.state.set_ref(repo.key, f"refs/pr/{number}", sha)
    if sha != parent:
        note_commit(repo, f"refs/pr/{number}", sha, title, author)
    return number


def note_commit(repo: Repo, ref: str, sha: str, title: str, author: str) -> None:
    """Show a commit in the pull request it was made for; other refs have none."""
    with repo.state.disk.lock():
        discussions = _read(repo)
        for discussion in discussions:
            if discussion["pull"] and ref == f"refs/pr/{discussion['num']}":
                discussion["events"].append(_event("commit", author, {"subject": title, "oid": sha}))
                _write(repo, discussions)


def _summary(repo: Repo, discussion: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": discussion["num"],
        "title": discussion["title"],
        "author": {"name": discussion["author"], "type": "user"},
        "createdAt": discussion["created"],
        "status": discussion["status"],
        "isPullRequest": discussion["pull"],
        "repo": {"name": repo.id, "type": repo.kind},
    }


@routes.add("GET", "api/{kind}/{user}/{name}/discussions")
def discussions(exchange: Exchange, kind: str, user: str, name: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    wanted = {key: exchange.param(key) for key in ("type", "status", "author")}
    found = [
        item
        for item in reversed(_read(repo))
        if wanted["type"] in (None, "all", "pull_request" if item["pull"] else "discussion")
        and wanted["status"] in (None, "all", "open" if item["status"] in ("open", "draft") else "closed")
        and wanted["author"] in (None, item["author"])
    ]
    size = repo.state.options.page_size
    start = int(exchange.param("p") or 0) * size
    shown = [_summary(repo, item) for item in found[start : start + size]]
    exchange.answer({"discussions": shown, "count": len(found), "start": start})


@routes.add("POST", "api/{kind}/{user}/{name}/discussions")
def create(exchange: Exchange, kind: str, user: str, name: str) -> None:
    repo = open_to_propose(exchange, repo_key(kind, user, name))
    assert repo.caller is not None
    body = exchange.json_body()
    title, pull = body.get("title"), bool(body.get("pullRequest"))
    if not isinstance(title, str) or not 3 <= len(title) <= 200:
        raise Failure(400, None, "the title must have 3 to 200 characters")
    status, text = "draft" if pull else "open", body.get("description") or ""
    with repo.state.disk.lock():
        number = _open(repo, title, text, repo.caller.user, pull=pull, status=status, base="refs/heads/main")
        if pull:
            repo.state.set_ref(repo.key, f"refs/pr/{number}", repo.commit("main"))
    exchange.answer({"num": number, "url": f"{exchange.site.hub}/{repo.key}/discussions/{number}", "pullRequest": pull})


@routes.add("GET", "api/{kind}/{user}/{name}/discussions/{number}")
def details(exchange: Exchange, kind: str, user: str, name: str, number: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    discussion = _find(_read(repo), number)
    answer = {**_summary(repo, discussion), "events": discussion["events"]}
    if discussion["pull"]:
        answer["changes"] = {"base": discussion["base"], "mergeCommitId": discussion.get("merged")}
        answer["filesWithConflicts"] = [] if discussion["status"] == "merged" else _merge(repo, discussion)[1]
        if exchange.flag("diff"):
            answer["diff"] = _diff(repo, discussion)
    exchange.answer(answer)


@routes.add("POST", "api/{kind}/{user}/{name}/discussions/{number}/comment")
def comment(exchange: Exchange, kind: str, user: str, name: str, number: str) -> None:
    repo = open_to_propose(exchange, repo_key(kind, user, name))
    assert repo.caller is not None
    event = _comment(str(exchange.json_body().get("comment", "")), repo.caller.user)
    _change(repo, number, event)
    exchange.answer({"newMessage": event})


@routes.add("POST", "api/{kind}/{user}/{name}/discussions/{number}/status")
def status(exchange: Exchange, kind: str, user: str, name: str, number: str) -> None:
    repo = open_to_propose(exchange, repo_key(kind, user, name))
    assert repo.caller is not None
    wanted = exchange.json_body().get("status")
    if not repo.writable and _find(_read(repo), number)["author"] != repo.caller.user:
        raise Failure(403, None, "only its author or a writer of the repo may do this")
    if wanted not in ("open", "closed"):
        raise Failure(400, None, "the status must be open or closed")
    event = _event("status-change", repo.caller.user, {"status": wanted})
    _change(repo, number, event, status=wanted)
    exchange.answer({"newStatus": event})


@routes.add("POST", "api/{kind}/{user}/{name}/discussions/{number}/merge")
def merge(exchange: Exchange, kind: str, user: str, name: str, number: str) -> None:
    repo = open_to_write(exchange, repo_key(kind, user, name))
    assert repo.caller is not None
    author = repo.caller.user
    with repo.state.disk.lock():
        discussion = _find(_read(repo), number)
        if not discussion["pull"] or discussion["status"] not in ("open", "draft"):
            raise Failure(400, None, "only an open pull request can be merged")
        entries, conflicts = _merge(repo, discussion)
        if conflicts:
            raise Failure(409, None, f"conflicts in {', '.join(conflicts)}")
        base = repo.state.all_refs(repo.key)[discussion["base"]]
        title = f"{discussion['title']} (#{number})"
        sha = repo.state.add_commit(repo.key, base, entries, title=title, author=author)
        repo.state.set_ref(repo.key, discussion["base"], sha)
        _change(repo, number, _event("status-change", author, {"status": "merged"}), status="merged", merged=sha)
    exchange.answer({})


def _change(repo: Repo, number: str, event: dict[str, Any], **fields: Any) -> None:
    with repo.state.disk.lock():
        found = _read(repo)
        discussion = _find(found, number)
        discussion["events"].append(event)
        discussion |= fields
        _write(repo, found)


def _sides(repo: Repo, discussion: dict[str, Any]) -> tuple[dict[str, Entry], dict[str, Entry], dict[str, Entry]]:
    """The files of the last commit that both have, of the branch, and of the pull request."""
    refs = repo.state.all_refs(repo.key)
    base = repo.state.history(repo.key, refs[discussion["base"]])
    head = repo.state.history(repo.key, refs[f"refs/pr/{discussion['num']}"])
    shared = {commit.sha for commit in base}
    fork = next((dict(commit.entries) for commit in head if commit.sha in shared), {})
    return fork, dict(base[0].entries), dict(head[0].entries)


def _merge(repo: Repo, discussion: dict[str, Any]) -> tuple[dict[str, Entry], list[str]]:
    """The merged files, and those that both sides changed."""
    fork, base, head = _sides(repo, discussion)
    changed = [path for path in {*fork, *head} if fork.get(path) != head.get(path)]
    conflicts = [p for p in changed if base.get(p) != fork.get(p) and base.get(p) != head.get(p)]
    merged = {path: entry for path, entry in base.items() if path not in changed}
    return merged | {path: head[path] for path in changed if path in head}, sorted(conflicts)


def _diff(repo: Repo, discussion: dict[str, Any]) -> str:
    fork, _, head = _sides(repo, discussion)
    lines = []
    for path in sorted({*fork, *head}):
        if fork.get(path) != head.get(path):
            old, new = (_lines(repo, side.get(path)) for side in (fork, head))
            lines += [
                f"diff --git a/{path} b/{path}",
                *difflib.unified_diff(old, new, f"a/{path}", f"b/{path}", lineterm=""),
            ]
    return "\n".join(lines)


def _lines(repo: Repo, entry: Entry | None) -> list[str]:
    if entry is None:
        return []
    content = entry.pointer if entry.lfs else repo.state.blob(entry.oid).read_bytes()
    return content.decode(errors="replace").splitlines()
