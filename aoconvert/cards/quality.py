"""What an evaluation says of a checkpoint, from ``aoconvert.eval.json``, which anybody may have written.

It is on the card only where it belongs to this very manifest.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aoconvert.cards.markdown import Md, unbroken
from aoconvert.checkpoint.evaluation import ComponentFigures, Evaluation, Metrics, evaluation_of
from aoconvert.checkpoint.manifest import SHEET_NAME, Manifest
from aoconvert.humanize import rounded
from aoconvert.options.evaluate import EvaluateOptions
from aoconvert.options.fields import REFERENCE, SWITCH, options_of

_WORST = 5

Row = tuple[str, str, str, str, str]
"""Figure, the original's, the quantized model's, how much it changed, the original's with noise."""

# figure, its label, what a model gives that equals the original
_FIGURES: Mapping[str, tuple[str, str]] = {
    "kl_mean": ("KL divergence from the original, mean (nats per token)", "0"),
    "kl_p99": ("KL divergence, 99th percentile", "0"),
    "kl_max": ("KL divergence, largest", "0"),
    "top1_agreement": ("same most likely token", "100 %"),
    "cosine_mean": ("cosine of the outputs, mean", "1"),
    "cosine_min": ("cosine of the outputs, smallest", "1"),
    "cosine_tokens_min": ("cosine of the outputs of a token, smallest", "1"),
    "output_relative_error": ("relative error of the outputs", "0"),
    "output_sqnr_db": ("SQNR of the outputs (dB)", "∞"),
    "latents_relative_error": ("relative error of the final latents", "0"),
    "psnr_mean": ("PSNR of the pictures, mean (dB)", "∞"),
    "psnr_min": ("PSNR of the pictures, smallest (dB)", "∞"),
    "ssim_mean": ("SSIM of the pictures, mean", "1"),
    "lpips_mean": ("LPIPS of the pictures, mean", "0"),
}


def describe_quality(folder: Path, place: str, bytes_in: int, bytes_out: int) -> dict[str, Any] | None:
    """The values of the card's section; ``None`` where there is no evaluation of this manifest.

    Args:
        folder: the checkpoint.
        place: what the command evaluates: a repo id, or the folder.
        bytes_in, bytes_out: of the weights, before and after.
    """
    report = evaluation_of(folder)
    if report is None:
        return None
    return {
        "components": [
            {
                "name": part.name,
                "task": part.task,
                "rows": list(_rows(part.metrics, part.noise_floor)),
                "floor": bool(part.noise_floor.model_dump(exclude_none=True)),
                "worst": _worst(part),
            }
            for part in report.components
        ],
        "data": "; ".join([report.data.detail, *_missing(report)]),
        "kind": report.data.kind,
        "samples": report.data.samples,
        "tokens": report.data.tokens,
        "files": [(file.name, file.sha256) for file in report.data.files],
        "dtype": report.source.dtype,
        "same_files": report.source.same_files is not False,
        "gates": [{"name": gate.name, "limit": _shown(gate.limit), "passed": gate.passed} for gate in report.gates],
        "device": report.environment.get("device_name") or report.environment.get("device"),
        "command": _command(report, place),
        "size_change": _change(bytes_in, bytes_out, 1) if bytes_in else "",
        "sheet": SHEET_NAME if (folder / SHEET_NAME).is_file() else None,
    }


def output_errors(folder: Path, manifest: Manifest) -> list[dict[str, float]]:
    """For each component of the manifest: layer → the error of its outputs in dB; of an evaluation of this manifest."""
    report = evaluation_of(folder)
    parts = report.components if report is not None else ()
    alone = len(manifest.components) == len(parts) == 1  # a model alone has no name in a report
    found = {part.name: {layer.name: layer.output_sqnr_db for layer in part.layers} for part in parts}
    return [
        {
            layer: error
            for layer, error in found.get(parts[0].name if alone else entry.name, {}).items()
            if error is not None
        }
        for entry in manifest.components
    ]


def _missing(report: Evaluation) -> list[str]:
    """Which figures are absent and why; a mean stands for what else there is of a figure."""
    skipped = [figure for part in report.components for figure in part.skipped_figures if figure.name in _FIGURES]
    found = [
        f"{_FIGURES[figure.name][0].partition(',')[0]}: {figure.reason}"
        for figure in skipped
        if not figure.name.endswith("_min")
    ]
    return list(dict.fromkeys(found))


def _rows(metrics: Metrics, floor: Metrics) -> Iterator[Row]:
    if metrics.perplexity_source and metrics.perplexity is not None:
        before, after = metrics.perplexity_source, metrics.perplexity
        noisy = "" if floor.perplexity is None else _shown(floor.perplexity)
        yield "perplexity", _shown(before), _shown(after), _change(before, after, 2), noisy
    for name, (label, perfect) in _FIGURES.items():
        value, noise = getattr(metrics, name), getattr(floor, name)
        if value is not None:
            yield label, perfect, _figure(name, value), "", "" if noise is None else _figure(name, noise)


def _change(before: float, after: float, digits: int) -> Md:
    """How much more or less it is, in percent."""
    return unbroken(f"{after / before - 1:+.{digits}%}".replace("%", " %").replace("-", "−"))


def _figure(name: str, value: float) -> str:
    if name == "top1_agreement":
        return f"{value:.2%}".replace("%", " %")
    return f"{value:.1f}" if name.endswith("_db") or name.startswith("psnr") else _shown(value)


def _shown(value: float) -> str:
    """Three digits, four from 1 on; of what is nearly 1, as a cosine, two digits of what it lacks to that."""
    if 0.9 < value < 1:
        return f"{value:.{min(12, 2 + max(1, math.floor(-math.log10(1 - value))))}f}"
    return rounded(value, 3 if abs(value) < 1 else 4)


def _worst(part: ComponentFigures) -> list[tuple[str, float]]:
    known = [(layer.name, layer.output_sqnr_db) for layer in part.layers if layer.output_sqnr_db is not None]
    return sorted(known, key=lambda layer: layer[1])[:_WORST]


def _command(report: Evaluation, place: str) -> str | None:
    """The command that gives the figures again; ``None`` where it is not one, or a card may not show it."""
    try:
        program, name, _, *words = shlex.split(report.command)
    except ValueError:
        return None
    known = {option.names(field)[-1]: option for field, option in options_of(EvaluateOptions).items()}
    rest = iter(words)
    for word in rest:
        option = known.get(word)
        if option is None:
            return None
        if option.kind is not SWITCH:
            value = next(rest, "")
            if not (option.shows(value) or (word in ("--source", "--source-revision") and _is_reference(value))):
                return None
    return shlex.join([program, name, place, *words]) if (program, name) == ("aoconvert", "eval") else None


def _is_reference(value: str) -> bool:
    return re.fullmatch(REFERENCE.pattern, value, re.ASCII) is not None
