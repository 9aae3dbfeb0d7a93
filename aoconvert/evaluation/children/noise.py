"""The noise floor: a model whose weights are as far from their values as bfloat16 rounding would bring them.

A weight in float32 or float16 is really rounded to bfloat16. A weight that is bfloat16 already takes noise of the same
power: rounding has an error of up to half a step with a variance of step²/12, so each value goes to one of its two
neighbours, one step away, with a probability of 1/12. Zeros, and the largest values, stay.

It is put into all weights of two or more dimensions but embeddings, for a module at a time while that runs.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

_PERIOD = 1_048_583  # a prime, so that no row of a matrix begins at the same place of the pattern as another
_LARGEST = 0x7F7F  # bfloat16's largest finite value, as bits without the sign


def add_rounding_noise(weight: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """A copy of a weight with the noise; the same name and seed give the same noise."""
    if weight.dtype != torch.bfloat16:
        return weight.to(torch.bfloat16).to(weight.dtype)
    begin = zlib.crc32(name.encode()) % _PERIOD
    steps = _steps(seed)[begin : begin + _PERIOD].to(weight.device)
    noisy = weight.detach().clone().contiguous()
    flat = noisy.view(-1).view(torch.int16)
    for start in range(0, len(flat), _PERIOD):
        bits = flat[start : start + _PERIOD]
        size = bits & 0x7FFF
        bits += torch.where((size > 0) & (size < _LARGEST), steps[: len(bits)], 0)
    return noisy


@lru_cache(maxsize=1)
def _steps(seed: int) -> torch.Tensor:
    """The pattern of steps, twice in a row."""
    drawn = torch.randint(24, (_PERIOD,), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    return ((drawn == 0).to(torch.int16) - (drawn == 1).to(torch.int16)).repeat(2)


@contextlib.contextmanager
def rounding_noise(model: nn.Module, seed: int) -> Iterator[None]:
    """Have a model run with the noise."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not _weights(module):
            continue
        swap = _Swap(name, seed)
        handles += [
            module.register_forward_pre_hook(swap.put),
            module.register_forward_hook(swap.back, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1 and parameter.dtype.is_floating_point and not parameter.is_meta
    }


class _Swap:
    """Hooks of one module."""

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._seed = name, seed
        self._kept: dict[str, nn.Parameter] = {}

    def put(self, module: nn.Module, _: Any) -> None:
        self._kept = _weights(module)
        for name, parameter in self._kept.items():
            noisy = add_rounding_noise(parameter, f"{self._name}.{name}", self._seed)
            module._parameters[name] = nn.Parameter(noisy, requires_grad=False)

    def back(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self._kept)
        self._kept = {}
