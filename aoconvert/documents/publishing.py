"""Documents of ``verify``, ``card`` and ``push``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from aoconvert.documents.base import Document


class Check(Document):
    """One check of a verification; ``seconds`` is how long it took."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    seconds: float


class Ran(Document):
    """A piece of code that ran, and on which device."""

    what: Literal["load", "forward", "example"]
    device: str
    code_sha256: str | None
    inputs: dict[str, str] | None = Field(
        description="of a forward pass, component to who made its inputs: pipeline, processor, dummy_inputs or search"
    )


class ForwardPass(Document):
    """A forward pass of one quantized model."""

    component: str
    class_name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    output_sqnr_db: float | None = Field(
        description="of the output, to the original's on the same input; null where they are equal or not compared"
    )
    inputs: str | None = Field(description="who made its inputs; null where none passed")


class VerifyDocument(Document):
    """``verify --json``, and ``aoconvert.verify.json``."""

    schema_version: Literal[1]
    ok: bool
    path: str
    checks: list[Check]
    strategy: str | None
    safe_globals: list[str]
    imports: list[str]
    torchao: str | None
    torch: str | None
    python: str | None
    versions: dict[str, str]
    manifest_sha256: str | None
    date: str
    device: str | None
    code_sha256: str | None
    example: bool
    ran: list[Ran]
    forward: list[ForwardPass]
    published: dict[str, Any] | None = Field(description="the commit on the Hub that was opened")


class CardDocument(Document):
    """``card --json``."""

    path: str
    card: str
    picture: str | None = Field(description="the SVG beside it")
    written: list[str]
    warnings: list[str]


class PushedFile(Document):
    """A file that the repo holds; ``uploaded`` by this run."""

    path: str
    size: int
    sha256: str
    uploaded: bool


class PushDocument(Document):
    """``push --json``. The last four keys come only after ``--dry-run``, ``verification`` with ``--verify-hub``."""

    repo_id: str
    url: str
    commit: str | None
    pr_url: str | None
    files: list[PushedFile]
    bytes_uploaded: int
    nothing_to_do: bool
    deleted: list[str]
    warnings: list[str]
    dry_run: bool
    verification: VerifyDocument | None = None
    to_upload: list[str] | None = None
    bytes_to_upload: int | None = None
    to_delete: list[str] | None = None
    card: str | None = None
