"""Verification: the checks, in order. What was not proven safe is never loaded."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import (
    CODE_INSIDE,
    Checkpoint,
    config_path,
    from_folder,
    from_manifest,
    validate,
    with_imports,
)
from aoconvert.checkpoint.files import check_files, file_sha256, notes, shadows
from aoconvert.checkpoint.load_code import card_strategy, code_sha256, load_code
from aoconvert.checkpoint.manifest import CARD_BYTES, CARD_NAME, MANIFEST_NAME, REPORT_NAME, Manifest
from aoconvert.checkpoint.published import Published
from aoconvert.checkpoint.report import (
    SCHEMA_VERSION,
    Check,
    CheckName,
    ForwardPass,
    Ran,
    Report,
    Status,
    Strategy,
    some,
)
from aoconvert.checkpoint.usage import usage_code, usage_sha256
from aoconvert.environment import choose_device, versions
from aoconvert.errors import AoconvertError, PlanError
from aoconvert.files import check_replaceable, is_there, read_limited, write_whole, writing
from aoconvert.formats.registry import read_stored
from aoconvert.humanize import plural, size
from aoconvert.models.bounds import Held, check_config
from aoconvert.options import VerifyOptions
from aoconvert.planning.overwriting import tidy
from aoconvert.progress import Progress
from aoconvert.recipes.foreign_configs import check_quantization
from aoconvert.rewriting.compare_old import is_old
from aoconvert.sources import Source
from aoconvert.verification.library import LibraryFindings, compare_by_library, originals
from aoconvert.verification.load_device import LoadDevice, choose_load_device
from aoconvert.verification.loading import (
    Loaded,
    OtherWeights,
    check_forward,
    check_load,
    check_numbers,
    check_published,
    check_reload,
)
from aoconvert.verification.original import check_source
from aoconvert.verification.process import Children
from aoconvert.verification.versions import version_problems


class Stop(Exception):
    """A check failed on which all that follow depend."""


@dataclass(frozen=True)
class _Outcome:
    """What a check found, and how long its work took."""

    status: Status
    detail: str
    seconds: float


def _outcome(work: Callable[[], tuple[Status, str]]) -> _Outcome:
    """Do a check's work; an error of ours fails it."""
    began = time.perf_counter()
    try:
        status, detail = work()
    except AoconvertError as error:
        status, detail = "failed", error.message
    return _Outcome(status, detail, time.perf_counter() - began)


@dataclass
class _Run:
    folder: Path
    label: str
    options: VerifyOptions
    progress: Progress
    original: Source | None = None
    published: Published | None = None
    checks: list[Check] = field(default_factory=list)
    strategy: Strategy | None = None
    device: str | None = None
    example: bool = False
    ran: list[Ran] = field(default_factory=list)
    forward: tuple[ForwardPass, ...] = ()
    target: Checkpoint | None = None
    manifest: Manifest | None = None
    place: LoadDevice | None = None

    def check(self, name: CheckName, work: Callable[[], tuple[Status, str]] | Future[_Outcome]) -> Status:
        """Run one check, or wait for one that runs already."""
        self.progress.start(name, 0)
        outcome = work.result() if isinstance(work, Future) else _outcome(work)
        self.progress.finish()
        detail = " ".join(outcome.detail.split())
        self.checks.append(Check(name=name, status=outcome.status, detail=detail, seconds=outcome.seconds))
        return outcome.status

    def require(self, name: CheckName, work: Callable[[], tuple[Status, str]] | Future[_Outcome]) -> None:
        """As :meth:`check`, but nothing follows a failure."""
        if self.check(name, work) == "failed":
            raise Stop


def verify(
    folder: Path,
    label: str,
    options: VerifyOptions,
    progress: Progress,
    *,
    original: Source | None = None,
    published: Published | None = None,
) -> Report:
    """Check a checkpoint, and write ``aoconvert.verify.json`` beside its manifest.

    Args:
        folder: the checkpoint on this machine.
        label: what the report calls it.
        options: what to check.
        progress: is told what happens.
        original: the source, to compare everything with.
        published: open it from the Hub, by the code of its card and with an empty cache, in place of the folder, which
            holds the same files; nothing is written into the folder then.

    Raises:
        SourceError: the folder holds no torchao checkpoint at all.
        WriteError: something that is not a file is where the report belongs.
        PlanError: the device that was asked for is not here. What an earlier verification found stays.
    """
    if options.device != "auto" and options.reload:
        choose_device(options.device)
    tidy(folder)
    writes = published is None and is_there(folder / MANIFEST_NAME)
    if writes:
        with writing(folder / REPORT_NAME):
            check_replaceable(folder / REPORT_NAME)
    run = _Run(folder, label, options, progress, original, published)
    with contextlib.suppress(Stop):
        _checks(run)
    target = run.target
    present = versions()
    report = Report(
        schema_version=SCHEMA_VERSION,
        ok=all(check.status != "failed" for check in run.checks),
        path=label,
        checks=tuple(run.checks),
        strategy=run.strategy,
        safe_globals=target.safe_globals if target else (),
        imports=target.imports if target else (),
        torchao=present.get("torchao"),
        torch=present.get("torch"),
        python=present.get("python"),
        versions=present,
        manifest_sha256=file_sha256(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else None,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=run.device,
        code_sha256=code_sha256(target, run.strategy) if target is not None and run.strategy is not None else None,
        example=run.example,
        ran=tuple(run.ran),
        forward=run.forward,
        published=published.to_dict() if published is not None else None,
    )
    if report.manifest_sha256 is None or not writes:
        return report
    return report.model_copy(update={"unwritten": _write(folder, report)})


def _write(folder: Path, report: Report) -> str | None:
    """Put the report beside the manifest; why that cannot be."""
    try:
        write_whole(folder / REPORT_NAME, report.dump().encode())
    except OSError as error:
        return f"{REPORT_NAME} is not written: {error.strerror}"
    return None


def _checks(run: _Run) -> None:
    run.require("manifest", lambda: _manifest(run))
    run.require("files", lambda: _files(run))
    run.require("pickle", lambda: _pickle(run))
    target = run.target
    assert target is not None
    run.check("versions", lambda: _versions(run, target))
    with Children() as children, ThreadPoolExecutor(4) as pool:
        try:
            _checks_side_by_side(run, target, children, pool)
        except BaseException:
            children.stop()  # before the pool waits for them
            raise


def _checks_side_by_side(run: _Run, target: Checkpoint, children: Children, pool: ThreadPoolExecutor) -> None:
    """The checks that take interpreters of their own, which start together."""
    loaded = Loaded()
    findings: list[LibraryFindings] = []
    load = pool.submit(_outcome, lambda: check_load(target, loaded, children))
    loaded.wait = lambda: wait([load])
    reloading = pool.submit(_outcome, lambda: _reload(run, target, loaded, children))
    comparing = pool.submit(_outcome, lambda: _library(run, target, findings, children))
    source, manifest = run.original, target.manifest
    if source is not None and manifest is not None:
        asking = pool.submit(_outcome, lambda: _source(source, manifest))
    run.require("load", load)
    run.check("reload", reloading)
    if source is not None and manifest is not None:
        run.check("source", asking)
    run.check("library", comparing)
    left = findings[0].left if findings else None
    run.check("numbers", lambda: check_numbers(target, loaded, run.original, left, run.options.lora))
    asked = run.options.reload and (run.options.forward or run.options.example)
    obstacle = run.place.obstacle if run.place is not None else None
    run.check("forward", lambda: check_forward(loaded, asked=asked, obstacle=obstacle))
    run.example = loaded.example
    run.forward = loaded.passes(target)
    run.ran = list(_ran(run, target, loaded))


def _source(source: Source, manifest: Manifest) -> tuple[Status, str]:
    """Whether the source has the very files; the original of a checkpoint that was migrated cannot have them."""
    if any(entry.migrated is not None for entry in manifest.components) and not is_old(source, manifest):
        return "skipped", "an old checkpoint was migrated, which this is not: numbers compares the values"
    return check_source(source, manifest.source)


def _ran(run: _Run, target: Checkpoint, loaded: Loaded) -> Iterator[Ran]:
    """Which code ran, and where: what did not pass, or was not tried, is not among it."""
    if run.strategy is None or run.device is None:
        return
    opened = code_sha256(target, run.strategy)
    yield Ran(what="load", device=run.device, code_sha256=opened, inputs=None)
    if loaded.forward_passed:
        sources = {one.component: one.inputs for one in run.forward if one.inputs is not None}
        yield Ran(what="forward", device=run.device, code_sha256=opened, inputs=sources)
    if loaded.example:
        yield Ran(what="example", device=run.device, code_sha256=usage_sha256(target), inputs=None)


def _manifest(run: _Run) -> tuple[Status, str]:
    if not is_there(run.folder / MANIFEST_NAME):
        run.target = from_folder(run.folder, run.label)
        return "skipped", f"no {MANIFEST_NAME}: not made by aoconvert; there is nothing to compare with"
    run.manifest = found = manifests.load(run.folder)
    validate(found)
    count = sum(len(component.tensors) for component in found.components)
    return (
        "passed",
        f"schema {found.schema_version}, {plural(len(found.components), 'component')}, {plural(count, 'tensor')}",
    )


def _files(run: _Run) -> tuple[Status, str]:
    """Configs are only looked into once they are known to be those that were written."""
    if run.manifest is None:
        assert run.target is not None
        problems = shadows(run.folder, {part.folder: part.files for part in run.target.parts})
        said = some(["there is no manifest to list them", *notes(run.folder)])
        return ("failed", some(problems)) if problems else ("skipped", said)
    problems, hashed = check_files(run.folder, run.manifest)
    if problems:
        return "failed", some(problems)
    run.target = from_manifest(run.folder, run.manifest, alone=True)
    listed = {file.path for file in run.manifest.files()}
    if problems := shadows(run.folder, run.manifest.weights_by_folder(), listed):
        return "failed", some(problems)
    return "passed", some([f"{plural(len(listed), 'file')}, {size(hashed)} hashed", *notes(run.folder)])


def _pickle(run: _Run) -> tuple[Status, str]:
    target = run.target
    assert target is not None
    problems = []
    known: set[str] = set()
    sizes: dict[str, list[int]] = {}
    for path in target.files:
        try:
            contents = read_stored(target.folder / path)
            known |= {use.name for use in contents.globals}
            sizes[path] = [tensor.nbytes for tensor in contents.tensors.values()]
        except AoconvertError as error:
            problems.append(error.message.replace(f"{target.folder}/", ""))
    if problems:
        return "failed", some(problems)
    for part in target.parts:  # before a library makes a model of it
        held = Held.of(size for path in part.files for size in sizes.get(path, ()))
        check_config(part.name or part.class_name, part.config, held)
        try:
            check_quantization(part.config.get("quantization_config") or {})
        except ValueError as error:
            return "failed", f"{config_path(part)}: the quantization_config: {error}"
    if target.manifest is None:
        run.target = with_imports(target, known)
    elif extra := sorted(name for name in known if name.startswith("torchao.") and name not in target.safe_globals):
        return "failed", f"the pickles name {extra[0]}, which the manifest does not list"
    said = f"{plural(len(known), 'name')}, all in the list of safe names" if known else "no pickle among them"
    return "passed", f"{plural(len(target.files), 'file')}, {said}"


def _versions(run: _Run, target: Checkpoint) -> tuple[Status, str]:
    """Whether this environment can open it, and whether this machine can run it."""
    with contextlib.suppress(PlanError):  # a device that went away meanwhile: opening it will fail
        run.place = choose_load_device(target, run.options.device)
    entries = target.manifest.components if target.manifest is not None else []
    problems = [line for entry in entries for line in version_problems(entry)]
    if problems:
        return "failed", some(problems)
    if run.place is not None and run.place.obstacle is not None:
        return ("failed" if run.options.require_device else "skipped"), run.place.obstacle
    if not entries:
        return "skipped", "there is no manifest to say what it needs"
    wanted = sorted({f"{k}{v}" for entry in entries for k, v in entry.loads_with.items()})
    return "passed", f"needs {', '.join(wanted)}"


def _reload(run: _Run, target: Checkpoint, loaded: Loaded, children: Children) -> tuple[Status, str]:
    """Try the ways of loading in turn; the first that opens it is the one to put on a card.

    Where the weights cannot run they are opened all the same, and nothing is computed with them.
    """
    if not run.options.reload:
        return "skipped", "it was not requested"
    if target.kind == "state_dict":
        return "skipped", "a file of tensors alone: nothing says which model it is for"
    if target.runs_code and not run.options.trust_remote_code:
        return "skipped", f"{CODE_INSIDE}: read it, then use --trust-remote-code"
    where = run.place or choose_load_device(target, run.options.device)
    failures: list[str] = []
    for strategy in _strategies(target, run.options, run.published):
        try:
            status, detail = _open(run, target, loaded, children, strategy, where)
        except OtherWeights as error:  # another way of loading does not help who takes this one
            return "failed", error.message
        if status == "passed":
            run.strategy, run.device = strategy, where.device
            before = f" (from_pretrained could not: {failures[0]})" if failures else ""
            on = "" if where.obstacle is None else f", on {where.device}"
            return "passed", f"{strategy}: {detail}{on}{before}"
        failures.append(f"{strategy}: {detail}" if run.published is not None else detail)
    return "failed", "; ".join(failures)


def _open(
    run: _Run, target: Checkpoint, loaded: Loaded, children: Children, strategy: Strategy, where: LoadDevice
) -> tuple[Status, str]:
    """Open the checkpoint by one way, from its folder or from the Hub, and use what was opened where that can run."""
    published = run.published
    place = published.repo_id if published is not None else str(target.folder.resolve())
    commit = published.commit if published is not None else None
    code = load_code(target, place, strategy, device=where.device, hub=published is not None, revision=commit)
    forward = run.options.forward and where.obstacle is None
    wanted = run.options.example and where.obstacle is None
    example = usage_code(target, place, small=True, revision=commit) if wanted else None
    source = run.original if forward else None
    wishes: dict[str, Any] = {
        "forward": forward,
        "example": example,
        "originals": originals(target, source, trust=run.options.trust_remote_code),
    }
    if published is None:
        status, detail = check_reload(target, code, loaded, children, **wishes)
    else:
        status, detail = check_published(target, published, code, loaded, children, **wishes)
        detail += _card_shows(target, published, strategy)
    if status == "passed" and wanted and example is None:
        missing = {"status": "skipped", "detail": "the card has no example for this model"}
        loaded.forward.append({"example": True, "forward": missing})
    return status, detail


def _library(run: _Run, target: Checkpoint, findings: list[LibraryFindings], children: Children) -> tuple[Status, str]:
    """The library's own comparison with the source, where there is one."""
    if run.original is None:
        return "skipped", "no source given"
    if not run.options.reload:
        return "skipped", "it was not requested"
    options = run.options
    how = (options.lora, options.hub)
    found = compare_by_library(target, run.original, children, *how, trust=options.trust_remote_code)
    findings.append(found)
    return found.status, found.detail


def _card_shows(target: Checkpoint, published: Published, strategy: Strategy) -> str:
    """Whether the published card shows the code that ran, but for the commit and the device."""
    card = target.folder / CARD_NAME
    try:
        text = read_limited(card, CARD_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return f"; there is no {CARD_NAME}"
    codes = (
        load_code(target, published.repo_id, strategy, hub=True, revision=revision)
        for revision in {None, published.revision}
    )
    return "" if any(code in text for code in codes) else f"; {CARD_NAME} shows different code"


def _strategies(target: Checkpoint, options: VerifyOptions, published: Published | None) -> Iterator[Strategy]:
    """Ways of loading to try; from the Hub only the one that the card shows, where a manifest says which."""
    if published is not None and options.strategy == "auto" and target.manifest is not None:
        yield card_strategy(target)
        return
    if options.strategy == "from-pretrained" or (options.strategy == "auto" and not target.fused):
        yield "from-pretrained"
    if options.strategy in ("auto", "assign"):
        yield "assign"
