"""What the checkpoint holds, under the model's own names; from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.models import Skeleton
from aoconvert.models.base import SourceTensor
from aoconvert.models.conversions import CannotFollow, Recipe, follow
from aoconvert.models.fused import conversions

if TYPE_CHECKING:
    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles


@dataclass(frozen=True)
class Inventory:
    """The checkpoint's tensors for one model.

    Attributes:
        direct: state-dict key → the tensor that becomes it as it is.
        merged: state-dict keys that transformers builds from several tensors, or by an operation on one.
        recipes: how each of them is made from tensors of the checkpoint.
        obstacle: why that cannot be said, and transformers' loader must make a copy of all of them; then there are no
            recipes.
        unused: names that the model has no place for.
        order: state-dict keys as they lie in the files.
    """

    direct: Mapping[str, SourceTensor]
    merged: frozenset[str]
    recipes: Mapping[str, Recipe]
    obstacle: str | None
    unused: tuple[str, ...]
    order: tuple[str, ...]


def headers(source: Source, weights: WeightFiles) -> dict[str, SourceTensor] | None:
    """Checkpoint name → tensor, over all files; ``None`` where the headers cannot be had without the weights.

    Raises:
        SourceError: a file is damaged, or two files contradict each other.
    """
    found: dict[str, SourceTensor] = {}
    for path in weights.files:
        if weights.format == "safetensors":
            entries = _safetensors(source, path)
        elif source.is_local(path):
            entries = _torch_bin(source, path)
        else:
            return None
        for entry in entries:
            if weights.index is not None and weights.index.get(entry.name, path) != path:
                continue
            if entry.name in found:
                raise SourceError(
                    f"{source.label}: tensor {entry.name!r} is in {found[entry.name].file} and in {path}",
                    hint="remove the file that does not belong to this checkpoint",
                )
            found[entry.name] = entry
    if weights.index is not None:
        for name, path in weights.index.items():
            if name not in found:
                raise SourceError(
                    f"{source.label}: the index says {name!r} is in {path}, but it is not",
                    hint="download the checkpoint again",
                )
    return found


def _safetensors(source: Source, path: str) -> list[SourceTensor]:
    from aoconvert.readers.safetensors import DTYPES, read_header

    if source.is_local(path):
        return [
            SourceTensor(path, info.name, info.dtype, info.shape, info.nbytes)
            for info in read_header(source.local(path)).values()
        ]
    header: Mapping[str, Any] = source.safetensors_header(path)
    found = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise SourceError(f"{source.label}: {path}: tensor {name!r} has the unknown dtype {entry['dtype']}")
        found.append(SourceTensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), end - begin))
    return found


def _torch_bin(source: Source, path: str) -> list[SourceTensor]:
    from aoconvert.readers.torch_bin import TorchBinReader

    reader = TorchBinReader(source.local(path))
    try:
        return [
            SourceTensor(path, info.name, info.dtype, info.shape, info.nbytes, info.place)
            for info in reader.infos().values()
        ]
    finally:
        reader.close()


def take(source: Source, skeleton: Skeleton, weights: WeightFiles | None) -> Inventory | None:
    """Match the checkpoint's tensors with the model's.

    Returns:
        ``None`` where there are no weights to look at (a config alone, or a ``.bin`` on the Hub).

    Raises:
        SourceError: a file is damaged, or two files contradict each other.
    """
    found = headers(source, weights) if weights is not None else None
    if found is None or weights is None:
        return None
    if skeleton.component.library == "diffusers":
        from aoconvert.models import diffusers

        names = diffusers.source_names(skeleton, found, sharded=weights.index is not None)
        if skeleton.fused:
            here = {name: found[origin] for name, origin in names.items()}
            recipes = {name: made for made in follow(skeleton, conversions(skeleton), here) for name in made.targets}
            return _inventory(skeleton, found, names, merged=frozenset(recipes), recipes=recipes)
        return _inventory(skeleton, found, names)
    from aoconvert.models import transformers

    resolved = transformers.source_names(skeleton, found)
    try:
        if resolved.clash is not None:
            raise CannotFollow(f"the checkpoint holds {resolved.clash} and what it is made from")
        made = follow(skeleton, resolved.conversions, found)
        recipes = {name: recipe for recipe in made for name in recipe.targets}
        if twice := recipes.keys() & resolved.direct.keys():
            raise CannotFollow(f"the checkpoint holds {min(twice)} and what it is made from")
    except CannotFollow as reason:
        return _inventory(skeleton, found, resolved.direct, merged=resolved.merged, obstacle=str(reason))
    return _inventory(skeleton, found, resolved.direct, merged=frozenset(recipes), recipes=recipes)


def _inventory(
    skeleton: Skeleton,
    found: Mapping[str, SourceTensor],
    names: Mapping[str, str],
    *,
    merged: frozenset[str] = frozenset(),
    recipes: Mapping[str, Recipe] | None = None,
    obstacle: str | None = None,
) -> Inventory:
    """Put together what is known; ``names`` leads from a state-dict key to the checkpoint's name."""
    recipes = recipes or {}
    wanted = {spec.name for spec in skeleton}
    direct = {name: found[origin] for name, origin in names.items() if name in wanted}
    position = {name: rank for rank, name in enumerate(found)}
    # a tensor that is made comes where its first source comes
    places = {name: position[tensor.name] for name, tensor in direct.items()}
    places |= {name: min(position[source.name] for source in recipe) for name, recipe in recipes.items()}
    order = sorted(places, key=places.__getitem__)
    if obstacle is not None:  # the copy is read after the rest; what goes into it is transformers' business
        return Inventory(direct, merged, {}, obstacle, (), (*order, *sorted(merged)))
    used = {tensor.name for tensor in direct.values()} | {
        source.name for recipe in recipes.values() for source in recipe
    }
    unused = tuple(name for name in found if name not in used)
    return Inventory(direct, merged, recipes, None, unused, tuple(order))
