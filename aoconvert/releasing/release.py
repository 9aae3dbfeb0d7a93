"""Carries out a release file: plan all, make what is missing, publish what keeps its gates, and record it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from aoconvert.environment import host_by_default
from aoconvert.errors import UsageError
from aoconvert.options.release import ReleaseKwargs, ReleaseOptions
from aoconvert.progress import Progress, Silent
from aoconvert.releasing.engines.local import choose_jobs, make_here, make_in_workers
from aoconvert.releasing.engines.ray import check_ray, make_on_ray
from aoconvert.releasing.engines.task import Work
from aoconvert.releasing.page import Page
from aoconvert.releasing.preflight import hold_root, refuse_publishing, refuse_root
from aoconvert.releasing.publish import Publisher
from aoconvert.releasing.record import ModelRecord, Record, VariantRecord, describe_plan, read_record
from aoconvert.releasing.release_file import ReleaseFile, load
from aoconvert.releasing.siblings import Siblings
from aoconvert.releasing.steps import Steps, start_record
from aoconvert.releasing.told import Event, OnEvent
from aoconvert.releasing.variants import PlannedVariant, choose_variants, list_variants, plan_variants, root_of


def _ignore(event: Event) -> None:
    """Nobody listens."""


@host_by_default()
def release(
    path: str | Path,
    *,
    progress: Progress | None = None,
    on_event: OnEvent = _ignore,
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
        PlanError: a variant cannot be made: every problem of all variants, before any work; or another run is at it.
        HubError: a source is not there, or the token may not publish; before any work.
        Interrupted: what is done stays for the next run.
    """
    wanted, place = ReleaseOptions(**options), Path(path)
    if wanted.address is not None and wanted.engine != "ray":
        raise UsageError(f"--address {wanted.address} is a Ray cluster's", hint="add --engine ray, or omit it")
    run = _Release(place, load(place), wanted, progress or Silent(), on_event)
    return run.plan_only() if wanted.dry_run else run.carry_out()


@dataclass
class _Release:
    """A release at work.

    Attributes:
        records: what is known of each variant of the file, by its name.
        jobs: so many variants are made at a time.
        variants: of the file, also those that were not asked for.
    """

    path: Path
    found: ReleaseFile
    options: ReleaseOptions
    progress: Progress
    on_event: OnEvent
    records: dict[str, VariantRecord] = field(default_factory=dict)
    revisions: dict[str, str | None] = field(default_factory=dict)
    jobs: int = 1
    variants: list[PlannedVariant] = field(default_factory=list)

    def plan_only(self) -> Record:
        """Plan the variants, and change nothing."""
        for each in self._plan():
            assert each.plan is not None
            self._note(start_record(each, "planned").model_copy(update=describe_plan(each.plan)))
        return self._record()

    def carry_out(self) -> Record:
        """Make the variants and publish them; the record is written after each."""
        variants = self._plan()
        if not self.options.skip_push:
            refuse_publishing(variants, self.found, self.options)
        root = root_of(self.path, self.options)
        with hold_root(root):
            record = self._make_and_publish(variants)
            Page(self.path, self.found, self.options, record, root).write()
            return record

    def _make_and_publish(self, variants: Sequence[PlannedVariant]) -> Record:
        by_name = {each.name: each for each in variants}
        publisher = Publisher(self.found, self.options, self.progress, self.on_event)
        siblings = Siblings(self.path, self.found)
        if not self.options.skip_push:
            others = [record for name, record in self.records.items() if name not in by_name]
            for record in siblings.forget_deleted(others, publisher):
                self._note(record)
            for record in siblings.recall(self.variants, self.records, publisher):
                self._note(record)
        before = list(self.records.values())  # what is new of the others goes with the last commit of each, once
        with closing(self._make(variants)) as made:  # where it stops early, so do the workers
            for record in made:
                record = record.model_copy(update={"published": self.records[record.name].published})
                if record.status == "made" and not self.options.skip_push:
                    known = siblings.describe(before, record)
                    record = publisher.publish(by_name[record.name], record, known)
                self._note(record)
                self._record().write(root_of(self.path, self.options))
                if self.options.fail_fast and record.status in ("failed", "gate_failed"):
                    break
        self._tell_siblings(siblings, publisher)
        return self._record()

    def _tell_siblings(self, siblings: Siblings, publisher: Publisher) -> None:
        """Bring the cards of all variants up to date, now that all is known."""
        if self.options.skip_push:
            siblings.write_cards(self.variants, self.records)
            return
        for record in siblings.update(self.variants, dict(self.records), publisher):
            self._note(record)
        self._record().write(root_of(self.path, self.options))

    def _make(self, variants: Sequence[PlannedVariant]) -> Generator[VariantRecord]:
        """Make the variants; each record comes as soon as its variant is judged."""
        work = Work(self.path, self.found, self.options)
        if self.options.engine == "ray":
            yield from make_on_ray(variants, work, self.progress, self.on_event)
        elif self.jobs == 1:
            yield from make_here(variants, Steps(self.options, self.progress, self.on_event))
        else:
            yield from make_in_workers(variants, work, self.jobs, self.progress, self.on_event)

    def _plan(self) -> list[PlannedVariant]:
        """The variants that were asked for, planned; of the others the record says what an earlier run did."""
        refuse_root(root_of(self.path, self.options), self.found)
        self.variants = every = list_variants(self.path, self.found, self.options)
        chosen = choose_variants(self.path, every, self.options.only)
        before = read_record(root_of(self.path, self.options))
        earlier = {record.name: record for record in before.variants} if before is not None else {}
        for each in every:
            known = earlier.get(each.name)
            self._note(known.model_copy(update={"status": "skipped"}) if known else start_record(each, "skipped"))
        self.revisions = {model.name: model.revision for model in before.models} if before is not None else {}
        plan_variants(chosen, self.options, self._planned)
        if self.options.engine == "ray":
            check_ray(chosen)
        else:
            self.jobs = choose_jobs(chosen, self.options.jobs)
        return chosen

    def _planned(self, each: PlannedVariant) -> None:
        assert each.plan is not None
        self.revisions[each.model.title] = each.revision
        document = each.plan.to_dict()
        totals = [component["totals"] for component in document["components"]]
        found = {"needs": document["needs"], "totals": totals, "warnings": document["warnings"]}
        self.on_event({"event": "planned", "variant": each.name, **found})

    def _note(self, record: VariantRecord) -> None:
        self.records[record.name] = record

    def _record(self) -> Record:
        variants = tuple(self.records.values())
        models = tuple(
            ModelRecord(name=model.title, source=model.source, revision=self.revisions.get(model.title))
            for model in self.found.all_models
        )
        ok = all(variant.status not in ("failed", "gate_failed") for variant in variants)
        return Record(name=self.found.name, models=models, ok=ok, variants=variants)
