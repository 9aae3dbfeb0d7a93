"""Verification: the checks, in order. What was not proven safe is never loaded."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aoconvert import manifest as manifests
from aoconvert.environment import versions
from aoconvert.errors import AoconvertError, PlanError
from aoconvert.manifest import MANIFEST_NAME, Manifest
from aoconvert.progress import Progress
from aoconvert.verification.code import Strategy, code_sha256, load_code
from aoconvert.verification.files import check_files, file_sha256, shadows
from aoconvert.verification.loading import Loaded, check_forward, check_load, check_numbers, check_reload
from aoconvert.verification.pickles import read_loadable
from aoconvert.verification.place import Place, choose_place
from aoconvert.verification.report import REPORT_NAME, Check, CheckName, Report, Status, some
from aoconvert.verification.target import Target, from_folder, from_manifest, validate, with_imports
from aoconvert.verification.usage import usage_code
from aoconvert.verification.versions import version_problems

Choice = Literal["auto", "from-pretrained", "assign"]


@dataclass(frozen=True)
class VerifyOptions:
    """What to check.

    Attributes:
        strategy: way of loading to prove; ``auto`` takes ``assign`` where ``from_pretrained`` fails.
        reload: open the checkpoint with the library, which holds the whole model.
        forward: take one forward pass of what was opened.
        example: also run the model card's example, at the smallest sizes.
        device: where to open it and take the forward pass; ``auto``: the layout's device where it is here, else the
            CPU.
        require_device: weights that cannot run here are a failure, not a skipped check.
        source: the original, to compare the numbers with.
    """

    strategy: Choice = "auto"
    reload: bool = True
    forward: bool = True
    require_device: bool = False
    device: str = "auto"
    example: bool = False
    source: str | None = None


class Stop(Exception):
    """A check failed on which all that follow depend."""


@dataclass
class _Run:
    folder: Path
    label: str
    options: VerifyOptions
    progress: Progress
    checks: list[Check] = field(default_factory=list)
    strategy: Strategy | None = None
    device: str | None = None
    example: bool = False
    target: Target | None = None
    manifest: Manifest | None = None
    place: Place | None = None

    def check(self, name: CheckName, work: Callable[[], tuple[Status, str]]) -> Status:
        """Run one check; an error of ours fails it."""
        began = time.perf_counter()
        self.progress.start(name, 0)
        try:
            status, detail = work()
        except AoconvertError as error:
            status, detail = "failed", error.message
        self.progress.finish()
        self.checks.append(Check(name, status, " ".join(detail.split()), time.perf_counter() - began))
        return status

    def require(self, name: CheckName, work: Callable[[], tuple[Status, str]]) -> None:
        if self.check(name, work) == "failed":
            raise Stop


def verify(folder: Path, label: str, options: VerifyOptions, progress: Progress) -> Report:
    """Check a checkpoint, and write ``aoconvert.verify.json`` beside its manifest.

    Args:
        folder: the checkpoint on this machine.
        label: what the report calls it.
        options: what to check.
        progress: is told what happens.

    Raises:
        SourceError: the folder holds no torchao checkpoint at all.
    """
    run = _Run(folder, label, options, progress)
    with contextlib.suppress(Stop):
        _checks(run)
    target = run.target
    report = Report(
        path=label,
        checks=tuple(run.checks),
        strategy=run.strategy,
        safe_globals=target.safe_globals if target else (),
        imports=target.imports if target else (),
        versions=versions(),
        manifest_sha256=file_sha256(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else None,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=run.device,
        code_sha256=code_sha256(target, run.strategy) if target is not None and run.strategy is not None else None,
        example=run.example,
    )
    if report.manifest_sha256 is not None:
        (folder / REPORT_NAME).write_text(report.dump(), encoding="utf-8")
    return report


def _checks(run: _Run) -> None:
    run.require("manifest", lambda: _manifest(run))
    run.require("files", lambda: _files(run))
    run.require("pickle", lambda: _pickle(run))
    target = run.target
    assert target is not None
    run.check("versions", lambda: _versions(run, target))
    loaded = Loaded()
    run.require("load", lambda: check_load(target, loaded))
    if run.options.reload:
        run.check("reload", lambda: _reload(run, target, loaded))
    else:
        run.check("reload", lambda: ("skipped", "not asked for"))
    run.check("numbers", lambda: check_numbers(target, loaded, run.options.source))
    asked = run.options.reload and (run.options.forward or run.options.example)
    obstacle = run.place.obstacle if run.place is not None else None
    run.check("forward", lambda: check_forward(loaded, asked=asked, obstacle=obstacle))
    run.example = loaded.example


def _manifest(run: _Run) -> tuple[Status, str]:
    if not (run.folder / MANIFEST_NAME).is_file():
        run.target = from_folder(run.folder)
        return "skipped", f"no {MANIFEST_NAME}: by somebody else; nothing to compare with"
    run.manifest = found = manifests.load(run.folder)
    validate(found)
    count = sum(len(component.tensors) for component in found.components)
    return "passed", f"schema {found.schema_version}, {len(found.components)} component(s), {count} tensors"


def _files(run: _Run) -> tuple[Status, str]:
    """Configs are only looked into once they are known to be those that were written."""
    if run.manifest is None:
        assert run.target is not None
        problems = shadows(run.folder, {part.folder: part.files for part in run.target.parts})
        return ("failed", some(problems)) if problems else ("skipped", "no manifest lists them")
    problems, hashed = check_files(run.folder, run.manifest)
    if problems:
        return "failed", some(problems)
    run.target = from_manifest(run.folder, run.manifest)
    return "passed", f"{sum(1 for _ in run.manifest.files())} files, {hashed / 1e9:.2f} GB hashed"


def _pickle(run: _Run) -> tuple[Status, str]:
    target = run.target
    assert target is not None
    problems = []
    known: set[str] = set()
    for path in target.files:
        try:
            known |= {use.name for use in read_loadable(target.folder / path).globals}
        except AoconvertError as error:
            problems.append(error.message.replace(f"{target.folder}/", ""))
    if problems:
        return "failed", some(problems)
    if target.manifest is None:
        run.target = with_imports(target, known)
    elif extra := sorted(name for name in known if name.startswith("torchao.") and name not in target.safe_globals):
        return "failed", f"the pickles name {extra[0]}, which the manifest does not list"
    return "passed", f"{len(target.files)} file(s), {len(known)} names, all on the list of safe ones"


def _versions(run: _Run, target: Target) -> tuple[Status, str]:
    """Whether this environment can open it, and whether this machine can run it."""
    with contextlib.suppress(PlanError):  # a device that was asked for and is not here: opening it will fail
        run.place = choose_place(target, run.options.device)
    entries = target.manifest.components if target.manifest is not None else []
    problems = [line for entry in entries for line in version_problems(entry)]
    if problems:
        return "failed", some(problems)
    if run.place is not None and run.place.obstacle is not None:
        return ("failed" if run.options.require_device else "skipped"), run.place.obstacle
    if not entries:
        return "skipped", "no manifest says what it needs"
    wanted = sorted({f"{k}{v}" for entry in entries for k, v in entry.loads_with.items()})
    return "passed", f"needs {', '.join(wanted)}"


def _reload(run: _Run, target: Target, loaded: Loaded) -> tuple[Status, str]:
    """Try the ways of loading in turn; the first that works is the one to put on a card.

    Where the weights cannot run they are opened all the same, and nothing is computed with them.
    """
    where = run.place or choose_place(target, run.options.device)
    failures: list[str] = []
    folder = str(target.folder.resolve())
    can_run = where.obstacle is None
    wanted = run.options.example and can_run
    example = usage_code(target, folder, small=True) if wanted else None
    for strategy in _strategies(target, run.options.strategy):
        code = load_code(target, folder, strategy, device=where.device)
        forward = run.options.forward and can_run
        status, detail = check_reload(target, code, loaded, forward=forward, example=example)
        if status == "passed":
            run.strategy, run.device = strategy, where.device
            if wanted and example is None:
                missing = {"status": "skipped", "detail": "the card has no example for it"}
                loaded.forward.append({"example": True, "forward": missing})
            before = f" (from_pretrained could not: {failures[0]})" if failures else ""
            on = "" if can_run else f", on {where.device}"
            return "passed", f"{strategy}: {detail}{on}{before}"
        failures.append(detail)
    return "failed", "; ".join(failures)


def _strategies(target: Target, choice: Choice) -> Iterator[Strategy]:
    if choice == "from-pretrained" or (choice == "auto" and not target.fused):
        yield "from-pretrained"
    if choice in ("auto", "assign"):
        yield "assign"
