"""What changes the files of a repo: preupload, LFS, Xet tokens, commits.

Rules of access, and the messages, as far as they are public: without the right to write, ``create_pr=1`` must be passed
to preupload, to the commit and to the Xet token, and the LFS batch must name no ref
(https://github.com/huggingface/huggingface_hub/issues/1182, https://github.com/huggingface/hf-hub/pull/199). LFS
objects are not shared between repos (https://github.com/huggingface/huggingface_hub/issues/2876).
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from fake_hub import card, community, store
from fake_hub.access import KINDS, Repo, open_repo, open_to_propose, repo_key, writer
from fake_hub.attributes import DEFAULT_GITATTRIBUTES, REGULAR_LIMIT, is_lfs, matches
from fake_hub.state import Entry
from fake_hub.wire import Exchange, Failure, Routes

XET_LIFETIME = 3600  # seconds
PASS_CREATE_PR = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"

routes = Routes()


def open_for(exchange: Exchange, key: str, revision: str) -> Repo:
    """A repo to commit to: by a writer, or as a pull request. Raises Failure."""
    repo = open_to_propose(exchange, key)
    own = community.author_of(repo, revision) if revision.startswith("refs/pr/") else None
    if not (repo.writable or exchange.flag("create_pr") or (repo.caller is not None and own == repo.caller.user)):
        raise Failure(403, None, PASS_CREATE_PR)
    return repo


@routes.add("POST", "api/validate-yaml")
def validate_yaml(exchange: Exchange) -> None:
    body = exchange.json_body()
    errors, warnings = card.validate(str(body.get("content", "")), body.get("repoType", "model"))
    answer = {
        name: [{"message": text} for text in found] for name, found in (("errors", errors), ("warnings", warnings))
    }
    exchange.answer(answer, 400 if errors else 200)


@routes.add("POST", "api/{kind}/{user}/{name}/preupload/{revision}")
def preupload(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    """How each file is to be uploaded, and what is there under its name."""
    repo = open_for(exchange, repo_key(kind, user, name), revision)
    entries = repo.entries(revision)
    body = exchange.json_body()
    attributes = _text(repo, entries.get(".gitattributes"), DEFAULT_GITATTRIBUTES)
    ignored = str(body.get("gitIgnore") or _text(repo, entries.get(".gitignore"), "")).splitlines()
    files = []
    for file in body["files"]:
        path, size = file["path"], file["size"]
        # the Hub takes no binary files into git; git's own sign of one is a zero byte
        lfs = size > REGULAR_LIMIT or is_lfs(path, attributes) or b"\0" in base64.b64decode(file.get("sample", ""))
        found = {
            "path": path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": bool(ignored) and matches(path, ignored),
        }
        if path in entries:
            found["oid"] = entries[path].oid
        files.append(found)
    exchange.answer({"files": files})


def _text(repo: Repo, entry: Entry | None, default: str) -> str:
    return default if entry is None or entry.lfs else repo.state.blob(entry.oid).read_text(errors="replace")


# LFS: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md


@routes.add("POST", "{user}/{git}/info/lfs/objects/batch")
def model_batch(exchange: Exchange, user: str, git: str) -> None:
    _batch(exchange, "models", user, git)


@routes.add("POST", "{kind}/{user}/{git}/info/lfs/objects/batch")
def other_batch(exchange: Exchange, kind: str, user: str, git: str) -> None:
    _batch(exchange, kind, user, git)


def _batch(exchange: Exchange, kind: str, user: str, git: str) -> None:
    body = exchange.json_body()
    repo = open_to_propose(exchange, repo_key(kind, user, git.removesuffix(".git")))
    ref = (body.get("ref") or {}).get("name")
    if not repo.writable and ref is not None and community.author_of(repo, ref) != writer(exchange).user:
        raise Failure(403, None, "Authorization error.")
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise Failure(422, None, "only uploads by sha256 are known here")
    parts = "multipart" in body.get("transfers", [])
    objects = [_upload(exchange, repo, kind, item["oid"], item["size"], parts) for item in body["objects"]]
    exchange.answer(
        {"transfer": "multipart" if parts else "basic", "objects": objects},
        headers={"Content-Type": "application/vnd.git-lfs+json"},
    )


def _upload(exchange: Exchange, repo: Repo, kind: str, oid: str, size: int, parts: bool) -> dict[str, Any]:
    """What to do to upload one object: nothing, one PUT, or several."""
    site, options = exchange.site, repo.state.options
    found: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if len(oid) != 64 or not set(oid) <= set("0123456789abcdef"):
        return {**found, "error": {"code": 422, "message": "the oid is not a sha256"}}
    if repo.state.object(repo.key, oid) is not None:
        return found
    if parts and options.multipart_above is not None and size > options.multipart_above:
        upload = secrets.token_hex(8)
        numbers = range(1, -(-size // options.part_size) + 1)
        header = {f"{number:05}": store.address(site, f"/parts/{upload}/{number:05}", "PUT") for number in numbers}
        href = store.address(site, f"/api/complete_multipart/{kind}/{repo.id}/{upload}", "POST", site.hub)
        action = {"href": href, "header": {"chunk_size": str(options.part_size), **header}}
    else:
        action = {"href": store.address(site, f"/upload/{kind}/{repo.id}/{oid}", "PUT")}
    verify = {"href": f"{site.hub}/{KINDS[kind]}{repo.id}.git/info/lfs/objects/verify"}
    return {**found, "actions": {"upload": action, "verify": verify}}


@routes.add("POST", "api/complete_multipart/{kind}/{user}/{name}/{upload}")
def complete_multipart(exchange: Exchange, kind: str, user: str, name: str, upload: str) -> None:
    """The client sends no token here: the address is signed."""
    if not store.is_signed(exchange, "POST"):
        raise Failure(403, None, "The address is not signed, or no longer good")
    body = exchange.json_body()
    parts = sorted(body["parts"], key=lambda part: part["partNumber"])
    key = repo_key(kind, user, name)
    problem = store.join(exchange.site.state, key, body["oid"], upload, [part["etag"] for part in parts])
    if problem is not None:
        raise Failure(400, None, problem)
    exchange.answer({"success": True})


@routes.add("POST", "{user}/{git}/info/lfs/objects/verify")
def model_verify(exchange: Exchange, user: str, git: str) -> None:
    _verify(exchange, "models", user, git)


@routes.add("POST", "{kind}/{user}/{git}/info/lfs/objects/verify")
def other_verify(exchange: Exchange, kind: str, user: str, git: str) -> None:
    _verify(exchange, kind, user, git)


def _verify(exchange: Exchange, kind: str, user: str, git: str) -> None:
    repo = open_to_propose(exchange, repo_key(kind, user, git.removesuffix(".git")))
    body = exchange.json_body()
    found = repo.state.object(repo.key, body["oid"])
    if found is None:
        raise Failure(404, None, "the object did not arrive")
    if found["size"] != body["size"]:
        raise Failure(422, None, f"the object has {found['size']} bytes, not {body['size']}")
    exchange.answer({"success": True})


# Xet: https://huggingface.co/docs/xet/auth


@routes.add("GET", "api/{kind}/{user}/{name}/xet-read-token/{revision}")
def xet_read_token(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    repo = open_repo(exchange, repo_key(kind, user, name), content=True)
    repo.commit(revision)
    _xet_token(exchange, "read")


@routes.add("GET", "api/{kind}/{user}/{name}/xet-write-token/{revision}")
def xet_write_token(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    repo = open_for(exchange, repo_key(kind, user, name), revision)
    if not exchange.flag("create_pr"):  # the client says "None" there, not knowing the pull request's ref
        repo.entries(revision)
    _xet_token(exchange, "write")


def _xet_token(exchange: Exchange, scope: str) -> None:
    if not exchange.site.state.xet:
        raise Failure(404, None, "Xet is not enabled for this repo")
    expires = int(time.time()) + XET_LIFETIME
    token = f"xet-{scope}-{store.signature(exchange.site.state, 'XET', scope, expires)}"
    endpoint = exchange.site.cas().endpoint
    exchange.answer(
        {"accessToken": token, "exp": expires, "casUrl": endpoint},
        headers={"X-Xet-Cas-Url": endpoint, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)},
    )


# Commits


@routes.add("POST", "api/{kind}/{user}/{name}/commit/{revision}")
def commit(exchange: Exchange, kind: str, user: str, name: str, revision: str) -> None:
    """One commit, or with ``create_pr=1`` a pull request with one. Nothing of it is done if anything is wrong."""
    repo = open_for(exchange, repo_key(kind, user, name), revision)
    assert repo.caller is not None
    author = repo.caller.user
    header, operations = _operations(exchange.body())
    state, key = repo.state, repo.key
    proposed = exchange.flag("create_pr")
    with state.disk.lock():
        refs = state.all_refs(key)
        full = revision if revision in refs else f"refs/heads/{revision}"
        if full not in refs and (refs or revision != "main"):
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        parent = refs.get(full)
        expected = header.get("parentCommit")
        if expected is not None and expected != parent:
            raise Failure(412, None, "A commit has happened since. Please refresh and try again.")
        entries = dict(state.entries(key, parent)) if parent is not None else {}
        for operation in operations:
            _apply(exchange, repo, entries, *operation)
        title = header["summary"]
        sha = state.add_commit(key, parent, entries, title=title, author=author, message=header.get("description", ""))
        number = None
        if proposed:
            number = community.add_pull_request(repo, title, header.get("description", ""), author, full, parent, sha)
        else:
            state.set_ref(key, full, sha)
            community.note_commit(repo, full, sha, title, author)
    page = f"{exchange.site.hub}/{key}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
    if number is not None:
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    exchange.answer(answer)


def _operations(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header and the operations of an ndjson body."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        parsed = [(line["key"], dict(line["value"])) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(400, None, f"Invalid ndjson: {error!r}") from None
    if not parsed or parsed[0][0] != "header" or not parsed[0][1].get("summary"):
        raise Failure(400, None, "The first line must be a header with a summary")
    return parsed[0][1], parsed[1:]


def _apply(exchange: Exchange, repo: Repo, entries: dict[str, Entry], kind: str, value: dict[str, Any]) -> None:
    operations: dict[str, Callable[[Exchange, Repo, dict[str, Entry], dict[str, Any]], None]] = {
        "file": _add_file,
        "lfsFile": _add_lfs,
        "deletedFile": _delete_file,
        "deletedFolder": _delete_folder,
    }
    path = value.get("path")
    if kind not in operations or not isinstance(path, str):
        raise Failure(400, None, f"Unknown operation: {kind}")
    parts = path.rstrip("/").split("/")
    if any(part in ("", ".", "..", ".git") for part in parts):
        raise Failure(400, None, f"Invalid path: {path}")
    if not kind.startswith("deleted"):
        above = {"/".join(parts[:length]) for length in range(1, len(parts))}
        if above & set(entries) or any(other.startswith(f"{path}/") for other in entries):
            raise Failure(400, None, f"{path} is both a file and a folder")
    operations[kind](exchange, repo, entries, value)


def _add_file(exchange: Exchange, repo: Repo, entries: dict[str, Entry], value: dict[str, Any]) -> None:
    path = value["path"]
    try:
        encoded = value.get("encoding") == "base64"
        content = base64.b64decode(value["content"], validate=True) if encoded else value["content"].encode()
    except (binascii.Error, KeyError, AttributeError):
        raise Failure(400, None, f"Invalid content of {path}") from None
    if len(content) > REGULAR_LIMIT:
        raise Failure(400, None, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
    if b"\0" in content[:8000]:
        raise Failure(400, None, f"Your push was rejected because it contains binary files. Offending files: {path}")
    if path == "README.md":
        errors, _ = card.validate(content.decode(errors="replace"), repo.kind)
        if errors:
            raise Failure(400, None, "Invalid metadata in README.md: " + "; ".join(errors))
    entries[path] = repo.state.add_blob(content)


def _add_lfs(exchange: Exchange, repo: Repo, entries: dict[str, Entry], value: dict[str, Any]) -> None:
    """The object must have arrived, by LFS for this repo or by Xet."""
    path, oid = value["path"], value.get("oid", "")
    found = repo.state.object(repo.key, oid) if oid.isalnum() else None
    if found is None and oid.isalnum() and repo.state.xet:
        uploaded = exchange.site.cas().lookup(oid)
        if uploaded is not None:
            repo.state.add_object(repo.key, oid, uploaded[1], uploaded[0])
            found = repo.state.object(repo.key, oid)
    if found is None:
        message = (
            "Your push was rejected because an LFS pointer pointed to a file that does not exist. Offending file: "
        )
        raise Failure(400, None, message + path)
    if value.get("size", found["size"]) != found["size"]:
        raise Failure(400, None, f"{path} has {found['size']} bytes, not {value['size']}")
    entries[path] = Entry(oid, found["size"], True)


def _delete_file(exchange: Exchange, repo: Repo, entries: dict[str, Entry], value: dict[str, Any]) -> None:
    if value["path"] not in entries:
        # the client looks for this sentence
        raise Failure(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
    del entries[value["path"]]


def _delete_folder(exchange: Exchange, repo: Repo, entries: dict[str, Entry], value: dict[str, Any]) -> None:
    inside = value["path"].rstrip("/") + "/"
    found = [path for path in entries if path.startswith(inside)]
    if not found:
        raise Failure(404, "EntryNotFound", f"A folder with this name doesn't exist: {value['path']}")
    for path in found:
        del entries[path]
