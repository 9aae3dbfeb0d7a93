"""The repos of the loopback Hub, on disk: what a repo is, apart from how it is served.

Layout of the folder::

    blobs/<oid>                       contents; the oid is git's blob sha1, or the sha256 of an LFS file
    repos/<user>/<name>/repo.json     {private, gated, readers}
    repos/<user>/<name>/refs.json     {branch or tag: commit sha}
    repos/<user>/<name>/<sha>.json    a commit: {path: {oid, size, lfs}}
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# What the Hub's default .gitattributes sends to LFS, as far as the tests need it.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".gguf")


@dataclass(frozen=True)
class Entry:
    """One file of a commit: git blob sha1, or for LFS the sha256; size in bytes."""

    oid: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Settings:
    """Who may read a repo: everyone, or the users in ``readers``. A gated repo can be listed by everyone."""

    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()


class HubState:
    """Repos, commits and users. Every method may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokens: dict[str, str] = {}
        self._lock = threading.RLock()
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def add_user(self, name: str, token: str) -> None:
        self.tokens[token] = name

    def create_repo(
        self, repo_id: str, *, private: bool = False, gated: bool = False, readers: Iterable[str] = ()
    ) -> None:
        folder = self._folder(repo_id)
        folder.mkdir(parents=True)
        settings = Settings(private, gated, tuple(readers))
        (folder / "repo.json").write_text(json.dumps(asdict(settings)))
        (folder / "refs.json").write_text("{}")

    def settings(self, repo_id: str) -> Settings | None:
        file = self._folder(repo_id) / "repo.json"
        if not file.is_file():
            return None
        raw = json.loads(file.read_text())
        return Settings(raw["private"], raw["gated"], tuple(raw["readers"]))

    def commit(self, repo_id: str, files: Mapping[str, bytes | Path], *, ref: str = "main") -> str:
        """Add files to a branch's tip (or to nothing) and move the branch. Returns the commit's sha."""
        with self._lock:
            refs = self.refs(repo_id)
            entries = dict(self.entries(repo_id, refs[ref])) if ref in refs else {}
            for path, content in files.items():
                entries[path] = self._store(path, content)
            listing = json.dumps({path: asdict(entries[path]) for path in sorted(entries)})
            sha = hashlib.sha1(f"{refs.get(ref)}\n{listing}".encode()).hexdigest()
            (self._folder(repo_id) / f"{sha}.json").write_text(listing)
            self.set_ref(repo_id, ref, sha)
            return sha

    def set_ref(self, repo_id: str, ref: str, sha: str) -> None:
        with self._lock:
            refs = {**self.refs(repo_id), ref: sha}
            (self._folder(repo_id) / "refs.json").write_text(json.dumps(refs))

    def refs(self, repo_id: str) -> dict[str, str]:
        refs: dict[str, str] = json.loads((self._folder(repo_id) / "refs.json").read_text())
        return refs

    def resolve(self, repo_id: str, revision: str) -> str | None:
        """The commit a branch, tag or sha means; ``None`` where there is none."""
        sha = self.refs(repo_id).get(revision, revision)
        return sha if (self._folder(repo_id) / f"{sha}.json").is_file() else None

    def entries(self, repo_id: str, sha: str) -> dict[str, Entry]:
        raw = json.loads((self._folder(repo_id) / f"{sha}.json").read_text())
        return {path: Entry(**entry) for path, entry in raw.items()}

    def blob(self, oid: str) -> Path:
        return self.root / "blobs" / oid

    def _folder(self, repo_id: str) -> Path:
        return self.root / "repos" / repo_id

    def _store(self, path: str, content: bytes | Path) -> Entry:
        lfs = path.endswith(LFS_SUFFIXES)
        content_bytes = content.read_bytes() if isinstance(content, Path) else content
        size = len(content_bytes)
        if lfs:
            oid = hashlib.sha256(content_bytes).hexdigest()
        else:
            oid = hashlib.sha1(b"blob %d\0" % size + content_bytes).hexdigest()
        target = self.blob(oid)
        if not target.exists():
            target.write_bytes(content_bytes)
        return Entry(oid, size, lfs)
