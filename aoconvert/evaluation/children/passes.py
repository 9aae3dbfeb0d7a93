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
    with torch.no_grad():
        output = give_sample(model, task, sample).cpu()
    tokens = {"causal-lm": "input_ids", "seq2seq": "decoder_input_ids"}.get(task)
    return Outcome(output, sample[tokens][0, 1:] if tokens in sample else None)


def give_sample(model: Any, task: str, sample: dict[str, Any]) -> torch.Tensor:
    """What of its output is compared, on its device, in the state of autograd that there is."""
    given = _on_device(sample, model.device)
    if task in ("causal-lm", "seq2seq"):
        given["use_cache"] = False
    torch.manual_seed(0)
    output = model(**given)
    if (task == "causal-lm" and "input_ids" in sample) or (task == "seq2seq" and "decoder_input_ids" in sample):
        logits: torch.Tensor = output.logits[0, :-1]
        return logits
    values = getattr(output, "logits", None) if task != "encoder" else None
    if values is None:
        values = getattr(output, "last_hidden_state", None)
    if values is None:
        values = inputs.first_tensors(output)[0]
    rows: torch.Tensor = values.reshape(-1, values.shape[-1])
    return rows


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
