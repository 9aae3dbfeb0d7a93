"""Limits that a result has to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from aoconvert.checkpoint.evaluation import ComponentFigures, GateResult, Metrics, Task
from aoconvert.errors import UsageError
from aoconvert.options.evaluate import EvaluateOptions

_LOGITS: frozenset[Task] = frozenset({"causal-lm", "seq2seq", "classifier"})
_TEXTS: frozenset[Task] = frozenset({"causal-lm", "seq2seq"})
_VECTORS: frozenset[Task] = frozenset({"encoder", "denoiser"})
_PICTURES: frozenset[Task] = frozenset({"denoiser"})


def _ratio(metrics: Metrics) -> float | None:
    before, after = metrics.perplexity_source, metrics.perplexity
    return after / before if before and after is not None else None


@dataclass(frozen=True)
class _Gate:
    """An option that is a limit.

    Attributes:
        field: of ``EvaluateOptions``.
        value: the figure that it limits.
        side: whether the limit is the largest or the smallest that may be.
        tasks: of the models that have such a figure.
        nothing: what a figure stands for that is absent, as it is infinite; ``None``: it then is missing.
    """

    field: str
    value: Callable[[Metrics], float | None]
    side: Literal["max", "min"]
    tasks: frozenset[Task]
    nothing: float | None = None


_GATES = (
    _Gate("max_kl", lambda metrics: metrics.kl_mean, "max", _LOGITS),
    _Gate("min_agreement", lambda metrics: metrics.top1_agreement, "min", _LOGITS),
    _Gate("max_perplexity_ratio", _ratio, "max", _TEXTS),
    _Gate("min_cosine", lambda metrics: metrics.cosine_mean, "min", _VECTORS),
    _Gate("min_psnr", lambda metrics: metrics.psnr_mean, "min", _PICTURES, nothing=math.inf),
    _Gate("max_lpips", lambda metrics: metrics.lpips_mean, "max", _PICTURES),
)


def check_gates(options: EvaluateOptions, tasks: Collection[Task]) -> None:
    """Refuse a limit for a figure that no model of these tasks has, before any work.

    Raises:
        UsageError: there is one, or it is not a number.
    """
    for gate in _GATES:
        limit = getattr(options, gate.field)
        if limit is None:
            continue
        if not math.isfinite(limit):
            raise UsageError(f"{_flag(gate)} must be a finite number")
        if not gate.tasks & set(tasks):
            kinds = ", ".join(sorted(set(tasks)))
            hint = " or ".join(_flag(other) for other in _GATES if other.tasks & set(tasks))
            raise UsageError(f"{_flag(gate)} does not apply to this model ({kinds})", hint=f"use {hint}")


def judge(options: EvaluateOptions, components: Iterable[ComponentFigures]) -> Iterator[GateResult]:
    """Hold the figures against the limits: the worst component counts, and a figure that is missing is not enough."""
    found = list(components)
    for gate in _GATES:
        limit = getattr(options, gate.field)
        if limit is None:
            continue
        values = [gate.value(part.metrics) for part in found if part.task in gate.tasks]
        known = [gate.nothing if value is None else value for value in values]
        numbers = [value for value in known if value is not None]
        worst = max(numbers, default=math.inf) if gate.side == "max" else min(numbers, default=-math.inf)
        passed = worst <= limit if gate.side == "max" else worst >= limit
        name = gate.field.replace("_", "-")
        yield GateResult(name=name, limit=limit, value=worst if math.isfinite(worst) else None, passed=passed)


def _flag(gate: _Gate) -> str:
    return f"--{gate.field.replace('_', '-')}"
