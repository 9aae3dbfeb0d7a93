"""``aoconvert demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from aoconvert.cli.completion import complete_scheme
from aoconvert.cli.options import common
from aoconvert.cli.output import Output
from aoconvert.humanize import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.demo import DemoResult

EXAMPLES = """\b
Examples:
  aoconvert demo
  aoconvert demo /tmp/demo --scheme float8wo
"""


@click.command("demo", epilog=EXAMPLES)
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default=Path("aoconvert-demo"))
@click.option(
    "--scheme",
    default="int8wo",
    show_default=True,
    metavar="NAME",
    shell_complete=complete_scheme,
    help="Scheme to quantize to.",
)
@common
def command(*, folder: Path, scheme: str, out: Output) -> None:
    """Build a tiny CogVideoX pipeline in DIR, quantize it, verify the result and write its model card.

    Needs no network. DIR/source is the pipeline, DIR/out the result.
    """
    with out.watch(f"build, quantize and verify a tiny pipeline in {folder}") as progress:
        from aoconvert import demo

        done = demo.run(folder, scheme, progress)
    data = {
        "source": str(done.source),
        **done.result.to_dict(),
        "verification": done.report.to_dict(),
        "card": [str(path) for path in done.card],
    }
    out.result(lambda: _render(done), data, str(done.result.output))


def _render(done: DemoResult) -> RenderableType:
    result = done.result
    component = result.manifest.components[0]
    kinds: dict[str, int] = {}
    for tensor in component.tensors:
        kinds[tensor.action] = kinds.get(tensor.action, 0) + 1
    worst = component.totals.worst_sqnr_db
    quantized = (
        f"{component.name} to {component.scheme}: {size(result.bytes_in)} → {size(result.bytes_out)}, "
        f"{result.quantized_fraction:.1%} of {result.parameters:,} parameters, {result.seconds:.1f} s"
    )
    table = Output.table(
        [
            ("built", f"{done.source}: CogVideoX pipeline, random weights, bfloat16"),
            ("quantized", quantized),
            ("tensors", ", ".join(f"{count} {action}" for action, count in kinds.items())),
            ("error", f"worst SQNR {worst:.1f} dB" if worst is not None else "none"),
            *((check.name, f"{check.status}: {check.detail}") for check in done.report.checks),
            ("card", ", ".join(str(path) for path in done.card)),
            ("result", str(result.output)),
        ]
    )
    table.title, table.title_justify = "aoconvert demo", "left"
    return table
