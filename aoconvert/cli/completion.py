"""What a shell completes: names of schemes. Imports no torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.files import read_limited
from aoconvert.json_text import CONFIG_BYTES, parse_json

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem


def complete_scheme(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The schemes whose names begin so, each with when to choose it."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name, help=text) for name, text in _schemes().items() if name.startswith(incomplete)]


def complete_scheme_or_auto(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The same, and ``auto``."""
    from click.shell_completion import CompletionItem

    auto = [CompletionItem("auto", help="chooses a scheme for each tensor")] if "auto".startswith(incomplete) else []
    return [*complete_scheme(ctx, param, incomplete), *auto]


def complete_candidates(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The last name of a list with commas."""
    from click.shell_completion import CompletionItem

    before, comma, last = incomplete.rpartition(",")
    chosen = before.split(",")
    return [
        CompletionItem(f"{before}{comma}{name}", help=text)
        for name, text in _schemes().items()
        if name.startswith(last) and name not in chosen
    ]


def complete_component(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A part of the pipeline, where SOURCE is a folder; after ``NAME=`` a scheme."""
    from click.shell_completion import CompletionItem

    name, equals, scheme = incomplete.partition("=")
    if equals:
        found = _schemes()
        return [CompletionItem(f"{name}={item}", help=found[item]) for item in found if item.startswith(scheme)]
    source = ctx.params.get("source") or next(iter(ctx.args), None)  # an option without its value stops click's parser
    return [CompletionItem(part) for part in _parts(source) if part.startswith(name)]


def _schemes() -> dict[str, str]:
    """Name → when to choose it."""
    from aoconvert.schemes.table import catalogue

    return {entry.name: entry.summary for entry in catalogue()}


def _parts(source: str | None) -> list[str]:
    """Parts of the pipeline in a folder that are models: schedulers and tokenizers have configs of other names."""
    folder = Path(source or "")
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        index = parse_json(read_limited(folder / "model_index.json", CONFIG_BYTES))
        parts = [name for name, entry in index.items() if isinstance(entry, list)]
        return [name for name in parts if (folder / name / "config.json").is_file()]
    return []
