"""Makes the variants in this process, one source after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aoconvert.releasing.record import VariantRecord
from aoconvert.releasing.steps import Steps
from aoconvert.releasing.variants import PlannedVariant


def make_here(variants: Sequence[PlannedVariant], steps: Steps) -> Iterator[VariantRecord]:
    """Make planned variants; each record comes as soon as its variant is judged.

    Raises:
        Interrupted: what is done stays for the next run.
    """
    by_source: dict[tuple[str, str | None, str | None], list[PlannedVariant]] = {}
    for each in variants:
        by_source.setdefault((each.source, each.model.revision, each.model.subfolder), []).append(each)
    for group in by_source.values():
        yield from steps.make(group)
