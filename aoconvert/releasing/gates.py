"""Requested against got: what a variant must reach to be published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aoconvert.checkpoint.evaluation import Evaluation, GateResult
from aoconvert.checkpoint.report import Report
from aoconvert.evaluation.gates import judge
from aoconvert.options.evaluate import EvaluateOptions
from aoconvert.options.fields import parse_size
from aoconvert.releasing.release_file import Gates


def judge_variant(
    gates: Gates, made: dict[str, Any], report: Report, evaluation: Evaluation | None
) -> Iterator[GateResult]:
    """Hold a variant against its gates.

    Args:
        gates: what it must reach.
        made: as :func:`aoconvert.releasing.record.describe_manifest` gives it.
        report: of its verification.
        evaluation: of its outputs; ``None``: there was none, and no gate needs it.
    """
    yield _of("verified", 1.0, float(report.ok), passed=report.ok)
    if (least := gates.min_quantized) is not None:
        yield _at_least("min-quantized", least, made["quantized_fraction"])
    if (least := gates.min_sqnr_db) is not None:
        # no weight has an error: nothing is lost
        worst = made["worst_sqnr_db"]
        yield _of("min-sqnr-db", least, worst, passed=worst is None or worst >= least)
    if gates.max_size is not None:
        most = parse_size(gates.max_size) if isinstance(gates.max_size, str) else gates.max_size
        yield _of("max-size", most, made["size_bytes"], passed=made["size_bytes"] <= most)
    if gates.require_forward:
        forward = report.check("forward")
        ran = forward is not None and forward.status == "passed"
        yield _of("require-forward", 1.0, float(ran), passed=ran)
    if evaluation is not None:
        yield from judge(make_gates(gates), evaluation.components)


def make_gates(gates: Gates) -> EvaluateOptions:
    """The limits that ``eval`` knows, as its options."""
    limits: dict[str, Any] = gates.evaluated
    return EvaluateOptions(**limits)


def _at_least(name: str, limit: float, value: float) -> GateResult:
    return _of(name, limit, value, passed=value >= limit)


def _of(name: str, limit: float, value: float | None, *, passed: bool) -> GateResult:
    return GateResult(name=name, limit=float(limit), value=value, passed=passed)
