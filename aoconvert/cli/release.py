"""``aoconvert release``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.cli.release_job import engine_option, job_options, run_job, take_job_options
from aoconvert.humanize import size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from aoconvert.releasing.record import Record, VariantRecord
    from aoconvert.releasing.told import Event

EXAMPLES = """\b
Examples:
  aoconvert release releases/cogvideox-5b.toml --dry-run
  aoconvert release releases/cogvideox-5b.toml --owner my-org
  aoconvert release releases/llama.toml --only 'int8*' --skip-push --json
  aoconvert release releases/cogvideox-5b.toml --owner my-org --engine hf-jobs --flavor cpu-xl
"""

_WIDE = 120  # columns in which the last one of the table has room
_COLORS = {"pushed": "green", "unchanged": "green", "made": "green", "gate_failed": "red", "failed": "red"}


@click.command("release", epilog=EXAMPLES)
@click.argument("path", metavar="RELEASE.toml", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Plan every variant: sizes, needs and problems; change nothing.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Variants to make, with * and ?. Repeatable.")
@click.option("--skip-push", is_flag=True, help="Make and judge the variants, publish nothing.")
@click.option("--owner", metavar="NAME", help="User or organization for {owner} in the repos' names.")
@click.option(
    "--keep-going/--fail-fast",
    default=True,
    show_default=True,
    help="Go on with the other variants if one fails or misses a gate.",
)
@click.option(
    "--output-root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("releases"),
    show_default=True,
    help="Folder for the variants, release.json and release.html.",
)
@click.option("--eval/--no-eval", "evaluate", default=None, help="Evaluate each variant. Default: if a gate needs it.")
@click.option("--token", envvar="HF_TOKEN", help="Hub token; it is never stored.")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Cache of the Hub client.")
@click.option("--local-files-only", is_flag=True, help="Use no network for the source.")
@engine_option
@click.option("--address", metavar="HOST:PORT", help="ray: the cluster. Default: RAY_ADDRESS, or one on this machine.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Make N variants at a time, each in a process of its own. Default: one for each GPU; ray: no limit.",
)
@job_options
@common
def command(*, path: Path, out: Output, keep_going: bool, **options: Any) -> int:
    """Make a release: quantize, verify, evaluate, judge and publish every variant of a release file.

    A variant that misses a gate is not published; exit code 4. What is done already is not done again: run the same
    command to continue. With --json it prints one JSON document per line and event, the last one is the summary.

    With --engine hf-jobs the same happens in a job on Hugging Face. It costs money: without --confirm only its plan is
    shown, with the machine, the timeout and the most that it can cost.
    """
    options["fail_fast"] = not keep_going
    notes: list[str] = []

    def pass_on(event: Event) -> None:
        notes.extend(f"{event['variant']}: {line}" for line in event.get("warnings", ()) if "variant" in event)
        if event["event"] == "card_not_updated":
            notes.append(f"{event['variant']}: its card and record were not brought up to date: {event['reason']}")
        if event["event"] == "card_not_updated":
            notes.append(f"{event['variant']}: its card does not show this release: {event['reason']}")
        out.event(event)

    job = take_job_options(options)
    if job is not None:
        record = run_job(path, job, out, pass_on, options)
    else:
        with out.watch(f"release {path.name}") as progress:
            from aoconvert.releasing import release

            record = release(path, progress=progress, on_event=pass_on, **options)
    if record is not None and (summary := os.environ.get("GITHUB_STEP_SUMMARY")) and not options["dry_run"]:
        notes += _append(Path(summary), markdown(record))
    for line in notes:
        out.warning(line)
    if record is None:
        return 0
    data = {"event": "summary", **record.to_dict()}
    out.result(lambda: table(record), data, "ok" if record.ok else "failed")
    return record.exit_code


def _append(path: Path, text: str) -> list[str]:
    """Add to a file; gives what is to be said where that fails: the release is made all the same."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        return [f"the job's summary was not written: GITHUB_STEP_SUMMARY={path}: {error.strerror or error}"]
    return []


def table(record: Record) -> RenderableType:
    """The record for people; in a narrow terminal, what there is to say of a variant comes below the figures."""
    return _Table(record)


@dataclass(frozen=True)
class _Table:
    record: Record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.markup import escape
        from rich.text import Text

        variants = self.record.variants
        beside = options.max_width >= _WIDE
        dry = any(variant.status == "planned" for variant in variants)
        figures = ("size", "bits", "disk", "time (guess)") if dry else ("size", "bits", "SQNR")
        columns = {"variant": WHOLE, "status": WHOLE, **dict.fromkeys(figures, NUMBER)}
        rows = []
        for variant in variants:
            color = _COLORS.get(variant.status, "yellow")
            row = (
                escape(variant.name),
                f"[{color}]{variant.status}[/{color}]",
                *(_plan_figures if dry else _figures)(variant),
            )
            rows.append((*row, escape(_said(variant))) if beside else row)
        yield Output.table(rows, {**columns, "": FOLD} if beside else columns)
        for variant in () if beside else variants:
            if said := _said(variant):
                yield Text(f"{variant.name}: {said}", overflow="fold")
        yield Text(f"{self.record.name}: {'ok' if self.record.ok else 'not ok'}", style="bold")


def markdown(record: Record) -> str:
    """The record as a Markdown table, for a CI job's summary."""
    lines = [f"### {_as_it_is(record.name)}", "", "| variant | status | size | bits per weight | worst SQNR | |"]
    lines.append("|---|---|--:|--:|--:|---|")
    for variant in record.variants:
        said = _said(variant)
        shown = said if said == variant.url else _as_it_is(said)
        cells = (f"`{variant.name}`", variant.status, *_figures(variant), shown)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def _as_it_is(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def _figures(variant: VariantRecord) -> tuple[str, str, str]:
    bits, worst = variant.bits_per_weight, variant.worst_sqnr_db
    return (
        size(variant.size_bytes) if variant.size_bytes is not None else "",
        f"{bits:.1f}" if bits is not None else "",
        f"{worst:.1f} dB" if worst is not None else "",
    )


def _plan_figures(variant: VariantRecord) -> tuple[str, ...]:
    disk, seconds = variant.disk_bytes, variant.seconds_guess
    shown = "" if seconds is None else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return (*_figures(variant)[:2], size(disk) if disk is not None else "", shown)


def _said(variant: VariantRecord) -> str:
    """What is to be known of a variant: what it missed, what went wrong, or where it is."""
    missed = [gate for gate in variant.gates if not gate.passed]
    if missed:
        return "; ".join(
            f"{gate.name} {_value(gate.name, gate.value)} (limit {_value(gate.name, gate.limit)})" for gate in missed
        )
    if variant.error is not None:
        error = variant.error
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return variant.url or (variant.repo_id if variant.status == "planned" else None) or ""


def _value(gate: str, value: float | None) -> str:
    if value is None:
        return "none"
    return size(int(value)) if gate == "max-size" else f"{value:.6g}"
