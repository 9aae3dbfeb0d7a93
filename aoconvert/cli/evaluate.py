"""``aoconvert eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.errors import UsageError
from aoconvert.humanize import size
from aoconvert.options.evaluate import EvaluateOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.checkpoint.evaluation import ComponentFigures, Evaluation

EXAMPLES = """\b
Examples:
  aoconvert eval --source meta-llama/Llama-3.2-1B --text wiki.txt
  aoconvert eval ./out --source ./my-model --samples 16 --max-kl 0.05
  aoconvert eval --source black-forest-labs/FLUX.1-dev --prompts prompts.txt --size 1024x1024 --steps 28
  aoconvert eval user/MiniLM-int8wo --min-cosine 0.999 --json
"""

_DEFAULT = "out"


@click.command("eval", epilog=EXAMPLES)
@click.argument("checkpoint", metavar="[PATH|REPO_ID]", default=_DEFAULT)
@with_options(EvaluateOptions)
@common
def command(*, checkpoint: str, out: Output, **options: Any) -> int:
    """Show how much a converted checkpoint lost: its outputs beside the original's. Default: ./out.

    Both models run on the same inputs, one after the other, each in a fresh process. Language models: KL divergence,
    agreement of the most likely token, perplexity. Encoders: cosine and relative error. Pipelines: error of the
    denoiser on the original's inputs, error of the final latents, PSNR and SSIM of the pictures, and eval.png. The same
    figures for noise like bfloat16 rounding say what "as good as the original" is. It writes aoconvert.eval.json; exit
    code 4 if a gate is missed.
    """
    if checkpoint == _DEFAULT and not Path(checkpoint).exists():
        raise UsageError(f"no ./{_DEFAULT} here", hint="aoconvert eval PATH, or a model on the Hub as user/repo")
    from aoconvert import api

    with out.watch(f"eval {checkpoint}") as progress:
        report = api.evaluate(checkpoint, progress=progress, **options)
    for line in warnings(report):
        out.warning(line)
    out.result(lambda: table(report), report.to_dict(), "ok" if report.ok else "failed")
    return report.exit_code


def warnings(report: Evaluation) -> list[str]:
    """What the user should know."""
    found = [report.unwritten] if report.unwritten is not None else []
    if report.source.same_files is False:
        found.append(f"{report.source.label} has other weights files than those that were quantized")
    return found


def table(report: Evaluation) -> RenderableType:
    """The report for people."""
    from rich.console import Group
    from rich.markup import escape
    from rich.text import Text

    columns = {"figure": FOLD, "quantized": NUMBER, "bfloat16 noise": NUMBER}
    shown: list[RenderableType] = []
    for part in report.components:
        amount = f"on {report.data.tokens} tokens: " if report.data.tokens is not None else ""
        title = f"{part.name or part.class_name} ({part.task}), {amount}{report.data.detail}"
        shown += [Text(title, style="bold"), Output.table(_rows(part), columns)]
        if part.layers:
            worst = sorted(
                (layer for layer in part.layers if layer.output_sqnr_db is not None),
                key=lambda layer: layer.output_sqnr_db or 0.0,
            )[:3]
            names = ", ".join(f"{layer.name} {layer.output_sqnr_db:.1f} dB" for layer in worst)
            shown.append(Text(f"layers with the largest output error: {names or 'none'}"))
        shown += [Text(f"no {figure.name}: {figure.reason}") for figure in part.skipped_figures]
    if report.peak_bytes:
        taken = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in report.peak_bytes.items())
        shown.append(Text(f"largest amount of memory of each process's own: {taken}"))
    gates = [
        (
            f"--{gate.name}",
            f"{gate.limit:g}",
            "" if gate.value is None else f"{gate.value:.6g}",
            "[green]passed[/green]" if gate.passed else "[red]missed[/red]",
        )
        for gate in report.gates
    ]
    if gates:
        shown.append(Output.table(gates, {"gate": WHOLE, "limit": NUMBER, "value": NUMBER, "": WHOLE}))
    shown.append(
        Text(f"evaluated: {escape(report.path)}" if report.ok else f"a gate was missed: {report.path}", style="bold")
    )
    return Group(*shown)


_LABELS = {
    "kl_mean": "KL divergence, mean (nats per token)",
    "kl_median": "KL divergence, median",
    "kl_p90": "KL divergence, 90 % of tokens below",
    "kl_p99": "KL divergence, 99 % of tokens below",
    "kl_max": "KL divergence, largest",
    "top1_agreement": "same most likely token",
    "perplexity_source": "perplexity of the original",
    "perplexity": "perplexity",
    "cosine_mean": "cosine of the outputs, mean",
    "cosine_min": "cosine of the outputs, smallest",
    "cosine_tokens_mean": "cosine for each token, mean",
    "cosine_tokens_min": "cosine for each token, smallest",
    "output_relative_error": "relative error of the outputs",
    "output_sqnr_db": "SQNR of the outputs (dB)",
    "latents_relative_error": "relative error of the final latents",
    "psnr_mean": "PSNR of the pictures, mean (dB)",
    "psnr_min": "PSNR of the pictures, smallest (dB)",
    "ssim_mean": "SSIM of the pictures, mean",
    "lpips_mean": "LPIPS of the pictures, mean",
}


def _rows(part: ComponentFigures) -> list[tuple[str, str, str]]:
    figures, floor = (metrics.model_dump(exclude_none=True) for metrics in (part.metrics, part.noise_floor))
    return [
        (label, f"{figures[name]:.6g}", f"{floor[name]:.6g}" if name in floor else "")
        for name, label in _LABELS.items()
        if name in figures
    ]
