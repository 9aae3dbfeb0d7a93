"""Carries out a release file on this machine, one variant after the other; what is done is left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from aoconvert import api
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.evaluation import Evaluation, GateResult, evaluation_of
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME, Manifest
from aoconvert.checkpoint.report import Report, read_report
from aoconvert.engine.resume_file import signature_of
from aoconvert.environment import host_by_default
from aoconvert.errors import AoconvertError, Interrupted, PlanError, SourceError, UsageError
from aoconvert.humanize import first
from aoconvert.options.release import ReleaseKwargs, ReleaseOptions
from aoconvert.planning import Plan
from aoconvert.progress import Progress, Silent
from aoconvert.releasing.gates import judge_variant
from aoconvert.releasing.record import (
    Failure,
    Record,
    VariantRecord,
    describe_evaluation,
    describe_manifest,
    describe_plan,
    read_record,
)
from aoconvert.releasing.release_file import Gates, ReleaseFile, Variant, load, options_of, repo_of

Event = dict[str, Any]


@host_by_default()
def release(
    path: str | Path,
    *,
    progress: Progress | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **options: Unpack[ReleaseKwargs],
) -> Record:
    """Make a release: quantize, verify, evaluate, judge and publish every variant of a release file.

    What an earlier run did is not done again: a variant whose source, plan and versions are the same keeps its files, a
    report that belongs to them counts, and the Hub is sent what it lacks.

    Args:
        path: the release file (TOML).
        progress: is told what happens within a step; default: silent.
        on_event: is told of each step, as ``release --json`` prints it.
        **options: fields of ``aoconvert.options.release.ReleaseOptions``.

    Returns:
        The record, as ``release.json`` in the output root holds it; ``record.exit_code`` sums it up.

    Raises:
        UsageError: the file is wrong, or no variant was asked for.
        PlanError: a variant cannot be made: every problem of all variants, before any work.
        Interrupted: what is done stays for the next run.
    """
    wanted = ReleaseOptions(**options)
    found = load(Path(path))
    return _Release(Path(path), found, wanted, progress or Silent(), on_event).run()


@dataclass
class _Job:
    """A variant at work."""

    variant: Variant
    options: dict[str, Any]
    repo_id: str | None
    gates: Gates
    folder: Path
    before: VariantRecord | None
    plan: Plan | None = None
    signature: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.variant.title

    @property
    def scheme(self) -> str:
        return self.variant.scheme or self.name

    @property
    def is_made(self) -> bool:
        """Whether the folder holds the files of an earlier run with the same plan and source."""
        before, place = self.before, self.folder / MANIFEST_NAME
        if before is None or before.signature != self.signature or not place.is_file():
            return False
        return before.manifest_sha256 == file_sha256(place)


@dataclass
class _Release:
    path: Path
    found: ReleaseFile
    options: ReleaseOptions
    progress: Progress
    on_event: Callable[[Event], None]
    records: dict[str, VariantRecord] = field(default_factory=dict)
    revision: str | None = None

    def run(self) -> Record:
        """Plan all, then make them one by one."""
        before = read_record(self.root)
        earlier = {variant.name: variant for variant in before.variants} if before is not None else {}
        jobs = [self._job(variant, earlier.get(variant.title)) for variant in self.found.variants]
        chosen = [job for job in jobs if self._is_wanted(job.name)]
        if not chosen:
            raise UsageError(
                f"--only {' '.join(self.options.only)}: {self.path.name} has no such variant",
                hint=f"it has {first([job.name for job in jobs], 8)}",
            )
        for job in jobs:
            self.records[job.name] = self._skipped(job)
        self._plan_all(chosen)
        if self.options.dry_run:
            for job in chosen:
                assert job.plan is not None
                planned = {"status": "planned", "repo_id": job.repo_id, **describe_plan(job.plan)}
                self.records[job.name] = VariantRecord(name=job.name, scheme=job.scheme, **planned)
            return self._record()
        for job in chosen:
            self._make(job)
            self._record().write(self.root)
            record = self.records[job.name]
            if self.options.fail_fast and record.status in ("failed", "gate_failed"):
                break
        return self._record()

    @property
    def root(self) -> Path:
        """The folder of all variants."""
        return self.options.output_root / self.path.stem

    @property
    def source(self) -> str:
        """The repo, or the folder beside the release file."""
        beside = self.path.parent / self.found.source
        return str(beside) if beside.exists() else self.found.source

    def _is_wanted(self, name: str) -> bool:
        return not self.options.only or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.options.only)

    def _job(self, variant: Variant, before: VariantRecord | None) -> _Job:
        options = options_of(self.found, variant, self.path.parent)
        hub = {"token": self.options.token, "cache_dir": self.options.cache_dir}
        options |= {**hub, "local_files_only": self.options.local_files_only}
        folder = self.root / variant.title
        repo_id = repo_of(self.found, variant, self.options.owner)
        return _Job(variant, options, repo_id, self.found.gates.over(variant.gates), folder, before)

    def _skipped(self, job: _Job) -> VariantRecord:
        if job.before is not None:
            return job.before.model_copy(update={"status": "skipped"})
        return VariantRecord(name=job.name, scheme=job.scheme, status="skipped", repo_id=job.repo_id)

    def _plan_all(self, jobs: list[_Job]) -> None:
        """Plan every variant.

        Raises:
            PlanError: with every problem of all of them.
        """
        problems: list[str] = []
        hints: list[str] = []
        for job in jobs:
            if job.repo_id is None and not self.options.skip_push:
                problems.append(f"{job.name}: no owner for {job.variant.repo or self.found.repo}")
                hints.append("--owner NAME, or --skip-push")
            if self.options.evaluate is False and job.gates.evaluated:
                problems.append(f"{job.name}: the gates {', '.join(job.gates.evaluated)} need an evaluation")
                hints.append("omit --no-eval")
            try:
                job.plan = api.plan(
                    self.source, job.variant.scheme, output=job.folder, overwrite=True, **self._plain(job.options)
                )
                job.signature = signature_of(job.plan)
                self.revision = job.plan.source.revision or self.revision
            except (PlanError, SourceError, UsageError) as error:
                problems += [f"{job.name}: {line}" for line in error.problems]
                hints += [error.hint] if error.hint else []
            else:
                planned = job.plan.to_dict()
                self._say("planned", job, needs=planned["needs"], totals=[c["totals"] for c in planned["components"]])
        if problems:
            raise PlanError(problems, hint=hints[0] if hints else None)

    @staticmethod
    def _plain(options: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in options.items() if value is not None}

    def _say(self, event: str, job: _Job, **values: Any) -> None:
        self.on_event({"event": event, "variant": job.name, **values})

    def _record(self) -> Record:
        variants = tuple(self.records.values())
        ok = all(variant.status not in ("failed", "gate_failed") for variant in variants)
        return Record(name=self.found.name, source=self.found.source, revision=self.revision, ok=ok, variants=variants)

    def _make(self, job: _Job) -> None:
        """Take one variant as far as it goes; what goes wrong is its record's."""
        self._say("variant_started", job, scheme=job.scheme, repo_id=job.repo_id)
        record = VariantRecord(
            name=job.name,
            scheme=job.scheme,
            status="failed",
            repo_id=job.repo_id,
            folder=job.name,
            signature=job.signature,
        )
        try:
            manifest = self._quantize(job)
            made = describe_manifest(manifest)
            sha256 = file_sha256(job.folder / MANIFEST_NAME)
            record = record.model_copy(update={**made, "manifest_sha256": sha256})
            self.records[job.name] = record
            self._record().write(self.root)  # a run that stops in the middle does not quantize it again
            report = self._verify(job)
            evaluation = self._evaluate(job)
            gates = tuple(judge_variant(job.gates, made, report, evaluation))
            metrics = describe_evaluation(evaluation) if evaluation is not None else {}
            record = record.model_copy(update={"verified": report.ok, "gates": gates, "metrics": metrics})
            if missed := [gate for gate in gates if not gate.passed]:
                record = record.model_copy(update={"status": "gate_failed"})
                self._say("gate_failed", job, gates=[gate.model_dump(mode="json") for gate in missed])
            elif self.options.skip_push:
                record = record.model_copy(update={"status": "made"})
            else:
                record = record.model_copy(update=self._push(job))
        except Interrupted:
            raise
        except AoconvertError as error:
            failure = Failure(
                type=type(error).__name__, message=error.message, hint=error.hint, exit_code=error.exit_code
            )
            record = record.model_copy(update={"error": failure})
            self._say("failed", job, error=failure.model_dump())
        self.records[job.name] = record

    def _quantize(self, job: _Job) -> Manifest:
        if job.is_made:
            self._say("quantized", job, again=False)
            return manifests.load(job.folder)
        done = api.quantize(
            self.source,
            job.variant.scheme,
            output=job.folder,
            overwrite=True,
            progress=self.progress,
            **self._plain(job.options),
        )
        self._say("quantized", job, again=True, seconds=done.seconds, bytes_out=done.bytes_out)
        return done.manifest

    def _verify(self, job: _Job) -> Report:
        """The verification of these files against the source: an earlier one, or a new one."""
        report = _report_of(job.folder)
        again = report is None or not report.ok or _status(report, "source") != "passed"
        if again or report is None:
            report = api.verify(
                job.folder,
                source=self.source,
                source_revision=self.revision if self.found.source == self.source else None,
                progress=self.progress,
                token=self.options.token,
                cache_dir=self.options.cache_dir,
                local_files_only=self.options.local_files_only,
            )
        failed = [f"{check.name}: {check.detail}" for check in report.checks if check.status == "failed"]
        self._say("verified", job, again=again, ok=report.ok, failed=failed)
        return report

    def _evaluate(self, job: _Job) -> Evaluation | None:
        """The evaluation of these files: an earlier one, a new one, or none where nothing asks for it."""
        wanted = bool(job.gates.evaluated) if self.options.evaluate is None else self.options.evaluate
        if not wanted:
            return None
        report = evaluation_of(job.folder)
        again = report is None
        if report is None:
            report = api.evaluate(
                job.folder,
                source=self.source,
                progress=self.progress,
                token=self.options.token,
                cache_dir=self.options.cache_dir,
                local_files_only=self.options.local_files_only,
            )
        self._say("evaluated", job, again=again, metrics=describe_evaluation(report))
        return report

    def _push(self, job: _Job) -> dict[str, Any]:
        assert job.repo_id is not None
        done = api.push(
            job.repo_id,
            job.folder,
            progress=self.progress,
            token=self.options.token,
            private=self.found.private,
            collection=self.found.collection,
            license=self.found.license,
        )
        if done.nothing_to_do:
            self._say("unchanged", job, repo_id=done.repo_id, commit=done.commit)
        else:
            self._say("pushed", job, repo_id=done.repo_id, commit=done.commit, url=done.url, bytes_sent=done.bytes_sent)
        status = "unchanged" if done.nothing_to_do else "pushed"
        return {"status": status, "repo_id": done.repo_id, "url": done.url, "commit": done.commit}


def _report_of(folder: Path) -> Report | None:
    """The last verification, where it is of the manifest that is there."""
    try:
        report = read_report(folder)
    except (OSError, ValueError, AoconvertError):
        return None
    if report is None or report.manifest_sha256 != file_sha256(folder / MANIFEST_NAME):
        return None
    return report


def _status(report: Report, name: Any) -> str | None:
    check = report.check(name)
    return check.status if check is not None else None


__all__ = ["Event", "GateResult", "release"]
