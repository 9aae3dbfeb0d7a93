"""What a verification proved of a card's code, read from ``aoconvert.verify.json``, which anybody may have written.

A card says that its code was run only where the report passed, belongs to this very manifest, and names this very code.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from aoconvert.checkpoint.checkpoint import Checkpoint
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.load_code import code_device, code_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME, Manifest
from aoconvert.checkpoint.report import Check, Report, Strategy, read_report
from aoconvert.checkpoint.usage import usage_sha256


@dataclass(frozen=True)
class Proof:
    """What is proven.

    Attributes:
        ok: the code of ``strategy`` opened this checkpoint, and no check failed.
        reason: why not; ``""`` where it is.
        strategy: the way of loading to show.
        date, device, versions, checks: of the report, if it belongs to this manifest.
        example: the example of the card was run too, on the same device, at the smallest sizes.
        forward: every quantized model took a forward pass there.
        not_run: what of the code was not run where it was tried: a device; ``None`` where all of it was.
    """

    ok: bool
    reason: str
    strategy: Strategy
    date: str | None = None
    device: str | None = None
    versions: tuple[tuple[str, str], ...] = ()
    checks: tuple[Check, ...] = ()
    example: bool = False
    forward: bool = False
    not_run: str | None = None


def prove(folder: Path, target: Checkpoint, manifest: Manifest) -> Proof:
    """What the report in the folder says of its checkpoint."""
    ways = {entry.load.strategy for entry in manifest.components}
    usual: Strategy = "assign" if "assign" in ways else "from-pretrained"
    try:
        report = read_report(folder)
    except FileNotFoundError:
        return Proof(False, "No verification has been run.", usual)
    except (OSError, ValueError):  # of pydantic's, too
        return Proof(False, "The verification report cannot be read.", usual)
    if report.manifest_sha256 != file_sha256(folder / MANIFEST_NAME):
        return Proof(False, "The last verification checked another conversion.", usual)
    strategy = report.strategy or usual
    reason = _doubt(report, target, strategy)
    return Proof(
        ok=not reason,
        reason=reason,
        strategy=strategy,
        date=datetime.fromisoformat(report.date).date().isoformat(),
        device=report.device,
        versions=tuple(report.versions.items()),
        checks=report.checks,
        example=report.example and report.device in report.ran_on("example", usage_sha256(target)),
        forward=report.device in report.ran_on("forward", report.code_sha256),
        not_run=_not_run(target, report.device),
    )


def _not_run(target: Checkpoint, device: str | None) -> str | None:
    """The device that the code names and that it did not run on."""
    named = code_device(target)
    return named if named is not None and (device or "").partition(":")[0] != named else None


def _doubt(report: Report, target: Checkpoint, strategy: Strategy) -> str:
    if report.failed or not report.ok:
        failed = ", ".join(check.name for check in report.failed)
        return f"The verification failed: {failed or 'its report says so'}."
    reload = report.check("reload")
    if reload is None or reload.status != "passed" or report.strategy is None:
        why = f" ({reload.detail})" if reload is not None else ""
        return f"The verification passed without opening the model{why}."
    if report.code_sha256 != code_sha256(target, strategy):
        return "The last verification ran different code."
    if report.ran and report.device not in report.ran_on("load", report.code_sha256):
        return "The last verification does not say where this code ran."
    return ""
