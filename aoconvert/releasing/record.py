"""What a release did: ``release.json``, which a later run reads to see what is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aoconvert.checkpoint.evaluation import Evaluation
from aoconvert.checkpoint.manifest import RELEASE_NAME, Manifest
from aoconvert.checkpoint.release import ReleasedVariant, VariantNeeds
from aoconvert.errors import AoconvertError, HubError, VerificationError
from aoconvert.files import read_limited, write_whole, writing
from aoconvert.formats.registry import FORMATS, written_as
from aoconvert.json_text import INDEX_BYTES, parse_json
from aoconvert.planning import Plan
from aoconvert.releasing.guess import guess_seconds

RECORD_NAME = RELEASE_NAME

Status = Literal["planned", "pushed", "unchanged", "made", "gate_failed", "failed", "skipped"]


class _Model(BaseModel):
    """Keys are only added, so readers let unknown ones pass."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Failure(_Model):
    """Why a variant failed, as any command says it."""

    type: str
    message: str
    hint: str | None = None
    exit_code: int
    retryable: bool = Field(default=False, description="the same command can succeed later without any change")
    problems: tuple[str, ...] = Field(default=(), description="everything that is wrong")


class VariantRecord(ReleasedVariant):
    """One variant: what was made, how good it is, and where it is."""

    status: Status = Field(
        description="planned: a dry run; unchanged: the Hub has exactly this; made: not pushed, as was asked; "
        "skipped: not asked for, or stopped before it by --fail-fast"
    )
    folder: str | None = Field(default=None, description="below the output root")
    disk_bytes: int | None = Field(default=None, description="of a dry run: what its folder will take")
    seconds_guess: float | None = Field(
        default=None,
        description="of a dry run: how long quantizing may take, guessed from its bytes by what two CPU cores took; "
        "downloads, verify and eval come on top of it; absent for GPUs",
    )
    error: Failure | None = None
    published: ReleasedVariant | None = Field(
        default=None, description="what its repo holds, also where this run made something else, or nothing"
    )


class ModelRecord(_Model):
    """A source of the release."""

    name: str
    source: str
    revision: str | None = Field(default=None, description="commit of the source")


class Record(_Model):
    """A release: its variants in the order of the file."""

    schema_version: Literal[1] = 1
    name: str
    models: tuple[ModelRecord, ...]
    ok: bool
    variants: tuple[VariantRecord, ...]

    @property
    def exit_code(self) -> int:
        """The contract's: 4 for a gate or a verification, 5 for the Hub, 1 for other failures; 3 would say: no work."""
        failed = [
            variant.error.exit_code
            for variant in self.variants
            if variant.error is not None and variant.status == "failed"
        ]
        if any(variant.status == "gate_failed" for variant in self.variants) or VerificationError.exit_code in failed:
            return VerificationError.exit_code
        if HubError.exit_code in failed:
            return HubError.exit_code
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """Give what ``release.json`` holds and the last line of ``release --json`` repeats."""
        return self.model_dump(mode="json", exclude_none=True)

    def write(self, folder: Path) -> None:
        """Write ``release.json``, whole or not at all.

        Raises:
            WriteError: disk full, no permission.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        with writing(folder / RECORD_NAME):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / RECORD_NAME, text.encode())


def read_record(folder: Path) -> Record | None:
    """Read what an earlier run left; ``None`` where there is none, or it cannot be used."""
    try:
        return Record.model_validate(parse_json(read_limited(folder / RECORD_NAME, INDEX_BYTES)))
    except (OSError, ValueError, ValidationError):
        return None


def failure_of(error: AoconvertError) -> Failure:
    """What a command would have said of it."""
    return Failure(
        type=type(error).__name__,
        message=error.message,
        hint=error.hint,
        exit_code=error.exit_code,
        retryable=error.retryable,
        problems=error.problems,
    )


def public_form(record: VariantRecord) -> ReleasedVariant:
    """A variant as it is published."""
    return ReleasedVariant(**{name: getattr(record, name) for name in ReleasedVariant.model_fields})


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """Size and error of a result, for its record."""
    totals = [component.totals for component in manifest.components]
    parameters = sum(total.parameters for total in totals)
    quantized = sum(total.quantized_parameters for total in totals)
    outside = sum(t.quantized_parameters / t.quantized_fraction for t in totals if t.quantized_fraction)
    errors = [total.worst_sqnr_db for total in totals if total.worst_sqnr_db is not None]
    return {
        "size_bytes": sum(file.size for part in manifest.components for file in part.files if written_as(file.path)),
        "bits_per_weight": sum(t.bits_per_weight * t.parameters for t in totals) / parameters if parameters else None,
        "quantized_fraction": quantized / outside if outside else 0.0,
        "worst_sqnr_db": min(errors, default=None),
        "needs": _describe_needs(manifest),
    }


def _describe_needs(manifest: Manifest) -> VariantNeeds:
    spans: dict[str, list[str]] = {}
    for component in manifest.components:
        for package, span in component.loads_with.items():
            spans.setdefault(package, []).extend(part.strip() for part in span.split(","))
    layouts = [component.layout for component in manifest.components]
    least = max((layout.min_capability for layout in layouts if layout.min_capability), default=None)
    return VariantNeeds(
        loads_with={package: ",".join(dict.fromkeys(parts)) for package, parts in spans.items()},
        devices=tuple(dict.fromkeys(layout.device for layout in layouts)),
        min_capability=".".join(map(str, least)) if least else None,
        memory_bytes=sum(entry.size for entry in manifest.files() if _is_weights(entry.path)),
    )


def _is_weights(path: str) -> bool:
    return path.endswith(tuple(suffix for entry in FORMATS.values() for suffix in entry.suffixes))


def describe_plan(plan: Plan) -> dict[str, Any]:
    """What can be said of a result before it is made."""
    totals = [component.totals for component in plan.components]
    parameters = sum(total.parameters for total in totals)
    return {
        "size_bytes": sum(file.size for component in plan.components for file in component.files),
        "disk_bytes": plan.needs.disk_bytes,
        "seconds_guess": guess_seconds(plan),
        "bits_per_weight": sum(t.bits_per_weight * t.parameters for t in totals) / parameters if parameters else None,
    }


def describe_evaluation(report: Evaluation) -> dict[str, dict[str, float]]:
    """Figures of each component that apply."""
    return {part.name or part.class_name: part.metrics.model_dump(exclude_none=True) for part in report.components}
