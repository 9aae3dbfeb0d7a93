"""``aoconvert repack``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output
from aoconvert.humanize import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.rewriting import Repacked

EXAMPLES = """\b
Examples:
  aoconvert repack ./out --layout-device cuda
  aoconvert repack ./FLUX.1-dev-int4wo --layout-device cpu -o ./FLUX.1-dev-int4wo-cpu
"""


@click.command("repack", epilog=EXAMPLES)
@click.argument("checkpoint", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--layout-device",
    "device",
    type=click.Choice(["cpu", "cuda", "xpu"]),
    required=True,
    help="Device to pack for; cpu means the CPU of this machine.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output folder. Default: PATH-DEVICE, beside PATH."
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an earlier result of aoconvert in the output folder, never anything else.",
)
@common
def command(*, checkpoint: Path, device: str, output: Path | None, overwrite: bool, out: Output) -> int:
    """Pack the int4 weights of a converted checkpoint for another device.

    It quantizes nothing again: the codes, scales and zero points stay the same, and are compared afterwards. Everything
    else is copied.
    """
    from aoconvert import api

    with out.watch(f"repack {checkpoint}") as progress:
        done = api.repack(checkpoint, device, output=output, overwrite=overwrite, progress=progress)
    if done.unconfirmed is not None:
        out.warning(f"unconfirmed: {done.unconfirmed}")
    out.result(lambda: _summary(done), done.to_dict(), str(done.output))
    return 0


def _summary(done: Repacked) -> RenderableType:
    rows = []
    for entry in done.manifest.components:
        if entry.name in done.before:
            layouts = f"{done.before[entry.name]} → {entry.layout.packing}"
            rows.append((entry.name or entry.class_name, f"{layouts}, {size(entry.totals.bytes_out)}"))
    rows.append(("weights", f"{done.weights} packed again; every code, scale and zero point is the same"))
    rows.append(("time", f"{done.seconds:.1f} s"))
    return Output.table([*rows, ("output", str(done.output))])
