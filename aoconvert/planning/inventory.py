"""What the checkpoint holds, under the model's own names; from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aoconvert.errors import SourceError
from aoconvert.formats.registry import SOURCE_FORMATS
from aoconvert.models import ModelPart, Skeleton
from aoconvert.models.base import SourceTensor
from aoconvert.models.conversions import CannotConvert, MergeRecipe, resolve_conversions
from aoconvert.models.fused import conversions
from aoconvert.originals import Original, dequantize
from aoconvert.planning.values import Values
from aoconvert.sources.bundle import BundleSource

if TYPE_CHECKING:
    from aoconvert.models.recording import ReplayRecipe
    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles


UNKNOWN = "the model class does not know"
_LEFT_OUT = "diffusers leaves it out when it opens this model from the file"


@dataclass(frozen=True)
class SourceTensors:
    """What the weights files hold.

    Attributes:
        tensors: the checkpoint's name → tensor, in the order of files and data.
        others: the checkpoint's name → what it is that is not a tensor that could be read (``None``, a number, a dict).
        single_file: of a single file, its name: the tensors may have the names of their authors.
        configs: where the configs of a pipeline lie that is in the single file.
        elsewhere: names that only other models in the file take.
    """

    tensors: Mapping[str, SourceTensor]
    others: Mapping[str, str]
    single_file: str | None = None
    configs: Path | None = None
    elsewhere: frozenset[str] = frozenset()


class Readable(Protocol):
    """A tensor that can be read: its name in the model, and where it lies.

    Attributes:
        name: of the model's state dict.
        bytes_read: its bytes in memory when it is read.
        source_dtype: the dtype that it is read in, such as ``bfloat16``.
        origin: (file, name) in the source; ``None`` where it is made from others.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See above."""

    @property
    def bytes_read(self) -> int:
        """See above."""

    @property
    def source_dtype(self) -> str:
        """See above."""

    @property
    def origin(self) -> tuple[str, str] | None:
        """See above."""


@dataclass(frozen=True)
class Inventory:
    """The checkpoint's tensors for one model.

    Attributes:
        direct: state-dict key → the tensor that becomes it as it is.
        merged: state-dict keys that transformers builds from several tensors, or by an operation on one.
        recipes: how each of them is made from tensors of the checkpoint.
        obstacle: why that cannot be said, and transformers' loader must make a copy of all of them; then there are no
            recipes.
        for_want_of_data: the obstacle is that the data is not at hand; with it, that loader may get through.
        unknown: tensors that the model has no place for.
        passed: the checkpoint's names that are not read, and why.
        unreadable: state-dict key → what the checkpoint has there in place of a tensor.
        needs_data: the checkpoint's names that transformers converts on the CPU wherever the model is: without their
            data it cannot be asked about them.
        order: state-dict keys, and names of ``unknown``, as they lie in the files.
        converted: what the library finds in the checkpoint, by name, where it converts that first; else ``None``.
    """

    direct: Mapping[str, SourceTensor]
    merged: frozenset[str]
    recipes: Mapping[str, MergeRecipe | ReplayRecipe]
    obstacle: str | None
    for_want_of_data: bool = False
    unknown: tuple[SourceTensor, ...] = ()
    passed: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    needs_data: frozenset[str] = frozenset()
    order: tuple[str, ...] = ()
    converted: Mapping[str, SourceTensor] | None = None


def read_contents(source: Source, weights: WeightFiles, model: str = "") -> SourceTensors | None:
    """Read every header; ``None`` where the headers cannot be had without the weights.

    Args:
        source: the source.
        weights: its files.
        model: the component's name.

    Raises:
        SourceError: a file is damaged, or two files contradict each other.
    """
    found: dict[str, SourceTensor] = {}
    others: dict[str, str] = {}
    for path in weights.files:
        contents = SOURCE_FORMATS[weights.format].contents(source, path)
        if contents is None:
            return None
        infos = contents.tensors.values()
        entries = [SourceTensor(path, i.name, i.dtype, i.shape, i.nbytes, i.place, packing=i.packing) for i in infos]
        others |= contents.others
        for entry in entries:
            if entry.name in found:
                _check_twice(source, weights, entry.name, found[entry.name].file, path)
            found[entry.name] = entry
    configs = source.around.root if isinstance(source, BundleSource) else None
    return SourceTensors(found, others, source.weights_file, configs, source.elsewhere.get(model, frozenset()))


def _check_twice(source: Source, weights: WeightFiles, name: str, first: str, last: str) -> None:
    """Of two files with the same tensor the libraries take the last, whatever the index says.

    Raises:
        SourceError: the index says another, or there is none.
    """
    if weights.index is None or weights.index.get(name) != last:
        raise SourceError(
            f"{source.label}: tensor {name!r} is in {first} and in {last}",
            hint="delete the file that does not belong to this checkpoint",
        )


def dequantize_contents(
    source: Source, component: ModelPart, contents: SourceTensors
) -> tuple[SourceTensors, Original]:
    """What a quantized checkpoint holds, as if it were not quantized, and how it is.

    Raises:
        SourceError: parts are missing, or do not fit together.
    """
    with Values(source) as values:
        tensors, dropped, original = dequantize(component, contents.tensors, values.read)
    return replace(contents, tensors=tensors, others={**contents.others, **dropped}), original


def match(skeleton: Skeleton, contents: SourceTensors, *, sharded: bool) -> Inventory:
    """Match the checkpoint's tensors with the model's.

    Args:
        skeleton: the empty model.
        contents: of its checkpoint.
        sharded: it has an index.
    """
    if contents.single_file is not None and (skeleton.component.library == "diffusers" or contents.configs):
        return _match_single_file(skeleton, contents, contents.single_file)
    if skeleton.component.library == "diffusers":
        return _match_diffusers(skeleton, contents, sharded=sharded)
    from aoconvert.models import transformers

    found = contents.tensors
    resolved = transformers.source_names(skeleton, [*found, *contents.others])
    names = {name: origin for name, origin in resolved.direct.items() if origin in found}
    unreadable = {name: contents.others[origin] for name, origin in resolved.direct.items() if origin not in found}
    needs_data = {
        name
        for item in resolved.conversions
        if getattr(item.converter, "force_cpu", False)
        for names in item.sources.values()
        for name in names
    }
    finish = _Finish(skeleton, contents, names, resolved.passed, unreadable, frozenset(needs_data))
    try:
        if resolved.clash is not None:
            raise CannotConvert(f"the checkpoint holds both {resolved.clash} and the tensors that it is merged from")
        made = resolve_conversions(skeleton, resolved.conversions, found)
        recipes = {name: recipe for recipe in made for name in recipe.targets}
        if twice := recipes.keys() & resolved.direct.keys():
            raise CannotConvert(f"the checkpoint holds both {min(twice)} and the tensors that it is merged from")
    except CannotConvert as reason:
        into_copy = {name for item in resolved.conversions for names in item.sources.values() for name in names}
        made_whole = finish.inventory(merged=resolved.merged, obstacle=str(reason), used=into_copy)
        return replace(made_whole, for_want_of_data=reason.for_want_of_data)
    return finish.inventory(merged=frozenset(recipes), recipes=recipes)


def _match_diffusers(skeleton: Skeleton, contents: SourceTensors, *, sharded: bool) -> Inventory:
    from aoconvert.models import diffusers

    found = contents.tensors
    names = diffusers.source_names(skeleton, [*found, *contents.others], sharded=sharded)
    there = {name: origin for name, origin in names.items() if origin in found}
    wanted = {spec.name for spec in skeleton}
    unreadable = {name: contents.others[names[name]] for name in names.keys() - there.keys() if name in wanted}
    finish = _Finish(skeleton, contents, there, {}, unreadable)
    if not skeleton.fused:
        return finish.inventory()
    here = {name: found[origin] for name, origin in there.items()}
    whole = [item for item in conversions(skeleton) if all(n in here for part in item.sources.values() for n in part)]
    recipes = {name: made for made in resolve_conversions(skeleton, whole, here) for name in made.targets}
    return finish.inventory(merged=frozenset(recipes), recipes=recipes)


def _match_single_file(skeleton: Skeleton, contents: SourceTensors, label: str) -> Inventory:
    from aoconvert.models.bundle import convert_part
    from aoconvert.models.original_names import convert_names
    from aoconvert.models.recording import ReplayRecipe

    found, wanted = contents.tensors, [spec.name for spec in skeleton]
    if skeleton.fused:
        raise SourceError(f"{label}: --fuse-qkv does not work with a single file", hint="omit --fuse-qkv")
    if contents.configs is not None:
        made = convert_part(skeleton.component, found, contents.configs, label)
    else:
        made = convert_names(skeleton.component, found, wanted, label)
    steps = {name: made[name] for name in wanted if name in made}
    names = {name: step.source.name for name, step in steps.items() if step.source is not None}
    recipes = {name: ReplayRecipe(name, step) for name, step in steps.items() if step.source is None}
    used = {*names.values(), *(source.name for recipe in recipes.values() for source in recipe)}
    left = {source.name: name for name, step in made.items() for source in step.sources if name not in steps}
    reasons = {
        name: f"diffusers makes {left[name]} of it, which {UNKNOWN}" if name in left else _LEFT_OUT
        for name in [*found, *left]
        if name not in used and name not in contents.elsewhere
    }
    own = {name: tensor for name, tensor in found.items() if name not in contents.elsewhere}
    finish = _Finish(skeleton, replace(contents, tensors=own), names, {}, {}, left_out=reasons)
    converted = {name: SourceTensor(label, name, step.dtype, step.shape, step.nbytes) for name, step in steps.items()}
    inventory = finish.inventory(merged=frozenset(recipes), recipes=recipes)
    # as they lie in the folder that diffusers saves: so the result is the same
    order = sorted(converted, key=lambda name: (-converted[name].dtype.itemsize, name))
    return replace(inventory, converted=converted, order=tuple(order))


@dataclass(frozen=True)
class _Finish:
    """Puts together what is known; ``names`` leads from a state-dict key to the checkpoint's name.

    ``left_out``: names of the checkpoint that nothing is made of, and why.
    """

    skeleton: Skeleton
    contents: SourceTensors
    names: Mapping[str, str]
    passed: Mapping[str, str]
    unreadable: Mapping[str, str]
    needs_data: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def inventory(
        self,
        *,
        merged: frozenset[str] = frozenset(),
        recipes: Mapping[str, MergeRecipe | ReplayRecipe] | None = None,
        obstacle: str | None = None,
        used: set[str] | None = None,
    ) -> Inventory:
        """``used``: names of the checkpoint that go into ``merged`` without a recipe."""
        recipes = recipes or {}
        found = self.contents.tensors
        wanted = {spec.name for spec in self.skeleton}
        direct = {name: found[origin] for name, origin in self.names.items() if name in wanted}
        position = {name: rank for rank, name in enumerate(found)}
        # a tensor that is made comes where its first source comes
        places = {name: position[tensor.name] for name, tensor in direct.items()}
        places |= {
            name: min((position[source.name] for source in recipe), default=0) for name, recipe in recipes.items()
        }
        taken = {tensor.name for tensor in direct.values()} | (used or set()) | self.passed.keys()
        taken |= self.left_out.keys()
        taken |= {source.name for recipe in recipes.values() for source in recipe}
        unknown = tuple(tensor for name, tensor in found.items() if name not in taken)
        places |= {tensor.name: position[tensor.name] for tensor in unknown}
        order = sorted(places, key=places.__getitem__)
        order += sorted(merged) if obstacle is not None else []  # the copy is read after the rest
        passed = {name: f"{other} maps to the same tensor" for name, other in self.passed.items()}
        passed |= self.left_out
        passed |= {name: what for name, what in self.contents.others.items() if name not in passed}
        return Inventory(
            direct,
            merged,
            recipes,
            obstacle,
            unknown=unknown,
            passed=passed,
            unreadable=self.unreadable,
            needs_data=self.needs_data,
            order=tuple(order),
        )
