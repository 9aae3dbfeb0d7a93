"""The variants of a release: what each is made of, where it goes, and its plan."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from aoconvert import api
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME
from aoconvert.engine.resume_file import signature_of
from aoconvert.errors import AoconvertError, HubError, HubRefusal, PlanError, SourceError, UsageError
from aoconvert.files import read_limited, write_whole, writing
from aoconvert.hub.access import name_problems
from aoconvert.humanize import first
from aoconvert.json_text import INDEX_BYTES, parse_json
from aoconvert.options import QuantizeKwargs
from aoconvert.options.release import ReleaseOptions
from aoconvert.planning import Plan
from aoconvert.planning.output import output_problems, space_problems
from aoconvert.releasing.release_file import Gates, Model, ReleaseFile, Variant, options_of, repo_of


def note_name(folder: str) -> str:
    """Name of the file beside a variant's folder that says what lies in it; it is written when the folder is whole."""
    return f"{folder}.made.json"


class Made(BaseModel):
    """What lies in a variant's folder, written down beside it as soon as it is there.

    Attributes:
        signature: what the files depend on: versions, device, plan and source.
        manifest_sha256: of the manifest that belongs to it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    signature: dict[str, Any]
    manifest_sha256: str


class Begun(BaseModel):
    """What a run is about to make, written down before it begins: a run that is killed may have finished it.

    Attributes:
        signature: see ``Made``.
        replaces: SHA-256 of the manifest that lay there; ``None``: there was none.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    signature: dict[str, Any]
    replaces: str | None


@dataclass
class PlannedVariant:
    """A variant of a model, and how it will be made.

    Attributes:
        name: what messages, folders and the record call it.
        source: a repo, or the path of a folder.
        options: keyword arguments of ``quantize``, but for the output.
        repo_id: where it is published; ``None``: no owner is known.
        folder: its files.
        license: for the card, where the source's names none.
        plan, signature: once ``plan_variants`` has seen it.
    """

    model: Model
    variant: Variant
    name: str
    source: str
    options: dict[str, Any]
    repo_id: str | None
    gates: Gates
    folder: Path
    license: str | None
    plan: Plan | None = None
    signature: dict[str, Any] | None = None

    @property
    def scheme(self) -> str:
        """Name of the scheme, or of the recipe."""
        return self.variant.scheme or self.variant.title

    @property
    def revision(self) -> str | None:
        """Commit of the source, where it is a repo."""
        return self.plan.source.revision if self.plan is not None else None

    @property
    def is_made(self) -> bool:
        """Whether the folder holds the files of an earlier run with the same plan, source and versions."""
        return self._is_noted and self._is_whole()

    @property
    def _is_noted(self) -> bool:
        with contextlib.suppress(OSError, ValueError, ValidationError):
            made = Made.model_validate(parse_json(read_limited(self._state, INDEX_BYTES)))
            if made.signature == self.signature and made.manifest_sha256 == self._digest():
                return True
        with contextlib.suppress(OSError, ValueError, ValidationError):
            begun = Begun.model_validate(parse_json(read_limited(self._begun, INDEX_BYTES)))
            return begun.signature == self.signature and begun.replaces != self._digest()
        return False

    def _is_whole(self) -> bool:
        """Whether all files are there, by their sizes."""
        try:
            files = manifests.load(self.folder).files()
            return all((self.folder / file.path).stat().st_size == file.size for file in files)
        except (OSError, AoconvertError):
            return False

    def note_begun(self) -> None:
        """Write down what is going to be made, so that it is known also if this process ends when the folder is there.

        Raises:
            WriteError: disk full.
        """
        try:
            replaces = self._digest()
        except OSError:
            replaces = None
        self._write(self._begun, Begun(signature=self._signature(), replaces=replaces))

    def note_made(self) -> None:
        """Write down that the folder is what the plan says.

        Raises:
            WriteError: disk full.
        """
        made = Made(signature=self._signature(), manifest_sha256=self._digest())
        self._write(self._state, made)
        self._begun.unlink(missing_ok=True)

    def _signature(self) -> dict[str, Any]:
        assert self.signature is not None
        return self.signature

    @staticmethod
    def _write(path: Path, note: BaseModel) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(note.model_dump(mode="json")).encode())

    @property
    def _state(self) -> Path:
        return self.folder.with_name(note_name(self.folder.name))

    @property
    def _begun(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.begun.json")

    def _digest(self) -> str:
        return file_sha256(self.folder / MANIFEST_NAME)


def list_variants(path: Path, found: ReleaseFile, options: ReleaseOptions) -> list[PlannedVariant]:
    """Every variant of every model of a release file, in the file's order; nothing is planned yet."""
    hub = {
        "token": options.token,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only or None,
    }
    root = root_of(path, options)
    return [
        PlannedVariant(
            model=model,
            variant=variant,
            name=(name := found.title(model, variant)),
            source=_resolve(path, model.source),
            options=_without_none({**options_of(found, model, variant, path.parent), **hub}),
            repo_id=repo_of(found, model, variant, options.owner),
            gates=found.gates.over(variant.gates),
            folder=root / name,
            license=model.license or found.license,
        )
        for model in found.all_models
        for variant in found.variants
    ]


def root_of(path: Path, options: ReleaseOptions) -> Path:
    """The folder of all variants of a release file."""
    return options.output_root / path.stem


def _resolve(path: Path, source: str) -> str:
    """The repo, or the folder beside the release file."""
    beside = path.parent / source
    return str(beside) if beside.exists() else source


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def choose_variants(path: Path, variants: Sequence[PlannedVariant], patterns: Sequence[str]) -> list[PlannedVariant]:
    """Those whose names fit one of the patterns; all, where there are none.

    Raises:
        UsageError: none fits.
    """
    chosen = [
        each for each in variants if not patterns or any(fnmatch.fnmatchcase(each.name, text) for text in patterns)
    ]
    if not chosen:
        raise UsageError(
            f"--only {shlex.join(patterns)}: {path.name} has no such variant",
            hint=f"it has {first([each.name for each in variants], 8)}",
        )
    return chosen


def plan_variants(
    variants: Sequence[PlannedVariant],
    options: ReleaseOptions,
    on_planned: Callable[[PlannedVariant], None],
    *,
    elsewhere: bool = False,
) -> None:
    """Plan every variant.

    Args:
        variants: the variants, which get their plans.
        options: of the release.
        on_planned: is told of each.
        elsewhere: another machine will make them.

    Raises:
        PlanError: with every problem of all of them.
        HubRefusal: sources that the Hub does not give, where nothing else is wrong.
        HubError: the Hub does not answer.
    """
    problems: list[str] = []
    hints: list[str] = []
    refused: dict[tuple[Model, str], HubError] = {}
    for each, made in _plan_each(variants, elsewhere=elsewhere):
        if each.repo_id is None and not options.skip_push:
            problems.append(f"{each.name}: no owner is known for its repo")
            hints.append("--owner NAME, or --skip-push")
        if options.evaluate is False and each.gates.evaluated:
            problems.append(f"{each.name}: the gates {', '.join(each.gates.evaluated)} need an evaluation")
            hints.append("omit --no-eval")
        problems += [f"{each.name}: {line}" for line in _repo_problems(each, options)]
        if (each.model, each.source) in refused:
            continue
        if isinstance(made, (PlanError, SourceError, UsageError)):
            problems += [f"{each.name}: {line}" for line in made.problems]
            hints += [made.hint] if made.hint else []
        elif isinstance(made, HubError) and not made.retryable:
            refused[each.model, each.source] = made
        elif isinstance(made, AoconvertError):
            raise made
        else:
            if not elsewhere and not each.is_made:
                found = output_problems(made.source, each.folder, overwrite=True)
                problems += [f"{each.name}: {line}" for line in found]
            on_planned(each)
    hints += [error.hint for error in refused.values() if error.hint]
    unread = [f"{model.title}: {line}" for (model, _), error in refused.items() for line in error.problems]
    if unread and not problems:
        raise HubRefusal(unread, hint=hints[0] if hints else None)
    problems += unread
    problems += [f"{name}: {repo} is the repo of {other}, too" for repo, name, other in _same_repos(variants)]
    if not problems and not elsewhere and variants:
        wanted = [each.plan.needs.disk_bytes for each in variants if each.plan is not None and not each.is_made]
        problems += space_problems(variants[0].folder.parent, sum(wanted))
    if problems:
        raise PlanError(problems, hint=hints[0] if hints else None)


def _plan_each(
    variants: Sequence[PlannedVariant], *, elsewhere: bool
) -> Iterator[tuple[PlannedVariant, Plan | AoconvertError]]:
    """Plan variants, and note plan and signature; what those of a model have in common is read once."""
    for source, group in groupby(variants, key=lambda each: each.source):
        members = list(group)
        wanted: list[tuple[str | None, QuantizeKwargs]] = [
            (each.variant.scheme, {"output": each.folder, "overwrite": True, **each.options})  # type: ignore[typeddict-item]
            for each in members
        ]
        known: dict[str, list[Any]] = {}
        for each, made in zip(members, api.plan_all(source, wanted, elsewhere=elsewhere), strict=True):
            if not isinstance(made, AoconvertError):
                each.plan, each.signature = made, signature_of(made, by_commit=True, known=known)
            yield each, made


def _repo_problems(each: PlannedVariant, options: ReleaseOptions) -> list[str]:
    return name_problems(each.repo_id) if each.repo_id is not None and not options.skip_push else []


def _same_repos(variants: Sequence[PlannedVariant]) -> list[tuple[str, str, str]]:
    """Repos that two variants would go to: the repo, and both names."""
    found: dict[str, str] = {}
    twice = []
    for each in variants:
        if each.repo_id is None:
            continue
        key = each.repo_id.lower()  # the Hub has no two that differ in nothing else
        if found.setdefault(key, each.name) != each.name:
            twice.append((each.repo_id, each.name, found[key]))
    return twice
