"""What the manifest says of a run: values made from plans and from what was written, for every verb that writes one."""

from __future__ import annotations

import datetime
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from aoconvert.checkpoint import manifest
from aoconvert.checkpoint.entries import Kind
from aoconvert.checkpoint.manifest import ComponentEntry, FileEntry, TensorEntry, UnquantizedEntry
from aoconvert.engine.memory import peak_device_bytes, peak_host_bytes
from aoconvert.engine.results import ComponentResult, Seconds, TensorResult
from aoconvert.engine.source_card import read_card
from aoconvert.environment import device_facts, platform_name, versions
from aoconvert.formats.base import SealedFile, WrittenTensor
from aoconvert.formats.registry import TORCH_BIN
from aoconvert.models import ModelLayout, ModelPart
from aoconvert.models.calls import call_parameters
from aoconvert.models.lora_files import LoraFile
from aoconvert.models.own_classes import is_pipeline_module
from aoconvert.models.transformers import auto_class
from aoconvert.planning import ComponentPlan, Plan
from aoconvert.planning.types import TensorPlan, UnquantizedPlan, config_dict, layout_dict
from aoconvert.recipes import rule_schemes
from aoconvert.schemes.base import Layout
from aoconvert.schemes.imports import imports
from aoconvert.sources import Source
from aoconvert.sources.file import FileSource
from aoconvert.version import __version__


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunClock:
    """When a run started, as ISO 8601 in UTC, and how many seconds have passed since."""

    started: str = field(default_factory=_now)
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began


def tool_entry() -> manifest.Tool:
    """Name this aoconvert."""
    return manifest.Tool(name="aoconvert", version=__version__)


def run_entry(
    clock: RunClock, command: str, devices: Sequence[str] = ("cpu",), seconds: Seconds | None = None
) -> manifest.RunEntry:
    """Sum up a run that ends now.

    Args:
        clock: started with the run.
        command: the command line that makes the result again.
        devices: where it quantized.
        seconds: time that each stage of the engine was at work.
    """
    seconds = seconds or Seconds()
    return manifest.RunEntry(
        command=command,
        started=clock.started,
        seconds=round(clock.seconds, 3),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=max(map(peak_device_bytes, devices)),
        reader_seconds=round(seconds.reader, 3),
        quantize_seconds=round(seconds.quantize, 3),
        writer_seconds=round(seconds.writer, 3),
    )


def source_entry(plan: Plan, files: Mapping[str, FileEntry]) -> manifest.SourceEntry:
    """Describe the source; ``files`` are the weights files that were read, by path."""
    card = read_card(plan.source)
    return manifest.SourceEntry(
        kind=plan.source.kind,
        repo_id=plan.source.repo_id,
        revision=plan.source.revision,
        subfolder=plan.subfolder,
        license=card.license if card else None,
        base_model=plan.source.repo_id,
        card=card,
        config=_config_entry(plan.source),
        loras=[_lora_entry(plan, lora) for lora in plan.loras],
        files=[files[path] for path in sorted(files)],
    )


def _lora_entry(plan: Plan, lora: LoraFile) -> manifest.LoraEntry:
    """Describe a LoRA that was added."""
    deltas = [delta for component in plan.components for found in component.deltas.values() for delta in found]
    return manifest.LoraEntry(
        label=lora.label,
        repo_id=lora.repo_id,
        revision=lora.revision,
        path=lora.path,
        weight=lora.weight,
        size=lora.size,
        sha256=lora.sha256,
        tensors=sum(delta.lora.sha256 == lora.sha256 for delta in deltas),
    )


def _config_entry(source: Source) -> manifest.ConfigEntry | None:
    """Say where the config of a single file came from."""
    if not isinstance(source, FileSource) or (origin := source.origin) is None:
        return None
    return manifest.ConfigEntry(
        repo_id=origin.repo_id, revision=origin.revision, folder=origin.folder, inferred=origin.inferred
    )


def environment_entry(device: str) -> manifest.EnvironmentEntry:
    """Name the installed versions, the platform, and the device that quantizes."""
    facts = device_facts(device)
    return manifest.EnvironmentEntry(
        **versions(),
        platform=platform_name(),
        device=manifest.DeviceEntry(
            type=facts.type, name=facts.name, capability=list(facts.capability) if facts.capability else None
        ),
    )


def pipeline_entry(layout: ModelLayout) -> manifest.PipelineEntry | None:
    """``None`` for a model that is not a pipeline, and for a pipeline whose class is not diffusers' own."""
    if layout.kind != "pipeline":
        return None
    call = call_parameters(layout.class_name)
    return None if call is None else manifest.PipelineEntry(class_name=layout.class_name, call=dict(call))


def file_entry(path: str, file: SealedFile) -> FileEntry:
    """Describe a weights file that is sealed; ``path`` is in the output."""
    return FileEntry(path=path, size=file.size, sha256=file.sha256)


def layout_entry(layout: Layout, unconfirmed: str | None) -> manifest.LayoutEntry:
    """Say where packed weights can be used, and why nobody can be sure of that yet."""
    return manifest.LayoutEntry(**layout_dict(layout, unconfirmed))


def loading_values(files: Iterable[SealedFile], *, torchao: bool = True) -> dict[str, list[str]]:
    """A component's ``safe_globals`` and ``imports``, by the names in the pickles of its files.

    Args:
        files: of the component.
        torchao: whether a tensor in them is quantized.
    """
    names = sorted({name for file in files for name in file.globals})
    foreign = [name for name in names if name.partition(".")[0] not in ("torch", "collections", "builtins")]
    return {"safe_globals": foreign, "imports": imports(names) if torchao else []}


def written_values(written: WrittenTensor) -> dict[str, Any]:
    """The values of a ``TensorEntry`` that only writing shows."""
    return {
        "class_name": written.class_name,
        "data_names": tuple(written.data_names),
        "bytes_out": written.nbytes,
        "sha256": written.sha256,
    }


def component_entry(
    plan: Plan, component: ComponentPlan, done: ComponentResult, others: Sequence[FileEntry]
) -> ComponentEntry:
    """Describe a quantized model.

    Args:
        plan: the whole plan.
        component: the model's part of it.
        done: what was written.
        others: its files that hold no weights.
    """
    model, quantized = component.component, bool(component.schemes)  # a migration may leave nothing quantized
    config = config_dict(component.config) if quantized else {}
    kinds = {spec.name: spec.kind for spec in component.skeleton}
    tensors = [
        _tensor_entry(tensor, kinds.get(tensor.name), done.tensors.get(tensor.name), plan.device)
        for tensor in component.tensors
    ]
    worst = [entry.sqnr_db for entry in tensors if entry.sqnr_db is not None and math.isfinite(entry.sqnr_db)]
    return ComponentEntry(
        name=model.name,
        path=component.folder,
        library=model.library,
        class_name=model.class_name,
        module=model.module,
        scheme=component.scheme_name or manifest.PLAIN,
        config=config,
        dtype=_base_dtype(component),
        layout=layout_entry(component.layout, component.unconfirmed),
        format=component.format.name,
        files=[*(file_entry(path, file) for path, file in done.files.items()), *others],
        **loading_values(done.files.values(), torchao=quantized),
        load=_load_entry(plan, component),
        loads_with={**({"torchao": f">={component.min_torchao}"} if quantized else {}), "torch": ">=2.6"},
        fused_qkv=bool(component.skeleton.fused),
        rules=dict(rule_schemes(config, component.layout.device)) if len(component.schemes) > 1 else None,
        original=manifest.OriginalEntry(**asdict(component.original)) if component.original is not None else None,
        migrated=None,
        converted=None,
        missing=[manifest.LeftOutEntry(**asdict(item)) for item in component.missing],
        dropped=[manifest.LeftOutEntry(**asdict(item)) for item in component.dropped],
        tensors=tensors,
        totals=manifest.Totals(**asdict(component.totals), worst_sqnr_db=min(worst, default=None)),
    )


def unquantized_entry(part: UnquantizedPlan, done: ComponentResult, others: Sequence[FileEntry]) -> UnquantizedEntry:
    """Describe a part of a pipeline that was not quantized; arguments as for ``component_entry``."""
    return UnquantizedEntry(
        name=part.component.name,
        path=part.folder,
        library=part.component.library,
        class_name=part.component.class_name,
        files=[*(file_entry(path, file) for path, file in done.files.items()), *others],
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


def _tensor_entry(tensor: TensorPlan, kind: Kind | None, result: TensorResult | None, device: str) -> TensorEntry:
    """Describe a tensor; without a result it is tied to another, and has no bytes of its own.

    Args:
        tensor: its plan.
        kind: what it belongs to, as the skeleton says; ``None`` for a tensor that the class does not know.
        result: what was written.
        device: the plan's first.
    """
    written = written_values(result.written) if result else {"class_name": "torch.Tensor", "bytes_out": 0}
    return TensorEntry(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        action=tensor.action,
        reason=tensor.reason,
        scheme=tensor.scheme.name if tensor.scheme is not None else None,
        kind=kind,
        bytes_in=tensor.bytes_in,
        sqnr_db=result.sqnr_db if result else None,
        max_abs_error=result.max_abs_error if result else None,
        repaired_rows=result.repaired if result else 0,
        device=result.device if result and result.device != device.partition(":")[0] else None,
        file=tensor.file,
        **written,
    )


def _load_entry(plan: Plan, component: ComponentPlan) -> manifest.LoadEntry:
    """How it is opened: by its class, or where its code is inside the checkpoint by the auto class that finds it."""
    model = component.component
    kwargs, opener = _load_kwargs(component), model.class_name
    if plan.trust_remote_code:
        if model.library == "transformers" and (found := auto_class(model)) is not None:
            kwargs, opener = {**kwargs, "trust_remote_code": True}, found
        elif _runs_code(plan.layout, model):
            kwargs = {**kwargs, "trust_remote_code": True}
    strategy: Literal["assign", "from_pretrained"] = "assign" if component.skeleton.fused else "from_pretrained"
    return manifest.LoadEntry(strategy=strategy, class_name=opener, kwargs=kwargs)


def _runs_code(layout: ModelLayout, model: ModelPart) -> bool:
    """Whether diffusers needs code inside the checkpoint to open a component, or the pipeline around it."""
    modules = {part.library for part in layout.parts} | {model.module or model.library}
    return layout.own_code or not all(
        name in ("diffusers", "transformers") or is_pipeline_module(name) for name in modules
    )


def _load_kwargs(component: ComponentPlan) -> dict[str, Any]:
    """diffusers' default dtype is float32 beside a quantized model, and it finds a sharded .bin only when told."""
    if component.component.library == "transformers":
        return {}
    kwargs: dict[str, Any] = {"torch_dtype": _base_dtype(component)}
    if len(component.files) > 1 and component.format is TORCH_BIN:
        kwargs["use_safetensors"] = False
    return kwargs


def _base_dtype(component: ComponentPlan) -> str:
    """The dtype that was decided on; of ``auto``, what most parameters have."""
    if component.dtype != "auto":
        return component.dtype
    counts: Counter[str] = Counter()
    for tensor in component.tensors:
        if tensor.parameter:
            counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0]
