"""What a forward pass gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def first_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output: of a model's own output class, of tuples, lists and dicts, in order.

    What only serves the next step (a cache) is not among them.
    """
    if isinstance(output, torch.Tensor):
        return [output] if output.dtype.is_floating_point else []
    if isinstance(output, Mapping):
        return [tensor for key, item in output.items() if "cache" not in str(key) for tensor in first_tensors(item)]
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in first_tensors(item)]
    if hasattr(output, "__dict__") and not callable(output):
        values = vars(output)
        sample = values.get("parameters", values.get("sample"))  # a distribution over latents
        return first_tensors(sample if sample is not None else list(values.values())) if values else []
    return []


def sqnr_db(original: list[torch.Tensor], result: list[torch.Tensor]) -> float | None:
    """How far the result's output is from the original's: 10·log10 of signal power over error power, in dB.

    Returns:
        ``inf`` where they are equal; ``None`` where they cannot be compared: other shapes, or nothing in them.
    """
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(original, result, strict=False) if a.shape == b.shape]
    pairs = [(a, b) for a, b in pairs if a.isfinite().all() and b.isfinite().all()]
    signal = sum(float((a * a).sum()) for a, _ in pairs)
    noise = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    if not pairs or (signal == 0 and noise > 0):
        return None
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise)
