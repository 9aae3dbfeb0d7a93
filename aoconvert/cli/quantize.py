"""``aoconvert quantize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli import plan as plan_command
from aoconvert.cli import verify as verify_command
from aoconvert.cli.options import common, conversion
from aoconvert.cli.output import Output
from aoconvert.humanize import first, number, plural, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.checkpoint.evaluation import Evaluation
    from aoconvert.checkpoint.manifest import Totals
    from aoconvert.checkpoint.report import Report
    from aoconvert.engine.results import QuantizeResult

EXAMPLES = """\b
Examples:
  aoconvert quantize THUDM/CogVideoX-5b --scheme int8wo
  aoconvert quantize ./my-model --scheme float8wo -o ./my-model-fp8
  aoconvert quantize ./my-model --scheme int4dq --group-size 64 --skip 're:.*\\.proj_out'
  aoconvert quantize black-forest-labs/FLUX.1-dev --scheme int8wo --component transformer --component text_encoder_2
"""


@click.command("quantize", epilog=EXAMPLES)
@conversion
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing, like 'aoconvert plan'.")
@click.option("--verify", is_flag=True, help="Run 'aoconvert verify' on the result; exit code 4 if it fails.")
@click.option("--eval", "evaluate", is_flag=True, help="Run 'aoconvert eval' on the result, with its defaults.")
@common
def command(*, source: str, out: Output, dry_run: bool, verify: bool, evaluate: bool, **options: Any) -> int:
    """Quantize SOURCE, a Hub repo id, a folder or one weights file, into a torchao checkpoint.

    It reads a diffusers pipeline, a diffusers model or a transformers model one tensor at a time, quantizes with
    torchao's own code, and streams the result into .bin files that from_pretrained opens, beside a manifest.
    """
    if dry_run:
        plan_command.show(source, options, out, tensors=False)
        return 0
    with out.watch(f"quantize {source}") as progress:
        from aoconvert import api

        result = api.quantize(source, progress=progress, **options)
    for line in result.warnings:
        out.warning(line)
    parts: list[RenderableType] = []
    data = result.to_dict()
    code = 0
    if verify:
        report = _verify(result, source, out, options)
        parts += ["", verify_command.table(report)]
        data["verification"] = report.to_dict()
        code = report.exit_code
    if evaluate and code == 0:
        from aoconvert.cli import evaluate as evaluate_command

        found = _evaluate(result, source, out, options)
        parts += ["", evaluate_command.table(found)]
        data["evaluation"] = found.to_dict()
        code = found.exit_code
    out.result(lambda: _with_summary(result, parts), data, str(result.output))
    return code


def _hub(result: QuantizeResult, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How the source is found again: a repo at the commit that was quantized."""
    names = ("trust_remote_code", "token", "cache_dir", "local_files_only")
    return {"source": result.manifest.source.repo_id or source, **{name: options[name] for name in names}}


def _verify(result: QuantizeResult, source: str, out: Output, options: Mapping[str, Any]) -> Report:
    from aoconvert import api

    with out.watch(f"verify {result.output}") as progress:
        report = api.verify(result.output, progress=progress, **_hub(result, source, options))
    if report.unwritten is not None:
        out.warning(report.unwritten)
    return report


def _evaluate(result: QuantizeResult, source: str, out: Output, options: Mapping[str, Any]) -> Evaluation:
    from aoconvert import api
    from aoconvert.cli import evaluate as evaluate_command

    with out.watch(f"eval {result.output}") as progress:
        report = api.evaluate(result.output, progress=progress, **_hub(result, source, options))
    for line in evaluate_command.warnings(report):
        out.warning(line)
    return report


def _with_summary(result: QuantizeResult, parts: Sequence[RenderableType]) -> RenderableType:
    from rich.console import Group

    return Group(_summary(result), *parts) if parts else _summary(result)


def _share(totals: Totals) -> str:
    """The part that is quantized, as the card says it: of all parameters, embeddings among them."""
    return f"{totals.quantized_parameters / totals.parameters:.1%}" if totals.parameters else "0%"


def _summary(result: QuantizeResult) -> RenderableType:
    from rich.text import Text

    rows: list[tuple[str, str | Text]] = []
    for item in result.manifest.components:
        totals = item.totals
        worst = "" if totals.worst_sqnr_db is None else f", worst SQNR {totals.worst_sqnr_db:.1f} dB"
        sizes = f"{item.scheme}: {size(totals.bytes_in)} → {size(totals.bytes_out)}"
        share = f"{_share(totals)} of {number(totals.parameters)} parameters quantized{worst}"
        rows.append((item.name or item.class_name, f"{sizes}, {share}"))
    rows.append(("time", f"{result.seconds:.1f} s, peak memory {size(result.peak_host_bytes)}"))
    if result.peak_device_bytes:
        rows.append(("device", f"peak {size(result.peak_device_bytes)}"))
    if result.resumed:
        rows.append(("resumed", f"{plural(result.resumed, 'tensor')} from an earlier run"))
    if result.skipped:
        matrices = "1 matrix" if len(result.skipped) == 1 else f"{len(result.skipped)} matrices"
        rows.append(("not quantized", f"{matrices}; aoconvert.json has the reasons"))
    for reason, paths in plan_command.left_behind(result.manifest.left_behind).items():
        rows.append(("left behind", Text(f"{first(paths)} ({reason})")))
    return Output.table([*rows, ("output", str(result.output))])
