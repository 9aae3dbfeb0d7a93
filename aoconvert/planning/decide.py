"""What happens to each tensor, and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aoconvert.errors import QuantizeError
from aoconvert.models import Skeleton, TensorSpec
from aoconvert.models.base import SourceTensor
from aoconvert.models.conversions import Recipe
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
    decider = _Decider(skeleton, scheme, skip, dtype, inventory)
    tensors = [made for spec in skeleton if (made := decider.plan(spec)) is not None]
    problems = decider.problems
    if decider.missing:
        shown = ", ".join(decider.missing[:3])
        more = f" and {len(decider.missing) - 3} more" if len(decider.missing) > 3 else ""
        problems.append(f"{skeleton.component.title}: the checkpoint does not hold {shown}{more}")
    return Decisions(tuple(tensors), decider.outputs, tuple(problems))


@dataclass
class _Decider:
    """Goes through the tensors of one component and collects what is wrong with them."""

    skeleton: Skeleton
    scheme: Scheme
    skip: SkipRules
    dtype: torch.dtype | None
    inventory: Inventory | None
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._twins: dict[str, list[str]] = {}
        for spec in self.skeleton:
            if spec.tied_to:
                self._twins.setdefault(spec.tied_to, []).append(spec.name)
        self._cache: dict[tuple[tuple[int, ...], torch.dtype, bool], torch.Tensor] = {}

    def plan(self, spec: TensorSpec) -> TensorPlan | None:
        """What happens to one tensor; ``None`` where something is wrong with it."""
        origin = self._origin(spec)
        recipe = self.inventory.recipes.get(spec.name) if self.inventory else None
        if not self._is_usable(spec, origin, recipe):
            return None
        made = origin or recipe
        found = made.dtype if made else (spec.dtype if not spec.floating else self.dtype or spec.dtype)
        target = _target_dtype(spec, found, self.dtype)
        if spec.tied_to:
            why: str | None = f"the same tensor as {spec.tied_to}"
        else:
            why = _reason(spec, target, self.scheme, self.skip, frozenset(self._twins))
        action: Action = (
            "tied" if spec.tied_to else "quantize" if why is None else "cast" if target != found else "keep"
        )
        written = action != "tied"
        if written:
            self.outputs[spec.name] = self._output(spec, target, quantized=why is None)
        return TensorPlan(
            name=spec.name,
            shape=spec.shape,
            dtype=str(target).removeprefix("torch."),
            source_dtype=str(found).removeprefix("torch."),
            action=action,
            reason=why,
            candidate=spec.kind == "linear" or (spec.parameter and len(spec.shape) > 1 and spec.kind == "other"),
            parameter=spec.parameter,
            embedding=spec.kind == "embedding",
            bytes_in=0 if not written else recipe.bytes_in(spec.name) if recipe else spec.numel * found.itemsize,
            bytes_out=nbytes(self.outputs[spec.name]) if written else 0,
            origin=(origin.file, origin.name) if origin and written else None,
            sources=tuple((source.file, source.name) for source in recipe) if recipe and written else (),
            working_bytes=recipe.working_bytes(spec.name, target) if recipe and written else 0,
        )

    def _origin(self, spec: TensorSpec) -> SourceTensor | None:
        """The checkpoint's tensor; of a shared one also under its other name."""
        if self.inventory is None:
            return None
        if spec.name in self.inventory.merged:
            return None
        names = [spec.name, *self._twins.get(spec.name, ())]
        return next((self.inventory.direct[name] for name in names if name in self.inventory.direct), None)

    def _is_usable(self, spec: TensorSpec, origin: SourceTensor | None, recipe: Recipe | None) -> bool:
        title = self.skeleton.component.title
        if self.inventory is None or spec.tied_to is not None:
            return True
        if origin is None and recipe is None:
            if spec.name not in self.inventory.merged:
                self.missing.append(spec.name)
            return spec.name in self.inventory.merged
        if origin is not None and origin.shape != spec.shape:
            self.problems.append(
                f"{title}: {spec.name} is {list(origin.shape)} in {origin.file}, but its class wants {list(spec.shape)}"
            )
            return False
        small = [tensor.dtype for tensor in (recipe or [origin]) if tensor is not None and tensor.dtype.itemsize == 1]
        if spec.floating and small:
            self.problems.append(f"{title}: {spec.name} is already {str(small[0]).removeprefix('torch.')}")
            return False
        return True

    def _output(self, spec: TensorSpec, dtype: torch.dtype, *, quantized: bool) -> torch.Tensor:
        key = (spec.shape, dtype, quantized)
        if key not in self._cache:
            self._cache[key] = meta_output(spec, dtype, self.scheme if quantized else None)
        return self._cache[key]


def _target_dtype(spec: TensorSpec, found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    import torch

    if not spec.floating or not found.is_floating_point:
        return found
    if spec.keep_fp32:
        return torch.float32
    return dtype or found
