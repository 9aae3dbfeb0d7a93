"""Quantize, verify, evaluate, judge: what turns planned variants into files that may be published, or may not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert import api
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.evaluation import Evaluation, evaluation_of
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME, Manifest
from aoconvert.checkpoint.report import Report, read_report
from aoconvert.errors import AoconvertError, Interrupted, VerificationError
from aoconvert.hub.contents import find_changed_files
from aoconvert.options.release import ReleaseOptions
from aoconvert.progress import Progress
from aoconvert.releasing.gates import judge_variant
from aoconvert.releasing.record import VariantRecord, describe_evaluation, describe_manifest, failure_of
from aoconvert.releasing.told import OnEvent, ProgressEvents
from aoconvert.releasing.variants import PlannedVariant


def start_record(each: PlannedVariant, status: Any = "failed") -> VariantRecord:
    """A record of a variant of which nothing else is known yet."""
    return VariantRecord(
        name=each.name, model=each.model.title, scheme=each.scheme, status=status, repo_id=each.repo_id
    )


@dataclass
class Steps:
    """Carries variants as far as they go; what goes wrong is in their records.

    Attributes:
        options: of the release.
        progress: is told what happens within a step.
        on_event: is told of each step.
    """

    options: ReleaseOptions
    progress: Progress
    on_event: OnEvent

    def make(self, variants: Sequence[PlannedVariant]) -> Iterator[VariantRecord]:
        """Make variants of one source; each record comes as soon as its variant is judged.

        Raises:
            Interrupted: what is done stays for the next run.
        """
        for each in variants:
            self._say("variant_started", each, scheme=each.scheme, repo_id=each.repo_id)
            try:
                manifest = self._quantize(each)
                yield self._judge(each, manifest)
            except Interrupted:
                raise
            except AoconvertError as error:
                failure = failure_of(error)
                self._say("failed", each, error=failure.model_dump())
                yield start_record(each).model_copy(update={"error": failure})

    def _say(self, event: str, each: PlannedVariant, **values: Any) -> None:
        self.on_event({"event": event, "variant": each.name, **values})

    def _watch(self, each: PlannedVariant) -> Progress:
        return ProgressEvents(self.progress, self.on_event, [each.name])

    def _hub(self) -> dict[str, Any]:
        options = self.options
        return {
            "token": options.token,
            "cache_dir": options.cache_dir,
            "local_files_only": options.local_files_only,
        }

    def _quantize(self, each: PlannedVariant) -> Manifest:
        if each.is_made:
            each.note_made()  # where a run ended before it could
            self._say("quantized", each, again=False)
            return manifests.load(each.folder)
        each.note_begun()
        done = api.quantize(
            each.source,
            each.variant.scheme,
            output=each.folder,
            overwrite=True,
            progress=self._watch(each),
            **each.options,
        )
        each.note_made()
        self._say("quantized", each, again=True, seconds=done.seconds, bytes_out=done.bytes_out)
        return done.manifest

    def _judge(self, each: PlannedVariant, manifest: Manifest) -> VariantRecord:
        made = describe_manifest(manifest)
        report = self._verify(each)
        evaluation = self._evaluate(each)
        gates = tuple(judge_variant(each.gates, made, report, evaluation))
        missed = [gate for gate in gates if not gate.passed]
        if missed:
            self._say("gate_failed", each, gates=[gate.model_dump(mode="json") for gate in missed])
        metrics = describe_evaluation(evaluation) if evaluation is not None else {}
        got = {
            "status": "gate_failed" if missed else "made",
            "revision": each.revision,
            "folder": each.folder.name,
            "manifest_sha256": file_sha256(each.folder / MANIFEST_NAME),
            "verified": report.ok,
            "gates": gates,
            "metrics": metrics,
            "metrics_data": evaluation.data.sha256 if evaluation is not None else None,
        }
        return start_record(each).model_copy(update={**made, **got})

    def _verify(self, each: PlannedVariant) -> Report:
        """The verification of these files against the source: an earlier one, or a new one.

        Raises:
            VerificationError: files are not those that were written.
        """
        report = _report_of(each.folder)
        again = report is None or not report.ok or _status(report, "source") != "passed"
        if again or report is None:
            report = api.verify(
                each.folder,
                source=each.source,
                source_revision=each.revision if each.plan is not None and each.plan.source.is_remote else None,
                progress=self._watch(each),
                **self._hub(),
            )
        failed = [f"{check.name}: {check.detail}" for check in report.checks if check.status == "failed"]
        self._say("verified", each, again=again, ok=report.ok, failed=failed)
        files = report.check("files")
        if files is not None and files.status == "failed":
            hint = f"remove {each.folder} and run the same command again: it is made anew"
            raise VerificationError(f"{each.folder}: {files.detail}", hint=hint)
        return report

    def _evaluate(self, each: PlannedVariant) -> Evaluation | None:
        """The evaluation of these files: an earlier one, a new one, or none where nothing asks for it."""
        wanted = bool(each.gates.evaluated) if self.options.evaluate is None else self.options.evaluate
        if not wanted:
            return None
        report = evaluation_of(each.folder)
        again = report is None
        if report is None:
            report = api.evaluate(each.folder, source=each.source, progress=self._watch(each), **self._hub())
        self._say("evaluated", each, again=again, metrics=describe_evaluation(report))
        return report


def _report_of(folder: Path) -> Report | None:
    """The last verification, where it is of the files that are there."""
    try:
        report = read_report(folder)
        if report is None or report.manifest_sha256 != file_sha256(folder / MANIFEST_NAME):
            return None
        changed = find_changed_files(folder, [file.path for file in manifests.load(folder).files()])
    except (OSError, ValueError, AoconvertError):
        return None
    return report if not changed else None


def _status(report: Report, name: Any) -> str | None:
    check = report.check(name)
    return check.status if check is not None else None
