"""``aoconvert plan``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, conversion
from aoconvert.cli.output import FOLD, NUMBER, Output
from aoconvert.humanize import first, plural, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.checkpoint.manifest import LeftBehindEntry
    from aoconvert.planning import ComponentPlan, FilePlan, Plan, TensorPlan
    from aoconvert.planning.types import LeftBehind

EXAMPLES = """\b
Examples:
  aoconvert plan THUDM/CogVideoX-5b --scheme int8wo
  aoconvert plan ./my-model --scheme int4dq --tensors
  aoconvert plan meta-llama/Llama-3.1-8B --scheme int8wo --json > plan.json
"""


@click.command("plan", epilog=EXAMPLES)
@conversion
@click.option("--tensors", is_flag=True, help="List every tensor.")
@common
def command(*, source: str, out: Output, tensors: bool, **options: Any) -> None:
    """Show what quantize would do with SOURCE: every decision and the exact sizes. It writes nothing.

    It reads configs and headers only, and fetches nothing else of a Hub repo; --scheme auto reads the weights too. A
    folder that holds only a config.json can be planned too.
    """
    show(source, options, out, tensors=tensors)


def show(source: str, options: Mapping[str, Any], out: Output, *, tensors: bool) -> None:
    """Make the plan and print it."""
    from aoconvert import api

    with out.watch(f"plan {source}") as progress:
        made = api.plan(source, progress=progress, **options)
    for line in made.warnings:
        out.warning(line)
    out.result(lambda: _render(made, tensors=tensors), made.to_dict(), str(sum(file.size for file in _files(made))))


def _files(plan: Plan) -> list[FilePlan]:
    return [file for item in plan.components for file in item.files]


def _render(plan: Plan, *, tensors: bool) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for item in plan.components:
        totals = item.totals
        parts.append(Text(f"{item.component.title} ({item.component.class_name}) → {item.scheme_name}", style="bold"))
        parts.append(
            Text(
                f"  {size(totals.bytes_in)} → {size(totals.bytes_out)}, {totals.bits_per_weight:.2f} bits per weight, "
                f"{totals.quantized_fraction:.1%} of the parameters outside embeddings quantized "
                f"({totals.parameters:,} parameters)"
            )
        )
        parts.append(Padding(_tensor_table(item) if tensors else _reason_table(item), (0, 0, 0, 2)))
        parts += [Text(f"  {file.path}  {size(file.size)}") for file in item.files]
    for part in plan.unquantized:
        total = sum(file.size for file in part.files)
        parts.append(
            Text(f"{part.component.name} ({part.component.class_name}) unchanged, {size(total)} in .bin files")
        )
    if plan.copied:
        parts.append(
            Text(f"copied unchanged: {plural(len(plan.copied), 'file')}, {size(sum(c.size for c in plan.copied))}")
        )
    for reason, paths in left_behind(plan.left_behind).items():
        parts.append(Text(f"not copied: {first(paths)} ({reason})"))
    needs = plan.needs
    device = f", {size(needs.device_peak_bytes)} on {plan.device}" if needs.device_peak_bytes else ""
    parts.append(Text(f"needs {size(needs.disk_bytes)} of disk, about {size(needs.host_peak_bytes)} of memory{device}"))
    return Group(*parts)


def left_behind(files: Iterable[LeftBehind | LeftBehindEntry]) -> dict[str, list[str]]:
    """What did not arrive: reason → paths."""
    by_reason: dict[str, list[str]] = {}
    for item in files:
        by_reason.setdefault(item.reason, []).append(item.path)
    return by_reason


def _reason_table(plan: ComponentPlan) -> RenderableType:
    groups: dict[tuple[str, str], list[int]] = {}
    example: dict[tuple[str, str], str] = {}
    for tensor in plan.tensors:
        key = (tensor.action, _why(tensor))
        counts = groups.setdefault(key, [0, 0, 0, 0])
        for place, value in enumerate((1, tensor.numel, tensor.bytes_in, tensor.bytes_out)):
            counts[place] += value
        example.setdefault(key, tensor.name)
    rows = [
        (*group, example[group], str(count), f"{numel:,}", size(bytes_in), size(bytes_out))
        for group, (count, numel, bytes_in, bytes_out) in sorted(groups.items(), key=lambda item: -item[1][1])
    ]
    texts, numbers = ("action", "why", "example"), ("tensors", "parameters", "in", "out")
    return Output.table(rows, dict.fromkeys(texts, FOLD) | dict.fromkeys(numbers, NUMBER))


def _why(tensor: TensorPlan) -> str:
    said = [f"to {tensor.scheme.name}"] if tensor.scheme is not None else []
    return "; ".join([*said, *([tensor.reason] if tensor.reason else [])])


def _tensor_table(plan: ComponentPlan) -> RenderableType:
    rows = []
    for tensor in plan.tensors:
        shape = "×".join(str(side) for side in tensor.shape) or "scalar"
        sizes = (size(tensor.bytes_in), size(tensor.bytes_out))
        rows.append((tensor.name, shape, tensor.dtype, tensor.action, _why(tensor), *sizes))
    texts = ("tensor", "shape", "dtype", "action", "why")
    return Output.table(rows, dict.fromkeys(texts, FOLD) | {"in": NUMBER, "out": NUMBER})
