"""What the middle stage of a pass tells the writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from aoconvert.engine.read_ahead import Release
from aoconvert.planning.types import TensorPlan
from aoconvert.schemes.error_stats import ErrorStats


@dataclass(frozen=True)
class Whole:
    """A finished tensor for its file; ``device``: the type of the one that quantized it."""

    plan: TensorPlan
    tensor: torch.Tensor
    error: ErrorStats | None
    device: str | None
    release: Release


@dataclass(frozen=True)
class Begin:
    """A tensor whose rows come one after the other. ``like`` is what it will be, on meta."""

    plan: TensorPlan
    like: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """The next rows of the first inner tensor, or of a plain tensor."""

    plan: TensorPlan
    rows: torch.Tensor
    release: Release


@dataclass(frozen=True)
class End:
    """The other inner tensors, whole; ``device``: as of ``Whole``."""

    plan: TensorPlan
    rest: Mapping[str, torch.Tensor]
    error: ErrorStats | None
    device: str | None


Message = Whole | Begin | Rows | End
Send = Callable[[Message, int], None]


def nothing() -> None:
    """Release nothing: what has memory of its own needs no release."""
