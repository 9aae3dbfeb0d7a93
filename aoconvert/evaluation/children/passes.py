"""One forward pass: what of a model's output is compared, (positions, values)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aoconvert import inputs
from aoconvert.evaluation.figures import SampleFigures, compare_logits, compare_vectors


@dataclass(frozen=True)
class Outcome:
    """The output of each position, and the tokens that come next, where there are any; both on the CPU."""

    output: torch.Tensor
    targets: torch.Tensor | None


def run_sample(model: Any, task: str, sample: dict[str, Any]) -> Outcome:
    """Give a sample to a model."""
    given = _on_device(sample, model.device)
    if task in ("causal-lm", "seq2seq"):
        given["use_cache"] = False
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**given)
    if task == "causal-lm" and "input_ids" in sample:
        return Outcome(output.logits[0, :-1].cpu(), sample["input_ids"][0, 1:])
    if task == "seq2seq" and "decoder_input_ids" in sample:
        return Outcome(output.logits[0, :-1].cpu(), sample["decoder_input_ids"][0, 1:])
    if task != "encoder" and getattr(output, "logits", None) is not None:
        return Outcome(output.logits.reshape(-1, output.logits.shape[-1]).cpu(), None)
    values = getattr(output, "last_hidden_state", None)
    if values is None:
        values = inputs.first_tensors(output)[0]
    return Outcome(values.reshape(-1, values.shape[-1]).cpu(), None)


def compare(task: str, before: Outcome, output: torch.Tensor) -> SampleFigures:
    """Compare what the original and another model gave for a sample.

    Raises:
        NotFiniteError: NaN or infinity in one of them.
    """
    if task == "encoder":
        return compare_vectors(before.output, output)
    return compare_logits(before.output, output, before.targets)


def _on_device(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on_device(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_device(item, device) for item in value)
    return value
