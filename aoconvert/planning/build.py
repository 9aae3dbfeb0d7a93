"""Builds the plan: every decision and every problem, from configs and headers, with no weights read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aoconvert import recipes, schemes
from aoconvert.checkpoint.lock import refuse_held
from aoconvert.environment import choose_devices
from aoconvert.errors import PlanError, SourceError
from aoconvert.humanize import plural
from aoconvert.models import ModelPart, identify
from aoconvert.models.fused import CannotFuse
from aoconvert.options import QuantizeOptions
from aoconvert.originals import refuse_unsupported
from aoconvert.planning.component import plan_component
from aoconvert.planning.component_warnings import component_warnings, dropped_warning
from aoconvert.planning.copying import sort_files, unread_pickles
from aoconvert.planning.needs import needs
from aoconvert.planning.output import output_problems, space_problems
from aoconvert.planning.sharing import Shared
from aoconvert.planning.types import ComponentPlan, Plan, StreamedPlan, UnquantizedPlan
from aoconvert.planning.unquantized import part_problems, plan_unquantized
from aoconvert.planning.weights import choose_components, is_only, load_recipe
from aoconvert.recipes.rules import Rules, allow_rules, find_unmatched, skip_rules

if TYPE_CHECKING:
    from aoconvert.models import ModelLayout
    from aoconvert.models.lora import LoraPart
    from aoconvert.models.lora_files import LoraFile
    from aoconvert.recipes import Recipe
    from aoconvert.sources import Source


def build_plan(
    source: Source,
    options: QuantizeOptions,
    *,
    need_weights: bool = False,
    elsewhere: bool = False,
    rules: Mapping[str, Rules] | None = None,
    shared: Shared | None = None,
) -> Plan:
    """Decide everything about a conversion.

    Args:
        source: the resolved source.
        options: what the user asked for.
        need_weights: the plan will be carried out: a source without weights is a problem, and so is a disk that is
            too small (otherwise a warning).
        elsewhere: another machine will carry it out, so the disk here does not matter.
        rules: component name → which scheme for which tensor; by default what the options say.
        shared: what other plans of this source found already.

    Raises:
        PlanError: with every problem at once.
        SourceError: the source cannot be read at all.
        UsageError: unknown scheme, bad setting.
    """
    shared = shared or Shared()
    layout = shared.once(options, ("layout",), lambda: identify(source, options.subfolder))
    recipe = load_recipe(options)
    chosen, problems = choose_components(layout, options, recipe)
    for model in chosen:
        refuse_unsupported(model)  # before torch is imported
    devices, unusable = _choose_devices(options.device)
    rules = rules or {model.name: resolve_rules(options, model, devices[0], recipe) for model in chosen}
    loras, parts, unused = _read_loras(layout, chosen, options)
    components, found, warnings = _plan_components(
        source, layout, chosen, rules, options, parts, shared, need_weights=need_weights
    )
    problems += [
        *unused,
        *unusable,
        *found,
        *_list_unmatched(components),
        *_list_unmatched_missing(components, options),
        *_nothing_carried(components, options),
    ]
    # a plan writes nothing: what is in the way of carrying it out is worth knowing, no more
    obstacles = problems if need_weights else warnings
    unquantized, incomplete, dropped = _plan_others(source, layout, chosen, options, shared)
    obstacles += incomplete
    warnings += dropped
    streamed: tuple[StreamedPlan, ...] = (*components, *unquantized)
    fetch = [path for model in streamed if model.weights for path in model.weights.paths]
    copied, left_behind = sort_files(source, layout, chosen, fetch, options)
    problems += unread_pickles(source, copied)
    wanted = needs(components, unquantized, copied, devices)
    obstacles += output_problems(source, options.output, overwrite=options.overwrite)
    # of a config alone the plan is a calculation: nothing could be carried out anyway
    possible = need_weights or any(component.weights for component in components)
    if not elsewhere:
        (problems if possible else warnings).extend(space_problems(options.output, wanted.disk_bytes))
    problems += _unreadable(source, [file.source for file in copied])
    if problems:
        raise PlanError(problems)
    return Plan(
        source=source,
        layout=layout,
        output=options.output,
        devices=devices,
        components=tuple(components),
        unquantized=unquantized,
        copied=copied,
        left_behind=left_behind,
        fetch=(*fetch, *(file.source for file in copied)),
        needs=wanted,
        warnings=tuple(warnings),
        subfolder=options.subfolder,
        variant=options.variant,
        trust_remote_code=options.trust_remote_code,
        allow_cpu=options.device == "auto",
        loras=tuple(loras),
    )


def refuse_early(source: Source, options: QuantizeOptions) -> None:
    """Refuse a conversion for what can be seen without torch, so that nobody waits for its import.

    Raises:
        PlanError: the output is in the way, or a component is not there, all at once; another process writes there.
        SourceError: the source cannot be read at all, or is quantized by a method that is not read.
        UsageError: the recipe has a mistake.
    """
    layout = identify(source, options.subfolder)
    chosen, problems = choose_components(layout, options, load_recipe(options))
    problems += output_problems(source, options.output, overwrite=options.overwrite)
    if problems:
        raise PlanError(problems)
    refuse_held(options.output)
    for model in chosen:
        refuse_unsupported(model)


def _choose_devices(wanted: str) -> tuple[tuple[str, ...], list[str]]:
    """Where weights are quantized, and why it cannot be where the user wants it."""
    try:
        return choose_devices(wanted), []
    except PlanError as error:
        return ("cpu",), list(error.problems)


def _plan_components(
    source: Source,
    layout: ModelLayout,
    chosen: Sequence[ModelPart],
    rules: Mapping[str, Rules],
    options: QuantizeOptions,
    loras: Mapping[str, Sequence[LoraPart]],
    shared: Shared,
    *,
    need_weights: bool,
) -> tuple[list[ComponentPlan], list[str], list[str]]:
    """The plans of the chosen models, what is wrong with them, and what the user should know.

    Raises:
        CannotFuse: fused projections were asked for, and not one of the models can have them.
        SourceError: the source cannot be read at all.
    """
    components: list[ComponentPlan] = []
    problems: list[str] = []
    warnings: list[str] = []
    refusals: list[CannotFuse] = []
    for model in chosen:
        plan_model = partial(
            plan_component,
            source,
            layout,
            model,
            rules[model.name],
            options,
            shared,
            need_weights=need_weights,
            loras=loras.get(model.name, ()),
        )
        try:
            component, found = plan_model(fuse_qkv=options.fuse_qkv)
        except CannotFuse as refusal:  # a text encoder, or a VAE, beside a denoiser that can
            refusals.append(refusal)
            component, found = plan_model(fuse_qkv=False)
        components.append(component)
        problems += found
        warnings += component_warnings(source, component)
    if refusals and len(refusals) == len(components):
        raise refusals[0]
    return components, problems, [*warnings, *(f"{refusal}: its projections stay separate" for refusal in refusals)]


def _read_loras(
    layout: ModelLayout, chosen: Sequence[ModelPart], options: QuantizeOptions
) -> tuple[list[LoraFile], dict[str, list[LoraPart]], list[str]]:
    """The LoRAs, what they hold for each chosen model, and what they hold for others.

    Raises:
        SourceError: one is damaged, or of a kind that is not supported.
    """
    if not options.lora:
        return [], {}, []
    from aoconvert.models.lora import split_lora
    from aoconvert.models.lora_files import read_loras

    loras = read_loras(options.lora, options.hub)
    names = {model.name for model in chosen}
    parts: dict[str, list[LoraPart]] = {}
    problems = []
    for lora in loras:
        for name, part in split_lora(lora, layout).items():
            parts.setdefault(name, []).append(part)
            if name not in names:
                also = " ".join(f"--component {item}" for item in [*names, name])
                problems.append(f"--lora {lora.label} also changes {name}, which is not quantized ({also})")
    return loras, parts, problems


def _plan_others(
    source: Source, layout: ModelLayout, chosen: Sequence[ModelPart], options: QuantizeOptions, shared: Shared
) -> tuple[tuple[UnquantizedPlan, ...], list[str], list[str]]:
    """The parts of a pipeline that are written as they are, what others lack, and what the user should know."""
    if not chosen or layout.kind != "pipeline" or is_only(layout, options):
        return (), [], []
    problems = part_problems(source, layout, chosen, options.variant)
    if source.elsewhere and options.keep_original_files:
        raise SourceError(
            f"{source.label}: --keep-original-files does not work with a single file", hint="omit --keep-original-files"
        )
    if options.keep_original_files:
        return (), problems, []
    others = ("others", options.format, options.max_shard_size, *(model.folder for model in chosen))
    parts = shared.once(options, others, lambda: plan_unquantized(source, layout, chosen, options))
    return parts, problems, [line for part in parts for line in dropped_warning(part.component.title, part.dropped)]


def _unreadable(source: Source, paths: Sequence[str]) -> list[str]:
    """What keeps files from being taken over; of a Hub repo nothing is here yet."""
    problems = []
    for path in paths if source.kind == "folder" else ():
        try:
            source.fetch([path])
        except SourceError as error:
            problems.append(error.message)
    return problems


def resolve_rules(options: QuantizeOptions, component: ModelPart, device: str, recipe: Recipe | None = None) -> Rules:
    """Which scheme is for which tensor of a component, by what the user said.

    Args:
        options: what the user said.
        component: the model.
        device: where it is quantized; packed layouts are made for it unless the user says otherwise.
        recipe: what ``options.recipe`` holds.

    Raises:
        UsageError: an unknown scheme or setting, or a recipe that makes no sense.
        PlanError: a scheme that cannot be made with what is installed.
    """
    kind = device.partition(":")[0]
    name = options.components.get(component.name) or options.scheme
    default = None
    if name is not None:
        default = schemes.get(
            name,
            group_size=options.group_size,
            settings=options.settings,
            layout_device=options.layout_device or kind,
        )
    rules = Rules((), default)
    if recipe is not None:
        rules = recipes.rules(recipe, component.name, default, layout_device=options.layout_device, device=kind)
    return replace(rules, skip=skip_rules(options.skip))


def _list_unmatched(components: Sequence[ComponentPlan]) -> list[str]:
    """One line for every rule that no tensor of the components answers to."""
    rules = list(dict.fromkeys(rule for component in components for rule in component.rules))
    specs = [spec for component in components for spec in component.skeleton]
    return find_unmatched(rules, [name for spec in specs for name in (spec.name, spec.module)])


def _list_unmatched_missing(components: Sequence[ComponentPlan], options: QuantizeOptions) -> list[str]:
    """One line for every ``--allow-missing`` that no missing tensor answers to; nothing where no weights were seen."""
    if not any(component.weights for component in components):
        return []
    names = [item.name for component in components for item in component.missing]
    return find_unmatched(allow_rules(options.allow_missing), [*names, *(name.rpartition(".")[0] for name in names)])


def _nothing_carried(components: Sequence[ComponentPlan], options: QuantizeOptions) -> list[str]:
    """The problem that ``--carry`` would keep no codes at all; nothing where no weights were seen."""
    seen = [component for component in components if component.weights is not None]
    if not options.carry or not seen or any(tensor.carried for item in seen for tensor in item.tensors):
        return []
    if all(component.original is None for component in seen):
        return ["--carry: the source is not quantized (omit --carry)"]
    again = Counter(t.reason for component in seen for t in component.tensors if t.scheme is not None)
    why = "; ".join(f"{plural(count, 'weight')} {reason}" for reason, count in again.most_common(2))
    return [f"--carry: none of the source's codes can be kept: {why or 'nothing is quantized'}"]
