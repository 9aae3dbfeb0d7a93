"""``aoconvert schemes``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.schemes import Scheme, SchemeEntry

EXAMPLES = """\b
Examples:
  aoconvert schemes
  aoconvert schemes int4wo
  aoconvert schemes --json
"""


@click.command("schemes", epilog=EXAMPLES)
@click.argument("name", required=False)
@common
def command(*, name: str | None, out: Output) -> None:
    """List the schemes: torchao config, size, what they demand, and whether they work here; or show NAME in full."""
    from aoconvert import schemes

    if name is not None:
        entry = schemes.find(name)
        if out.mode == "quiet":
            out.result(lambda: "", None, entry.name)
            return
        data = _data(entry, name)
        out.result(lambda: _one(data), data, entry.name)
        return
    entries = schemes.catalogue()
    # names alone need no torch
    rows = [] if out.mode == "quiet" else [_data(entry, entry.name) for entry in entries]
    out.result(lambda: _all(rows), rows, "\n".join(entry.name for entry in entries))


def _data(entry: SchemeEntry, name: str) -> dict[str, Any]:
    """What the catalogue says, and what torchao makes of a weight where it is installed."""
    from aoconvert import schemes
    from aoconvert.errors import PlanError
    from aoconvert.schemes.here import cannot_run

    scheme, why = None, schemes.availability(entry)
    if why is None:
        try:
            scheme = schemes.get(name)
        except PlanError as error:
            why = error.message
    cannot = why if scheme is None else cannot_run(scheme.layout)
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "config": entry.config,
        "settings": dict((*entry.fields, *entry.defaults)),
        "weight_dtype": entry.weight_dtype,
        "tensor_class": entry.tensor_class,
        "packing": entry.packing,
        "group_size_option": entry.group_field is not None,
        "requires": list(entry.requires),
        "min_torchao_to_load": entry.min_torchao,
        "runs_here": cannot is None,
        "why_not": cannot,
        "summary": entry.summary,
        "source": entry.source,
        "quantizes_here": why is None,
        "why_not_quantized": why,
        "device": entry.device,
        "min_capability": list(entry.min_capability) if entry.min_capability else None,
        "ranks": list(entry.ranks),
        "from_dtypes": list(entry.dtypes),
        "embeddings": entry.embeddings,
        "layouts": _layouts(entry),
        **_measured(scheme),
    }


def _measured(scheme: Scheme | None) -> dict[str, Any]:
    """What only a quantized weight shows; nothing of it where torchao is missing."""
    return {
        "activation_dtype": scheme.activation if scheme else None,
        "granularity": scheme.granularity if scheme else None,
        "group_size": scheme.group_size if scheme else None,
        "bits": scheme.bits if scheme else None,
        "bytes_per_parameter": round(scheme.bytes_per_parameter, 4) if scheme else None,
        "notes": list(scheme.notes) if scheme else [],
    }


def _layouts(entry: SchemeEntry) -> list[dict[str, Any]]:
    """The layouts that ``--layout-device`` chooses among; for most schemes one, for any device."""
    from aoconvert import schemes
    from aoconvert.errors import PlanError
    from aoconvert.schemes.here import cannot_run
    from aoconvert.schemes.table import INT4

    if entry.name != INT4["cpu"].name:
        return []
    found = []
    for device, layout_entry in INT4.items():
        scheme, why = None, schemes.availability(layout_entry)
        if why is None:
            try:
                scheme = schemes.get(entry.name, layout_device=device)
            except PlanError as error:
                why = error.message
        cannot = why if scheme is None else cannot_run(scheme.layout)
        found.append(
            {
                "layout_device": device,
                "packing": scheme.layout.packing if scheme else layout_entry.packing,
                "tensor_class": layout_entry.tensor_class,
                "quantizes_here": why is None,
                "why_not_quantized": why,
                "runs_here": cannot is None,
                "why_not": cannot,
                "unconfirmed": scheme.unconfirmed if scheme else None,
            }
        )
    return found


def _here(row: dict[str, Any]) -> str:
    """Whether it works on this machine, in a few words."""
    if row["quantizes_here"]:
        return "yes" if row["runs_here"] else f"quantize only: {row['why_not']}"
    return f"no: {row['why_not_quantized']}"


def _all(rows: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("scheme", "torchao config", "bytes/parameter", "loads with", "here", "when to choose it"):
        table.add_column(title, overflow="fold", justify="right" if title.startswith("bytes") else "left")
    for row in rows:
        size = row["bytes_per_parameter"]
        table.add_row(
            row["name"],
            row["config"].rpartition(".")[2],
            f"{size:.2f}" if size is not None else "?",
            f"torchao ≥ {row['min_torchao_to_load']}",
            _here(row),
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
    table.add_row("activations", row["activation_dtype"] or "as they are")
    table.add_row("granularity", row["granularity"] or "?")
    table.add_row("--group-size", "yes" if row["group_size_option"] else "no")
    size = row["bytes_per_parameter"]
    table.add_row("file size", f"{size:.4f} bytes a parameter, scales included (bfloat16: 2)" if size else "?")
    table.add_row("takes", _takes(row))
    table.add_row("needs", ", ".join(row["requires"]))
    table.add_row("loads with", f"torchao ≥ {row['min_torchao_to_load']}")
    table.add_row("runs on", _runs_on(row))
    table.add_row("here", _here(row))
    for layout in row["layouts"]:
        table.add_row(
            f"for {layout['layout_device']}",
            f"{layout['tensor_class']}, {layout['packing']}: {_here(layout)}"
            + (f"; unconfirmed: {layout['unconfirmed']}" if layout["unconfirmed"] else ""),
        )
    for note in row["notes"]:
        table.add_row("note", note)
    table.add_row("choose it", f"{row['summary']} ({row['source']})")
    return table


def _takes(row: dict[str, Any]) -> str:
    """What weights it takes."""
    kinds = ["linear layers", *(["stacked experts"] if 3 in row["ranks"] else [])]
    kinds += ["embeddings"] if row["embeddings"] else []
    return f"{', '.join(kinds)}, in {', '.join(row['from_dtypes'])}"


def _runs_on(row: dict[str, Any]) -> str:
    """Which devices run it."""
    from aoconvert.schemes.describe import capability

    if row["layouts"]:
        return "the device of its layout (--layout-device)"
    device = "any device" if row["device"] == "any" else f"{row['device']} devices"
    minimum = row["min_capability"]
    return f"{device}; CUDA from compute capability {capability(minimum)} on" if minimum else device
