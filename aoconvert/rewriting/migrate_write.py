"""One tensor of a migration: made, repaired where it must be, and what differs from the old one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aoconvert.checkpoint.manifest import DeviationEntry, MigratedEntry
from aoconvert.rewriting.migrate_plan import Moved, make_output
from aoconvert.rewriting.migrate_types import OldTensor, OldWeights
from aoconvert.schemes.tensors import dequantize, repair

_REPAIRED = "{} of its scales were 0, so that their values were NaN: they stand for zeros now"


def make_tensor(old: OldTensor, moved: Moved | None) -> tuple[Any, float | None, int]:
    """What is written for a tensor, its largest difference to the old values, and how many scales were repaired."""
    made = make_output(old, moved, on_meta=False)
    repaired = repair(made) if moved is not None and moved.migration == "carried" else 0
    return made, _error(made, moved), repaired


def find_deviation(moved: Moved, error: float | None, repaired: int) -> DeviationEntry | None:
    """Say what differs from the old tensor; arguments as ``make_tensor`` gives them; ``None``: nothing."""
    reasons = [moved.reason] if moved.reason else []
    if repaired:
        reasons.append(_REPAIRED.format(repaired))
    if not reasons and moved.migration == "carried":
        return None
    return DeviationEntry(name=moved.old.name, reason="; ".join(reasons), max_abs_error=error or 0.0)


def describe_weights(weights: OldWeights, deviations: Sequence[DeviationEntry]) -> MigratedEntry:
    """Where tensors are from, for the manifest."""
    return MigratedEntry(
        kind=weights.kind, scheme=weights.scheme, written_by=weights.written_by, deviations=list(deviations)
    )


def _error(made: Any, moved: Moved | None) -> float | None:
    """The largest difference of what is written to the values that the old tensor stands for; ``None``: there is none.

    A tensor that is carried, or dequantized, stands for the same values.
    """
    if moved is None or (moved.old.exact is None and moved.migration != "requantized"):
        return None
    exact = moved.old.exact() if moved.old.exact is not None else moved.old.make(False)
    values = dequantize(made) if hasattr(made, "__tensor_flatten__") else made
    return float((values.float() - exact.float()).abs().max()) if exact.numel() else 0.0
