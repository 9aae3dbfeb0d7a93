"""Attention projections of a diffusers model, fused: one matrix for query, key and value.

``fuse_qkv_projections`` of a model adds the fused layers and keeps the old ones, with a copy of the weights; a
processor then uses the fused ones only. A file needs them once, so here the old layers go. The load code does the same
(``verification/code.py``), as ``from_pretrained`` builds the model unfused.
Source: ``fuse_projections`` in ``diffusers.models.attention`` and ``attention_processor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.models.base import ModelPart, Skeleton, describe_tensors
from aoconvert.models.conversions import Conversion
from aoconvert.models.diffusers import empty_model, list_float32

if TYPE_CHECKING:
    from torch import nn


class CannotFuse(SourceError):
    """A model whose projections diffusers does not fuse."""


# fused layer → the layers whose outputs it gives, one after the other
FUSED: Mapping[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def fuse(model: nn.Module) -> frozenset[str]:
    """Fuse a model's projections and take out the layers that are not used any more.

    Returns:
        Names of the fused layers; none where no attention of the model can be fused.

    Raises:
        ValueError: diffusers refuses the model.
    """
    before = {name for name, _ in model.named_modules()}
    fusing: Any = model
    fusing.fuse_qkv_projections()
    names = frozenset(name for name, _ in model.named_modules() if name not in before)
    for name in names:
        owner, _, layer = name.rpartition(".")
        for part in FUSED[layer]:
            delattr(model.get_submodule(owner), part)
    return names


def skeleton(component: ModelPart) -> Skeleton:
    """The empty model with fused projections, and its tensors.

    Raises:
        CannotFuse: the class has nothing to fuse, or diffusers refuses.
        SourceError: the class does not take its config.
    """
    model = empty_model(component)
    refusal = f"{component.title}: {component.class_name} has no attention whose projections diffusers can fuse"
    if not hasattr(model, "fuse_qkv_projections"):
        raise CannotFuse(refusal, hint="leave out --fuse-qkv")
    try:
        names = fuse(model)
    except ValueError as error:
        raise CannotFuse(f"{component.title}: {error}".splitlines()[0], hint="leave out --fuse-qkv") from error
    if not names:
        raise CannotFuse(refusal, hint="leave out --fuse-qkv")
    keep = list_float32(model)
    described = describe_tensors(model, tied={}, keep_fp32=keep, precise=keep)
    return Skeleton(component, model, described, fused=names)


def conversions(skeleton: Skeleton) -> tuple[Conversion, ...]:
    """How the fused tensors are made of the checkpoint's, for ``conversions.resolve_conversions``."""
    from transformers.core_model_loading import Concatenate, WeightConverter

    made = []
    for spec in skeleton:
        if spec.module not in skeleton.fused:
            continue
        owner, _, layer = spec.module.rpartition(".")
        ending = spec.name.removeprefix(f"{spec.module}.")
        parts = [f"{owner}.{part}.{ending}" for part in FUSED[layer]]
        converter = WeightConverter(parts, spec.name, [Concatenate(dim=0)])
        made.append(Conversion(spec.name, converter, {part: (part,) for part in parts}))
    return tuple(made)
