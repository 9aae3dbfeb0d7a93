"""Carry out a plan: stream every component, take over the rest, write the manifest last."""

from __future__ import annotations

import datetime
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from aoconvert.checkpoint import manifest
from aoconvert.checkpoint.manifest import ComponentEntry, FileEntry, Manifest, SourceEntry, UnquantizedEntry
from aoconvert.checkpoint.unfinished import JOURNAL_NAME
from aoconvert.engine.memory import peak_device_bytes, peak_host_bytes, steady_allocator
from aoconvert.engine.model_config import model_config, quantization_config
from aoconvert.engine.read import ComponentReading
from aoconvert.engine.results import ComponentResult, Seconds, TensorResult
from aoconvert.engine.resume import Journal
from aoconvert.engine.source_card import read_card
from aoconvert.engine.staging import Stage
from aoconvert.engine.stream import run_component
from aoconvert.environment import device_facts, platform_name, versions
from aoconvert.errors import (
    DeviceError,
    HostMemoryError,
    Interrupted,
    ReadError,
    SourceError,
    WriteError,
    is_out_of_memory,
)
from aoconvert.formats.digest import FileDigest
from aoconvert.formats.index import write_index
from aoconvert.humanize import size
from aoconvert.models import ModelLayout, ModelPart, join
from aoconvert.models.calls import call_parameters
from aoconvert.models.own_classes import is_pipeline_module
from aoconvert.models.transformers import auto_class
from aoconvert.planning import ComponentPlan, Plan
from aoconvert.planning.copying import unread_pickles
from aoconvert.planning.files import index_name
from aoconvert.planning.types import StreamedPlan, UnquantizedPlan, config_dict, layout_dict, vars_of
from aoconvert.progress import Progress
from aoconvert.recipes import rule_schemes
from aoconvert.schemes.imports import imports
from aoconvert.version import __version__


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did; ``to_dict`` is what ``aoconvert quantize --json`` prints. Bytes, seconds.

    ``resumed`` is the number of tensors that an earlier run had finished.
    """

    output: Path
    manifest: Manifest
    seconds: float
    bytes_in: int
    bytes_out: int
    parameters: int
    quantized_parameters: int
    quantized_fraction: float
    peak_host_bytes: int
    peak_device_bytes: int
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Keys are a contract. ``worst_sqnr_db`` is the lowest of all weights, null where nothing has an error."""
        components = [
            {
                "name": item.name,
                "class_name": item.class_name,
                "scheme": item.scheme,
                "worst_sqnr_db": item.totals.worst_sqnr_db,
                "bits_per_weight": item.totals.bits_per_weight,
            }
            for item in self.manifest.components
        ]
        worst = [item.totals.worst_sqnr_db for item in self.manifest.components]
        return {
            "output": str(self.output),
            "manifest": str(self.output / manifest.MANIFEST_NAME),
            "scheme": "+".join(dict.fromkeys(item.scheme for item in self.manifest.components)),
            "worst_sqnr_db": min((value for value in worst if value is not None), default=None),
            "components": components,
            "seconds": round(self.seconds, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "quantized_fraction": self.quantized_fraction,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "warnings": list(self.warnings),
            "resumed": self.resumed,
        }


def run(
    plan: Plan,
    progress: Progress,
    *,
    command: str,
    resume: bool = True,
    begun: Mapping[Path, FileDigest] | None = None,
) -> QuantizeResult:
    """Carry out ``plan``. The output appears under its name only when it is whole.

    Args:
        plan: made with the same versions, its source's files local.
        progress: is told what happens.
        command: the command line that makes the result again, for the manifest.
        resume: go on with what an earlier run left; otherwise start afresh.
        begun: digests of weights files that were hashed in part already.

    Raises:
        AoconvertError: after ``Interrupted``, ``WriteError``, ``ReadError``, ``SourceError`` and ``DeviceError`` the
            tensors that are finished stay beside the output for the next run, and the hint says so; otherwise nothing
            is left.
    """
    steady_allocator()
    began = time.perf_counter()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    stage = Stage(plan.output)
    journal = Journal(plan, stage)
    try:
        unused = journal.open(resume, progress)
        stage.announce(_written_files(plan))
        resumed = journal.kept
        for path in {path for item in plan.streamed if item.weights for path in item.weights.files}:
            if begun and (digest := begun.get(plan.source.local(path))):
                journal.digests.setdefault(path, digest)
        entries, digests, seconds = _components(plan, stage, journal, progress)
        progress.start("copy", sum(item.bytes_in for item in plan.unquantized) + sum(c.size for c in plan.copied))
        unquantized, more, spent = _unquantized(plan, stage, journal, progress)
        for problem in unread_pickles(plan.source, plan.copied):  # those of the Hub were not here for the plan
            raise SourceError(problem)
        copied = stage.take_over(plan.source, plan.copied, progress)
        progress.finish()
        digests |= more
        seconds += spent
        elapsed = time.perf_counter() - began
        result = Manifest(
            schema_version=1,
            tool=manifest.Tool(name="aoconvert", version=__version__),
            source=_source_entry(plan, digests),
            environment=_environment(plan),
            pipeline=_pipeline(plan),
            components=entries,
            unquantized=unquantized,
            copied=copied,
            left_behind=[manifest.LeftBehindEntry(path=item.path, reason=item.reason) for item in plan.left_behind],
            run=manifest.RunEntry(
                command=command,
                started=started,
                seconds=round(elapsed, 3),
                peak_host_bytes=peak_host_bytes(),
                peak_device_bytes=max(peak_device_bytes(device) for device in plan.devices),
                reader_seconds=round(seconds.reader, 3),
                quantize_seconds=round(seconds.quantize, 3),
                writer_seconds=round(seconds.writer, 3),
            ),
        )
        stage.check_output()
        stage.place(manifest.encode(result))
    except KeyboardInterrupt:
        raise _interrupted(stage, journal) from None
    except (WriteError, ReadError, SourceError, DeviceError) as error:
        if journal.kept:
            stage.leave()
            error.hint = "; ".join(filter(None, [error.hint, f"the same command goes on: {_kept(stage, journal)}"]))
        else:
            stage.discard()
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            stage.discard()
            raise
        raise _out_of_memory(plan, stage, journal) from error
    except BaseException:
        stage.discard()
        raise
    finally:
        journal.close()
    warning = (f"the earlier run's work is not used: {unused}",) if unused else ()
    return replace(_result(plan, result), warnings=(*plan.warnings, *warning), resumed=resumed)


def _interrupted(stage: Stage, journal: Journal) -> Interrupted:
    """What to say after Ctrl-C or SIGTERM; what is finished stays."""
    if stage.placed:
        return Interrupted("interrupted; the output is whole")
    if not journal.kept:
        stage.discard()
        return Interrupted("interrupted; the unfinished output was removed")
    stage.leave()
    what = f"{journal.kept} of {journal.total} tensors are kept, run the same command again to go on"
    return Interrupted(f"interrupted; {what}", hint=f"they are in {stage.root}; --no-resume starts afresh")


def _out_of_memory(plan: Plan, stage: Stage, journal: Journal) -> HostMemoryError:
    """What to say where the host's memory is used up; what is finished stays."""
    hint = "end other programs or raise the limit; on fewer cores (taskset) it takes less"
    if not journal.is_open and (stage.root / JOURNAL_NAME).exists():  # what an earlier run left was not looked at yet
        stage.leave()
    elif journal.kept:
        stage.leave()
        hint = f"{hint}; the same command goes on: {_kept(stage, journal)}"
    else:
        stage.discard()
    return HostMemoryError(f"memory ran out: this run takes about {size(plan.needs.host_peak_bytes)} of it", hint=hint)


def _kept(stage: Stage, journal: Journal) -> str:
    return f"{journal.kept} of {journal.total} tensors are kept in {stage.root}; --no-resume starts afresh"


def _components(
    plan: Plan, stage: Stage, journal: Journal, progress: Progress
) -> tuple[list[ComponentEntry], dict[str, FileEntry], Seconds]:
    entries: list[ComponentEntry] = []
    digests: dict[str, FileEntry] = {}
    seconds = Seconds()
    progress.start("quantize", sum(item.totals.bytes_in for item in plan.components))
    for component in plan.components:
        with ComponentReading(component, plan, stage.root, journal.digests) as reading:
            done = run_component(component, reading, journal, plan.devices, progress, allow_cpu=plan.allow_cpu)
            digests |= _read_files(plan, reading)
        seconds += done.seconds
        extra = [
            stage.write_text(
                join(component.folder, "config.json"),
                model_config(
                    component.component.library,
                    component.component.config,
                    quantization_config(component.component.library, component.config, component.skip_modules),
                    component.dtype,
                ),
            )
        ]
        if len(component.files) > 1:
            extra.append(_write_index(component, stage))
        entries.append(_component_entry(component, done, extra, plan))
    progress.finish()
    return entries, digests, seconds


def _written_files(plan: Plan) -> set[str]:
    """Every file that the run writes, by its path in the output."""
    found = {file.path for model in plan.streamed for file in model.files} | {item.path for item in plan.copied}
    found |= {join(component.folder, "config.json") for component in plan.components}
    return found | {
        join(model.folder, index_name(model.component, model.format)) for model in plan.streamed if len(model.files) > 1
    }


def _read_files(plan: Plan, reading: ComponentReading) -> dict[str, FileEntry]:
    files = plan.source.files()
    return {
        path: FileEntry(path=path, size=files[path].size, sha256=digest) for path, digest in reading.digests().items()
    }


def _unquantized(
    plan: Plan, stage: Stage, journal: Journal, progress: Progress
) -> tuple[list[UnquantizedEntry], dict[str, FileEntry], Seconds]:
    """Write the parts that are not quantized, tensor by tensor."""
    entries: list[UnquantizedEntry] = []
    digests: dict[str, FileEntry] = {}
    seconds = Seconds()
    for part in plan.unquantized:
        with ComponentReading(part, plan, stage.root, journal.digests) as reading:
            done = run_component(part, reading, journal, ("cpu",), progress)
            digests |= _read_files(plan, reading)
        seconds += done.seconds
        files = [FileEntry(path=path, size=file.size, sha256=file.sha256) for path, file in done.files.items()]
        if len(part.files) > 1:
            files.append(_write_index(part, stage))
        entries.append(_unquantized_entry(part, done, files))
    return entries, digests, seconds


def _unquantized_entry(part: UnquantizedPlan, done: ComponentResult, files: list[FileEntry]) -> UnquantizedEntry:
    return UnquantizedEntry(
        name=part.component.name,
        path=part.folder,
        library=part.component.library,
        class_name=part.component.class_name,
        files=files,
        tensors=[
            manifest.StoredEntry(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                sha256=done.tensors[tensor.same_as or tensor.name].written.sha256,
                file=tensor.file or "",
            )
            for tensor in part.tensors
        ],
    )


def _index_path(model: StreamedPlan) -> str:
    return join(model.folder, index_name(model.component, model.format))


def _write_index(component: StreamedPlan, stage: Stage) -> FileEntry:
    path = _index_path(component)
    where = {t.name: Path(t.file).name for t in component.tensors if t.file is not None}
    write_index(stage.root / path, where, sum(t.bytes_out for t in component.tensors))
    content = (stage.root / path).read_text(encoding="utf-8")
    return stage.write_text(path, content)


def _component_entry(plan: ComponentPlan, done: ComponentResult, extra: list[FileEntry], whole: Plan) -> ComponentEntry:
    kinds = {spec.name: spec.kind for spec in plan.skeleton}
    tensors = []
    for tensor in plan.tensors:
        result = done.tensors.get(tensor.name)
        tensors.append(
            manifest.TensorEntry(
                name=tensor.name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                action=tensor.action,
                reason=tensor.reason,
                scheme=tensor.scheme.name if tensor.scheme is not None else None,
                kind=kinds.get(tensor.name),
                class_name=result.written.class_name if result else "torch.Tensor",
                data_names=tuple(result.written.data_names) if result else (),
                bytes_in=tensor.bytes_in,
                bytes_out=result.written.nbytes if result else 0,
                sqnr_db=result.sqnr_db if result else None,
                max_abs_error=result.max_abs_error if result else None,
                repaired_rows=result.repaired if result else 0,
                device=_elsewhere(result, whole),
                file=tensor.file,
                sha256=result.written.sha256 if result else None,
            )
        )
    sealed = [FileEntry(path=path, size=file.size, sha256=file.sha256) for path, file in done.files.items()]
    names = sorted({name for file in done.files.values() for name in file.globals})
    worst = [entry.sqnr_db for entry in tensors if entry.sqnr_db is not None and math.isfinite(entry.sqnr_db)]
    return ComponentEntry(
        name=plan.component.name,
        path=plan.folder,
        library=plan.component.library,
        class_name=plan.component.class_name,
        module=plan.component.module,
        scheme=plan.scheme_name,
        config=config_dict(plan.config),
        dtype=_base_dtype(plan),
        layout=manifest.LayoutEntry(**layout_dict(plan.layout, plan.unconfirmed)),
        format=plan.format.name,
        files=sealed + extra,
        safe_globals=[name for name in names if name.partition(".")[0] not in ("torch", "collections", "builtins")],
        imports=imports(names),
        load=_load(plan, whole),
        loads_with={"torchao": f">={plan.min_torchao}", "torch": ">=2.6"},
        fused_qkv=bool(plan.skeleton.fused),
        rules=dict(rule_schemes(config_dict(plan.config), plan.layout.device)) if len(plan.schemes) > 1 else None,
        missing=[manifest.LeftOutEntry(**item.to_dict()) for item in plan.missing],
        dropped=[manifest.LeftOutEntry(**item.to_dict()) for item in plan.dropped],
        tensors=tensors,
        totals=manifest.Totals(**vars_of(plan.totals), worst_sqnr_db=min(worst, default=None)),
    )


def _elsewhere(result: TensorResult | None, whole: Plan) -> str | None:
    """The type of device that quantized a tensor, where it is not the plan's."""
    planned = whole.device.partition(":")[0]
    return result.device if result is not None and result.device != planned else None


def _load(plan: ComponentPlan, whole: Plan) -> manifest.LoadEntry:
    """How it is opened: by its class, or where its code is inside the checkpoint by the auto class that finds it."""
    component = plan.component
    kwargs, opener = _load_kwargs(plan), component.class_name
    if whole.trust_remote_code:
        if component.library == "transformers" and (found := auto_class(component)) is not None:
            kwargs, opener = {**kwargs, "trust_remote_code": True}, found
        elif _runs_code(whole.layout, component):
            kwargs = {**kwargs, "trust_remote_code": True}
    strategy: Literal["assign", "from_pretrained"] = "assign" if plan.skeleton.fused else "from_pretrained"
    return manifest.LoadEntry(strategy=strategy, class_name=opener, kwargs=kwargs)


def _runs_code(layout: ModelLayout, component: ModelPart) -> bool:
    """Whether diffusers needs code inside the checkpoint to open a component, or the pipeline around it."""
    modules = {part.library for part in layout.parts} | {component.module or component.library}
    return layout.own_code or not all(
        name in ("diffusers", "transformers") or is_pipeline_module(name) for name in modules
    )


def _load_kwargs(plan: ComponentPlan) -> dict[str, Any]:
    """diffusers' default dtype is float32 beside a quantized model, and it finds a sharded .bin only when told."""
    if plan.component.library == "transformers":
        return {}
    kwargs: dict[str, Any] = {"torch_dtype": _base_dtype(plan)}
    if len(plan.files) > 1:
        kwargs["use_safetensors"] = False
    return kwargs


def _base_dtype(plan: ComponentPlan) -> str:
    """The dtype that was decided on; of ``auto``, what most parameters have."""
    if plan.dtype != "auto":
        return plan.dtype
    counts: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.parameter:
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0]


def _source_entry(plan: Plan, digests: Mapping[str, FileEntry]) -> SourceEntry:
    card = read_card(plan.source)
    return SourceEntry(
        kind=plan.source.kind,
        repo_id=plan.source.repo_id,
        revision=plan.source.revision,
        subfolder=plan.subfolder,
        license=card.license if card else None,
        base_model=plan.source.repo_id,
        card=card,
        files=[digests[path] for path in sorted(digests)],
    )


def _environment(plan: Plan) -> manifest.EnvironmentEntry:
    device = device_facts(plan.device)
    return manifest.EnvironmentEntry(
        **versions(),
        platform=platform_name(),
        device=manifest.DeviceEntry(
            type=device.type,
            name=device.name,
            capability=list(device.capability) if device.capability else None,
        ),
    )


def _pipeline(plan: Plan) -> manifest.PipelineEntry | None:
    """``None`` for a model that is no pipeline, and for a pipeline whose class is not diffusers' own."""
    if plan.layout.kind != "pipeline":
        return None
    call = call_parameters(plan.layout.class_name)
    return None if call is None else manifest.PipelineEntry(class_name=plan.layout.class_name, call=dict(call))


def _result(plan: Plan, written: Manifest) -> QuantizeResult:
    totals = [component.totals for component in written.components]
    outside = sum(t.quantized_parameters / t.quantized_fraction for t in totals if t.quantized_fraction)
    quantized = sum(t.quantized_parameters for t in totals)
    named = len(plan.components) > 1
    return QuantizeResult(
        output=plan.output,
        manifest=written,
        seconds=written.run.seconds,
        bytes_in=sum(t.bytes_in for t in totals),
        bytes_out=sum(t.bytes_out for t in totals),
        parameters=sum(t.parameters for t in totals),
        quantized_parameters=quantized,
        quantized_fraction=quantized / outside if outside else 0.0,
        peak_host_bytes=written.run.peak_host_bytes,
        peak_device_bytes=written.run.peak_device_bytes,
        skipped=tuple(
            (f"{item.component.name}.{tensor.name}" if named else tensor.name, tensor.reason or "")
            for item in plan.components
            for tensor in item.skipped
        ),
        warnings=plan.warnings,
    )
