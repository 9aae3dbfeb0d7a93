"""``aoconvert schemes``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.schemes import SchemeEntry

EXAMPLES = """\b
Examples:
  aoconvert schemes
  aoconvert schemes int4dq
  aoconvert schemes --json
"""


@click.command("schemes", epilog=EXAMPLES)
@click.argument("name", required=False)
@common
def command(*, name: str | None, out: Output) -> None:
    """List the schemes: torchao config, what they demand, and whether they run here; or show NAME in full."""
    from aoconvert import schemes

    if name is not None:
        entry = schemes.find(name)
        data = _data(entry)
        out.result(lambda: _one(data), data, entry.name)
        return
    entries = schemes.catalogue()
    rows = [_data(entry) for entry in entries]
    out.result(lambda: _all(rows), rows, "\n".join(entry.name for entry in entries))


def _data(entry: SchemeEntry) -> dict[str, Any]:
    from aoconvert import schemes

    why = schemes.availability(entry)
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "config": entry.config,
        "settings": dict(entry.fields),
        "weight_dtype": entry.weight_dtype,
        "tensor_class": entry.tensor_class,
        "packing": entry.packing,
        "group_size_option": entry.group_field is not None,
        "requires": list(entry.requires),
        "min_torchao_to_load": entry.min_torchao,
        "runs_here": why is None,
        "why_not": why,
        "summary": entry.summary,
    }


def _all(rows: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("scheme", "torchao config", "loads with", "here", "when to choose it"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["config"].rpartition(".")[2],
            f"torchao ≥ {row['min_torchao_to_load']}",
            "yes" if row["runs_here"] else row["why_not"],
            row["summary"],
        )
    return table


def _one(row: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("scheme", row["name"])
    table.add_row("also called", ", ".join(row["aliases"]))
    settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
    table.add_row("torchao config", f"{row['config']}({settings})")
    table.add_row("weights", f"{row['weight_dtype']}, {row['tensor_class']}, {row['packing']}")
    table.add_row("--group-size", "yes" if row["group_size_option"] else "no")
    table.add_row("needs", ", ".join(row["requires"]))
    table.add_row("loads with", f"torchao ≥ {row['min_torchao_to_load']}, on any device")
    table.add_row("runs here", "yes" if row["runs_here"] else f"no: {row['why_not']}")
    table.add_row("choose it", row["summary"])
    return table
