"""What a push is asked to do, what it sends, and what it did."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from aoconvert.files import open_regular

if TYPE_CHECKING:
    from aoconvert.checkpoint.report import Report

MARKER = "aoconvert manifest: sha256:"
_CHUNK = 1 << 22


class PushKwargs(TypedDict, total=False):
    """``PushOptions`` as keyword arguments."""

    token: str | None
    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None
    commit_description: str | None
    tag: str | None
    collection: str | None
    dry_run: bool
    allow_unverified: bool
    rehash: bool
    replace: bool
    verify_hub: bool
    card_template: Path | None
    license: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class PushOptions:
    """How to publish.

    Attributes:
        token: the Hub token; ``None`` uses what the Hub client finds. It is in no repr.
        private: visibility of a new repo; ``None`` takes the account's default, or what the repo has.
        revision: branch to commit to, made when it is not there, or ``refs/pr/N``; ``None`` for main.
        create_pr: open a pull request, or go on with the one that an earlier run opened for the same manifest.
        commit_message, commit_description: of the commit; ``None`` takes a default.
        tag: name to give to the commit.
        collection: slug of a collection to add the repo to.
        dry_run: look at everything, change nothing.
        allow_unverified: publish without a verification that passed; the card says so.
        rehash: compare the SHA-256 of each file with the manifest, whatever its time of change.
        replace: take the place of another model, of other weights, and of files that others wrote or changed there.
        verify_hub: at the end, open the commit from the Hub by the card's code, with an empty cache.
        card_template, license, metadata: for the model card.
    """

    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None
    tag: str | None = None
    collection: str | None = None
    dry_run: bool = False
    allow_unverified: bool = False
    rehash: bool = False
    replace: bool = False
    verify_hub: bool = False
    card_template: Path | None = None
    license: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def branch(self) -> str | None:
        """The branch that holds the checkpoint at the end; ``None`` for main, which a pull request is for."""
        return None if self.revision == "main" or (self.revision or "").startswith("refs/pr/") else self.revision


@dataclass(frozen=True)
class UploadFile:
    """A file that the repo is to hold: size in bytes, SHA-256 of its content, and where the content is."""

    path: str
    size: int
    sha256: str
    content: Path | bytes = field(repr=False)

    @classmethod
    def from_bytes(cls, path: str, content: bytes) -> UploadFile:
        """A file that was made in memory."""
        return cls(path, len(content), hashlib.sha256(content).hexdigest(), content)

    def blocks(self) -> Iterator[bytes]:
        """The content, piece by piece."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with os.fdopen(open_regular(self.content), "rb") as file:
            while block := file.read(_CHUNK):
                yield block

    def git_sha1(self) -> str:
        """The name git gives to this content (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects)."""
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: size in bytes; SHA-256 of its content where it is an LFS file, else git's SHA-1 of it."""

    size: int
    blob_id: str
    sha256: str | None

    def holds(self, file: UploadFile) -> bool:
        """Whether this is the same content."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.blob_id == file.git_sha1()


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: ``user/repo``.
        url: the page of the repo, or of its branch.
        commit: the commit that holds the checkpoint; ``None`` after a dry run.
        pr_url: the pull request's page, with ``create_pr``.
        files: what the repo holds now.
        sent: paths that were not there before.
        deleted: paths that the same commit removed.
        warnings: one line each.
        nothing_to_do: everything was there already, and no commit was made.
        dry_run: nothing was changed; ``sent`` and ``deleted`` are what would be.
        card: text of the model card that was, or would be, sent.
        verification: of the commit on the Hub, with ``verify_hub``.
    """

    repo_id: str
    url: str
    commit: str | None
    pr_url: str | None
    files: tuple[UploadFile, ...]
    sent: frozenset[str]
    deleted: tuple[str, ...]
    warnings: tuple[str, ...]
    nothing_to_do: bool
    dry_run: bool
    card: str
    verification: Report | None = None

    @property
    def exit_code(self) -> int:
        """What the command exits with: the checkpoint is there, but it may not open from there."""
        return self.verification.exit_code if self.verification is not None else 0

    @property
    def bytes_sent(self) -> int:
        """Bytes of the files in ``sent``, those included that an earlier run had uploaded."""
        return sum(file.size for file in self.files if file.path in self.sent)

    def to_dict(self) -> dict[str, Any]:
        """What ``push --json`` prints (``cli.md``: keys are a contract)."""
        done = frozenset[str]() if self.dry_run else self.sent
        found: dict[str, Any] = {
            "repo_id": self.repo_id,
            "url": self.url,
            "commit": self.commit,
            "pr_url": self.pr_url,
            "files": [
                {"path": file.path, "size": file.size, "sha256": file.sha256, "uploaded": file.path in done}
                for file in self.files
            ],
            "bytes_uploaded": 0 if self.dry_run else self.bytes_sent,
            "nothing_to_do": self.nothing_to_do,
            "deleted": [] if self.dry_run else list(self.deleted),
            "warnings": list(self.warnings),
            "dry_run": self.dry_run,
        }
        if self.verification is not None:
            found["verification"] = self.verification.to_dict()
        if not self.dry_run:
            return found
        to_send = [file.path for file in self.files if file.path in self.sent]
        would = {"to_upload": to_send, "bytes_to_upload": self.bytes_sent, "to_delete": list(self.deleted)}
        return {**found, **would, "card": self.card}
