"""What a migration will do, and everything that stands in its way, before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from aoconvert import schemes
from aoconvert.checkpoint.entries import Migration
from aoconvert.errors import PlanError
from aoconvert.formats.registry import TORCH_BIN
from aoconvert.models import ModelLayout, ModelPart, Skeleton, build_skeleton, identify
from aoconvert.models.base import TensorSpec
from aoconvert.models.bounds import Held, check_config, limit_model
from aoconvert.options import QuantizeOptions
from aoconvert.options.migrate import MigrateOptions
from aoconvert.planning.component import skip_modules
from aoconvert.planning.copying import sort_files, unread_pickles
from aoconvert.planning.files import lay_out
from aoconvert.planning.output import output_problems, space_problems
from aoconvert.planning.types import ComponentPlan, LeftOut, Needs, Plan, StreamedPlan, TensorPlan
from aoconvert.planning.unquantized import plan_unquantized
from aoconvert.recipes import fqn_to_config
from aoconvert.recipes.rules import Rules
from aoconvert.rewriting.migrate_types import OldTensor, OldWeights, SchemeName, stored_bytes
from aoconvert.schemes import Scheme
from aoconvert.schemes.apply import quantize_weight
from aoconvert.sources import Source, find_weights
from aoconvert.sources.weights import WeightFiles

Open = Callable[[Source, ModelPart, WeightFiles, MigrateOptions], OldWeights | None]
"""Opens the weights of a component where they are of a kind; ``None`` where they are not."""

_IMPORTS_BYTES = 480 * 10**6
_AT_ONCE = 3  # an old tensor, what is made of it, and what is written


@dataclass(frozen=True)
class Moved:
    """What becomes of one tensor that was quantized.

    Attributes:
        old: the tensor.
        migration: what is done with it.
        scheme: of what is written; ``None`` where it is not quantized.
        reason: what its owner should know; ``None``: nothing.
    """

    old: OldTensor
    migration: Migration
    scheme: Scheme | None
    reason: str | None


@dataclass
class MigrationPlan:
    """The plan, and the old weights, which stay open until they are written.

    Attributes:
        plan: as for a conversion.
        weights: old weights, by the component's name.
        old: their tensors, by component and name.
        moved: those that were quantized, by component and name.
    """

    plan: Plan
    weights: Mapping[str, OldWeights]
    old: Mapping[str, Mapping[str, OldTensor]]
    moved: Mapping[str, Mapping[str, Moved]]

    def close(self) -> None:
        """Release the files."""
        for weights in self.weights.values():
            weights.close()


@dataclass
class _Part:
    """A component that is migrated."""

    component: ModelPart
    files: WeightFiles
    weights: OldWeights
    moved: dict[str, Moved] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """How messages call it."""
        return self.component.title


def weights_of_all(source: Source) -> list[str]:
    """The weights files of every model of the source, which have to be on this machine for a plan."""
    layout = identify(source)
    found = (find_weights(source, part.folder, part.library, config=part.config) for part in layout.components)
    return [path for weights in found if weights is not None for path in weights.paths if not source.is_local(path)]


def plan_migration(source: Source, options: MigrateOptions, kinds: Sequence[Open]) -> MigrationPlan:
    """Decide everything about a migration; the source's weights are on this machine.

    Args:
        source: the old checkpoint.
        options: what the user asked for.
        kinds: what opens the weights of each kind.

    Raises:
        PlanError: with everything that is in the way.
        SourceError, UnsafeFileError: it cannot be read, or must not be loaded.
    """
    layout = identify(source)
    then = schemes.get(options.then) if options.then is not None else None
    opened: list[_Part] = []
    try:
        for component in layout.components:
            files = find_weights(source, component.folder, component.library, config=component.config)
            found = (kind(source, component, files, options) for kind in kinds) if files is not None else ()
            weights = next((item for item in found if item is not None), None)
            if weights is not None and files is not None:
                opened.append(_Part(component, files, weights))
        return _plan(source, layout, opened, then, options)
    except BaseException:
        for part in opened:
            part.weights.close()
        raise


def _plan(
    source: Source, layout: ModelLayout, opened: Sequence[_Part], then: Scheme | None, options: MigrateOptions
) -> MigrationPlan:
    if not opened:
        raise PlanError(
            [f"{source.label} holds no weights that torchao or Quanto quantized"],
            hint="aoconvert inspect shows what it is; aoconvert quantize takes originals",
        )
    if all(part.weights.is_todays and _has_todays_config(part.component) for part in opened):
        raise PlanError(
            [f"{source.label} is in today's tensor classes already: there is nothing to migrate"],
            hint="aoconvert verify proves that it opens",
        )
    problems = [_labelled(part, line) for part in opened for line in part.weights.problems]
    if problems:
        raise PlanError(problems)
    components = []
    for part in opened:
        component, found = _plan_component(layout, part, then)
        components.append(component)
        problems += [_labelled(part, line) for line in found]
    others = QuantizeOptions("int8wo", output=options.output, overwrite=options.overwrite)
    chosen = [part.component for part in opened]
    unquantized = plan_unquantized(source, layout, chosen, others) if layout.kind == "pipeline" else ()
    streamed: tuple[StreamedPlan, ...] = (*components, *unquantized)
    read = [path for model in streamed if model.weights for path in model.weights.paths]
    copied, left_behind = sort_files(source, layout, chosen, read, others)
    problems += unread_pickles(source, copied)
    disk = sum(file.size for model in streamed for file in model.files)
    disk += sum(item.size for item in copied)
    problems += output_problems(source, options.output, overwrite=options.overwrite)
    problems += space_problems(options.output, disk)
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    plan = Plan(
        source=source,
        layout=layout,
        output=options.output,
        devices=("cpu",),
        components=tuple(components),
        unquantized=unquantized,
        copied=copied,
        left_behind=left_behind,
        fetch=(),
        needs=Needs(disk, 0, _IMPORTS_BYTES + _AT_ONCE * _largest(components)),
        warnings=tuple(_labelled(part, line) for part in opened for line in part.weights.warnings),
        told=(f"packed on {options.packed_on}",),
    )
    return MigrationPlan(
        plan,
        {part.component.name: part.weights for part in opened},
        {part.component.name: {tensor.name: tensor for tensor in part.weights.tensors} for part in opened},
        {part.component.name: part.moved for part in opened},
    )


def _has_todays_config(component: ModelPart) -> bool:
    """Whether its config says how it is quantized in the form that the libraries read today."""
    found = component.config.get("quantization_config")
    kind = found.get("quant_type") if isinstance(found, dict) else None
    return isinstance(kind, dict) and isinstance(kind.get("default"), dict)


def _labelled(part: _Part, line: str) -> str:
    return f"{part.component.name}: {line}" if part.component.name else line


def _largest(components: Sequence[ComponentPlan]) -> int:
    return max((max(t.bytes_in, t.bytes_out) for part in components for t in part.tensors), default=0)


def _plan_component(layout: ModelLayout, part: _Part, then: Scheme | None) -> tuple[ComponentPlan, list[str]]:
    """The plan of one model, and what is wrong with it."""
    weights, config = part.weights, dict(part.component.config)
    config.pop("quantization_config", None)
    component = replace(part.component, config=config)
    dtype = _base_dtype(weights.tensors)
    held = Held.of(max(tensor.bytes_in, _numel(tensor.shape)) for tensor in weights.tensors)
    check_config(component.title, config, held)
    with limit_model(component.title, held):
        skeleton = build_skeleton(component, getattr(torch, dtype))
    planned, outputs, problems = _Tensors(part, skeleton, then).plan()
    folder = "" if layout.kind != "pipeline" else component.name
    order = [tensor.name for tensor in weights.tensors]
    tensors, written, files = lay_out(component, TORCH_BIN, folder, planned, outputs, order, None)
    decided = {tensor.name: tensor.scheme for tensor in tensors}
    used = {scheme.key: scheme for scheme in decided.values() if scheme is not None}
    rules = Rules((), next(iter(used.values())) if len(used) == 1 else None)
    linear = {spec.name for spec in skeleton if spec.kind == "linear"}
    plan = ComponentPlan(
        component=component,
        rules=rules,
        config=fqn_to_config(rules, decided, linear),
        folder=folder,
        format=TORCH_BIN,
        dtype=dtype,
        tensors=tensors,
        order=written,
        files=files,
        skip_modules=skip_modules(component, tensors),
        missing=(),
        dropped=tuple(LeftOut(name, what) for name, what in weights.others.items()),
        apart=(),
        copied=None,
        weights=part.files,
        skeleton=skeleton,
    )
    return plan, problems


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _base_dtype(tensors: Sequence[OldTensor]) -> str:
    """What most values appear as."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if getattr(torch, tensor.dtype).is_floating_point:
            counts[tensor.dtype] += _numel(tensor.shape)
    return counts.most_common(1)[0][0] if counts else "bfloat16"


@dataclass
class _Tensors:
    """Plans every tensor of a model."""

    part: _Part
    skeleton: Skeleton
    then: Scheme | None

    def plan(self) -> tuple[list[TensorPlan], dict[str, torch.Tensor], list[str]]:
        """The tensors, in the state dict's order, those that the class does not know last; what is written for each."""
        held = {tensor.name: tensor for tensor in self.part.weights.tensors}
        known = {spec.name for spec in self.skeleton}
        outputs: dict[str, torch.Tensor] = {}
        first: dict[tuple[object, ...], str] = {}
        planned = [found for spec in self.skeleton if (found := self._known(spec, held, first, outputs)) is not None]
        unknown = [held[name] for name in held if name not in known]
        planned += [self._unknown(tensor, outputs) for tensor in unknown if not tensor.was_quantized]
        return planned, outputs, list(self._problems(held))

    def _problems(self, held: Mapping[str, OldTensor]) -> Iterator[str]:
        """What does not fit the class of today."""
        title = self.part.component.class_name
        for spec in self.skeleton:
            found = held.get(spec.name)
            if found is None and spec.tied_to not in held:
                yield f"{spec.name} of today's {title} is not in its weights files"
            elif found is not None and found.shape != spec.shape:
                yield f"{spec.name} has the shape {found.shape}, but {spec.shape} in today's {title}"
        names = {spec.name for spec in self.skeleton}
        for name, tensor in held.items():
            if name not in names and tensor.was_quantized:
                yield f"{name} is quantized, but today's {title} has no such tensor"

    def _known(
        self,
        spec: TensorSpec,
        held: Mapping[str, OldTensor],
        first: dict[tuple[object, ...], str],
        outputs: dict[str, torch.Tensor],
    ) -> TensorPlan | None:
        old = held.get(spec.name)
        if old is None:  # where its data are those of another tensor; else it is among the problems
            return _tied(spec, self.part) if spec.tied_to in held else None
        other = held.get(spec.tied_to) if spec.tied_to is not None else None
        if other is not None and old.place is not None and old.place == other.place:
            return _tied(spec, self.part)
        same = first.setdefault(old.place, spec.name) if old.place is not None and old.bytes_in else spec.name
        moved = self._move(old, spec)
        outputs[spec.name] = make_output(old, moved, on_meta=True)
        if moved is not None:
            self.part.moved[spec.name] = moved
        return _tensor(old, moved, spec, outputs[spec.name], None if same == spec.name else same)

    def _move(self, old: OldTensor, spec: TensorSpec) -> Moved | None:
        """What becomes of a tensor; ``None`` for one that was not quantized."""
        if not old.was_quantized:
            return None
        if old.scheme is not None:
            return Moved(old, "carried", scheme_of_old(old), old.reason)
        if self.then is None or spec.kind == "other":
            return Moved(old, "dequantized", None, old.reason)
        blocked = schemes.blocker(old.shape, getattr(torch, old.dtype), self.then)
        if blocked is not None:
            return Moved(old, "dequantized", None, f"{old.reason}; {self.then.name} cannot take it: {blocked}")
        return Moved(old, "requantized", self.then, old.reason)

    def _unknown(self, old: OldTensor, outputs: dict[str, torch.Tensor]) -> TensorPlan:
        outputs[old.name] = old.make(True)
        return TensorPlan(
            name=old.name,
            shape=old.shape,
            dtype=old.dtype,
            source_dtype=old.dtype,
            action="carry",
            reason="the model class does not know it",
            candidate=False,
            parameter=False,
            embedding=False,
            bytes_in=old.bytes_in,
            bytes_out=old.bytes_in,
            origin=(old.file, old.name),
        )


def scheme_of_old(old: OldTensor) -> Scheme:
    """What makes such tensors today, with the packing of the old one."""
    found = resolve_scheme(old.scheme) if old.scheme is not None else None
    assert found is not None
    if old.packing is None:
        return found
    return replace(found, layout=replace(found.layout, packing=old.packing))


def resolve_scheme(name: SchemeName) -> Scheme:
    """A scheme of the catalogue, by its name and settings."""
    return schemes.get(
        name.name, group_size=name.group_size, settings=dict(name.settings), layout_device=name.layout_device
    )


def make_output(old: OldTensor, moved: Moved | None, *, on_meta: bool) -> torch.Tensor:
    """What is written for a tensor."""
    made = old.make(on_meta)
    if moved is None or moved.migration != "requantized" or moved.scheme is None:
        return made
    return quantize_weight(made, moved.scheme)


def _tied(spec: TensorSpec, part: _Part) -> TensorPlan:
    old = next(tensor for tensor in part.weights.tensors if tensor.name == spec.tied_to)
    return TensorPlan(
        name=spec.name,
        shape=spec.shape,
        dtype=old.dtype,
        source_dtype=old.dtype,
        action="tied",
        reason=f"tied to {spec.tied_to}",
        candidate=False,
        parameter=spec.parameter,
        embedding=spec.kind == "embedding",
        bytes_in=0,
        bytes_out=0,
    )


def _tensor(
    old: OldTensor, moved: Moved | None, spec: TensorSpec, output: torch.Tensor, same_as: str | None
) -> TensorPlan:
    quantized = moved is not None and moved.scheme is not None
    reason = moved.reason if moved is not None and not quantized else None
    return TensorPlan(
        name=old.name,
        shape=old.shape,
        dtype=old.dtype,
        source_dtype=old.stored_dtype,
        action="quantize" if quantized else "keep",
        reason=reason if moved is not None else "not quantized in the old checkpoint",
        candidate=spec.kind == "linear",
        parameter=spec.parameter,
        embedding=spec.kind == "embedding",
        bytes_in=old.bytes_in,
        bytes_out=stored_bytes(output),
        origin=(old.file, old.name),
        scheme=moved.scheme if moved is not None else None,
        same_as=same_as,
    )
