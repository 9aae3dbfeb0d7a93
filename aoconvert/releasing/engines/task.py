"""A part of a release that another process carries out: variants to make, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.release_file import ReleaseFile
from aoconvert.releasing.variants import PlannedVariant, list_variants

Message = dict[str, Any]


class Task(BaseModel):
    """Variants of a release file to make.

    Attributes:
        path: the release file; what it names is relative to its folder.
        file: what the file says.
        names: of the variants.
        revisions: commit of the source of each variant whose source is a repo: a branch may move meanwhile.
        cores: processors to use; empty: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    file: dict[str, Any]
    names: tuple[str, ...]
    revisions: dict[str, str] = {}
    output_root: Path
    owner: str | None = None
    evaluate: bool | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False
    token: str | None = Field(default=None, repr=False)
    cores: tuple[int, ...] = ()

    @property
    def options(self) -> ReleaseOptions:
        """The release's; who made the task publishes."""
        return ReleaseOptions(
            skip_push=True,
            owner=self.owner,
            output_root=self.output_root,
            evaluate=self.evaluate,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
        )

    def list_variants(self) -> list[PlannedVariant]:
        """Its variants, not planned yet; their sources are at the commits that were planned first."""
        found = list_variants(self.path, ReleaseFile.model_validate(self.file), self.options)
        chosen = [each for each in found if each.name in self.names]
        for each in chosen:
            if (revision := self.revisions.get(each.name)) is not None:
                each.options["revision"] = revision
        return chosen


@dataclass(frozen=True)
class Work:
    """A release, for whoever makes tasks of it."""

    path: Path
    found: ReleaseFile
    options: ReleaseOptions

    def task(self, variants: Sequence[PlannedVariant], cores: Sequence[int] = ()) -> Task:
        """Make a task of planned variants."""
        options = self.options
        return Task(
            path=self.path,
            file=self.found.model_dump(mode="json", exclude_defaults=True),
            names=tuple(each.name for each in variants),
            revisions={each.name: each.revision for each in variants if each.revision is not None},
            output_root=options.output_root,
            owner=options.owner,
            evaluate=options.evaluate,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            token=options.token,
            cores=tuple(cores),
        )


def group_by_source(variants: Sequence[PlannedVariant]) -> list[list[PlannedVariant]]:
    """Variants of one source side by side: they can share what is read of it."""
    found: dict[tuple[str, str | None, str | None], list[PlannedVariant]] = {}
    for each in variants:
        found.setdefault((each.source, each.model.revision, each.model.subfolder), []).append(each)
    return list(found.values())


def deal(variants: Sequence[PlannedVariant], jobs: int) -> list[list[PlannedVariant]]:
    """Share variants out among workers: whole groups of a source, cut only where workers would have nothing to do."""
    hands = group_by_source(variants)
    while len(hands) < jobs and max(map(len, hands), default=0) > 1:
        at = max(range(len(hands)), key=lambda index: len(hands[index]))
        half = -(-len(hands[at]) // 2)
        hands[at : at + 1] = [hands[at][:half], hands[at][half:]]
    return hands
