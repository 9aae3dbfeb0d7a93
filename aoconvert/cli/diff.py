"""``aoconvert diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.humanize import first, plural
from aoconvert.options import HubOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.comparison import Comparison, Difference

EXAMPLES = """Exit codes: 0 equal, 1 different, 4 a pickle that must not be loaded.

\b
Examples:
  aoconvert diff ./out ./out-again
  aoconvert diff user/CogVideoX-5b-int8wo ./out
  aoconvert diff THUDM/CogVideoX-5b ./out --json
"""

_SHOWN = 20


@click.command("diff", epilog=EXAMPLES)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@with_options(HubOptions, without=("revision",))
@common
def command(*, a: str, b: str, out: Output, **hub: Any) -> int:
    """Show what differs between two checkpoints, or between a checkpoint and its source.

    A and B are folders, weights files (.bin, .pt, .safetensors) or Hub repos (user/repo or user/repo@revision). Names,
    classes, shapes and dtypes are compared first, then codes and scales bit by bit, whatever the file format. For what
    differs, the SQNR says how far the values are from each other. No pickle is executed.
    """
    from aoconvert import api

    with out.watch(f"diff {a} {b}") as progress:
        found = api.diff(a, b, progress=progress, **hub)
    out.result(lambda: _human(found), found.to_dict(), "equal" if found.equal else "different")
    return 0 if found.equal else 1


def _human(found: Comparison) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if found.different:
        columns = {"tensor": FOLD, "differs in": WHOLE, "SQNR": NUMBER, "": FOLD}
        parts.append(Output.table((_row(item) for item in found.different[:_SHOWN]), columns))
        if (more := len(found.different) - _SHOWN) > 0:
            parts.append(Text(f"… and {more} more; --json lists all"))
    parts += [Text(line) for line in _lines(found)]
    return Group(*parts)


def _row(item: Difference) -> list[RenderableType]:
    from rich.text import Text

    sqnr = f"{item.sqnr_db:.2f} dB" if item.sqnr_db is not None else "-"
    return [Text(item.name), Text(item.what), Text(sqnr), Text(item.detail)]


def _lines(found: Comparison) -> list[str]:
    """The sums, and names that only one has."""
    lines = [
        f"only in {side}: {first(names, 10)}" for side, names in (("A", found.only_a), ("B", found.only_b)) if names
    ]
    if found.tied:
        lines.append(f"tied to a tensor that both have: {first(found.tied, 10)}")
    if found.left_out:
        lines.append(f"not compared: {', '.join(found.left_out)}; the other side is one model")
    same = f"{plural(found.same, 'tensor')} the same"
    lines.append(f"equal: {same}" if found.equal else f"different: {len(found.different)}; {same}")
    return lines
