"""What verification found: one entry a check, in the order they ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aoconvert.checkpoint.manifest import CARD_NAME as CARD_NAME
from aoconvert.checkpoint.manifest import REPORT_NAME as REPORT_NAME
from aoconvert.checkpoint.published import Published
from aoconvert.errors import VerificationError
from aoconvert.files import read_limited
from aoconvert.json_text import CONFIG_BYTES, parse_json

CheckName = Literal[
    "manifest", "files", "pickle", "versions", "load", "reload", "source", "library", "numbers", "forward"
]
Status = Literal["passed", "failed", "skipped"]

SCHEMA_VERSION = 1


def some(lines: list[str], most: int = 4) -> str:
    """The first few of many findings, in one line."""
    shown = "; ".join(lines[:most])
    return shown if len(lines) <= most else f"{shown}; and {len(lines) - most} more"


@dataclass(frozen=True)
class Check:
    """One check: what it found, in one line, and how long it took."""

    name: CheckName
    status: Status
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Ran:
    """Code that ran to its end: what it did, on which device, and its SHA-256 before place and sizes are filled in.

    ``inputs``: of a forward pass, component → who made its inputs: ``pipeline`` (what it hands to the component in its
    own call), ``processor`` (or tokenizer, beside the model), ``dummy_inputs`` of its class, or a ``search``.
    """

    what: Literal["load", "forward", "example"]
    device: str
    code_sha256: str | None
    inputs: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of one quantized model; ``output_sqnr_db``: of its output, to the original's on the same input.

    ``None`` where they were not compared, or are equal: ``detail`` says so. ``inputs``: who made them, as in
    :class:`Ran`.
    """

    component: str
    class_name: str
    status: Status
    detail: str
    output_sqnr_db: float | None
    inputs: str | None = None


@dataclass(frozen=True)
class Report:
    """A verification.

    Attributes:
        path: as the user named it.
        checks: in the order they ran.
        strategy: the way of loading that worked, ``None`` where nothing was loaded.
        safe_globals: names that ``torch.load`` was allowed beyond torch's own.
        imports: modules that were imported before loading.
        versions: of python, torch, torchao and the model libraries.
        manifest_sha256: of ``aoconvert.json``; ``None`` where there is none.
        date: when it was made, UTC, ISO 8601.
        device: where the checkpoint was opened; ``None`` where it was not.
        code_sha256: of the load code that opened it, see ``code.code_sha256``.
        example: the card's example ran, at the smallest sizes.
        ran: each piece of code that ran, and where. ``forward`` is a pass of each quantized model alone, as the load
            code of that digest opened it.
        forward: the forward pass of each quantized model that was opened.
        published: the commit on the Hub that was opened; ``None`` where it was a folder.
        unwritten: why the report is not in the folder; ``None`` where it is, or has no place.
    """

    path: str
    checks: tuple[Check, ...]
    strategy: str | None
    safe_globals: tuple[str, ...]
    imports: tuple[str, ...]
    versions: Mapping[str, str]
    manifest_sha256: str | None
    date: str
    device: str | None = None
    code_sha256: str | None = None
    example: bool = False
    ran: tuple[Ran, ...] = ()
    forward: tuple[ForwardPass, ...] = ()
    published: Published | None = None
    unwritten: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not any(check.status == "failed" for check in self.checks)

    @property
    def exit_code(self) -> int:
        """What a command that verified exits with."""
        return 0 if self.ok else VerificationError.exit_code

    def check(self, name: CheckName) -> Check | None:
        """The check of that name, if it ran."""
        return next((check for check in self.checks if check.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """What ``verify --json`` prints and ``aoconvert.verify.json`` holds (``cli.md``: keys are a contract)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "path": self.path,
            "checks": [
                {"name": c.name, "status": c.status, "detail": c.detail, "seconds": round(c.seconds, 3)}
                for c in self.checks
            ],
            "strategy": self.strategy,
            "safe_globals": list(self.safe_globals),
            "imports": list(self.imports),
            "torchao": self.versions.get("torchao"),
            "torch": self.versions.get("torch"),
            "python": self.versions.get("python"),
            "versions": dict(self.versions),
            "manifest_sha256": self.manifest_sha256,
            "date": self.date,
            "device": self.device,
            "code_sha256": self.code_sha256,
            "example": self.example,
            "ran": [asdict(one) for one in self.ran],
            "forward": [asdict(one) for one in self.forward],
            "published": self.published.to_dict() if self.published is not None else None,
        }

    def dump(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"


def read_report(folder: Path) -> dict[str, Any]:
    """What the report in a folder says; nothing of it is believed.

    Raises:
        OSError: there is none (``FileNotFoundError``), or it cannot be read.
        ValueError: it is not a JSON object.
    """
    values = parse_json(read_limited(folder / REPORT_NAME, CONFIG_BYTES), constants=False)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values
