"""Documents of ``verify``, ``bench``, ``eval``, ``card`` and ``push``."""

from __future__ import annotations

from pydantic import Field

from aoconvert.checkpoint.bench import Bench
from aoconvert.checkpoint.evaluation import Evaluation
from aoconvert.checkpoint.report import Report
from aoconvert.documents.base import Document


class VerifyDocument(Report):
    """``verify --json``, and ``aoconvert.verify.json``."""


class BenchDocument(Bench):
    """``bench --json``, and ``aoconvert.bench.json``."""


class EvalDocument(Evaluation):
    """``eval --json``, and ``aoconvert.eval.json``."""


class Drawn(Document):
    """A diagram, and the results in it."""

    title: str
    results: list[str]


class LeftOut(Document):
    """A result that is missing in a diagram, and why."""

    name: str
    reason: str


class PlotDocument(Document):
    """``bench --plot --json``."""

    plot: str = Field(description="the picture, SVG")
    diagrams: list[Drawn]
    left_out: list[LeftOut]


class CardDocument(Document):
    """``card --json``."""

    path: str
    card: str
    picture: str | None = Field(description="the picture beside the card, as SVG")
    siblings: str | None = Field(default=None, description="the picture of a release's variants, as SVG")
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
