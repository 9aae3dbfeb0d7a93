"""``aoconvert release --engine hf-jobs``: options, refusals, and how a job's plan is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aoconvert.cli.output import Output
from aoconvert.cli.streams import write_stderr
from aoconvert.errors import UsageError
from aoconvert.humanize import escape, first, size
from aoconvert.options.jobs import JobOptions, parse_duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.releasing.engines.hf_jobs import JobPlan
    from aoconvert.releasing.record import Record

F = TypeVar("F", bound=Callable[..., Any])

ENGINES = ("local", "ray", "hf-jobs")
_DEFAULTS = JobOptions()
_ONLY_HERE = {
    "output_root": "--output-root: the job keeps what it makes in --bucket",
    "jobs": "--jobs: the job makes a variant on each GPU of its machine",
    "address": "--address is a Ray cluster's",
}


engine_option = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="local",
    show_default=True,
    help="Who does the work: this machine, a Ray cluster (pip install 'aoconvert[ray]'), or a job on Hugging Face, "
    "which costs money.",
)


def job_options(function: F) -> F:
    """The options that only a job has."""
    options = [
        click.option("--flavor", metavar="NAME", help="hf-jobs: machine. Default: the cheapest that is large enough."),
        click.option("--timeout", metavar="TIME", help="hf-jobs: limit of an attempt, as 90m or 6h. Default: by size."),
        click.option(
            "--attempts",
            type=click.IntRange(min=1),
            help=f"hf-jobs: starts at most. Default: {_DEFAULTS.attempts}.",
        ),
        click.option("--bucket", metavar="NAME", help=f"hf-jobs: keeps what is made. Default: {_DEFAULTS.bucket}."),
        click.option("--namespace", metavar="NAME", help="hf-jobs: user or organization that runs it and pays."),
        click.option("--requirement", metavar="TEXT", help="hf-jobs: aoconvert as pip finds it. Default: on PyPI."),
        click.option("--confirm", is_flag=True, help="hf-jobs: start the job. Without it only its plan is shown."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def take_job_options(options: dict[str, Any]) -> JobOptions | None:
    """Take the options of a job out of ``options``; ``None``: this machine does the work, or a cluster.

    Raises:
        UsageError: options that do not go with the engine.
    """
    engine = options.pop("engine")
    typed = {field.name: options.pop(field.name) for field in fields(JobOptions)}
    given = {name: value for name, value in typed.items() if value not in (None, False)}
    if engine != "hf-jobs":
        options["engine"] = engine
        if given:
            raise UsageError(f"--{next(iter(given))} is for a job", hint="add --engine hf-jobs, or omit it")
        return None
    context = click.get_current_context()
    for name, problem in _ONLY_HERE.items():
        if context.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT):
            raise UsageError(problem, hint="omit it")
    if "timeout" in given:
        given["timeout"] = parse_duration(given["timeout"])
    return JobOptions(**given)


def run_job(
    path: Path, job: JobOptions, out: Output, pass_on: Callable[[dict[str, Any]], None], options: dict[str, Any]
) -> Record | None:
    """Run a release as a job; ``None``: only its plan was made, and is printed."""
    from aoconvert.releasing.engines.hf_jobs import JobPlan, release_as_job

    def on_event(event: dict[str, Any]) -> None:
        pass_on(event)
        if out.mode == "human" and event["event"] != "progress":
            write_stderr(f"{escape(_said(event))}\n")

    def on_log(line: str) -> None:
        if out.progress:
            write_stderr(f"{escape(line)}\n")

    found = release_as_job(path, job, on_event=on_event, on_log=on_log, **options)
    if not isinstance(found, JobPlan):
        return found
    for line in found.warnings:
        out.warning(line)
    out.result(lambda: table(found), {"event": "job_planned", **found.to_dict()}, f"{found.most_usd:.2f}")
    return None


def _said(event: dict[str, Any]) -> str:
    """An event in a few words."""
    told = event.get("variant") or event.get("url") or first(list(map(str, event.get("variants", []))))
    return f"{event['event'].replace('_', ' ')}: {told}" if told else str(event["event"]).replace("_", " ")


def table(plan: JobPlan) -> RenderableType:
    """A job's plan for people."""
    from rich.console import Group
    from rich.markup import escape as plain
    from rich.text import Text

    flavor, prices = plan.flavor, plan.prices
    when = f"the Hub's, {prices.url}" if prices.origin == "hub" else f"of {prices.read}, {prices.url}"
    bucket = f"{plan.bucket} ({'it is there' if plan.bucket_exists else 'it is made, private'})"
    again = f" x {plan.attempts} attempts" if plan.attempts > 1 else ""
    rows = [
        ("release", plain(f"{plan.name}, {len(plan.names)} variants: {first(plan.names, 6)}")),
        ("pays", plain(plan.namespace)),
        ("flavor", plain(f"{flavor.name}: {flavor.describe()}; ${flavor.usd_per_hour:.2f} per hour")),
        ("", plain(plan.reason)),
        ("timeout", plain(f"{plan.timeout / 3600:.4g} h: {plan.timeout_reason}")),
        ("at most", plain(f"${plan.most_usd:.2f} ({plan.timeout / 3600:.4g} h{again}; prices {when})")),
        ("reads", plain("; ".join(f"{pin.repo_id}@{pin.commit[:12]}" for pin in plan.order.pins))),
        ("keeps in", plain(bucket)),
        ("installs", plain(" ".join(plan.dependencies))),
        ("needs", plain(f"{plan.work.needs.describe()}; {size(plan.work.nbytes)} are read and written")),
    ]
    end = "Nothing was started: --confirm starts it."
    if plan.running is not None:
        end = f"The job {plan.running.id} does this already: --confirm follows it. {plan.running.url}"
        if not plan.running.same:
            end = f"The job {plan.running.id} works in the same folder, with another order. {plan.running.url}"
    return Group(Output.table(rows), Text(end, style="bold"))
