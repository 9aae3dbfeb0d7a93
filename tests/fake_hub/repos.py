"""Accounts, and repos as a whole: who is it, create, delete, settings, branches, tags."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from fake_hub.access import Repo, caller, may_create, open_repo, open_to_write, repo_key, writer
from fake_hub.accounts import Token
from fake_hub.browse import object_id
from fake_hub.wire import Exchange, Failure, Routes

routes = Routes()

# Names the Hub takes, as huggingface_hub.utils.validate_repo_id has them
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}")


@routes.add("GET", "api/whoami-v2")
def whoami(exchange: Exchange) -> None:
    token = caller(exchange)
    if token is None:
        raise Failure(401, None, "Invalid username or password.")
    access: dict[str, Any] = {"displayName": "tests", "role": token.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    if token.role == "fineGrained":
        scoped = [
            {
                "entity": {"_id": object_id(name), "type": _entity(name, token), "name": name},
                "permissions": list(granted),
            }
            for name, granted in token.scopes.items()
        ]
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    orgs = [
        {"type": "org", "id": object_id(name), "name": name, "fullname": name, "isEnterprise": False, "roleInOrg": role}
        for name, role in exchange.site.state.accounts.orgs(token.user).items()
    ]
    exchange.answer(
        {
            "type": "user",
            "id": object_id(token.user),
            "name": token.user,
            "fullname": token.user,
            "isPro": False,
            "canPay": False,
            "avatarUrl": "",
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


def _entity(name: str, token: Token) -> str:
    return "model" if "/" in name else "user" if name == token.user else "org"


@routes.add("GET", "api/{kind}/{user}/{name}/auth-check")
def auth_check(exchange: Exchange, kind: str, user: str, name: str) -> None:
    open_repo(exchange, repo_key(kind, user, name), content=True)
    exchange.answer({"success": True})


@routes.add("GET", "api/{kind}/{user}/{name}/auth-check/write")
def auth_check_write(exchange: Exchange, kind: str, user: str, name: str) -> None:
    open_to_write(exchange, repo_key(kind, user, name))
    exchange.answer({"success": True})


def _named(exchange: Exchange, body: dict[str, Any]) -> tuple[Token, str, str]:
    """The token, the namespace and the repo's key that a body names."""
    token = writer(exchange)
    namespace, name, kind = body.get("organization") or token.user, body.get("name"), body.get("type") or "model"
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.endswith((".git", "-", ".")):
        raise Failure(400, None, f"Invalid repo name: {name}")
    return token, namespace, repo_key(f"{kind}s", namespace, name)


@routes.add("POST", "api/repos/create")
def create(exchange: Exchange) -> None:
    body = exchange.json_body()
    token, namespace, key = _named(exchange, body)
    state = exchange.site.state
    if not may_create(state, token, namespace):
        kind = body.get("type") or "model"
        raise Failure(403, None, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    private = body.get("visibility") == "private" or body.get("private") is True
    url = f"{exchange.site.hub}/{key}"
    repo_id = "/".join(key.split("/")[-2:])
    try:
        state.create_repo(key, private=private, author=token.user, initial_commit=True)
    except FileExistsError:
        message = f"You already created this {body.get('type') or 'model'} repo: {repo_id}"
        raise Failure(409, None, message, more={"url": url, "name": repo_id}) from None
    exchange.answer({"url": url, "name": repo_id, "id": object_id(key)})


@routes.add("DELETE", "api/repos/delete")
def delete(exchange: Exchange) -> None:
    _, _, key = _named(exchange, exchange.json_body())
    repo = open_to_write(exchange, key)
    repo.state.delete_repo(repo.key)
    exchange.answer({})


@routes.add("PUT", "api/{kind}/{user}/{name}/settings")
def settings(exchange: Exchange, kind: str, user: str, name: str) -> None:
    repo = open_to_write(exchange, repo_key(kind, user, name))
    body = exchange.json_body()
    changed = repo.settings
    if "visibility" in body:
        changed = replace(changed, private=body["visibility"] == "private")
    if "gated" in body:
        changed = replace(changed, gated=bool(body["gated"]))
    repo.state.set_settings(repo.key, changed)
    exchange.answer({"private": changed.private, "gated": "manual" if changed.gated else False})


# Refs. What git allows as a name: https://git-scm.com/docs/git-check-ref-format

_BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.]|/\.|[/.]$|\.lock$|^@$|^-")


def _new_ref(repo: Repo, full: str, name: str, sha: str) -> None:
    """Make a ref, unless there is one or the name is none. Raises Failure."""
    if not name or _BAD_REF.search(name) or name.startswith("refs/"):
        raise Failure(400, None, f"Invalid reference name: {name}")
    with repo.state.disk.lock():
        if full in repo.state.all_refs(repo.key):
            raise Failure(409, None, f"Reference already exists: {name}")
        repo.state.set_ref(repo.key, full, sha)


def _drop_ref(repo: Repo, full: str, name: str) -> None:
    with repo.state.disk.lock():
        if full not in repo.state.all_refs(repo.key):
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {name}")
        repo.state.set_ref(repo.key, full, None)


@routes.add("POST", "api/{kind}/{user}/{name}/branch/{branch}")
def create_branch(exchange: Exchange, kind: str, user: str, name: str, branch: str) -> None:
    repo = open_to_write(exchange, repo_key(kind, user, name))
    _new_ref(repo, f"refs/heads/{branch}", branch, repo.commit(exchange.json_body().get("startingPoint") or "main"))
    exchange.answer({})


@routes.add("DELETE", "api/{kind}/{user}/{name}/branch/{branch}")
def delete_branch(exchange: Exchange, kind: str, user: str, name: str, branch: str) -> None:
    repo = open_to_write(exchange, repo_key(kind, user, name))
    if branch == "main":
        raise Failure(403, None, "The default branch cannot be deleted")
    _drop_ref(repo, f"refs/heads/{branch}", branch)
    exchange.answer({})


@routes.add("POST", "api/{kind}/{user}/{name}/tag/{revision}")
def create_tag(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    repo = open_to_write(exchange, repo_key(kind, user, name))
    tag = str(exchange.json_body().get("tag") or "")
    _new_ref(repo, f"refs/tags/{tag}", tag, repo.commit(revision))
    exchange.answer({})


@routes.add("DELETE", "api/{kind}/{user}/{name}/tag/{tag}")
def delete_tag(exchange: Exchange, kind: str, user: str, name: str, tag: str) -> None:
    repo = open_to_write(exchange, repo_key(kind, user, name))
    _drop_ref(repo, f"refs/tags/{tag}", tag)
    exchange.answer({})
