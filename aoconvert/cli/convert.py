"""``aoconvert convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output
from aoconvert.humanize import plural, size
from aoconvert.options.quantize import FORMATS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.rewriting import Converted

EXAMPLES = """\b
Examples:
  aoconvert convert ./out --format safetensors
  aoconvert convert ./Qwen3-8B-int8wo-safetensors --format bin -o ./Qwen3-8B-int8wo
"""


@click.command("convert", epilog=EXAMPLES)
@click.argument("checkpoint", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(FORMATS), required=True, help="Format of the new weights files.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output folder. Default: PATH-FORMAT, beside PATH."
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an earlier result of aoconvert in the output folder, never anything else.",
)
@common
def command(*, checkpoint: Path, format_: str, output: Path | None, overwrite: bool, out: Output) -> int:
    """Write the tensors of a torchao checkpoint into the other format of weights files.

    PATH is a folder that aoconvert wrote, or that transformers, diffusers or torchao's own functions wrote with tensors
    of today's classes. Nothing is quantized again: every tensor stays the same, bit for bit, and is compared
    afterwards. There and back gives the same .bin, byte for byte, where aoconvert wrote it. Everything else is copied.
    """
    from aoconvert import api

    with out.watch(f"convert {checkpoint}") as progress:
        done = api.convert(checkpoint, format_, output=output, overwrite=overwrite, progress=progress)
    out.result(lambda: _summary(done), done.to_dict(), str(done.output))
    return 0


def _summary(done: Converted) -> RenderableType:
    needs = sorted({text for entry in done.manifest.components for text in entry.loads_with.get("torchao", "").split()})
    return Output.table(
        [
            ("files", f"{plural(done.files, 'weights file')} in {done.format}, {size(done.bytes_out)}"),
            ("tensors", f"{done.tensors:,}, each bit for bit the same"),
            ("loads with", ", ".join(f"torchao {text}" for text in needs)),
            ("time", f"{done.seconds:.1f} s"),
            ("output", str(done.output)),
        ]
    )
