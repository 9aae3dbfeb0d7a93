"""Tensors that share their memory: which ones do, by what the checkpoint holds, and how they are made their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.models.base import Skeleton
from aoconvert.models.opening import Opening
from aoconvert.models.pipeline import build_skeleton

if TYPE_CHECKING:
    import torch
    from torch import nn

_KEY = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied:
    """A model whose shared tensors are their own.

    Attributes:
        skeleton: the model with the changed config: what is free has no ``tied_to`` there, what is stuck has.
        config: keys of ``config.json`` that change, with their new values; empty where nothing can be untied.
        free: state-dict key → the key it was tied to, under which the checkpoint holds it; both are written.
        stuck: state-dict key → why it stays tied.
    """

    skeleton: Skeleton
    config: Mapping[str, Any]
    free: Mapping[str, str]
    stuck: Mapping[str, str]


def settle_ties(
    skeleton: Skeleton, opening: Opening, are_equal: Callable[[Collection[str], Collection[str]], bool]
) -> tuple[Skeleton, tuple[tuple[str, str], ...]]:
    """The ties as the library leaves them when it has opened the checkpoint, whatever config and class declare.

    Of each group the tensor that the class takes the others from is written, even if the checkpoint has it under
    another name of the group.

    Args:
        skeleton: with the ties that are declared.
        opening: what the library said.
        are_equal: whether the checkpoint's tensors for two groups of keys hold the same values.

    Returns:
        The skeleton, and the pairs that are declared one but differ.
    """
    group: dict[str, set[str]] = {}
    for names in opening.shared:
        whole = set(names)
        group |= dict.fromkeys(names, whole)
    apart = []
    for name, origin in opening.contested:
        mine, other = group.setdefault(name, {name}), group.setdefault(origin, {origin})
        if mine is other:
            continue
        if are_equal(mine, other):
            joined = mine | other
            group |= dict.fromkeys(joined, joined)
        else:
            apart.append((name, origin))
    rivals: dict[str, str] = {}
    for name, origin in apart:
        rivals |= {name: origin, origin: name}
    declared = {spec.name: spec.tied_to for spec in skeleton}
    order = {name: (target is not None, at) for at, (name, target) in enumerate(declared.items())}
    specs = []
    for spec in skeleton:
        first = min(group.get(spec.name, {spec.name}) & order.keys(), key=order.__getitem__)
        specs.append(replace(spec, tied_to=first if first != spec.name else None, compared_with=rivals.get(spec.name)))
    return replace(skeleton, tensors=tuple(specs)), tuple(apart)


def untie(skeleton: Skeleton, dtype: torch.dtype, *, code_root: Path | None = None) -> Untied:
    """Set ``tie_word_embeddings`` to false, and ask the class what is tied then.

    Classes differ: T5's config insists on true, and its encoder's and decoder's embeddings are one tensor in any case;
    others scale by the width only while head and embedding are one, so that untying would change what they compute.

    Args:
        skeleton: of the model as it is.
        dtype: as for ``build_skeleton``.
        code_root: as for ``build_skeleton``.

    Raises:
        SourceError: the class does not take the changed config.
    """
    before = {spec.name: spec.tied_to for spec in skeleton if spec.tied_to}
    if not before:
        return Untied(skeleton, {}, {}, {})
    assert skeleton.model is not None  # only transformers' models tie anything
    if where := _reads_the_key(skeleton.model):
        why = f"{where} computes something different when they are not tied"
        return Untied(skeleton, {}, {}, dict.fromkeys(before, why))
    changes = _changes(skeleton.component.config)
    component = replace(skeleton.component, config={**skeleton.component.config, **changes})
    changed = build_skeleton(component, dtype, code_root=code_root)
    stuck = {spec.name for spec in changed if spec.tied_to}
    free = {name: target for name, target in before.items() if name not in stuck}
    why = f"{component.class_name} always ties them"
    if not free:
        return Untied(skeleton, {}, {}, dict.fromkeys(stuck, why))
    return Untied(changed, changes, free, dict.fromkeys(stuck, why))


def _changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The key at the top, and in the nested configs that have it (``text_config`` of a model that also sees)."""
    nested = {
        name: {**value, _KEY: False} for name, value in config.items() if isinstance(value, dict) and value.get(_KEY)
    }
    return {_KEY: False, **nested}


def _reads_the_key(model: nn.Module) -> str | None:
    """The class of a module whose forward looks at the key."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and _KEY in code.co_names:
            return type(module).__name__
    return None
