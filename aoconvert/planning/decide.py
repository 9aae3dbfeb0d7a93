"""What happens to each tensor, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aoconvert.errors import QuantizeError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.models import Skeleton, TensorSpec
from aoconvert.models.base import SourceTensor
from aoconvert.models.conversions import MergeRecipe
from aoconvert.originals import working_bytes
from aoconvert.planning.carrying import CARRIED, code_bytes, why_again
from aoconvert.planning.choices import Choices, Wishes, choose_schemes
from aoconvert.planning.source_checkpoint import SourceCheckpoint
from aoconvert.planning.types import Action, LeftOut, TensorPlan
from aoconvert.recipes.rules import Rules
from aoconvert.schemes import Scheme
from aoconvert.schemes.apply import quantize_weight

if TYPE_CHECKING:
    import torch

    from aoconvert.models.recording import ReplayRecipe

    Recipe = MergeRecipe | ReplayRecipe

UNKNOWN = "the model class does not know it"


def meta_output(name: str, shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme | None) -> torch.Tensor:
    """The tensor that will be written, on ``meta``: real class and real inner shapes, no data.

    Raises:
        QuantizeError: torchao declines a weight that ``blocker`` let pass.
    """
    import torch

    plain = torch.empty(shape, dtype=dtype, device="meta")
    if scheme is None:
        return plain
    result = quantize_weight(plain, scheme)
    if type(result) is torch.Tensor:
        raise QuantizeError(
            f"torchao left {name} {list(shape)} unquantized under {scheme.name}",
            hint=f"--skip {name}",
        )
    return result


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's data; of a torchao tensor all its inner tensors together."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    names, _ = flatten()
    return sum(nbytes(getattr(tensor, name)) for name in names)


@dataclass(frozen=True)
class Decisions:
    """The tensors of one component, in state-dict order, with what they will be on ``meta``.

    ``implementation``: how its quantized experts have to be multiplied, see :mod:`aoconvert.models.experts`.
    ``cannot_run``: the error that the class raises in this dtype, see :mod:`aoconvert.models.trial`.
    """

    tensors: tuple[TensorPlan, ...]
    outputs: Mapping[str, torch.Tensor]
    implementation: str | None
    problems: tuple[str, ...]
    missing: tuple[LeftOut, ...] = ()
    dropped: tuple[LeftOut, ...] = ()
    cannot_run: str | None = None


def decide(
    skeleton: Skeleton,
    rules: Rules,
    wishes: Wishes,
    dtype: torch.dtype | None,
    found: SourceCheckpoint | None,
    free: Mapping[str, str] | None = None,
) -> Decisions:
    """Decide for every tensor of a model.

    Args:
        skeleton: the empty model.
        rules: which scheme is for which tensor.
        wishes: what else the user said about that.
        dtype: of everything floating; ``None`` keeps the source's.
        found: the checkpoint; ``None`` where only the config is known.
        free: state-dict key → the key that it was tied to, under which the checkpoint may hold it.
    """
    decider = _Decider(skeleton, dtype, found, free or {})
    decider.choose_schemes(rules, wishes)
    tensors = [made for spec in skeleton if (made := decider.plan(spec)) is not None]
    tensors += decider.carry()
    return Decisions(
        tuple(tensors),
        decider.outputs,
        decider.choices.implementation,
        (*decider.problems, *decider.unusable(), *decider.refusals()),
        tuple(decider.left),
        tuple(decider.dropped()),
        decider.choices.cannot_run,
    )


@dataclass
class _Decider:
    """Goes through the tensors of one component and collects what is wrong with them."""

    skeleton: Skeleton
    dtype: torch.dtype | None
    found: SourceCheckpoint | None
    free: Mapping[str, str]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left: list[LeftOut] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    carries: bool = False

    def __post_init__(self) -> None:
        self.inventory = self.found.inventory if self.found is not None else None
        self._twins: dict[str, list[str]] = {}
        for spec in self.skeleton:
            if spec.tied_to:
                self._twins.setdefault(spec.tied_to, []).append(spec.name)
        self._cache: dict[tuple[tuple[int, ...], torch.dtype, str | None], torch.Tensor] = {}

    def choose_schemes(self, rules: Rules, wishes: Wishes) -> None:
        """Say which tensor gets which scheme."""
        dtypes = {spec.name: self._dtypes(spec)[1] for spec in self.skeleton}
        self.carries = wishes.carry
        self.choices = choose_schemes(self.skeleton, dtypes, rules, wishes)
        self.problems += self.choices.problems

    def _dtypes(self, spec: TensorSpec) -> tuple[torch.dtype, torch.dtype]:
        """The dtype that the tensor is read in, and the one it will have."""
        origin = self._origin(spec)
        made = origin or (self.inventory.recipes.get(spec.name) if self.inventory else None)
        found = made.dtype if made else (spec.dtype if not spec.floating else self.dtype or spec.dtype)
        target = _target_dtype(spec, found, self.dtype)
        return (found if origin is None else _dtype_read(origin, target)), target

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
            "tied" if spec.tied_to else "quantize" if why is None else "keep" if target == found else "cast"
        )
        if action in ("cast", "keep") and any(tensor.formula for tensor in recipe or [origin] if tensor):
            action = "cast"  # its bytes are not the source's
            if any(tensor.dequantized for tensor in recipe or [origin] if tensor):
                why = f"{why}; dequantized"
        written = action != "tied"
        if written:
            self.outputs[spec.name] = self._output(spec, target, choice.scheme)
        again = None
        if carried := self.carries and self.found is not None and choice.scheme is not None:
            again = why_again(origin, self.outputs[spec.name], choice.scheme)
            carried, why = again is None, CARRIED if again is None else f"not carried: {again}"
        made = TensorPlan(
            name=spec.name,
            shape=spec.shape,
            dtype=dtype_name(target),
            source_dtype=dtype_name(found),
            action=action,
            reason=why,
            candidate=spec.parameter and len(spec.shape) > 1 and spec.kind != "embedding",
            parameter=spec.parameter,
            embedding=spec.kind == "embedding",
            bytes_in=0 if not written else recipe.bytes_in(spec.name) if recipe else _bytes_in(spec, found, origin),
            bytes_out=nbytes(self.outputs[spec.name]) if written else 0,
            origin=(origin.file, origin.name) if origin and written else None,
            sources=tuple((source.file, source.name) for source in recipe) if recipe and written else (),
            working_bytes=_working_bytes(spec, recipe or origin, target) if written else 0,
            scheme=choice.scheme,
            carried=carried,
        )
        return replace(made, working_bytes=made.working_bytes + code_bytes(made)) if carried else made

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
        if self.inventory is None or spec.tied_to is not None:
            return True
        if what := self.inventory.unreadable.get(spec.name):
            self.faults.setdefault("unreadable", []).append(f"the checkpoint's {spec.name} is {what}")
            return False
        if origin is None and recipe is None:
            if spec.name not in self.inventory.merged:
                self._leave(spec)
            return spec.name in self.inventory.merged
        if origin is not None and origin.shape != spec.shape:
            self.faults.setdefault("shape", []).append(
                f"{spec.name} has the shape {list(origin.shape)} in {origin.file}, but its class expects "
                f"{list(spec.shape)}"
            )
            return False
        small = [tensor.dtype for tensor in (recipe or [origin]) if tensor is not None and tensor.dtype.itemsize == 1]
        if spec.floating and small:
            what = dtype_name(small[0])
            self.faults.setdefault(what, []).append(f"{spec.name} is already {what}")
            return False
        return True

    def _leave(self, spec: TensorSpec) -> None:
        """A tensor that the checkpoint does not hold: for the library to make, or missing."""
        assert self.found is not None
        opening = self.found.opening
        rule = self.found.allowed.match(spec.name, spec.module)
        if rule is not None:
            self.left.append(LeftOut(spec.name, f"not in the checkpoint ({rule.label})"))
        elif spec.name in opening.missing or opening.refusal is not None or spec.module in self.skeleton.fused:
            self.missing.append(spec.name)
        else:
            self.left.append(
                LeftOut(spec.name, "not in the checkpoint, as its class expects; the library initializes it")
            )

    def unusable(self) -> list[str]:
        """What is wrong with tensors of the checkpoint: one line for each kind of thing, however many there are."""
        title = self.skeleton.component.title
        return [f"{title}: {_first(lines)}" for lines in self.faults.values()]

    def refusals(self) -> list[str]:
        """Why the checkpoint cannot be converted, as the library says."""
        title, lines = self.skeleton.component.title, []
        if self.missing:
            shown = ", ".join(self.missing[:3])
            more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
            then = "initializes it" if self.skeleton.component.library == "transformers" else "leaves it without values"
            lines.append(
                f"{title}: the checkpoint does not hold {shown}{more} "
                f"(--allow-missing PATTERN leaves a tensor to the library, which {then})"
            )
        if self.found is None or self.problems or self.faults or lines:
            return lines  # the library's refusal would only say the same
        opening, inventory = self.found.opening, self.found.inventory
        if opening.refusal is not None and not inventory.for_want_of_data:
            why = inventory.obstacle or opening.refusal
            lines.append(f"{title}: {self.skeleton.component.library} cannot open it: {why}")
        mismatched = [
            f"{name} gets the shape {list(here)}, but its class expects {list(there)}"
            for name, (here, there) in (opening.mismatched or {}).items()
        ]
        return [*lines, *([f"{title}: {_first(mismatched)}"] if mismatched else [])]

    def carry(self) -> list[TensorPlan]:
        """Tensors that the class does not know: under their names, unchanged. Other loaders may use them."""
        import torch

        if self.found is None or self.found.drop_unknown:
            return []
        made = []
        for tensor in self.found.inventory.unknown:
            wanted = _dtype_read(tensor, self.dtype or tensor.dtype)
            dtype = dtype_name(wanted)
            self.outputs[tensor.name] = torch.empty(tensor.shape, dtype=wanted, device="meta")
            made.append(
                TensorPlan(
                    name=tensor.name,
                    shape=tensor.shape,
                    dtype=dtype,
                    source_dtype=dtype,
                    action="carry",
                    reason=f"{UNKNOWN}; dequantized" if tensor.dequantized else UNKNOWN,
                    candidate=False,
                    parameter=tensor.dtype.is_floating_point,
                    embedding=False,
                    bytes_in=tensor.nbytes,
                    bytes_out=nbytes(self.outputs[tensor.name]),
                    origin=(tensor.file, tensor.name),
                )
            )
        return made

    def dropped(self) -> list[LeftOut]:
        """What the checkpoint holds and the result does not."""
        if self.found is None:
            return []
        inventory = self.found.inventory
        unknown = inventory.unknown if self.found.drop_unknown else ()
        passed = [LeftOut(name, why) for name, why in inventory.passed.items()]
        return [*(LeftOut(tensor.name, f"{UNKNOWN} (--drop-unknown)") for tensor in unknown), *passed]

    def _output(self, spec: TensorSpec, dtype: torch.dtype, scheme: Scheme | None) -> torch.Tensor:
        key = (spec.shape, dtype, scheme.key if scheme is not None else None)
        if key not in self._cache:
            self._cache[key] = meta_output(spec.name, spec.shape, dtype, scheme)
        return self._cache[key]


def _dtype_read(tensor: SourceTensor, target: torch.dtype) -> torch.dtype:
    """The stored one; what is dequantized comes in the dtype that it will have, as the library casts it."""
    return tensor.dtype if tensor.formula is None else target


def _working_bytes(spec: TensorSpec, made: Recipe | SourceTensor | None, target: torch.dtype) -> int:
    """Host memory that is taken while a tensor is merged, and while its parts are dequantized."""
    if made is None or isinstance(made, SourceTensor):
        return working_bytes(made) if made is not None and made.formula is not None else 0
    parts = max((working_bytes(tensor) for tensor in made if tensor.formula is not None), default=0)
    return made.working_bytes(spec.name, target) + parts


def _bytes_in(spec: TensorSpec, found: torch.dtype, origin: SourceTensor | None) -> int:
    return spec.numel * found.itemsize if origin is None else origin.nbytes


def _first(lines: Sequence[str]) -> str:
    """The first of some lines that say the same of different tensors, and how many more there are."""
    more = len(lines) - 1
    return lines[0] if not more else f"{lines[0]} (and {more} more tensor{'s' if more > 1 else ''} likewise)"


def _target_dtype(spec: TensorSpec, found: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    import torch

    if not spec.floating or not found.is_floating_point:
        return found
    if spec.keep_fp32:
        return torch.float32
    return dtype or found
