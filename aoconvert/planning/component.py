"""The plan of one model: its tensors, its files, its ``config.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aoconvert import schemes
from aoconvert.formats.registry import OUTPUT
from aoconvert.humanize import size
from aoconvert.models import ModelLayout, ModelPart, Skeleton, build_skeleton, join
from aoconvert.models.bounds import Held, bounded, check_config
from aoconvert.models.pipeline import refuse_quantized
from aoconvert.models.ties import untied
from aoconvert.models.unknown import other_weights
from aoconvert.options import DEFAULT_DTYPE, QuantizeOptions
from aoconvert.planning import files as plan_files
from aoconvert.planning.choices import Wishes
from aoconvert.planning.decide import Decisions, decide, nbytes
from aoconvert.planning.inventory import SourceTensors, read_contents
from aoconvert.planning.source_checkpoint import read_checkpoint
from aoconvert.planning.types import ComponentPlan, FilePlan, LeftOut, TensorPlan
from aoconvert.planning.weights import chosen_weights, is_only
from aoconvert.recipes import fqn_to_config
from aoconvert.recipes.rules import Rules
from aoconvert.schemes.apply import quantize_weight
from aoconvert.sources.adapters import ADAPTER_CONFIG, adapter_files

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from aoconvert.planning.source_checkpoint import SourceCheckpoint
    from aoconvert.sources import Source


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def plan_component(
    source: Source,
    layout: ModelLayout,
    component: ModelPart,
    rules: Rules,
    options: QuantizeOptions,
    *,
    need_weights: bool,
    fuse_qkv: bool,
) -> tuple[ComponentPlan, list[str]]:
    """Decide everything about one model.

    Args:
        source: the resolved source.
        layout: what the source holds.
        component: the model.
        rules: which scheme is for which of its tensors.
        options: what the user asked for.
        need_weights: a model without weights is a problem.
        fuse_qkv: with fused projections.

    Returns:
        The plan, and what is wrong.

    Raises:
        CannotFuse: its projections cannot be fused.
        SourceError: the source cannot be read at all.
    """
    refuse_quantized(component)  # before its files are read, which would say it in their words
    weights = chosen_weights(source, component, options.variant)
    contents = read_contents(source, weights) if weights is not None else None
    held = Held.of(tensor.nbytes for tensor in contents.tensors.values()) if contents is not None else None
    check_config(component.title, component.config, held)
    checkpoint = (contents, weights.index is not None) if weights is not None and contents is not None else None
    draft = partial(_draft, source, component, rules, options, checkpoint, held, fuse_qkv=fuse_qkv)
    dtype, cannot_run = options.dtype or DEFAULT_DTYPE, None
    made = draft(dtype)
    if made.decisions.cannot_run is not None:
        cannot_run = (dtype, made.decisions.cannot_run)
        source_dtype = _most_common_dtype(made.found)
        if options.dtype is None and source_dtype != dtype:
            dtype, made = source_dtype, draft(source_dtype)
    skeleton, found, decisions = made.skeleton, made.found, made.decisions
    inventory = found.inventory if found is not None else None
    problems = [*made.problems, *decisions.problems]
    if weights is None and need_weights:
        others = other_weights(source, component.folder)
        problems.append(
            f"{component.title}: no weights in {join(source.label, component.folder)}"
            + (f", {others}" if others else "")
        )
    folder = "" if layout.kind != "pipeline" or is_only(layout, options) else component.name
    tensors, order, files = lay_out(
        component,
        folder,
        decisions.tensors,
        decisions.outputs,
        inventory.order if inventory else (),
        options.max_shard_size,
    )
    plan = ComponentPlan(
        component=_with_config(skeleton.component, decisions, drop_unknown=options.drop_unknown),
        rules=rules,
        config=_config(rules, decisions, skeleton),
        folder=folder,
        dtype=dtype,
        tensors=tensors,
        order=order,
        files=files,
        skip_modules=(*_skip_modules(component, tensors), *_missing_modules(skeleton, decisions)),
        missing=decisions.missing,
        dropped=decisions.dropped,
        apart=found.apart if found else (),
        copied=inventory.obstacle if inventory else None,
        weights=weights,
        skeleton=skeleton,
        recipes=inventory.recipes if inventory else {},
        cannot_run=cannot_run,
    )
    totals = plan.totals
    if not decisions.problems and totals.quantized_fraction < options.min_quantized:
        skipped = sum(t.numel for t in plan.skipped)
        problems.append(
            f"{component.title}: {_asked(rules)} would quantize {totals.quantized_fraction:.0%} of the parameters "
            f"outside embeddings, less than --min-quantized {options.min_quantized:g} ({skipped:,} parameters in "
            f"{len(plan.skipped)} matrices are left out: {_reasons(plan.skipped)})"
        )
    elif not decisions.problems and not totals.quantized_parameters:
        problems.append(f"{component.title}: nothing is left to quantize ({_reasons(plan.skipped)})")
    return plan, problems


@dataclass(frozen=True)
class _Draft:
    """What was decided about a model's tensors, for one dtype."""

    skeleton: Skeleton
    found: SourceCheckpoint | None
    decisions: Decisions
    problems: tuple[str, ...]


def _draft(
    source: Source,
    component: ModelPart,
    rules: Rules,
    options: QuantizeOptions,
    checkpoint: tuple[SourceTensors, bool] | None,
    held: Held | None,
    dtype_name: str,
    *,
    fuse_qkv: bool,
) -> _Draft:
    """``checkpoint``: what its files hold, and whether there is an index. The library gets what they call for."""
    with bounded(component.title, held):
        return _drafted(source, component, rules, options, checkpoint, dtype_name, fuse_qkv=fuse_qkv)


def _drafted(
    source: Source,
    component: ModelPart,
    rules: Rules,
    options: QuantizeOptions,
    checkpoint: tuple[SourceTensors, bool] | None,
    dtype_name: str,
    *,
    fuse_qkv: bool,
) -> _Draft:
    import torch

    dtype = _dtype(dtype_name)
    code = source.root / component.folder if options.trust_remote_code else None
    skeleton = build_skeleton(component, dtype or torch.bfloat16, code_root=code, fuse_qkv=fuse_qkv)
    free: Mapping[str, str] = {}
    problems = []
    if options.untie:
        apart = untied(skeleton, dtype or torch.bfloat16, code_root=code)
        skeleton, free = apart.skeleton, apart.free
        if not free:
            why = next(iter(apart.stuck.values()), "none of its tensors share their memory")
            problems.append(f"{component.title}: --untie: {why}")
    found = None
    if checkpoint is not None:
        contents, sharded = checkpoint
        skeleton, found = read_checkpoint(
            source, skeleton, contents, options, dtype or torch.bfloat16, sharded=sharded, code_root=code
        )
    wishes = Wishes(options.include_embeddings, options.default_skips)
    return _Draft(skeleton, found, decide(skeleton, rules, wishes, dtype, found, free), tuple(problems))


def _most_common_dtype(found: SourceCheckpoint | None) -> str:
    """What most of the checkpoint's floating values are in; float32 where nobody knows."""
    counts: Counter[str] = Counter()
    for tensor in found.inventory.direct.values() if found is not None else ():
        if tensor.dtype.is_floating_point:
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return counts.most_common(1)[0][0] if counts else "float32"


# Keys that count the layers for multi-token prediction, which are in the checkpoint and not in the model class
_PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def _with_config(component: ModelPart, decisions: Decisions, *, drop_unknown: bool) -> ModelPart:
    """The model with what its ``config.json`` has to say so that it can be loaded and used."""
    changes: dict[str, Any] = {}
    if decisions.implementation is not None:
        changes["experts_implementation"] = decisions.implementation
    if drop_unknown and decisions.dropped:
        changes |= _without_prediction(component.config)
    return replace(component, config={**component.config, **changes}) if changes else component


def _without_prediction(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that announce layers for multi-token prediction, set to none; at the top and in nested configs."""
    changes: dict[str, Any] = {key: 0 for key in _PREDICTION_LAYERS if config.get(key)}
    for name, value in config.items():
        if isinstance(value, dict) and (inner := _without_prediction(value)):
            changes[name] = {**value, **inner}
    return changes


def _asked(rules: Rules) -> str:
    if rules.default is not None:
        return rules.default.name
    return rules.rules[0].origin if rules.rules else "the recipe"


def _config(rules: Rules, decisions: Decisions, skeleton: Skeleton) -> AOBaseConfig:
    linear = {spec.name for spec in skeleton if spec.kind == "linear"}
    return fqn_to_config(rules, {tensor.name: tensor.scheme for tensor in decisions.tensors}, linear)


def _reasons(skipped: Sequence[TensorPlan]) -> str:
    """The reasons, most parameters first."""
    weight: dict[str, int] = {}
    for tensor in skipped:
        weight[tensor.reason or ""] = weight.get(tensor.reason or "", 0) + tensor.numel
    return "; ".join(sorted(weight, key=lambda reason: -weight[reason])[:3]) or "no matrices"


def lay_out(
    component: ModelPart,
    folder: str,
    planned: Sequence[TensorPlan],
    outputs: Mapping[str, torch.Tensor],
    order: Sequence[str],
    limit: int | None,
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...], tuple[FilePlan, ...]]:
    """Deal tensors to files, and compute each file's exact size.

    Args:
        component: the model.
        folder: its folder in the output.
        planned: its tensors, in state-dict order.
        outputs: what is written for them, on ``meta``.
        order: names as they lie in the source.
        limit: tensor bytes a file; ``None``: what the library can open.

    Returns:
        The tensors with their files, names in the order they are written, and the files.
    """
    predict_size = OUTPUT.writer.predict_size
    default = (
        plan_files.DIFFUSERS_FILE_BYTES if component.library == "diffusers" else plan_files.TRANSFORMERS_FILE_BYTES
    )
    dealt = plan_files.assign(planned, order, limit or default)
    where: dict[str, str] = {}
    files = []
    for number, names in enumerate(dealt, start=1):
        path = join(folder, plan_files.weights_name(component, OUTPUT, number, len(dealt)))
        where.update(dict.fromkeys(names, path))
        also = {tensor.name: tensor.same_as for tensor in planned if tensor.same_as in where}
        also = {name: same for name, same in also.items() if where[same] == path}
        where.update(dict.fromkeys(also, path))
        # the file lists tensors in state-dict order, their data lies in the order it was read
        listed = [tensor.name for tensor in planned if where.get(tensor.name) == path]
        files.append(FilePlan(path, predict_size({name: outputs[name] for name in names}, listed, also)))
    tensors = tuple(replace(tensor, file=where.get(tensor.name)) for tensor in planned)
    return tensors, tuple(name for names in dealt for name in names), tuple(files)


def _skip_modules(component: ModelPart, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    """``modules_to_not_convert``: linear modules that stay as they are.

    diffusers matches an entry as a substring of a parameter's name; an entry that would also catch a quantized
    parameter is written as the full parameter name, which it matches exactly.
    """
    quantized = [tensor.name for tensor in tensors if tensor.action == "quantize"]
    entries = []
    for tensor in tensors:
        if not tensor.candidate or tensor.action == "quantize" or not tensor.name.endswith(".weight"):
            continue
        module = tensor.name.removesuffix(".weight")
        clash = component.library == "diffusers" and any(f"{module}." in name for name in quantized)
        entries.append(tensor.name if clash else module)
    return tuple(entries)


def _missing_modules(skeleton: Skeleton, decisions: Decisions) -> list[str]:
    """Linear modules whose weight the library makes: it must not quantize that."""
    left = {item.name for item in decisions.missing}
    return [spec.module for spec in skeleton if spec.name in left and spec.kind == "linear"]


def _adapter_warnings(source: Source, component: ModelPart) -> list[str]:
    if component.library != "transformers":
        return []
    if found := adapter_files(source, component.folder):
        name = found[-1].rpartition("/")[2]
        # integrations.peft.maybe_load_adapters: only what is a folder keeps its own weights
        hub = "; of a repo on the Hub transformers then opens the model that it names as its base"
        return [f"{component.title}: {name} beside its weights is loaded with the weights where peft is installed{hub}"]
    if source.has(join(component.folder, ADAPTER_CONFIG)):
        return [f"{component.title}: {ADAPTER_CONFIG} is of an adapter whose weights are not there; it is left out"]
    return []


def component_warnings(source: Source, plan: ComponentPlan) -> list[str]:
    """What is not wrong, but the user should know."""
    title = plan.component.title
    lines = list(dict.fromkeys(f"{title}: {note}" for scheme in plan.schemes for note in scheme.notes))
    if plan.cannot_run is not None:
        dtype, error = plan.cannot_run
        what = f"it stays in {plan.dtype}" if plan.dtype != dtype else "--dtype float32 gives one that runs"
        lines.append(f"{title}: {plan.component.class_name} cannot run in {dtype} ({error}); {what}")
    if plan.component.config.get("experts_implementation") == "eager":
        lines.append(f"{title}: its experts run one after the other; nothing else multiplies them when quantized so")
    if plan.skeleton.fused:
        lines.append(f"{title}: from_pretrained cannot open fused projections; the load code assigns the weights")
    if plan.component.library == "diffusers" and len(plan.files) > 1:
        lines.append(f"{title}: diffusers opens a sharded .bin only with use_safetensors=False")
    for name, origin in plan.apart:
        lines.append(f"{title}: {name} and {origin} should be one by its config, but differ: both are kept")
    lines += _adapter_warnings(source, plan.component)
    lines += _counted(title, "tensors that its class does not know are carried over unchanged", plan.carried)
    lines += dropped_warning(title, plan.dropped)
    lines += _counted(title, "tensors that the checkpoint does not hold are left to the library", plan.missing)
    if (larger := _larger_than_int8(plan)) is not None:
        lines.append(f"{title}: {larger}")
    if plan.copied is not None:
        lines.append(f"{title}: transformers makes a copy of its merged tensors while it runs ({plan.copied})")
    return lines


def _larger_than_int8(plan: ComponentPlan) -> str | None:
    """Weights of fewer than 8 bits that take more bytes than int8wo's would: padding makes small layers large."""
    few = [t for t in plan.tensors if t.scheme is not None and t.scheme.format.bytes_per_parameter < _INT8_BYTES]
    if not few:
        return None
    here = sum(tensor.bytes_out for tensor in few)
    counts = Counter((tensor.shape, tensor.dtype) for tensor in few)
    int8 = sum(count * _int8_bytes(*kind) for kind, count in counts.items())
    if here <= int8:
        return None
    names = "+".join(dict.fromkeys(t.scheme.name for t in few if t.scheme is not None))
    return f"{names} takes {size(here)}, int8wo would take {size(int8)}: the layout pads layers this small"


def _int8_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """What int8wo stores for a weight."""
    import torch

    return nbytes(
        quantize_weight(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"), schemes.get("int8wo"))
    )


_INT8_BYTES = 0.9  # bytes per parameter; a scheme above it promises nothing smaller than int8wo


def dropped_warning(title: str, dropped: Sequence[LeftOut]) -> list[str]:
    """What the checkpoint holds and the result does not; no line where that is nothing."""
    return _counted(title, "entries of the checkpoint are left out", dropped)


def _counted(title: str, what: str, items: Sequence[LeftOut | TensorPlan]) -> list[str]:
    if not items:
        return []
    shown = ", ".join(item.name for item in items[:3]) + (", …" if len(items) > 3 else "")
    return [f"{title}: {len(items)} {what}: {shown}"]
