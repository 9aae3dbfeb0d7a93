"""What can be read from the loopback Hub: repos, listings, history, files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from fake_hub import card, store
from fake_hub.access import Repo, open_repo, repo_key
from fake_hub.state import Commit, Entry
from fake_hub.wire import Exchange, Failure, Routes

PATHS_LIMIT = 1000  # of one paths-info request: https://github.com/huggingface/huggingface_hub/issues/1503

routes = Routes()


@routes.add("GET", "api/{kind}/{user}/{name}")
def default_info(exchange: Exchange, kind: str, user: str, name: str) -> None:
    info(exchange, kind, user, name, "main")


@routes.add("GET", "api/{kind}/{user}/{name}/revision/{revision}")
def info(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    sha = repo.commit(revision)
    commit = repo.state.read_commit(repo.key, sha)
    blobs = "blobs" in exchange.params
    siblings: list[dict[str, Any]] = []
    for path, entry in commit.entries.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.blob_id}
            if entry.lfs:
                sibling["lfs"] = {"sha256": entry.oid, "size": entry.size, "pointerSize": len(entry.pointer)}
        siblings.append(sibling)
    tags, card_data = _card(repo, commit)
    full = {
        "_id": object_id(repo.key),
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": sha,
        "createdAt": repo.settings.created,
        "lastModified": commit.date,
        "private": repo.settings.private,
        "gated": "manual" if repo.settings.gated else False,
        "disabled": False,
        "tags": tags,
        "downloads": 0,
        "likes": 0,
        "usedStorage": sum(entry.size for entry in commit.entries.values()),
        **card_data,
        "siblings": siblings,
    }
    wanted = exchange.params.get("expand", []) + exchange.params.get("expand[]", [])
    exchange.answer({key: value for key, value in full.items() if not wanted or key in (*wanted, "_id", "id")})


def _card(repo: Repo, commit: Commit) -> tuple[list[str], dict[str, Any]]:
    """The repo's tags, and what of its info comes from the card."""
    import yaml  # type: ignore[import-untyped]

    readme = commit.entries.get("README.md")
    if readme is None or readme.lfs:
        return [], {}
    try:
        found = card.metadata(repo.state.blob(readme.oid).read_text(errors="replace"))
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        return [], {}
    plain = json.loads(json.dumps(found, default=str))
    tags = [tag for tag in plain.get("tags", []) if isinstance(tag, str)]
    named = {key: plain[key] for key in ("library_name", "pipeline_tag") if key in plain}
    return [*named.values(), *tags], {**named, "cardData": plain}


@routes.add("GET", "api/{kind}/{user}/{name}/tree/{revision}")
def tree_of_root(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    tree(exchange, kind, user, name, revision, "")


@routes.add("GET", "api/{kind}/{user}/{name}/tree/{revision}/{folder...}")
def tree(exchange: Exchange, kind: str, user: str, name: str, revision: str, folder: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    sha = repo.commit(revision)
    listing = folders(repo.state.entries(repo.key, sha))
    if folder not in listing:
        raise Failure(404, "EntryNotFound", f"{folder} does not exist on {revision}", {"X-Repo-Commit": sha})
    recursive = exchange.flag("recursive")
    inside = f"{folder}/" if folder else ""
    found = [
        path
        for path in sorted({path for paths in listing.values() for path in paths})
        if path.startswith(inside) and (recursive or "/" not in path[len(inside) :])
    ]
    exchange.page(items(exchange, repo, sha, found), repo.state.options.page_size)


@routes.add("POST", "api/{kind}/{user}/{name}/paths-info/{revision}")
def paths_info(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    body = exchange.body()
    if "json" in exchange.headers.get("Content-Type", ""):
        paths = json.loads(body)["paths"]
    else:
        exchange.params |= parse_qs(body.decode())
        paths = exchange.params.get("paths", [])
    if len(paths) > PATHS_LIMIT:
        raise Failure(413, None, "too many parameters")
    sha = repo.commit(revision)
    exchange.answer(items(exchange, repo, sha, [path.strip("/") for path in paths]))


def folders(entries: Mapping[str, Entry]) -> dict[str, set[str]]:
    """What each folder of a commit holds, folders among it; the root is ``""``."""
    found: dict[str, set[str]] = {"": set()}
    for path in entries:
        while path:
            folder = path.rpartition("/")[0]
            found.setdefault(folder, set()).add(path)
            path = folder
    return found


def items(exchange: Exchange, repo: Repo, sha: str, paths: list[str]) -> list[dict[str, Any]]:
    """What the Hub lists of files and folders; a path that is neither is left out."""
    commits = repo.state.history(repo.key, sha) if exchange.flag("expand") else []
    entries = repo.state.entries(repo.key, sha)
    listing = folders(entries)
    found = []
    for path in paths:
        if path in entries:
            item = _file(repo, path, entries[path])
        elif path in listing and path:
            item = {"type": "directory", "path": path, "size": 0, "oid": _tree_id(entries, path)}
        else:
            continue
        if commits:
            item["lastCommit"] = _last_commit(commits, path)
            if item["type"] == "file":
                item["securityFileStatus"] = {"status": "safe", "avScan": {}, "pickleImportScan": None}
        found.append(item)
    return found


def _file(repo: Repo, path: str, entry: Entry) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.blob_id}
    if entry.lfs:
        item["lfs"] = {"oid": entry.oid, "size": entry.size, "pointerSize": len(entry.pointer)}
        xet_hash = (repo.state.object(repo.key, entry.oid) or {}).get("xet_hash")
        if xet_hash:
            item["xetHash"] = xet_hash
    return item


def _tree_id(entries: Mapping[str, Entry], folder: str) -> str:
    """A name for what a folder holds; not git's."""
    held = sorted((path, entry.oid) for path, entry in entries.items() if path.startswith(f"{folder}/"))
    return hashlib.sha1(json.dumps(held).encode()).hexdigest()


def _last_commit(commits: list[Commit], path: str) -> dict[str, str]:
    """The newest commit that changed a file or something in a folder."""

    def held(commit: Commit) -> dict[str, str]:
        return {p: e.oid for p, e in commit.entries.items() if p == path or p.startswith(f"{path}/")}

    last = commits[0]
    for older in commits[1:]:
        if held(older) != held(last):
            break
        last = older
    return {"id": last.sha, "title": last.title, "date": last.date}


@routes.add("GET", "api/{kind}/{user}/{name}/commits/{revision}")
def commits(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    formatted = "formatted" in exchange.params.get("expand[]", [])
    found = []
    for commit in repo.state.history(repo.key, repo.commit(revision)):
        item: dict[str, Any] = {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": ""}],
            "date": commit.date,
        }
        if formatted:
            item["formatted"] = {"title": commit.title, "message": commit.message}
        found.append(item)
    exchange.page(found, repo.state.options.page_size)


@routes.add("GET", "api/{kind}/{user}/{name}/refs")
def refs(exchange: Exchange, kind: str, user: str, name: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name))
    groups: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    if exchange.flag("include_prs"):
        groups["pullRequests"] = []
    for ref, sha in sorted(repo.state.all_refs(repo.key).items()):
        for group, prefix in (("branches", "refs/heads/"), ("tags", "refs/tags/"), ("pullRequests", "refs/pr/")):
            if ref.startswith(prefix) and group in groups:
                short = ref if group == "pullRequests" else ref.removeprefix(prefix)
                groups[group].append({"name": short, "ref": ref, "targetCommit": sha})
    exchange.answer(groups)


@routes.add("GET", "datasets/{user}/{name}/resolve/{revision}/{path...}")
def resolve_dataset(exchange: Exchange, user: str, name: str, revision: str, path: str) -> None:
    _resolve(exchange, "datasets", repo_key("datasets", user, name), revision, path)


@routes.add("GET", "spaces/{user}/{name}/resolve/{revision}/{path...}")
def resolve_space(exchange: Exchange, user: str, name: str, revision: str, path: str) -> None:
    _resolve(exchange, "spaces", repo_key("spaces", user, name), revision, path)


@routes.add("GET", "{user}/{name}/resolve/{revision}/{path...}")
def resolve_model(exchange: Exchange, user: str, name: str, revision: str, path: str) -> None:
    _resolve(exchange, "models", repo_key("models", user, name), revision, path)


def _resolve(exchange: Exchange, kind: str, key: str, revision: str, path: str) -> None:
    """A file's content, or for LFS the way to it: to the store, and for clients that speak Xet to the CAS."""
    repo = open_repo(exchange, key, content=True)
    sha = repo.commit(revision)
    entry = repo.state.entries(repo.key, sha).get(path)
    if entry is None:
        raise Failure(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
    head = {"X-Repo-Commit": sha, "ETag": f'"{entry.oid}"'}
    if not entry.lfs:
        exchange.send_content(repo.state.blob(entry.oid), head)
        return
    head |= {"X-Linked-ETag": f'"{entry.oid}"', "X-Linked-Size": str(entry.size), "Accept-Ranges": "bytes"}
    xet_hash = (repo.state.object(repo.key, entry.oid) or {}).get("xet_hash")
    if xet_hash and repo.state.xet:
        head["X-Xet-Hash"] = xet_hash
        auth = f"{exchange.site.hub}/api/{kind}/{repo.id}/xet-read-token/{sha}"
        rebuild = f"{exchange.site.cas().endpoint}/v1/reconstructions/{xet_hash}"
        head["Link"] = f'<{auth}>; rel="xet-auth", <{rebuild}>; rel="xet-reconstruction-info"'
    exchange.send(302, b"", {**head, "Location": store.address(exchange.site, f"/lfs/{entry.oid}")})


def object_id(name: str) -> str:
    """24 hexadecimal digits, as the Hub's ids are."""
    return hashlib.sha1(name.encode()).hexdigest()[:24]
