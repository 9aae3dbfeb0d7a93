"""``aoconvert bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.errors import UsageError
from aoconvert.options.bench import BenchOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.checkpoint.bench import Bench, BenchRow

EXAMPLES = """Exit code: 0 if at least one row of the result ran, 1 if none did.

\b
Examples:
  aoconvert bench
  aoconvert bench ./out --source THUDM/CogVideoX-5b --device cuda --size 720x480 --frames 49 --steps 50
  aoconvert bench ./llama-int8wo --source ./llama --compile --batch-size 1 --batch-size 8 --tokens 128
  aoconvert bench ./int8wo ./int4wo ./float8wo --plot cost.svg
"""

_DEFAULT = "out"


@click.command("bench", epilog=EXAMPLES)
@click.argument("checkpoints", metavar="[PATH|REPO_ID]...", nargs=-1)
@with_options(BenchOptions)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Measure nothing: draw the reports (bench, eval) that are in the folders.",
)
@common
def command(*, checkpoints: tuple[str, ...], plot: Path | None, out: Output, **options: Any) -> int:
    """Measure what a converted checkpoint costs to run: memory and time. Default: ./out.

    Each row is measured in a fresh process: a pipeline's denoising step and its whole call, a language model's prompt
    and the tokens that it generates, one forward pass of any other model; plain, with fused projections where diffusers
    offers that, and with --source for the original too. What a mode cannot do is a row with the reason. The report,
    aoconvert.bench.json, is written after each row: a run that is stopped leaves the rows that are done, and the next
    run measures everything again. The report of a Hub repo is only printed.
    """
    if plot is not None:
        return _plot(checkpoints, plot, out, options)
    if len(checkpoints) > 1:
        raise UsageError(
            f"bench measures one checkpoint at a time, not {len(checkpoints)}",
            hint="--plot FILE.svg draws the reports of several",
        )
    checkpoint = checkpoints[0] if checkpoints else _DEFAULT
    if checkpoint == _DEFAULT and not Path(checkpoint).exists():
        raise UsageError(f"no ./{_DEFAULT} here", hint="aoconvert bench PATH, or a model on the Hub as user/repo")
    from aoconvert import api

    with out.watch(f"bench {checkpoint}") as progress:
        report = api.bench(checkpoint, progress=progress, **options)
    if report.unwritten is not None:
        out.warning(report.unwritten)
    out.result(lambda: table(report), report.to_dict(), "measured" if report.ok else "failed")
    return report.exit_code


def _plot(checkpoints: tuple[str, ...], plot: Path, out: Output, options: dict[str, Any]) -> int:
    """Draw what was measured before."""
    context = click.get_current_context()
    given = [
        name
        for name in options
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE and options[name] is not None
    ]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{flags}: --plot measures nothing", hint="measure first, then draw")
    if not checkpoints:
        raise UsageError("--plot needs folders with reports", hint="aoconvert bench PATH PATH --plot FILE.svg")
    from aoconvert import api

    drawn = api.plot(checkpoints, plot)
    for name, reason in drawn.left_out:
        out.warning(f"{name} is not in a diagram: {reason}")
    out.result(lambda: f"drawn: {plot}", drawn.to_dict(), str(plot))
    return 0


def table(report: Bench) -> RenderableType:
    """The report for people."""
    from rich.console import Group
    from rich.text import Text

    columns = {"model": WHOLE, "mode": WHOLE, "batch": NUMBER, "what": WHOLE, "model memory": NUMBER}
    columns |= {"peak memory": NUMBER, "time": NUMBER, "per second": NUMBER, "": FOLD}
    rows = [_row(row) for row in report.rows]
    facts = report.environment
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    lines = [
        f"{facts['device']}: {facts['device_name']}{threads}; time: median of {_runs(report)} runs (lowest to highest)",
        f"peak memory: {facts['peak']}",
        f"measured: {report.path}" if report.ok else f"not measured: {report.path}: no row of the result ran",
    ]
    return Group(Output.table(rows, columns), *(Text(line) for line in lines[:-1]), Text(lines[-1], style="bold"))


def _runs(report: Bench) -> int:
    return max((row.runs for row in report.rows), default=0)


def _row(row: BenchRow) -> list[RenderableType]:
    from rich.text import Text

    from aoconvert.humanize import size

    what = f"{row.unit} ({row.workload})" if row.workload else row.unit
    model = f"{row.model}, {row.scheme}"
    memory = [size(value) if value is not None else "-" for value in (row.model_bytes, row.peak_bytes)]
    time, rate, note = "-", "-", row.error or ""
    if row.seconds is not None and row.seconds_min is not None and row.seconds_max is not None:
        time = f"{row.seconds:.3g} s ({row.seconds_min:.3g} to {row.seconds_max:.3g})"
    if row.per_second is not None:
        rate = f"{row.per_second:.3g}"
    if row.compile_seconds is not None:
        note = f"compiled in {row.compile_seconds:.1f} s"
    return [Text(cell) for cell in (model, row.mode, str(row.batch_size), what, *memory, time, rate, note)]
