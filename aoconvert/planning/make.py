"""Make the plan: every decision and every problem, from configs and headers, with no weights read."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert import schemes
from aoconvert.environment import choose_devices
from aoconvert.errors import PlanError
from aoconvert.manifest import MANIFEST_NAME
from aoconvert.models import Component, ModelLayout, build_skeleton, identify, join
from aoconvert.options import QuantizeOptions
from aoconvert.planning import files as plan_files
from aoconvert.planning.decide import Decisions, SkipRules, decide
from aoconvert.planning.inventory import Inventory, take
from aoconvert.planning.needs import needs
from aoconvert.planning.types import ComponentPlan, CopyPlan, FilePlan, Needs, Plan, TensorPlan
from aoconvert.planning.weights import choose, is_only
from aoconvert.sources.weights import find_weights
from aoconvert.words import size

if TYPE_CHECKING:
    import torch

    from aoconvert.schemes import Scheme
    from aoconvert.sources import Source


def make(source: Source, options: QuantizeOptions, *, need_weights: bool = False) -> Plan:
    """Decide everything about a conversion.

    Args:
        source: the resolved source.
        options: what the user asked for.
        need_weights: the plan will be carried out: a source without weights is a problem, and so is a disk that is
            too small (otherwise a warning).

    Raises:
        PlanError: with every problem at once.
        SourceError: the source cannot be read at all.
        UsageError: unknown scheme, bad setting.
    """
    layout = identify(source, options.subfolder)
    chosen, problems = choose(layout, options)
    asked = {item.name: _scheme(options, item) for item in chosen}
    devices: tuple[str, ...] = ("cpu",)
    try:
        devices = choose_devices(options.device)
    except PlanError as error:
        problems += error.problems
    for scheme in {scheme.name: scheme for scheme in asked.values()}.values():
        why = schemes.availability(scheme.name)
        if why:
            problems.append(f"{scheme.name}: {why}")

    plans: list[ComponentPlan] = []
    warnings: list[str] = []
    for component in chosen:
        made, found = _component(source, layout, component, asked[component.name], options, need_weights=need_weights)
        plans.append(made)
        problems += found
        warnings += _component_warnings(made)
    problems += _unmatched_skips(plans, options)

    copied: tuple[CopyPlan, ...] = ()
    if chosen:
        copied = plan_files.copies(
            source,
            layout,
            chosen,
            only=is_only(layout, options),
            variant=options.variant,
            code=options.trust_remote_code,
        )
    wanted = needs(plans, copied, devices[0])
    problems += _output_problems(source, options)
    # of a config alone the plan is a calculation: nothing could be carried out anyway
    possible = need_weights or any(item.weights for item in plans)
    (problems if possible else warnings).extend(_space_problems(options, wanted))
    if problems:
        raise PlanError(problems)
    fetch = [path for item in plans if item.weights for path in item.weights.paths]
    return Plan(
        source=source,
        layout=layout,
        output=options.output,
        devices=devices,
        dtype=options.dtype,
        components=tuple(plans),
        copied=copied,
        fetch=(*fetch, *(item.source for item in copied)),
        needs=wanted,
        warnings=tuple(warnings),
        subfolder=options.subfolder,
        variant=options.variant,
        trust_remote_code=options.trust_remote_code,
        allow_cpu=options.device == "auto",
    )


def _scheme(options: QuantizeOptions, component: Component) -> Scheme:
    name = options.components.get(component.name) or options.scheme
    return schemes.get(name, group_size=options.group_size, settings=options.settings)


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _component(
    source: Source,
    layout: ModelLayout,
    component: Component,
    scheme: Scheme,
    options: QuantizeOptions,
    *,
    need_weights: bool,
) -> tuple[ComponentPlan, list[str]]:
    import torch

    dtype = _dtype(options.dtype)
    code = source.root / component.folder if options.trust_remote_code else None
    skeleton = build_skeleton(component, dtype or torch.bfloat16, code_root=code)
    weights = find_weights(source, component.folder, component.library, variant=options.variant)
    problems = []
    if weights is None and need_weights:
        problems.append(f"{component.title}: no weights in {join(source.label, component.folder)}")
    inventory = take(source, skeleton, weights)
    skip = SkipRules(options.skip)
    decisions = decide(skeleton, scheme, skip, dtype, inventory)
    problems += decisions.problems
    folder = "" if layout.kind != "pipeline" or is_only(layout, options) else component.name
    tensors, order, files = _lay_out(component, folder, decisions, inventory, options.max_shard_size)
    plan = ComponentPlan(
        component=component,
        scheme=scheme,
        folder=folder,
        tensors=tensors,
        order=order,
        files=files,
        skip_modules=_skip_modules(component, tensors),
        unused=inventory.unused if inventory else (),
        copied=inventory.obstacle if inventory else None,
        weights=weights,
        skeleton=skeleton,
        recipes=inventory.recipes if inventory else {},
    )
    totals = plan.totals
    if not decisions.problems and totals.quantized_fraction < options.min_quantized:
        skipped = sum(t.numel for t in plan.skipped)
        problems.append(
            f"{component.title}: {scheme.name} would quantize {totals.quantized_fraction:.0%} of the parameters "
            f"outside embeddings, less than --min-quantized {options.min_quantized:g} ({skipped:,} parameters in "
            f"{len(plan.skipped)} matrices are left out: {_reasons(plan.skipped)})"
        )
    elif not decisions.problems and not totals.quantized_parameters:
        problems.append(f"{component.title}: nothing is left to quantize ({_reasons(plan.skipped)})")
    return plan, problems


def _reasons(skipped: Sequence[TensorPlan]) -> str:
    """The reasons, most parameters first."""
    weight: dict[str, int] = {}
    for tensor in skipped:
        weight[tensor.reason or ""] = weight.get(tensor.reason or "", 0) + tensor.numel
    return "; ".join(sorted(weight, key=lambda reason: -weight[reason])[:3]) or "no matrices"


def _lay_out(
    component: Component, folder: str, decisions: Decisions, inventory: Inventory | None, limit: int | None
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...], tuple[FilePlan, ...]]:
    """Deal tensors to files, and compute each file's exact size."""
    from aoconvert.writers.torch_bin import predict_size

    default = (
        plan_files.DIFFUSERS_FILE_BYTES if component.library == "diffusers" else plan_files.TRANSFORMERS_FILE_BYTES
    )
    order = inventory.order if inventory else ()
    dealt = plan_files.assign(decisions.tensors, order, limit or default)
    where: dict[str, str] = {}
    files = []
    for number, names in enumerate(dealt, start=1):
        path = join(folder, plan_files.weights_name(component, number, len(dealt)))
        where.update(dict.fromkeys(names, path))
        # the pickle lists tensors in state-dict order, their data lies in the order it was read
        listed = [tensor.name for tensor in decisions.tensors if where.get(tensor.name) == path]
        files.append(FilePlan(path, predict_size({name: decisions.outputs[name] for name in names}, listed)))
    tensors = tuple(replace(tensor, file=where.get(tensor.name)) for tensor in decisions.tensors)
    return tensors, tuple(name for names in dealt for name in names), tuple(files)


def _skip_modules(component: Component, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
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


def _component_warnings(plan: ComponentPlan) -> list[str]:
    title = plan.component.title
    lines = [f"{title}: {note}" for note in plan.scheme.notes]
    if plan.component.library == "diffusers" and len(plan.files) > 1:
        lines.append(
            f"{title}: diffusers opens a sharded .bin only with use_safetensors=False, and a pipeline not at all"
        )
    if plan.unused:
        shown = ", ".join(plan.unused[:3]) + (", …" if len(plan.unused) > 3 else "")
        lines.append(f"{title}: {len(plan.unused)} tensors of the checkpoint have no place in the model: {shown}")
    if plan.copied is not None:
        lines.append(f"{title}: transformers makes a copy of its merged tensors while it runs ({plan.copied})")
    return lines


def _unmatched_skips(plans: Sequence[ComponentPlan], options: QuantizeOptions) -> list[str]:
    if not plans:
        return []
    return SkipRules(options.skip).unmatched([spec for plan in plans for spec in plan.skeleton])


def _output_problems(source: Source, options: QuantizeOptions) -> list[str]:
    """What is wrong with the place the result shall go to."""
    problems = []
    output = options.output
    try:
        output.lstat()
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return [f"output {output}: {getattr(error, 'strerror', None) or error}"]
    if output.name == "..":  # what is built beside it needs a name
        problems.append(f"output {output} has no name of its own; give the folder itself")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        problems.append(f"output {output} exists and is not a folder")
    elif output.is_dir() and any(output.iterdir()):
        if not options.overwrite:
            problems.append(f"output {output} exists and is not empty (--overwrite replaces an earlier result)")
        elif not (output / MANIFEST_NAME).is_file():
            problems.append(f"output {output} holds something that aoconvert did not write; it is not overwritten")
    place = output.resolve()
    if source.kind == "folder":
        root = source.root.resolve()
        if place == root or place in root.parents:
            problems.append(f"output {output} would replace the source")
        elif root in place.parents:
            problems.append(f"output {output} is inside the source")
    parent = _existing_parent(output)
    if not parent.is_dir():
        problems.append(f"output {output}: {parent} is not a folder")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"output {output}: no permission to write in {parent}")
    return problems


def _space_problems(options: QuantizeOptions, wanted: Needs) -> list[str]:
    """Whether the result fits on the disk it shall go to."""
    try:
        free = shutil.disk_usage(_existing_parent(options.output)).free + _held(options.output)
    except (OSError, ValueError):  # not a place at all, which is a problem of its own
        return []
    if free >= wanted.disk_bytes:
        return []
    return [f"output {options.output}: {size(wanted.disk_bytes)} needed, {size(free)} free on that disk"]


def _held(output: Path) -> int:
    """Bytes that an unfinished run holds there; the next one uses or frees them."""
    facts = [path.lstat() for path in plan_files.partial_folder(output).rglob("*")]
    return sum(found.st_blocks * 512 for found in facts if stat.S_ISREG(found.st_mode) and found.st_nlink == 1)


def _existing_parent(output: Path) -> Path:
    return next(folder for folder in output.resolve().parents if folder.exists())
