"""Blocks of a model that are repeated: on ``meta`` what one of them gives is what all of them give.

A model has dozens of blocks of one class, one after the other. Without values the same input gives the same output, so
that each kind of block runs once for each kind of input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_FEW = 3
_PLACE = re.compile(r"(.*_)?(idx|index|id|number|i)")  # attributes that say which block it is


def run_once(model: nn.Module) -> dict[str, str]:
    """Let repeated blocks of a model on ``meta`` run once.

    Returns:
        Name of a block → the name of the first that is like it.
    """
    likes: dict[str, str] = {}
    for name, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < _FEW:
            continue
        kinds: dict[Any, tuple[str, dict[Any, Any]]] = {}
        for place, block in blocks.named_children():
            first, outputs = kinds.setdefault(_kind(block), (f"{name}.{place}", {}))
            likes[f"{name}.{place}"] = first
            block.forward = _Once(block.forward, outputs)
    return {name: first for name, first in likes.items() if name != first}


class _Once:
    """A forward whose output is kept, together with that of the blocks like it."""

    def __init__(self, forward: Any, outputs: dict[Any, Any]) -> None:
        self._forward = forward
        self._outputs = outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _describe(args), _describe(kwargs)
        if key not in self._outputs:
            self._outputs[key] = self._forward(*args, **kwargs)
        return self._outputs[key]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What a block's behaviour depends on: classes, tensors and settings of all that is in it, but not its place."""
    modules = tuple((name, type(module), _settings(module)) for name, module in block.named_modules())
    tensors = (*block.named_parameters(), *block.named_buffers())
    return modules, tuple((name, type(t), tuple(t.shape), t.dtype) for name, t in tensors)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    values = vars(module).items()
    plain = [(k, v) for k, v in values if isinstance(v, (bool, int, str, type(None))) and not _PLACE.fullmatch(k)]
    return tuple(sorted(plain, key=lambda item: item[0]))


def _describe(value: Any) -> Any:
    """A value as far as it matters where no tensor has values."""
    if isinstance(value, torch.Tensor):
        return type(value), tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, Mapping):
        return tuple((key, _describe(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_describe, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)


def spread(found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What was found out about the weights of blocks that ran, for those of blocks like them, too.

    Args:
        found: by state-dict key.
        names: what :func:`run_once` gave.
    """
    members: dict[str, list[str]] = {}
    for name, first in names.items():
        members.setdefault(first, []).append(name)
    more = dict(found)
    for key, value in found.items():
        owner = key
        while owner := owner.rpartition(".")[0]:
            for name in members.get(owner, ()):
                more.setdefault(name + key.removeprefix(owner), value)
    return more
