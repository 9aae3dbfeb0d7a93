"""The plan of one model: its tensors, its files, its ``config.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aoconvert.formats.dtypes import dtype_name
from aoconvert.formats.registry import FORMATS, TORCH_BIN
from aoconvert.models import ModelLayout, ModelPart, Skeleton, build_skeleton, join
from aoconvert.models.bounds import Held, check_config, limit_model
from aoconvert.models.ties import untie
from aoconvert.models.unknown import other_weights
from aoconvert.options import DEFAULT_DTYPE, QuantizeOptions
from aoconvert.originals import is_quantized, refuse_unsupported, without_quantization
from aoconvert.planning.choices import Wishes
from aoconvert.planning.decide import Decisions, decide
from aoconvert.planning.files import lay_out, unstorable_problems
from aoconvert.planning.inventory import SourceTensors, dequantize_contents, read_contents
from aoconvert.planning.sharing import Shared
from aoconvert.planning.slices import SLICE_BYTES, by_rows
from aoconvert.planning.source_checkpoint import read_checkpoint
from aoconvert.planning.types import ComponentPlan, TensorPlan
from aoconvert.planning.weights import chosen_weights, is_only
from aoconvert.recipes import fqn_to_config
from aoconvert.recipes.rules import Rules

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from aoconvert.models.lora import Delta, LoraPart
    from aoconvert.originals import Original
    from aoconvert.planning.source_checkpoint import SourceCheckpoint
    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles


def plan_component(
    source: Source,
    layout: ModelLayout,
    component: ModelPart,
    rules: Rules,
    options: QuantizeOptions,
    shared: Shared,
    *,
    need_weights: bool,
    fuse_qkv: bool,
    loras: Sequence[LoraPart] = (),
) -> tuple[ComponentPlan, list[str]]:
    """Decide everything about one model.

    Args:
        source: the resolved source.
        layout: what the source holds.
        component: the model.
        rules: which scheme is for which of its tensors.
        options: what the user asked for.
        shared: what other plans of the source found already.
        need_weights: a model without weights is a problem.
        fuse_qkv: with fused projections.
        loras: what LoRAs hold for it.

    Returns:
        The plan, and what is wrong.

    Raises:
        CannotFuse: its projections cannot be fused.
        SourceError: the source cannot be read at all.
    """
    refuse_unsupported(component)  # before its files are read, which would say it in their words
    stored = shared.once(
        options, ("stored", component.name, component.folder), lambda: _read(source, component, options)
    )
    weights, contents, original, component = stored.weights, stored.contents, stored.original, stored.component
    draft = _draft_that_runs(
        partial(_draft, source, stored, rules, options, shared, fuse_qkv=fuse_qkv),
        original.dtype if original is not None and options.dtype == "auto" else options.dtype,
    )
    folder = "" if layout.kind != "pipeline" or is_only(layout, options) else component.name
    deltas, unfit = _match_loras(loras, draft.skeleton)
    plan, unstorable = _build(component, rules, draft, weights, folder, options, deltas)
    problems = [*draft.problems, *unfit, *unstorable]
    if original is not None and contents is not None:
        original = replace(original, carried=sum(tensor.carried for tensor in plan.tensors))
        plan = replace(plan, original=original, made={n: t for n, t in contents.tensors.items() if t.formula})
        if plan.copied is not None:
            problems.append(f"{component.title}: it is quantized, and cannot be read tensor by tensor: {plan.copied}")
    if weights is None and need_weights:
        problems.append(_no_weights(source, component))
    if not draft.decisions.problems:
        problems += _too_little(plan, options.min_quantized)
    return plan, problems


@dataclass(frozen=True)
class _Stored:
    """A model's files, what they hold, and the model as if it were not quantized."""

    component: ModelPart
    weights: WeightFiles | None
    contents: SourceTensors | None
    held: Held | None
    original: Original | None


def _read(source: Source, component: ModelPart, options: QuantizeOptions) -> _Stored:
    """Find a model's files and read their headers.

    Raises:
        SourceError: they cannot be read, or the config asks for more than they hold.
    """
    weights = chosen_weights(source, component, options.variant)
    contents = read_contents(source, weights, component.name) if weights is not None else None
    held = Held.of(tensor.nbytes for tensor in contents.tensors.values()) if contents is not None else None
    check_config(component.title, component.config, held)
    original = None
    if contents is not None and is_quantized(component):
        contents, original = dequantize_contents(source, component, contents)
    return _Stored(without_quantization(component), weights, contents, held, original)


@dataclass(frozen=True)
class _Opened:
    """An empty model, what it finds in its files, and the names that ``--untie`` freed; ``problem`` says why none."""

    skeleton: Skeleton
    found: SourceCheckpoint | None
    free: Mapping[str, str]
    problem: str | None


@dataclass(frozen=True)
class _Draft:
    """What was decided about a model's tensors, for one dtype; ``cannot_run`` as in ``ComponentPlan``."""

    dtype: str
    skeleton: Skeleton
    found: SourceCheckpoint | None
    decisions: Decisions
    problems: tuple[str, ...]
    cannot_run: tuple[str, str] | None = None


def _draft_that_runs(draft: Callable[[str], _Draft], wanted: str | None) -> _Draft:
    """The draft for a dtype in which the model runs, where there is one: the source's if not the default.

    Args:
        draft: makes it for a dtype.
        wanted: the dtype that the user asked for.
    """
    made = draft(wanted or DEFAULT_DTYPE)
    if made.decisions.cannot_run is None:
        return made
    cannot_run = (made.dtype, made.decisions.cannot_run)
    source_dtype = _most_common_dtype(made.found)
    if wanted is None and source_dtype != made.dtype:
        made = draft(source_dtype)
    return replace(made, cannot_run=cannot_run)


def _draft(
    source: Source,
    stored: _Stored,
    rules: Rules,
    options: QuantizeOptions,
    shared: Shared,
    asked_dtype: str,
    *,
    fuse_qkv: bool,
) -> _Draft:
    """Decide about a model's tensors; the library gets the time and the memory that its files call for."""
    import torch

    component = stored.component
    dtype = None if asked_dtype == "auto" else getattr(torch, asked_dtype)
    with limit_model(component.title, stored.held):
        opened = shared.once(
            options,
            ("opened", component.name, component.folder, asked_dtype, fuse_qkv),
            lambda: _open(source, stored, options, dtype or torch.bfloat16, fuse_qkv=fuse_qkv),
        )
        wishes = Wishes(options.include_embeddings, options.default_skips, options.carry)
        decisions = decide(opened.skeleton, rules, wishes, dtype, opened.found, opened.free)
    problems = [opened.problem] if opened.problem is not None else []
    return _Draft(asked_dtype, opened.skeleton, opened.found, decisions, (*problems, *decisions.problems))


def _open(source: Source, stored: _Stored, options: QuantizeOptions, dtype: torch.dtype, *, fuse_qkv: bool) -> _Opened:
    """Build the empty model and have the library open its files in it."""
    component, weights, contents = stored.component, stored.weights, stored.contents
    code = source.root / component.folder if options.trust_remote_code else None
    problem, found = None, None
    free: Mapping[str, str] = {}
    skeleton = build_skeleton(component, dtype, code_root=code, fuse_qkv=fuse_qkv)
    if options.untie:
        apart = untie(skeleton, dtype, code_root=code)
        skeleton, free = apart.skeleton, apart.free
        if not free:
            why = next(iter(apart.stuck.values()), "none of its tensors share their memory")
            problem = f"{component.title}: --untie: {why}"
    if weights is not None and contents is not None:
        sharded = weights.index is not None
        skeleton, found = read_checkpoint(source, skeleton, contents, options, dtype, sharded=sharded, code_root=code)
    return _Opened(skeleton, found, free, problem)


def _build(
    component: ModelPart,
    rules: Rules,
    draft: _Draft,
    weights: WeightFiles | None,
    folder: str,
    options: QuantizeOptions,
    deltas: Mapping[str, tuple[Delta, ...]],
) -> tuple[ComponentPlan, list[str]]:
    """Put the plan together, and say what its format cannot store; ``folder`` is where it goes in the output."""
    skeleton, found, decisions = draft.skeleton, draft.found, draft.decisions
    inventory = found.inventory if found is not None else None
    source_order = inventory.order if inventory else ()
    format_ = FORMATS[options.format]
    unstorable = unstorable_problems(component, format_, decisions.outputs)
    if unstorable:
        format_ = TORCH_BIN  # for the rest of the plan, which says what else is wrong
    tensors, order, files = lay_out(
        component,
        format_,
        folder,
        [_with_loras(tensor, deltas.get(tensor.name, ())) for tensor in decisions.tensors],
        decisions.outputs,
        source_order,
        options.max_shard_size,
    )
    plan = ComponentPlan(
        component=_with_config(skeleton.component, decisions, drop_unknown=options.drop_unknown),
        rules=rules,
        config=_config(rules, decisions, skeleton),
        folder=folder,
        format=format_,
        dtype=draft.dtype,
        tensors=tensors,
        order=order,
        files=files,
        skip_modules=(*skip_modules(component, tensors), *_missing_modules(skeleton, decisions)),
        missing=decisions.missing,
        dropped=decisions.dropped,
        apart=found.apart if found else (),
        copied=inventory.obstacle if inventory else None,
        weights=weights,
        skeleton=skeleton,
        recipes=inventory.recipes if inventory else {},
        cannot_run=draft.cannot_run,
        deltas=deltas,
    )
    return plan, unstorable


def _match_loras(loras: Sequence[LoraPart], skeleton: Skeleton) -> tuple[dict[str, tuple[Delta, ...]], list[str]]:
    """What LoRAs add to which tensor of a model, and what is wrong with them."""
    if not loras:
        return {}, []
    from aoconvert.models.lora import match_deltas

    found: dict[str, tuple[Delta, ...]] = {}
    problems: list[str] = []
    for part in loras:
        deltas, unfit = match_deltas(part, skeleton)
        problems += unfit
        for name, delta in deltas.items():
            found[name] = (*found.get(name, ()), delta)
    return found, problems


def _with_loras(tensor: TensorPlan, deltas: Sequence[Delta]) -> TensorPlan:
    """The tensor's plan with what adding LoRAs to it takes: its rows and what is added to them, in float32."""
    if not deltas:
        return tensor
    rows = min(tensor.numel, SLICE_BYTES // (tensor.bytes_read // tensor.numel)) if by_rows(tensor) else tensor.numel
    thin = sum(step.nbytes for delta in deltas for step in (delta.a, delta.b) if step is not None)
    if tensor.carried:
        tensor = replace(tensor, carried=False, reason="not carried: a LoRA is added to it")
    return replace(
        tensor,
        action="cast" if tensor.action == "keep" else tensor.action,
        working_bytes=tensor.working_bytes + 12 * rows + 2 * thin,
    )


def _no_weights(source: Source, component: ModelPart) -> str:
    others = other_weights(source, component.folder)
    where = join(source.label, component.folder)
    return f"{component.title}: no weights in {where}" + (f", {others}" if others else "")


def _too_little(component: ComponentPlan, min_quantized: float) -> list[str]:
    """The problem that less than ``min_quantized`` (0 to 1) would be quantized, or nothing at all."""
    title, totals, skipped = component.component.title, component.totals, component.skipped
    if totals.quantized_fraction < min_quantized:
        return [
            f"{title}: {_asked(component.rules)} would quantize {totals.quantized_fraction:.0%} of the parameters "
            f"outside embeddings, less than --min-quantized {min_quantized:g} ({sum(t.numel for t in skipped):,} "
            f"parameters in {len(skipped)} matrices are left out: {_reasons(skipped)})"
        ]
    if not totals.quantized_parameters:
        return [f"{title}: nothing is left to quantize ({_reasons(skipped)})"]
    return []


def _most_common_dtype(found: SourceCheckpoint | None) -> str:
    """What most of the checkpoint's floating values are in; float32 where nobody knows."""
    counts: Counter[str] = Counter()
    for tensor in found.inventory.direct.values() if found is not None else ():
        if tensor.dtype.is_floating_point:
            counts[dtype_name(tensor.dtype)] += tensor.nbytes
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


def skip_modules(component: ModelPart, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
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
