"""What happens to each tensor, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aoconvert.errors import QuantizeError
from aoconvert.models import Skeleton, TensorSpec
from aoconvert.models.base import SourceTensor
from aoconvert.models.conversions import Recipe
from aoconvert.planning.choices import Choices, Wishes, choose
from aoconvert.planning.inventory import Inventory
from aoconvert.planning.types import Action, TensorPlan
from aoconvert.rules import Rules
from aoconvert.schemes import Scheme
from aoconvert.schemes.apply import quantize_weight

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True)
class Decisions:
    """The tensors of one component, in state-dict order, with what they will be on ``meta``.

    ``implementation``: how its quantized experts have to be multiplied, see :mod:`aoconvert.models.experts`.
    """

    tensors: tuple[TensorPlan, ...]
    outputs: Mapping[str, torch.Tensor]
    implementation: str | None
    problems: tuple[str, ...]


def decide(
    skeleton: Skeleton,
    rules: Rules,
    wishes: Wishes,
    dtype: torch.dtype | None,
    inventory: Inventory | None,
    free: Mapping[str, str] | None = None,
) -> Decisions:
    """Decide for every tensor of a model.

    Args:
        skeleton: the empty model.
        rules: which scheme is for which tensor.
        wishes: what else the user said about that.
        dtype: of everything floating; ``None`` keeps the source's.
        inventory: the checkpoint's tensors; ``None`` where only the config is known.
        free: state-dict key → the key that it was tied to, under which the checkpoint may hold it.
    """
    decider = _Decider(skeleton, dtype, inventory, free or {})
    decider.choose(rules, wishes)
    tensors = [made for spec in skeleton if (made := decider.plan(spec)) is not None]
    problems = decider.problems
    if decider.missing:
        shown = ", ".join(decider.missing[:3])
        more = f" and {len(decider.missing) - 3} more" if len(decider.missing) > 3 else ""
        problems.append(f"{skeleton.component.title}: the checkpoint does not hold {shown}{more}")
    return Decisions(tuple(tensors), decider.outputs, decider.choices.implementation, tuple(problems))


@dataclass
class _Decider:
    """Goes through the tensors of one component and collects what is wrong with them."""

    skeleton: Skeleton
    dtype: torch.dtype | None
    inventory: Inventory | None
    free: Mapping[str, str]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    choices: Choices = field(default_factory=Choices)

    def __post_init__(self) -> None:
        self._twins: dict[str, list[str]] = {}
        for spec in self.skeleton:
            if spec.tied_to:
                self._twins.setdefault(spec.tied_to, []).append(spec.name)
        self._cache: dict[tuple[tuple[int, ...], torch.dtype, str | None], torch.Tensor] = {}

    def choose(self, rules: Rules, wishes: Wishes) -> None:
        """Say which tensor gets which scheme."""
        dtypes = {spec.name: self._dtypes(spec)[1] for spec in self.skeleton}
        self.choices = choose(self.skeleton, dtypes, rules, wishes)
        self.problems += self.choices.problems

    def _dtypes(self, spec: TensorSpec) -> tuple[torch.dtype, torch.dtype]:
        """The tensor's dtype in the checkpoint, and the one it will have."""
        made = self._origin(spec) or (self.inventory.recipes.get(spec.name) if self.inventory else None)
        found = made.dtype if made else (spec.dtype if not spec.floating else self.dtype or spec.dtype)
        return found, _target_dtype(spec, found, self.dtype)

    def plan(self, spec: TensorSpec) -> TensorPlan | None:
        """What happens to one tensor; ``None`` where something is wrong with it."""
        origin = self._origin(spec)
        recipe = self.inventory.recipes.get(spec.name) if self.inventory else None
        if not self._is_usable(spec, origin, recipe):
            return None
        found, target = self._dtypes(spec)
        choice = self.choices.of(spec)
        why = choice.reason
        action: Action = (
            "tied" if spec.tied_to else "quantize" if why is None else "cast" if target != found else "keep"
        )
        written = action != "tied"
        if written:
            self.outputs[spec.name] = self._output(spec, target, choice.scheme)
        return TensorPlan(
            name=spec.name,
            shape=spec.shape,
            dtype=str(target).removeprefix("torch."),
            source_dtype=str(found).removeprefix("torch."),
            action=action,
            reason=why,
            candidate=spec.parameter and len(spec.shape) > 1 and spec.kind != "embedding",
            parameter=spec.parameter,
            embedding=spec.kind == "embedding",
            bytes_in=0 if not written else recipe.bytes_in(spec.name) if recipe else spec.numel * found.itemsize,
            bytes_out=nbytes(self.outputs[spec.name]) if written else 0,
            origin=(origin.file, origin.name) if origin and written else None,
            sources=tuple((source.file, source.name) for source in recipe) if recipe and written else (),
            working_bytes=recipe.working_bytes(spec.name, target) if recipe and written else 0,
            scheme=choice.scheme,
        )

    def _origin(self, spec: TensorSpec) -> SourceTensor | None:
        """The checkpoint's tensor; of a shared one also under its other name."""
        if self.inventory is None:
            return None
        if spec.name in self.inventory.merged:
            return None
        names = [spec.name, *self._twins.get(spec.name, ())]
        names += [self.free[spec.name]] if spec.name in self.free else []
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

    def _output(self, spec: TensorSpec, dtype: torch.dtype, scheme: Scheme | None) -> torch.Tensor:
        key = (spec.shape, dtype, scheme.key if scheme is not None else None)
        if key not in self._cache:
            self._cache[key] = meta_output(spec, dtype, scheme)
        return self._cache[key]


def _target_dtype(spec: TensorSpec, found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    import torch

    if not spec.floating or not found.is_floating_point:
        return found
    if spec.keep_fp32:
        return torch.float32
    return dtype or found
