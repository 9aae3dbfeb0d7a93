"""``aoconvert migrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import Output
from aoconvert.humanize import size
from aoconvert.options.migrate import MigrateOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.rewriting import Migrated

_SHOWN = 5  # names of tensors under one reason
EXAMPLES = """\b
Examples:
  aoconvert migrate ./CogVideoX-5b-int8wo -o ./CogVideoX-5b-int8wo-new
  aoconvert migrate user/FLUX.1-dev-int4wo --packed-on avx512
  aoconvert migrate ./flux-fp6 --then int8wo
  aoconvert migrate ./pixart-quanto-int4 --exact
"""


@click.command("migrate", epilog=EXAMPLES)
@click.argument("source", metavar="SOURCE")
@with_options(MigrateOptions)
@common
def command(*, source: str, out: Output, **options: Any) -> int:
    """Rewrite an old torchao or Quanto checkpoint in torchao's tensor classes of today.

    SOURCE is a folder, a Hub repo id, or one torch file. Codes and scales stay the same, bit for bit. A weight that no
    class of today can hold is dequantized exactly, and quantized again only with --then. The original weights are not
    needed, and no pickle is executed.
    """
    from aoconvert import api

    with out.watch(f"migrate {source}") as progress:
        done = api.migrate(source, progress=progress, **options)
    for line in done.warnings:
        out.warning(line)
    out.result(lambda: _summary(done), done.to_dict(), str(done.output))
    return 0


def _summary(done: Migrated) -> RenderableType:
    rows = []
    for part, entry in done.entries:
        by = f" by {entry.written_by}" if entry.written_by else ""
        text = f"{entry.scheme}{by} → {part.scheme or part.dtype}, {size(part.totals.bytes_out)}"
        rows.append((part.name or part.class_name, text))
    said = {
        "carried": "with the same codes and scales",
        "dequantized": "dequantized exactly",
        "requantized": "quantized again",
        "unchanged": "not quantized before, unchanged",
    }
    rows += [("tensors", f"{number:,} {said[name]}") for name, number in done.counts.items() if number]
    reasons: dict[str, list[str]] = {}
    for item in done.deviations:
        reasons.setdefault(item.reason, []).append(item.name)
    for reason, names in reasons.items():
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        rows.append(("differs", f"{reason}: {', '.join(names[:_SHOWN])}{more}"))
    rows.append(("time", f"{done.seconds:.1f} s"))
    return Output.table([*rows, ("output", str(done.output))])
