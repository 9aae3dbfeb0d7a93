"""``aoconvert inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import Output
from aoconvert.errors import UnsafeFileError
from aoconvert.humanize import size
from aoconvert.options import HubOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.inspection.types import Component, Inspection

EXAMPLES = """Exit code 4: a pickle names or calls something that no checkpoint needs, or its archive is damaged.

\b
Examples:
  aoconvert inspect out
  aoconvert inspect user/CogVideoX-5b-int8wo
  aoconvert inspect model.bin --json
"""


@click.command("inspect", epilog=EXAMPLES)
@click.argument("path", metavar="PATH|REPO_ID")
@with_options(HubOptions)
@common
def command(*, path: str, out: Output, **hub: Any) -> int:
    """Show what a checkpoint is and what can load it, from headers alone.

    PATH is a folder or one weights file (.bin, .pt, .safetensors, .gguf). The weights of a Hub repo are not downloaded.
    No pickle is executed, nothing that the file names is imported, and torchao need not be installed.
    """
    with out.watch(f"inspect {path}"):
        from aoconvert.api import inspect

        found = inspect(path, **hub)
    out.result(lambda: _human(found), found.to_dict(), found.scheme or found.kind)
    return UnsafeFileError.exit_code if found.unsafe else 0


def _human(found: Inspection) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    title = Text(f"{found.path}: {found.class_name or 'unknown class'}", style="bold")
    shown = [part for part in found.components if part.kind != "plain"] or list(found.components)
    parts: list[RenderableType] = [title, *(_component(part) for part in shown)]
    plain = [part for part in found.components if part not in shown]
    if plain:
        total = size(sum(part.bytes for part in plain))
        parts.append(Text(f"not quantized: {', '.join(part.name for part in plain)} ({total})"))
    if found.revision:
        parts.append(Text(f"commit {found.revision[:12]}, {size(found.bytes_fetched)} fetched"))
    if found.next_command is not None:
        parts.append(Text(f"next: {found.next_command}"))
    return Group(*parts)


def _component(part: Component) -> RenderableType:
    from rich.text import Text

    return Output.table((label, Text(text, style=style)) for label, text, style in _rows(part))


def _rows(part: Component) -> list[tuple[str, str, str]]:
    rows = [("component", part.name, "")] if part.name else []
    rows.append(("kind", f"{part.kind}, {part.library or 'unknown library'}, {part.class_name or 'unknown class'}", ""))
    rows.append(("scheme", part.scheme or "none", ""))
    for name, number in part.tensor_classes.items():
        rows.append(("tensors", f"{number} × {name}", ""))
    if part.parameters:
        share = part.quantized_parameters / part.parameters
        rows.append(("parameters", f"{part.parameters:,}, {share:.1%} of them quantized", ""))
    rows.append(("size", f"{size(part.bytes)} in {len(part.files)} file{'s' if len(part.files) > 1 else ''}", ""))
    need = f", capability {'.'.join(map(str, part.min_capability))} or higher" if part.min_capability else ""
    rows.append(("layout", f"for {part.layout_device} device{need}" if part.layout_device == "any"
                 else f"for {part.layout_device}{need}", ""))  # fmt: skip
    rows.append(("written by", _writer(part), ""))
    names = [name for file in part.files for name in file.globals if not name.startswith(("torch.", "collections."))]
    if names:
        rows.append(("pickle uses", ", ".join(sorted(set(names))), ""))
    rows += _list_loading(part)
    rows += [("unsafe", line, "bold red") for line in part.unsafe]
    rows += [("to do" if place == 0 else "", line, "") for place, line in enumerate(part.advice)]
    return rows


def _writer(part: Component) -> str:
    writer = part.written_by
    known = [f"{name} {writer[name]}" for name in ("torchao", "torch", "diffusers", "transformers") if writer[name]]
    span = writer["torchao_range"]
    if span is not None and writer["torchao"] is None:
        known.insert(0, f"torchao {span['min']} to {span['max']}")
    tool = [writer["tool"]] if writer["tool"] else []
    return ", ".join([*tool, *known]) + (f" ({writer['how']})" if writer["how"] else "") or "unknown"


def _list_loading(part: Component) -> list[tuple[str, str, str]]:
    from aoconvert.inspection.components import span_text

    rows = []
    if part.loading is not None:
        rows.append(("loads with", span_text(part.loading), ""))
        rows += [("", reason, "dim") for reason in part.loading.why]
    elif part.needs:
        rows.append(("loads with", ", ".join(part.needs), ""))
    here = {True: ("yes", "green"), False: ("no", "red"), None: ("not known", "yellow")}[part.loads_here]
    rows.append(("loads here", here[0], here[1]))
    reasons = [line for line in part.problems if part.loading is None or line not in part.loading.why]
    return rows + [("", line, "") for line in reasons if line not in part.unsafe]
