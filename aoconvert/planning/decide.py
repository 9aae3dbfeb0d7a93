"""What happens to each tensor, and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aoconvert.errors import QuantizeError
from aoconvert.models import Skeleton, TensorSpec
from aoconvert.planning.inventory import Inventory
from aoconvert.planning.types import Action, TensorPlan
from aoconvert.schemes import Scheme, blocker
from aoconvert.schemes.apply import quantize_weight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SkipRules:
    """``--skip`` patterns: exact tensor or module names, or ``re:`` with a full match (``FqnToConfig``'s syntax)."""

    patterns: tuple[str, ...]

    def match(self, spec: TensorSpec) -> str | None:
        """The first pattern that matches the tensor or its module."""
        for pattern in self.patterns:
            if pattern.startswith("re:"):
                if re.fullmatch(pattern[3:], spec.name) or re.fullmatch(pattern[3:], spec.module):
                    return pattern
            elif pattern in (spec.name, spec.module):
                return pattern
        return None

    def unmatched(self, specs: Iterable[TensorSpec]) -> list[str]:
        """One line for every pattern that matches nothing, with the nearest names."""
        names = {name for spec in specs for name in (spec.name, spec.module) if name}
        lines = []
        for pattern in self.patterns:
            if pattern.startswith("re:"):
                if any(re.fullmatch(pattern[3:], name) for name in names):
                    continue
                near: list[str] = []
            elif pattern in names:
                continue
            else:
                near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.5)
            lines.append(f"--skip {pattern!r} matches nothing" + (f" (nearest: {', '.join(near)})" if near else ""))
        return lines


def meta_output(spec: TensorSpec, dtype: torch.dtype, scheme: Scheme | None) -> torch.Tensor:
    """The tensor that will be written, on ``meta``: real class and real inner shapes, no data.

    Raises:
        QuantizeError: torchao declines a weight that ``blocker`` let pass.
    """
    import torch

    plain = torch.empty(spec.shape, dtype=dtype, device="meta")
    if scheme is None:
        return plain
    result = quantize_weight(plain, scheme)
    if type(result) is torch.Tensor:
        raise QuantizeError(
            f"torchao left {spec.name} {list(spec.shape)} unquantized under {scheme.name}",
            hint=f"--skip {spec.name}",
        )
    return result


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's data; of a torchao tensor all its inner tensors together."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(nbytes(getattr(tensor, name)) for name in names)


def _reason(
    spec: TensorSpec, dtype: torch.dtype, scheme: Scheme, skip: SkipRules, shared: frozenset[str]
) -> str | None:
    """Why the tensor is not quantized, or ``None`` if it is."""
    if not spec.floating:
        return "not a floating tensor"
    if spec.kind == "embedding":
        return "an embedding table"
    if spec.kind != "linear":
        if spec.parameter and len(spec.shape) == 3 and "expert" in spec.name:
            return "experts in one 3-D parameter; this scheme takes the weights of linear layers"
        return f"{spec.module_class}: not the weight of a linear layer"
    pattern = skip.match(spec)
    if pattern is not None:
        return f"--skip {pattern}"
    if spec.name in shared:
        return "shared with another tensor; quantized and tied cannot be loaded again"
    if spec.output_head:
        return "output head"
    if spec.keep_fp32:
        return "the model class keeps it in float32"
    if scheme.needs_rows and spec.single_row:
        return f"sees one row per sample, which {scheme.name} cannot run"
    return blocker(spec.shape, dtype, scheme)


@dataclass(frozen=True)
class Decisions:
    """The tensors of one component, in state-dict order, with what they will be on ``meta``."""

    tensors: tuple[TensorPlan, ...]
    outputs: Mapping[str, torch.Tensor]
    problems: tuple[str, ...]


def decide(
    skeleton: Skeleton, scheme: Scheme, skip: SkipRules, dtype: torch.dtype | None, inventory: Inventory | None
) -> Decisions:
    """Decide for every tensor of a model.

    Args:
        skeleton: the empty model.
        scheme: what to quantize linear weights to.
        skip: what the user left out.
        dtype: of everything floating; ``None`` keeps the source's.
        inventory: the checkpoint's tensors; ``None`` where only the config is known.
    """
    shared = frozenset(spec.tied_to for spec in skeleton if spec.tied_to)
    outputs: dict[str, torch.Tensor] = {}
    cache: dict[tuple[tuple[int, ...], torch.dtype, bool], torch.Tensor] = {}
    tensors: list[TensorPlan] = []
    missing: list[str] = []
    problems: list[str] = []
    for spec in skeleton:
        origin = inventory.direct.get(spec.name) if inventory else None
        if inventory and origin is None and spec.name in shared and spec.name not in inventory.merged:
            # the checkpoint may name the shared tensor by its other name
            twin = next((s.name for s in skeleton if s.tied_to == spec.name and s.name in inventory.direct), None)
            origin = inventory.direct[twin] if twin else None
        merged = inventory is not None and spec.name in inventory.merged
        if inventory and origin is None and not merged and spec.tied_to is None:
            missing.append(spec.name)
            continue
        if origin is not None and spec.tied_to is None and origin.shape != spec.shape:
            problems.append(
                f"{skeleton.component.title}: {spec.name} is {list(origin.shape)} in {origin.file}, "
                f"but its class wants {list(spec.shape)}"
            )
            continue
        found = origin.dtype if origin else (spec.dtype if not spec.floating else dtype or spec.dtype)
        if spec.floating and found.itemsize == 1:
            problems.append(f"{skeleton.component.title}: {spec.name} is already {str(found).removeprefix('torch.')}")
            continue
        target = _target_dtype(spec, found, dtype)
        why = (
            _reason(spec, target, scheme, skip, shared)
            if spec.tied_to is None
            else f"the same tensor as {spec.tied_to}"
        )
        key = (spec.shape, target, why is None)
        if key not in cache:
            cache[key] = meta_output(spec, target, scheme if why is None else None)
        action: Action = (
            "tied" if spec.tied_to else "quantize" if why is None else "cast" if target != found else "keep"
        )
        if action != "tied":
            outputs[spec.name] = cache[key]
        tensors.append(
            TensorPlan(
                name=spec.name,
                shape=spec.shape,
                dtype=str(target).removeprefix("torch."),
                source_dtype=str(found).removeprefix("torch."),
                action=action,
                reason=why,
                candidate=spec.kind == "linear" or (spec.parameter and len(spec.shape) > 1 and spec.kind == "other"),
                parameter=spec.parameter,
                embedding=spec.kind == "embedding",
                bytes_in=spec.numel * found.itemsize if action != "tied" else 0,
                bytes_out=nbytes(cache[key]) if action != "tied" else 0,
                origin=(origin.file, origin.name) if origin and action != "tied" else None,
            )
        )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        problems.append(f"{skeleton.component.title}: the checkpoint does not hold {shown}")
    return Decisions(tuple(tensors), outputs, tuple(problems))


def _target_dtype(spec: TensorSpec, found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    import torch

    if not spec.floating or not found.is_floating_point:
        return found
    if spec.keep_fp32 and dtype is not torch.float64:
        return torch.float32 if (dtype or found).itemsize <= 4 else found
    return dtype or found
