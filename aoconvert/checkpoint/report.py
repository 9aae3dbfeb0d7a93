"""A verification as ``aoconvert.verify.json`` holds it: one model, written by verify, read by card, push and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from aoconvert.checkpoint.files import belongs
from aoconvert.checkpoint.json_model import Date, JsonModel, read_json_model
from aoconvert.checkpoint.manifest import REPORT_NAME
from aoconvert.errors import VerificationError
from aoconvert.json_text import CONFIG_BYTES

CheckName = Literal[
    "manifest", "files", "pickle", "versions", "load", "reload", "source", "library", "numbers", "forward"
]
Status = Literal["passed", "failed", "skipped"]
Strategy = Literal["from-pretrained", "assign"]

SCHEMA_VERSION: Literal[1] = 1


def some(lines: list[str], most: int = 4) -> str:
    """Join the first few of many findings to one line."""
    shown = "; ".join(lines[:most])
    return shown if len(lines) <= most else f"{shown}; and {len(lines) - most} more"


class Check(JsonModel):
    """One check of a verification; ``seconds`` is how long it took."""

    name: str
    status: Status
    detail: str
    seconds: Annotated[float, PlainSerializer(lambda seconds: round(seconds, 3))]


class Ran(JsonModel):
    """A piece of code that ran, and on which device."""

    what: Literal["load", "forward", "example"]
    device: str
    code_sha256: str | None
    inputs: dict[str, str] | None = Field(
        description="for the forward pass of each component, where its inputs came from: pipeline, processor, "
        "dummy_inputs or search"
    )


class ForwardPass(JsonModel):
    """A forward pass of one quantized model."""

    component: str
    class_name: str
    status: Status
    detail: str
    output_sqnr_db: float | None = Field(
        description="SQNR of the output to the original's on the same input; null where they are equal or were not "
        "compared"
    )
    inputs: str | None = Field(description="where its inputs came from; null where no forward pass passed")


class Report(JsonModel):
    """A verification.

    Attributes:
        ok: no check failed.
        path: as the user named it.
        checks: in the order they ran.
        strategy: the way of loading that worked, ``None`` where nothing was loaded.
        safe_globals: names that ``torch.load`` was allowed beyond torch's own.
        imports: modules that were imported before loading.
        versions: of python, torch, torchao and the model libraries; the first three have keys of their own, too.
        manifest_sha256: of ``aoconvert.json``; ``None`` where there is none.
        date: when it was made, UTC, ISO 8601.
        device: where the checkpoint was opened; ``None`` where it was not.
        code_sha256: of the load code that opened it, before place and device are filled in.
        example: the card's example ran, at the smallest sizes.
        ran: each piece of code that ran to its end, and where. ``forward`` is a pass of each quantized model alone, as
            the load code of that digest opened it.
        forward: the forward pass of each quantized model that was opened.
        published: the commit on the Hub that was opened; ``None`` where it was a folder.
        unwritten: why the report is not in the folder; ``None`` where it is, or has no place. Never written.
    """

    schema_version: Literal[1]
    ok: bool
    path: str
    checks: tuple[Check, ...]
    strategy: Annotated[Strategy, WithJsonSchema({"type": "string"})] | None
    safe_globals: tuple[str, ...]
    imports: tuple[str, ...]
    torchao: str | None
    torch: str | None
    python: str | None
    versions: dict[str, str]
    manifest_sha256: str | None
    date: Date
    device: str | None
    code_sha256: str | None
    example: bool
    ran: tuple[Ran, ...]
    forward: tuple[ForwardPass, ...]
    published: dict[str, Any] | None = Field(description="the commit on the Hub that was opened")
    unwritten: SkipJsonSchema[str | None] = Field(default=None, exclude=True)

    @property
    def exit_code(self) -> int:
        """What a command that verified exits with."""
        return 0 if self.ok else VerificationError.exit_code

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def check(self, name: CheckName) -> Check | None:
        """Find the check of that name, if it ran."""
        return next((check for check in self.checks if check.name == name), None)

    def ran_on(self, what: str, code_sha256: str | None) -> set[str]:
        """List the devices on which that very code ran."""
        return {item.device for item in self.ran if (item.what, item.code_sha256) == (what, code_sha256)}

    def to_dict(self) -> dict[str, Any]:
        """Give what ``verify --json`` prints and ``aoconvert.verify.json`` holds; the keys are a contract."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """Write the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"


def read_report(folder: Path) -> Report:
    """Read the report in a folder, which anybody may have written.

    Raises:
        OSError: there is none (``FileNotFoundError``), or it cannot be read.
        ValueError: it is not a report.
    """
    return read_json_model(Report, folder / REPORT_NAME, CONFIG_BYTES)


def proven_strategy(folder: Path) -> Strategy | None:
    """Find the way of loading that the report in a folder proves for the manifest beside it."""
    try:
        report = belongs(read_report(folder), folder)
    except (OSError, ValueError):
        return None
    return report.strategy if report is not None else None
