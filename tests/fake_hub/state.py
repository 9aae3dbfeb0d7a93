"""The repos of the loopback Hub, on disk: what a repo is, apart from how it is served.

A repo is named as in the Hub's URLs: ``user/name`` is a model, ``datasets/user/name`` and ``spaces/user/name`` are what
they say. Layout of the folder::

    options.json, accounts.json       see Options, and hub.accounts
    secret                            what addresses of the store are signed with
    blobs/<oid>                       contents; the oid is git's blob sha1, or the sha256 of an LFS file
    repos/<repo>/repo.json            {private, gated, readers, author, created}
    repos/<repo>/refs.json            {"refs/heads/main": commit, "refs/tags/v1": commit, "refs/pr/1": commit}
    repos/<repo>/commits/<sha>.json   {parent, title, message, author, date, entries: {path: {oid, size, lfs}}}
    repos/<repo>/objects/<sha256>     an LFS object that arrived for this repo; holds its size and Xet hash
    repos/<repo>/discussions.json     see hub.community

Servers and tests are different processes, and all of them use this class: every method may be called at any time.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fake_hub.accounts import Accounts, Token
from fake_hub.attributes import DEFAULT_GITATTRIBUTES, is_lfs
from fake_hub.disk import Disk


@dataclass(frozen=True)
class Entry:
    """One file of a commit: git blob sha1, or for LFS the sha256; size in bytes."""

    oid: str
    size: int
    lfs: bool

    @property
    def pointer(self) -> bytes:
        """What git holds of an LFS file: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n".encode()

    @property
    def blob_id(self) -> str:
        return git_sha1(self.pointer) if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: all files by path, and what a log shows of it."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Settings:
    """Who may read a repo: everyone, or its namespace and ``readers``. A gated repo can be listed by everyone."""

    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()
    author: str | None = None
    created: str = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Options:
    """How this Hub behaves.

    Attributes:
        xet: offer Xet: a CAS beside the store, and tokens for it.
        page_size: entries on one page of a listing.
        multipart_above: LFS files of more bytes are uploaded in parts; ``None``: no file is.
        part_size: bytes of a part.
    """

    xet: bool = False
    page_size: int = 1000
    multipart_above: int | None = None
    part_size: int = 5 << 20


class HubState:
    """Accounts, repos, commits, contents."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disk = Disk(root)
        self.accounts = Accounts(self.disk)
        (root / "blobs").mkdir(exist_ok=True)
        with self.disk.lock():
            if not (root / "secret").exists():
                (root / "secret").write_text(secrets.token_hex(32))

    # Options and accounts

    @property
    def options(self) -> Options:
        return Options(**self.disk.read(self.root / "options.json", {}))

    def set_options(self, **changes: Any) -> None:
        with self.disk.lock():
            self.disk.write(self.root / "options.json", asdict(replace(self.options, **changes)))

    @property
    def xet(self) -> bool:
        return self.options.xet

    @xet.setter
    def xet(self, on: bool) -> None:
        self.set_options(xet=on)

    def add_user(
        self, name: str, token: str, *, role: str = "write", scopes: Mapping[str, list[str]] | None = None
    ) -> None:
        """A user, or one more token of theirs. Roles and scopes as in ``hub.accounts.Token``."""
        self.accounts.add_token(token, Token(name, role, scopes or {}))

    def add_org(self, name: str, members: Mapping[str, str]) -> None:
        self.accounts.add_org(name, members)

    # Repos

    def create_repo(
        self,
        repo_id: str,
        *,
        private: bool = False,
        gated: bool = False,
        readers: Iterable[str] = (),
        author: str | None = None,
        initial_commit: bool = False,
    ) -> None:
        """A repo without commits, or with the Hub's first one, which holds .gitattributes. Raises FileExistsError."""
        folder = self.folder(repo_id)
        with self.disk.lock():
            folder.mkdir(parents=True)
            self.set_settings(repo_id, Settings(private, gated, tuple(readers), author, now()))
            self.disk.write(folder / "refs.json", {})
            if initial_commit:
                files = {".gitattributes": DEFAULT_GITATTRIBUTES.encode()}
                self.commit(repo_id, files, title="initial commit", author=author)

    def delete_repo(self, repo_id: str) -> None:
        with self.disk.lock():
            shutil.rmtree(self.folder(repo_id))

    def settings(self, repo_id: str) -> Settings | None:
        raw = self.disk.read(self.folder(repo_id) / "repo.json")
        return None if raw is None else Settings(**{**raw, "readers": tuple(raw["readers"])})

    def set_settings(self, repo_id: str, settings: Settings) -> None:
        self.disk.write(self.folder(repo_id) / "repo.json", asdict(settings))

    def folder(self, repo_id: str) -> Path:
        parts = repo_id.split("/")
        kind = parts.pop(0) if len(parts) == 3 else "models"
        return self.root / "repos" / kind / "/".join(parts)

    # Commits

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        ref: str = "main",
        delete: Iterable[str] = (),
        title: str = "a commit",
        author: str | None = None,
    ) -> str:
        """Add files to a branch's tip (or to nothing) and move the branch. Returns the commit's sha."""
        with self.disk.lock():
            parent = self.refs(repo_id).get(ref)
            entries = dict(self.entries(repo_id, parent)) if parent is not None else {}
            for path in delete:
                del entries[path]
            for path, content in files.items():
                entries[path] = self._store(path, content)
                if entries[path].lfs:
                    self.add_object(repo_id, entries[path].oid, entries[path].size)
            sha = self.add_commit(repo_id, parent, entries, title=title, author=author or repo_id.split("/")[-2])
            self.set_ref(repo_id, ref, sha)
            return sha

    def add_commit(
        self,
        repo_id: str,
        parent: str | None,
        entries: Mapping[str, Entry],
        *,
        title: str,
        author: str,
        message: str = "",
    ) -> str:
        """Write a commit; no ref is moved."""
        body = {
            "parent": parent,
            "title": title,
            "message": message,
            "author": author,
            "date": now(),
            "entries": {path: asdict(entries[path]) for path in sorted(entries)},
        }
        sha = hashlib.sha1(json.dumps(body).encode()).hexdigest()
        self.disk.write(self.folder(repo_id) / "commits" / f"{sha}.json", body)
        return sha

    def read_commit(self, repo_id: str, sha: str) -> Commit:
        raw = self.disk.read(self.folder(repo_id) / "commits" / f"{sha}.json")
        return Commit(sha, **{**raw, "entries": {path: Entry(**entry) for path, entry in raw["entries"].items()}})

    def history(self, repo_id: str, sha: str) -> list[Commit]:
        """A commit and those before it, the newest first."""
        commits = []
        following: str | None = sha
        while following is not None:
            commits.append(self.read_commit(repo_id, following))
            following = commits[-1].parent
        return commits

    def entries(self, repo_id: str, sha: str) -> Mapping[str, Entry]:
        return self.read_commit(repo_id, sha).entries

    # Refs

    def all_refs(self, repo_id: str) -> dict[str, str]:
        """Commits by full name: refs/heads/main, refs/tags/v1, refs/pr/1."""
        refs: dict[str, str] = self.disk.read(self.folder(repo_id) / "refs.json", {})
        return refs

    def refs(self, repo_id: str) -> dict[str, str]:
        """Commits by the name that a revision has in a request; a tag hides a branch, as in git."""
        refs = self.all_refs(repo_id)
        short = {name.removeprefix("refs/heads/"): sha for name, sha in refs.items()}
        return {name.removeprefix("refs/tags/"): sha for name, sha in short.items()}

    def set_ref(self, repo_id: str, ref: str, sha: str | None) -> None:
        """Move or make a ref, or remove it with ``None``. A name that is not full is a branch's."""
        full = ref if ref.startswith("refs/") else f"refs/heads/{ref}"
        with self.disk.lock():
            refs = self.all_refs(repo_id)
            if sha is None:
                del refs[full]
            else:
                refs[full] = sha
            self.disk.write(self.folder(repo_id) / "refs.json", refs)

    def resolve(self, repo_id: str, revision: str) -> str | None:
        """The commit a branch, tag, pull request or sha means; ``None`` where there is none."""
        refs = self.refs(repo_id)
        sha = refs.get(revision) or self.all_refs(repo_id).get(revision) or revision
        known = "/" not in sha and (self.folder(repo_id) / "commits" / f"{sha}.json").is_file()
        return sha if known else None

    # Contents

    def blob(self, oid: str) -> Path:
        return self.root / "blobs" / oid

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes, as far as they are in the store and not in Xet. Raises KeyError for an unknown path."""
        sha = self.resolve(repo_id, revision)
        if sha is None:
            raise KeyError(revision)
        return self.blob(self.entries(repo_id, sha)[path].oid).read_bytes()

    def add_object(self, repo_id: str, oid: str, size: int, xet_hash: str | None = None) -> None:
        """Note that an LFS object belongs to a repo: repos do not share them, as on the Hub."""
        self.disk.write(self.folder(repo_id) / "objects" / oid, {"size": size, "xet_hash": xet_hash})

    def object(self, repo_id: str, oid: str) -> dict[str, Any] | None:
        """``{size, xet_hash}`` of an LFS object that arrived for this repo."""
        found: dict[str, Any] | None = self.disk.read(self.folder(repo_id) / "objects" / oid)
        return found

    def add_blob(self, content: bytes) -> Entry:
        """Keep a regular file's content."""
        entry = Entry(git_sha1(content), len(content), False)
        target = self.blob(entry.oid)
        if not target.exists():
            partial = self.disk.scratch(target)
            partial.write_bytes(content)
            partial.replace(target)
        return entry

    def _store(self, path: str, content: bytes | Path) -> Entry:
        content_bytes = content.read_bytes() if isinstance(content, Path) else content
        if not is_lfs(path):
            return self.add_blob(content_bytes)
        entry = Entry(hashlib.sha256(content_bytes).hexdigest(), len(content_bytes), True)
        target = self.blob(entry.oid)
        if not target.exists():
            partial = self.disk.scratch(target)
            partial.write_bytes(content_bytes)
            partial.replace(target)
        return entry


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
