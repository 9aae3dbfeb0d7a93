"""The Python API. The command line is a thin layer on it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from aoconvert.environment import host_by_default
from aoconvert.errors import AoconvertError, SourceError, UsageError
from aoconvert.humanize import argument
from aoconvert.options import (
    HubOptions,
    QuantizeKwargs,
    QuantizeOptions,
    VerifyKwargs,
    VerifyOptions,
    make_options,
)
from aoconvert.options.fields import read_values, record
from aoconvert.progress import Progress, Silent

if TYPE_CHECKING:
    from aoconvert.cards import Card
    from aoconvert.cards.plot import Plot
    from aoconvert.checkpoint.bench import Bench
    from aoconvert.checkpoint.evaluation import Evaluation
    from aoconvert.checkpoint.published import Published
    from aoconvert.checkpoint.report import Report
    from aoconvert.comparison import Comparison
    from aoconvert.engine.results import QuantizeResult
    from aoconvert.hub.types import Pushed, PushKwargs
    from aoconvert.inspection.types import Inspection
    from aoconvert.options.bench import BenchKwargs
    from aoconvert.options.evaluate import EvaluateKwargs
    from aoconvert.options.migrate import MigrateKwargs
    from aoconvert.planning import Plan
    from aoconvert.rewriting import Converted, Migrated, Repacked
    from aoconvert.sources import Source


@host_by_default()
def plan(
    source: str | Path,
    scheme: str | None = None,
    *,
    progress: Progress | None = None,
    elsewhere: bool = False,
    **options: Unpack[QuantizeKwargs],
) -> Plan:
    """Decide everything about a conversion and write nothing. Only ``auto`` reads weights.

    Args:
        source: a Hub repo id, a folder, or one weights file.
        scheme: a scheme name, see ``aoconvert schemes``.
        progress: is told what happens; default: silent.
        elsewhere: another machine will carry it out, so the disk here does not matter.
        **options: fields of ``aoconvert.QuantizeOptions``; paths and sizes may be text.

    Returns:
        The plan: one entry a tensor, exact output sizes, what the run needs.

    Raises:
        PlanError: with every problem at once.
        SourceError: the source cannot be read.
        UsageError: an unknown scheme, or options that make no sense.
        HubError: the Hub said no.
    """
    [made] = plan_all(source, [(scheme, options)], progress=progress, elsewhere=elsewhere)
    if isinstance(made, AoconvertError):
        raise made
    return made


@host_by_default()
def plan_all(
    source: str | Path,
    conversions: Sequence[tuple[str | None, QuantizeKwargs]],
    *,
    progress: Progress | None = None,
    elsewhere: bool = False,
) -> list[Plan | AoconvertError]:
    """Plan several conversions of one source: its headers are read, and its models are opened, once for all of them.

    Args:
        source: a Hub repo id, a folder, or one weights file.
        conversions: scheme and options of each, as ``plan`` takes them.
        progress: is told what happens; default: silent.
        elsewhere: another machine will carry them out: a disk here that is too small is only a warning.

    Returns:
        For each conversion, in their order, its plan, or the error that ``plan`` would raise.

    Raises:
        Interrupted: Ctrl-C.
    """
    from aoconvert.searching.plans import plan_all as run

    wanted: list[QuantizeOptions | AoconvertError] = []
    for scheme, options in conversions:
        try:
            wanted.append(make_options(scheme, options))
        except UsageError as error:
            wanted.append(error)
    good = [each for each in wanted if isinstance(each, QuantizeOptions)]
    made = iter(run(source, good, progress or Silent(), elsewhere=elsewhere))
    return [each if isinstance(each, AoconvertError) else next(made) for each in wanted]


@host_by_default()
def quantize(
    source: str | Path,
    scheme: str | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[QuantizeKwargs],
) -> QuantizeResult:
    """Quantize a checkpoint into ``output`` (default ``./out``), one tensor at a time.

    Args:
        source: a Hub repo id, a folder, or one weights file.
        scheme: a scheme name, see ``aoconvert schemes``.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.QuantizeOptions``; paths and sizes may be text.

    Returns:
        What was done; ``result.output`` is the folder, ``result.manifest`` what is in it.

    Raises:
        AoconvertError: see ``plan``; also ReadError, WriteError and QuantizeError. Nothing appears half-written under
            the output's name. After a stop (also Ctrl-C, a kill, a full disk) the same call goes on where it was;
            ``resume=False`` starts afresh.
    """
    wanted = make_options(scheme, options)
    progress = progress or Silent()
    from aoconvert.planning.build import refuse_early
    from aoconvert.planning.overwriting import tidy
    from aoconvert.searching.plans import check_schemes, make_plan, resolve_source

    tidy(wanted.output)
    check_schemes(wanted)
    resolved = resolve_source(source, wanted)
    refuse_early(resolved, wanted)
    from aoconvert.engine.prehash import HashingAhead
    from aoconvert.planning.weights import local_weights, unreadable_headers

    with HashingAhead(local_weights(resolved, wanted)) as ahead:
        from aoconvert.engine.convert import run
        from aoconvert.sources.download import download

        download(resolved, unreadable_headers(resolved, wanted), progress)
        plan = make_plan(resolved, wanted, progress, need_weights=True)
        if plan.source.is_remote:
            download(plan.source, plan.fetch, progress)
        digests = ahead.stop()
    return run(plan, progress, command=command_line(plan, wanted), resume=wanted.resume, begun=digests)


@host_by_default()
def inspect(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> Inspection:
    """Say what a checkpoint is and what can load it, from headers alone: no pickle is run, no torchao is needed.

    Args:
        checkpoint: a folder, one weights file, or a Hub repo id, whose weights are not downloaded.
        revision, token, cache_dir, local_files_only: for a Hub repo.

    Returns:
        What it is; ``to_dict()`` is the document of ``aoconvert inspect --json``. A pickle that must not be loaded is
        in ``unsafe``.

    Raises:
        SourceError: nothing there, no weights in it, or a header that cannot be read.
        HubError: the Hub said no.
    """
    from aoconvert.inspection.inspect import inspect as run

    return run(str(checkpoint), HubOptions(revision, token, cache_dir, local_files_only))


@host_by_default()
def verify(
    checkpoint: str | Path,
    *,
    progress: Progress | None = None,
    **options: Unpack[VerifyKwargs],
) -> Report:
    """Prove that a converted checkpoint loads, in fresh processes; ``aoconvert.verify.json`` holds the report.

    Args:
        checkpoint: a folder, or a Hub repo id: the whole repo is fetched and checked, and then opened from the Hub by
            the code of its card, at that commit and with an empty cache, unless the network is not to be used.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.options.VerifyOptions``: ``source`` names the original to compare with.

    Returns:
        The report; ``report.ok`` says whether every check passed or had a reason to be skipped.

    Raises:
        SourceError: there is nothing to verify.
        UsageError: ``source`` is neither a folder nor a repo, or ``device`` not a device.
        PlanError: ``device`` is not here.
        HubError: the Hub said no.
    """
    from aoconvert.verification.original import check_reference, resolve_original

    wanted = VerifyOptions(**read_values(VerifyOptions, options))
    if wanted.source is not None:
        check_reference(wanted.source)
    folder, published = _checkpoint(checkpoint, wanted.hub)
    original = None
    if wanted.source is not None:
        hub = replace(wanted.hub, revision=wanted.source_revision)
        original = resolve_original(wanted.source, folder, hub, trust_remote_code=wanted.trust_remote_code)
    from aoconvert.verification.verify import verify as run

    return run(folder, str(checkpoint), wanted, progress or Silent(), original=original, published=published)


@host_by_default()
def bench(
    checkpoint: str | Path = "out",
    *,
    progress: Progress | None = None,
    **options: Unpack[BenchKwargs],
) -> Bench:
    """Measure memory and time of a converted checkpoint; ``aoconvert.bench.json`` holds the report.

    Args:
        checkpoint: a folder that ``quantize`` wrote, or a Hub repo id, which is fetched; its report is not written.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.options.bench.BenchOptions``: ``source`` names the original to measure too.

    Returns:
        The report; ``report.ok`` says whether a row of the result ran.

    Raises:
        SourceError: there is nothing to measure, or ``source`` is another model.
        VerificationError: its pickles are not safe to load.
        UsageError: ``source`` is neither a folder nor a repo, or a number that is none.
        PlanError: it cannot run here, or needs more memory than there is.
        HubError: the Hub said no.
    """
    from aoconvert.options.bench import BenchOptions
    from aoconvert.verification.original import check_reference, resolve_original

    wanted = BenchOptions(**read_values(BenchOptions, options))
    reference = wanted.source
    if reference is not None:
        check_reference(reference)
    folder, _ = _checkpoint(checkpoint, wanted.hub)

    def find_source() -> Source:
        assert reference is not None
        hub = replace(wanted.hub, revision=wanted.source_revision)
        return resolve_original(reference, folder, hub, trust_remote_code=wanted.trust_remote_code)

    from aoconvert.benchmarking.run import bench as run

    found = find_source if reference is not None else None
    ours = Path(checkpoint).is_dir()  # the Hub's cache holds what is on the Hub, and nothing else
    return run(folder, str(checkpoint), wanted, found, progress or Silent(), writes=ours)


@host_by_default()
def evaluate(
    checkpoint: str | Path = "out",
    *,
    progress: Progress | None = None,
    **options: Unpack[EvaluateKwargs],
) -> Evaluation:
    """Say how much a checkpoint lost: run it and its original on the same inputs, and write ``aoconvert.eval.json``.

    One model runs at a time, in a fresh process, and what the original gives is kept in aoconvert's cache for the next
    scheme.

    Args:
        checkpoint: a folder that ``quantize`` wrote, or a Hub repo id, whose report is not written.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.options.evaluate.EvaluateOptions``: ``source`` names the original, ``text``
            the files to compare on, ``max_kl`` and the like what must be reached.

    Returns:
        The report; ``report.ok`` says whether every gate was kept.

    Raises:
        SourceError: the checkpoint is unfinished or damaged, the source is another model, or cannot be run.
        UsageError: an option that does not apply, an empty or too short text, or no tokenizer for it.
        PlanError: a model that cannot be evaluated, or not on this machine.
        VerificationError: pickles that must not be loaded, or a result that cannot be run or gives NaN.
        HubError: the Hub said no.
    """
    from aoconvert.evaluation.evaluate import evaluate as run
    from aoconvert.options.evaluate import EvaluateOptions
    from aoconvert.verification.original import check_reference, resolve_original

    wanted = EvaluateOptions(**read_values(EvaluateOptions, options))
    if wanted.source is not None:
        check_reference(wanted.source)
    folder, _ = _checkpoint(checkpoint, wanted.hub)

    def find_source() -> Source:
        hub = replace(wanted.hub, revision=wanted.source_revision)
        reference = wanted.source or _source_of(folder)
        return resolve_original(reference, folder, hub, trust_remote_code=wanted.trust_remote_code)

    ours = Path(checkpoint).is_dir()  # the Hub's cache holds what is on the Hub, and nothing else
    return run(folder, str(checkpoint), wanted, find_source, progress or Silent(), writes=ours)


def plot(checkpoints: Sequence[str | Path], path: str | Path) -> Plot:
    """Draw several results in one picture, SVG: size against error, memory against time, from the reports in them.

    Args:
        checkpoints: folders with ``aoconvert.bench.json`` or ``aoconvert.eval.json``.
        path: of the picture, whose name ends in ``.svg``; it is replaced.

    Returns:
        What is in it, and what is not, with the reason.

    Raises:
        UsageError: a path that is no SVG file, or more results than there are colours.
        SourceError: a folder without a manifest, or no report in any.
        WriteError: the picture cannot be written.
    """
    from aoconvert.cards.comparable import compare_reports
    from aoconvert.cards.plot import MOST, write_plot

    place = Path(path)
    if place.suffix.lower() != ".svg":
        raise UsageError(f"--plot {place}: the picture is SVG, so its name must end in .svg")
    if len(checkpoints) > MOST:
        raise UsageError(f"--plot takes at most {MOST} results, not {len(checkpoints)}", hint="draw two pictures")
    return write_plot(place, compare_reports([Path(checkpoint) for checkpoint in checkpoints]))


def load(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> Any:
    """Open a converted checkpoint by the way that ``verify`` proved, refusing what its pickle check refuses.

    Args:
        checkpoint: a folder, or a Hub repo id.
        revision, token, cache_dir, local_files_only: for a Hub repo.
        **kwargs: for ``from_pretrained``; what the manifest says (``torch_dtype``) is the default.

    Returns:
        The pipeline or the model.

    Raises:
        VerificationError: its pickles are not safe to load, or nothing opens it.
        SourceError: it is no torchao checkpoint.
    """
    from aoconvert.checkpoint.opening import open_checkpoint

    hub = HubOptions(revision, token, cache_dir, local_files_only)
    return open_checkpoint(_checkpoint(checkpoint, hub)[0], kwargs)


@host_by_default()
def repack(
    checkpoint: str | Path,
    layout_device: str,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Repacked:
    """Pack the int4 weights of a converted checkpoint for another device; nothing is quantized again.

    Args:
        checkpoint: a folder that ``quantize`` wrote.
        layout_device: ``cpu`` (this machine's), ``cuda`` or ``xpu``.
        output: folder for the result; default: ``checkpoint`` with ``-cuda`` (or the other device) at its end.
        overwrite: replace an earlier result there.
        progress: is told what happens; default: silent.

    Returns:
        What was done; ``output`` is the folder, ``manifest`` what is in it.

    Raises:
        SourceError: no manifest, or other files than it lists.
        PlanError: weights that the layout cannot take, or an output that is in the way, with every problem.
        QuantizeError: a weight whose scales or zero points the layout cannot hold exactly.
        WriteError: disk full, or no permission.
    """
    from aoconvert.checkpoint import manifest as manifests
    from aoconvert.planning.output import refuse_output
    from aoconvert.sources.folder import FolderSource

    folder = Path(checkpoint)
    named = folder if folder.name not in ("", "..") else folder.resolve()
    place = Path(output) if output is not None else named.with_name(f"{named.name}-{layout_device}")
    manifests.load(folder)
    refuse_output(FolderSource(folder), place, overwrite=overwrite)  # before torch is imported
    from aoconvert.rewriting import repack as run

    words = ["aoconvert", "repack", argument(named.name), "--layout-device", layout_device]
    return run(
        folder, layout_device, place, overwrite=overwrite, progress=progress or Silent(), command=shlex.join(words)
    )


@host_by_default()
def convert(
    checkpoint: str | Path,
    format: str,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write the tensors of a torchao checkpoint into files of the other format, bit for bit.

    Args:
        checkpoint: a folder that ``quantize``, ``repack``, ``migrate`` or ``convert`` wrote, or that transformers,
            diffusers or torchao's own functions wrote with tensors of today's classes.
        format: ``bin`` or ``safetensors``.
        output: folder for the result; default: ``checkpoint`` with ``-bin`` or ``-safetensors`` at its end.
        overwrite: replace an earlier result there.
        progress: is told what happens; default: silent.

    Returns:
        What was done; ``output`` is the folder, ``manifest`` what is in it.

    Raises:
        UsageError: no such format.
        SourceError: other files than the manifest lists; without a manifest, no torchao tensors, or a config.json that
            does not say how they are quantized.
        PlanError: tensors that the format cannot store, or an output that is in the way, with every problem.
        WriteError: disk full, or no permission.
    """
    from aoconvert.checkpoint import manifest as manifests
    from aoconvert.files import is_there
    from aoconvert.options.quantize import FORMATS
    from aoconvert.planning.output import refuse_output
    from aoconvert.sources.folder import FolderSource

    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    folder = Path(checkpoint)
    named = folder if folder.name not in ("", "..") else folder.resolve()
    place = Path(output) if output is not None else named.with_name(f"{named.name}-{format}")
    if is_there(folder / manifests.MANIFEST_NAME) or not folder.is_dir():
        manifests.load(folder)
    refuse_output(FolderSource(folder), place, overwrite=overwrite)  # before torch is imported
    from aoconvert.rewriting import convert as run

    words = ["aoconvert", "convert", argument(named.name), "--format", format]
    return run(folder, format, place, overwrite=overwrite, progress=progress or Silent(), command=shlex.join(words))


@host_by_default()
def diff(
    a: str | Path,
    b: str | Path,
    *,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Say what differs between two checkpoints, or between a checkpoint and its source, tensor by tensor.

    Args:
        a, b: a folder, one weights file, or a Hub repo id each, also ``user/repo@revision``.
        token, cache_dir, local_files_only: for a Hub repo.
        progress: is told what happens; default: silent.

    Returns:
        What differs; ``equal`` says whether nothing does, ``to_dict()`` is the document of ``aoconvert diff --json``.

    Raises:
        SourceError: nothing there, or files that cannot be compared.
        VerificationError: a pickle that must not be loaded.
        HubError: the Hub said no.
    """
    from aoconvert.comparison import compare

    return compare(str(a), str(b), HubOptions(None, token, cache_dir, local_files_only), progress or Silent())


@host_by_default()
def migrate(
    checkpoint: str | Path,
    *,
    progress: Progress | None = None,
    **options: Unpack[MigrateKwargs],
) -> Migrated:
    """Write an old torchao or Quanto checkpoint again in the tensor classes of today, with the same codes and scales.

    Args:
        checkpoint: a folder, a Hub repo id, or one torch file, whose tensors are written without a model around them.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.options.MigrateOptions``: ``then`` names a scheme for what no class of today
            can hold, ``packed_on`` the CPU that packed int4 weights; ``exact`` dequantizes what a class would round.

    Returns:
        What was done; ``output`` is the folder, ``manifest`` what is in it, ``deviations`` what is not as it was.

    Raises:
        PlanError: nothing to migrate, tensors without a known counterpart, or an output that is in the way.
        SourceError: it cannot be read, or its pickle holds what no checkpoint holds.
        HubError: the Hub said no.
        WriteError: disk full, or no permission.
    """
    from aoconvert import schemes
    from aoconvert.options.migrate import MigrateOptions
    from aoconvert.planning.output import refuse_output
    from aoconvert.planning.overwriting import tidy
    from aoconvert.sources import resolve

    wanted = MigrateOptions(**read_values(MigrateOptions, options))
    progress = progress or Silent()
    if wanted.then is not None:
        schemes.find(wanted.then)
    tidy(wanted.output)
    source = resolve(str(checkpoint), wanted.hub, single_file=True)
    refuse_output(source, wanted.output, overwrite=wanted.overwrite)
    from aoconvert.rewriting import migrate as run
    from aoconvert.sources.download import download

    words = record(wanted, {"revision": source.revision})
    place = source.repo_id or argument(source.label)
    command = shlex.join(["aoconvert", "migrate", place, *words])
    return run(source, wanted, progress, command=command, fetch=lambda paths: download(source, paths, progress))


@host_by_default()
def card(
    checkpoint: str | Path,
    *,
    repo_id: str | None = None,
    template: str | Path | None = None,
    license: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Card:
    """Render the model card of a converted checkpoint; ``aoconvert.cards.write`` puts it into the folder.

    Args:
        checkpoint: a folder that ``quantize`` wrote.
        repo_id: where it will be published; without it the code on the card opens the folder.
        template: a Jinja template in place of aoconvert's.
        license: of the result, where the source's card names none.
        metadata: values of the front matter that replace what is there; ``None`` leaves a key out.

    Returns:
        The text of ``README.md``, of the picture beside it, and what is missing.

    Raises:
        SourceError: the folder has no manifest, or not a valid one.
        UsageError: metadata that the Hub does not know, or a template that fails.
    """
    from aoconvert.cards import CardOptions, render

    options = CardOptions(Path(template) if template is not None else None, license, dict(metadata or {}))
    return render(Path(checkpoint), options, repo_id=repo_id)


@host_by_default()
def push(
    repo_id: str,
    checkpoint: str | Path = "out",
    *,
    progress: Progress | None = None,
    **options: Unpack[PushKwargs],
) -> Pushed:
    """Publish a converted checkpoint on the Hub in one commit, with its model card, and compare what arrived.

    Args:
        repo_id: ``user/repo``, or a name alone for the token's own account.
        checkpoint: a folder that ``quantize`` wrote and ``verify`` passed.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.hub.PushOptions``.

    Returns:
        Where it is, the commit, and every file with what was uploaded.

    Raises:
        PlanError: what is in the folder cannot be published as it is, with every problem.
        HubError: the Hub said no, or cannot be reached.
        UsageError: options that exclude each other.
    """
    from aoconvert.hub.push import push as run
    from aoconvert.hub.types import PushOptions

    return run(Path(checkpoint), repo_id, PushOptions(**options), progress or Silent())


def _checkpoint(checkpoint: str | Path, hub: HubOptions) -> tuple[Path, Published | None]:
    """The checkpoint's folder, and where it is on the Hub, from which it was fetched; ``None`` without the network."""
    from huggingface_hub import is_offline_mode

    from aoconvert.checkpoint.published import Published
    from aoconvert.sources import resolve
    from aoconvert.sources.references import parse_repo

    source = resolve(str(checkpoint), hub)
    if not source.is_remote:
        return source.root, None
    if not set(source.files()) - {".gitattributes"}:
        raise SourceError(
            f"{source.label} holds no files at {hub.revision or 'its default branch'}",
            hint="--revision names another branch",
        )
    source.fetch(list(source.files()))
    if hub.local_files_only or is_offline_mode():
        return source.root, None
    assert source.repo_id is not None and source.revision is not None
    total = sum(file.size for file in source.files().values())
    asked = hub.revision or parse_repo(str(checkpoint))[1]
    return source.root, Published(source.repo_id, source.revision, asked, total, hub.token)


def _source_of(folder: Path) -> str:
    """The repo that a manifest names as the source.

    Raises:
        UsageError: it names none.
    """
    from aoconvert.checkpoint import manifest as manifests

    repo_id = manifests.load(folder).source.repo_id
    if repo_id is None:
        raise UsageError("the manifest names no repo as the source", hint="--source FOLDER names the original")
    return repo_id


def _config(source: Source) -> str | None:
    """Where a single file's config came from, as ``--config`` takes it: a repo with its commit, a folder by name."""
    from aoconvert.sources.file import FileSource

    if not isinstance(source, FileSource) or source.origin is None:
        return None
    origin = source.origin
    return f"{origin.repo_id}@{origin.revision}" if origin.repo_id is not None else argument(origin.label)


def command_line(plan: Plan, options: QuantizeOptions) -> str:
    """The command that makes the same result again: no token, no absolute path, the revision pinned."""
    device = plan.device.partition(":")[0]  # another kind may make other bytes, another number does not
    decided = {
        "revision": plan.source.revision,
        "device": device,
        "config": _config(plan.source),
        "lora": tuple(lora.reference for lora in plan.loras),
    }
    words = record(options, decided)
    return shlex.join(["aoconvert", "quantize", plan.source.repo_id or argument(plan.source.label), *words])
