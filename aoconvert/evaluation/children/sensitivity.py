"""What an error in each weight would do to the model's output, from gradients of the original.

For small changes Δ of the weights, KL(original‖changed) is ½·Δᵀ·F·Δ, where F is the Fisher information: the expected
square of the gradient of ln p(y), y drawn from the model's own distribution (J. Martens, "New insights and perspectives
on the natural gradient method", arXiv:1412.1193, section 5). An error of quantization has no direction that matters, so
of a weight W with n elements the trace of F is enough: KL ≈ ½·E‖∂ln p/∂W‖²·‖Δ‖²/n. For outputs that are no
distribution, the same of their squared relative error: y is a random direction, and there is no ½. What it does that a
mixture routes tokens to other experts is not in it.

The gradient of a weight is never made where it would be larger than the inner products of the rows that it is the sum
of: ‖Gᵀ·X‖² = Σ (G·Gᵀ)∘(X·Xᵀ), with the rows X of the layer's input and G of its output's gradient. That of a stack
of experts is made, and thrown away at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aoconvert.evaluation.children.experts import list_stacks
from aoconvert.evaluation.children.passes import give_sample
from aoconvert.inputs import available_memory

_TOKENS = 32
"""Tokens of the sample that are used: few, as a backward pass holds what each layer gave, and as few are enough."""

_DRAWS = 4
_SHARE = 8  # a gradient may take this part of the memory that there is
_AT_ONCE = 1 << 22  # elements that are widened to float32 at once

Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each call of a layer its input, and its output, which will have a gradient."""


def measure_sensitivity(model: Any, task: str, sample: dict[str, Any], seed: int) -> dict[str, float]:
    """Linear layer or stack of experts → what its squared relative error is multiplied by to give the expected loss.

    The loss is the mean KL of a token in nats, or the squared relative error of the outputs of an encoder.

    Args:
        model: the original.
        task: as in the report.
        sample: what it is given.
        seed: of what is drawn.

    Raises:
        ValueError: a part of the model is not in memory.
        Exception: whatever a model raises that has no backward pass.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("its weights are not all in memory, as a backward pass needs them")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}
    with torch.enable_grad(), _record(model) as rows, _add_stacks(model, sums):
        output = give_sample(model, task, _cut(sample)).float()
        for _ in range(_DRAWS):
            for _, given in itertools.chain(*rows.values()):
                given.grad = None
            _draw_loss(output, task, draw).backward(retain_graph=True)  # type: ignore[no-untyped-call]
            for name, calls in rows.items():
                if found := [(taken, given.grad) for taken, given in calls if given.grad is not None]:
                    sums[name] = sums.get(name, 0.0) + _squared_norm(found)
    scale = _DRAWS if task == "encoder" else 2 * _DRAWS * len(output)
    weights = {**dict(model.named_modules()), **dict(model.named_parameters())}
    return {name: total / scale * _mean_square(weights[name]) for name, total in sums.items()}


@contextlib.contextmanager
def _record(model: nn.Module) -> Iterator[dict[str, Rows]]:
    """Have each linear layer's output take part in a backward pass, which begins at the first of them."""
    found: dict[str, Rows] = {}

    def note(name: str, given: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        else:
            output.retain_grad()
        found.setdefault(name, []).append((given[0].detach(), output))
        return output

    handles = [
        module.register_forward_hook(lambda _, given, output, name=name: note(name, given, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _add_stacks(model: nn.Module, sums: dict[str, float]) -> Iterator[None]:
    """Have backward passes add up the squares of the gradients of those stacks of experts that there is room for."""
    handles = []
    for owner, _, stacks in list_stacks(model):
        for own, stack in stacks.items():
            if stack.nbytes > available_memory() // _SHARE:
                continue

            def add(parameter: torch.Tensor, name: str = f"{owner}.{own}" if owner else own) -> None:
                if parameter.grad is not None:
                    sums[name] = sums.get(name, 0.0) + sum(
                        float(part.float().square().sum()) for part in parameter.grad
                    )
                    parameter.grad = None

            stack.requires_grad_(True)
            handles.append((stack, stack.register_post_accumulate_grad_hook(add)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for stack, handle in handles:
            handle.remove()
            stack.requires_grad_(False)


def _cut(sample: dict[str, Any]) -> dict[str, Any]:
    """The first tokens, and what there is for each of them."""

    def short(value: Any) -> Any:
        tokens = isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()
        return value[:, :_TOKENS] if tokens else value

    return {name: short(value) for name, value in sample.items()}


def _draw_loss(output: torch.Tensor, task: str, draw: torch.Generator) -> torch.Tensor:
    """Σ ln p of classes that are drawn, or an inner product with a random direction, in units of the output's norm."""
    if task == "encoder":
        direction = torch.randn(output.shape, generator=draw).to(output.device)
        share: torch.Tensor = (output * direction).sum() / output.detach().norm()
        return share
    chances = torch.log_softmax(output, -1)
    drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=draw).to(output.device)
    likelihood: torch.Tensor = chances.gather(1, drawn).sum()
    return likelihood


def _squared_norm(calls: Rows) -> float:
    """‖∂/∂W‖² of a linear layer."""
    x, g = (torch.cat([call[at].reshape(-1, call[at].shape[-1]).float() for call in calls]) for at in (0, 1))
    if len(x) ** 2 <= x.shape[1] * g.shape[1]:
        return float(((g @ g.T) * (x @ x.T)).sum())
    step = max(1, _AT_ONCE // x.shape[1])
    return sum(float((part.T @ x).square().sum()) for part in torch.split(g, step, dim=1))


def _mean_square(weight: nn.Module | torch.Tensor) -> float:
    """Of a linear layer's weight, or of a stack."""
    values = weight.weight if isinstance(weight, nn.Module) else weight
    assert isinstance(values, torch.Tensor)
    parts = torch.split(values.detach(), max(1, _AT_ONCE * len(values) // values.numel()))
    return sum(float(part.float().square().sum()) for part in parts) / values.numel()
