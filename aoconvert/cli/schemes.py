"""``aoconvert schemes``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.completion import complete_scheme
from aoconvert.cli.options import common
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.schemes import SchemeEntry

_BESIDE_SUMMARY = 31  # columns: the longest name, bytes, here, and two spaces after each
_WIDEST = 120

EXAMPLES = """\b
Examples:
  aoconvert schemes
  aoconvert schemes --all
  aoconvert schemes int4wo
  aoconvert schemes --json
"""


@click.command("schemes", epilog=EXAMPLES)
@click.argument("name", required=False, shell_complete=complete_scheme)
@click.option(
    "--all", "everything", is_flag=True, help="Show every scheme, with its torchao config and what can load it."
)
@common
def command(*, name: str | None, everything: bool, out: Output) -> None:
    """List the schemes: their size, whether they work here, and when to choose them; or show NAME in full."""
    from aoconvert import schemes

    if name is not None:
        entry = schemes.find(name)
        data = _data(entry)
        out.result(lambda: _one(data), data, entry.name)
        return
    entries = schemes.catalogue()
    rows = [_data(entry) for entry in entries]
    out.result(lambda: (_all if everything else _screen)(rows), rows, "\n".join(entry.name for entry in entries))


def _data(entry: SchemeEntry) -> dict[str, Any]:
    from aoconvert import schemes
    from aoconvert.schemes.describe import notes

    why = schemes.availability(entry)
    cannot = _cannot_run(entry, why)
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "config": entry.config,
        "settings": dict((*entry.fields, *entry.defaults)),
        "weight_dtype": entry.weight_dtype,
        "tensor_class": entry.tensor_class.name,
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
        "activation_dtype": entry.activation,
        "granularity": entry.granularity,
        "bytes_per_parameter": entry.bytes_per_parameter,
        "device": entry.device,
        "min_capability": list(entry.min_capability) if entry.min_capability else None,
        "ranks": list(entry.ranks),
        "from_dtypes": list(entry.dtypes),
        "multiples": list(entry.multiples),
        "embeddings": entry.embeddings,
        "layouts": _layouts(entry),
        "notes": list(notes(entry, int(8 * entry.bytes_per_parameter), entry.granularity)),
    }


def _cannot_run(entry: SchemeEntry, why_not_quantized: str | None) -> str | None:
    """Why it does not run here; what cannot quantize for want of a package cannot run either."""
    from aoconvert.schemes.hardware import cannot_run

    return why_not_quantized or cannot_run(entry.device, entry.min_capability)


def _layouts(entry: SchemeEntry) -> list[dict[str, Any]]:
    """The layouts that ``--layout-device`` chooses among; most schemes have one, for any device."""
    from aoconvert import schemes
    from aoconvert.schemes.table import INT4

    if entry.layout_device is None:
        return []
    found = []
    for device, layout in INT4.items():
        why = schemes.availability(layout)
        cannot = _cannot_run(layout, why)
        found.append(
            {
                "layout_device": device,
                "packing": layout.packing,
                "tensor_class": layout.tensor_class.name,
                "quantizes_here": why is None,
                "why_not_quantized": why,
                "runs_here": cannot is None,
                "why_not": cannot,
                "unconfirmed": layout.unconfirmed,
            }
        )
    return found


def _here(row: dict[str, Any]) -> str:
    """Whether it works on this machine, in a few words."""
    if row["quantizes_here"]:
        return "yes" if row["runs_here"] else f"quantize only: {row['why_not']}"
    return f"no: {row['why_not_quantized']}"


def _screen(rows: list[dict[str, Any]]) -> RenderableType:
    """What fits a terminal of 80 columns and 24 lines."""
    from rich.console import Group
    from rich.text import Text

    from aoconvert.cli.folded import fold

    columns = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = [
        (line.name, f"{line.row['bytes_per_parameter']:.2f}", _here_in_a_word(line.row), line.summary)
        for line in fold(rows, columns - _BESIDE_SUMMARY)
    ]
    table = Output.table(lines, {"scheme": WHOLE, "bytes": NUMBER, "here": WHOLE, "when to choose it": WHOLE})
    notes = "bytes: per parameter. GPU: made here, runs on a GPU. --all: with details; schemes NAME: one in full"
    return Group(table, Text(notes if len(notes) <= columns else notes.partition(". ")[2], style="dim"))


def _here_in_a_word(row: Mapping[str, Any]) -> str:
    if not row["quantizes_here"]:
        return "no"
    return "yes" if row["runs_here"] else "GPU"


def _all(rows: list[dict[str, Any]]) -> RenderableType:
    titles = ("scheme", "torchao config", "bytes/parameter", "loads with", "here", "when to choose it")
    lines = [
        (
            row["name"],
            row["config"].rpartition(".")[2],
            f"{row['bytes_per_parameter']:.2f}",
            f"torchao ≥ {row['min_torchao_to_load']}",
            _here(row),
            row["summary"],
        )
        for row in rows
    ]
    return Output.table(lines, dict.fromkeys(titles, FOLD) | {"bytes/parameter": {**FOLD, "justify": "right"}})


def _one(row: dict[str, Any]) -> RenderableType:
    settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
    layouts = [
        (
            f"for {layout['layout_device']}",
            f"{layout['tensor_class']}, {layout['packing']}: {_here(layout)}"
            + (f"; unconfirmed: {layout['unconfirmed']}" if layout["unconfirmed"] else ""),
        )
        for layout in row["layouts"]
    ]
    return Output.table(
        [
            ("scheme", row["name"]),
            ("also called", ", ".join(row["aliases"])),
            ("torchao config", f"{row['config']}({settings})"),
            ("weights", f"{row['weight_dtype']}, {row['tensor_class']}, {row['packing']}"),
            ("activations", row["activation_dtype"] or "not quantized"),
            ("granularity", row["granularity"]),
            ("--group-size", "yes" if row["group_size_option"] else "no"),
            ("file size", f"{row['bytes_per_parameter']:.2f} bytes per parameter, scales included (bfloat16: 2)"),
            ("takes", _takes(row)),
            ("needs", ", ".join(row["requires"])),
            ("loads with", f"torchao ≥ {row['min_torchao_to_load']}"),
            ("runs on", _runs_on(row)),
            ("here", _here(row)),
            *layouts,
            *(("note", note) for note in row["notes"]),
            ("choose it", f"{row['summary']} ({row['source']})"),
        ]
    )


def _takes(row: dict[str, Any]) -> str:
    """What weights it takes."""
    kinds = ["linear layers", *(["stacked experts"] if 3 in row["ranks"] else [])]
    kinds += ["embeddings"] if row["embeddings"] else []
    out, into = row["multiples"]
    shape = f"; out_features a multiple of {out}, in_features of {into}" if (out, into) != (1, 1) else ""
    return f"{', '.join(kinds)}, in {', '.join(row['from_dtypes'])}{shape}"


def _runs_on(row: dict[str, Any]) -> str:
    """Which devices run it."""
    from aoconvert.schemes.describe import capability

    if row["layouts"]:
        return "the device of its layout (--layout-device)"
    device = "any device" if row["device"] == "any" else f"{row['device']} devices"
    minimum = row["min_capability"]
    return f"{device}; CUDA from compute capability {capability(minimum)} on" if minimum else device
