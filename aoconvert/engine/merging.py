"""Tensors that the checkpoint does not hold as they are: made from others of it, or read from transformers' copy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from aoconvert.engine.replaying import Replayed
from aoconvert.errors import AoconvertError, ReadError
from aoconvert.formats.safetensors.reader import SafetensorsReader
from aoconvert.models import transformers as transformers_models
from aoconvert.models.base import Load, Rows, SourceTensor
from aoconvert.models.conversions import BLOCK_BYTES, MergeRecipe, build, room
from aoconvert.models.recording import ReplayRecipe
from aoconvert.planning.inventory import Readable
from aoconvert.planning.types import ComponentPlan, StreamedPlan

if TYPE_CHECKING:
    from aoconvert.planning.types import Plan

_HINT = "check that from_pretrained opens this model"


class LoadInto(Protocol):
    """Gives a tensor of the checkpoint, or rows of it, in its dtype."""

    def __call__(self, source: SourceTensor, rows: Rows | None, into: torch.Tensor | None = None) -> torch.Tensor:
        """In ``into``, uint8 memory, where that is possible."""


class Merging(Protocol):
    """Gives the tensors of a component that have no ``origin``."""

    def read(self, tensor: Readable, rows: Rows | None, into: torch.Tensor | None) -> torch.Tensor:
        """The tensor, or its rows (start, stop), contiguous; in ``into``, uint8 memory, where that is possible.

        Raises:
            ReadError: a disk error, or transformers cannot make it.
        """

    def close(self) -> None:
        """Release memory, files, and what was written for this."""


def open_merging(plan: StreamedPlan, whole: Plan, scratch: Path, load: LoadInto) -> Merging | None:
    """What a model's plan asks for; ``None`` for one that is written as it is.

    Args:
        plan: the component.
        whole: the plan it belongs to.
        scratch: folder on the output's disk, for a copy.
        load: where the checkpoint's tensors come from.

    Raises:
        SourceError: a copy is needed, and transformers refuses the checkpoint.
    """
    if not isinstance(plan, ComponentPlan):
        return Replayed(plan.recipes, load) if plan.recipes else None
    replayed = {name: recipe for name, recipe in plan.recipes.items() if isinstance(recipe, ReplayRecipe)}
    if replayed:
        return Replayed(replayed, load)
    return _Made(plan, load) if plan.copied is None else _Copied(plan, whole, scratch)


class _Made:
    """Makes each tensor when it is asked for; in the dtype that it will have, as transformers casts before it merges.

    What cannot be made in rows is made whole, with everything that comes of the same conversion, and kept until
    another conversion is asked for: its rows and the other tensors follow.
    """

    def __init__(self, plan: ComponentPlan, load: LoadInto) -> None:
        self._recipes = {name: item for name, item in plan.recipes.items() if isinstance(item, MergeRecipe)}
        self._model = plan.skeleton.model
        self._dtypes: Mapping[str, torch.dtype] = {t.name: getattr(torch, t.dtype) for t in plan.tensors}
        self._load = load
        self._kept: tuple[str, dict[str, torch.Tensor]] | None = None
        self._scratch: dict[int, torch.Tensor] = {}

    def read(self, tensor: Readable, rows: Rows | None, into: torch.Tensor | None) -> torch.Tensor:
        recipe = self._recipes[tensor.name]
        dtype = self._dtypes[recipe.layer]
        if recipe.along is None:
            made = self._whole(recipe, tensor.name)
            if rows is None and _is_own(made[tensor.name], dtype):
                return made.pop(tensor.name)
            part = made[tensor.name] if rows is None else made[tensor.name][rows[0] : rows[1]]
            return room(tuple(part.shape), dtype, into).copy_(part)
        self._kept = None
        start, stop = rows or (0, tensor.shape[0])
        result = room((stop - start, *tensor.shape[1:]), dtype, into)
        if recipe.parts:
            for row in range(start, stop):
                self._stack(recipe, tensor.name, row, result[row - start])
            return result
        for first in range(start, stop, recipe.block_rows):
            last = min(first + recipe.block_rows, stop)
            made = self._build(recipe, (first, last), partial(self._cast, dtype))
            result[first - start : last - start].copy_(made[tensor.name])
        return result

    def _stack(self, recipe: MergeRecipe, name: str, row: int, result: torch.Tensor) -> None:
        """One row of a stack, such as an expert, a few rows of its parts at a time."""
        loaded: dict[str, torch.Tensor] = {}
        for at, sources in enumerate(recipe.sources.values()):
            source = sources[row]
            if at not in self._scratch or self._scratch[at].numel() < source.read_bytes:
                self._scratch[at] = torch.empty(source.read_bytes, dtype=torch.uint8)
            loaded[source.name] = self._load(source, None, self._scratch[at])
        height = result.shape[0] // recipe.parts
        parts = result.view(recipe.parts, height, *result.shape[1:])
        step = max(1, BLOCK_BYTES * height // max(1, result.nbytes))

        def load(source: SourceTensor, _: Rows | None) -> torch.Tensor:
            return loaded[source.name][first : first + step].to(result.dtype)

        for first in range(0, height, step):
            made = self._build(recipe, (row, row + 1), load)[name]
            parts[:, first : first + step].copy_(made.view(recipe.parts, -1, *result.shape[1:]))

    def _whole(self, recipe: MergeRecipe, name: str) -> dict[str, torch.Tensor]:
        """Everything of a conversion, ``name`` among it."""
        if self._kept is None or self._kept[0] != recipe.layer or name not in self._kept[1]:
            self._kept = None  # before the next is made
            self._kept = (recipe.layer, self._build(recipe, None, partial(self._cast, self._dtypes[recipe.layer])))
        return self._kept[1]

    def _cast(self, dtype: torch.dtype, source: SourceTensor, rows: Rows | None) -> torch.Tensor:
        return self._load(source, rows).to(dtype)

    def _build(self, recipe: MergeRecipe, rows: Rows | None, load: Load) -> dict[str, torch.Tensor]:
        try:
            return build(recipe, self._model, rows, load)
        except AoconvertError:
            raise
        except Exception as error:  # an operation may fail in its own way
            raise ReadError(
                f"transformers could not make {recipe.layer}: {error}".splitlines()[0], hint=_HINT
            ) from error

    def close(self) -> None:
        self._kept = None
        self._scratch = {}


def _is_own(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Contiguous, and no view of something larger."""
    return tensor.dtype == dtype and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


class _Copied:
    """Reads what transformers' own loader wrote to a folder on the output's disk."""

    def __init__(self, plan: ComponentPlan, whole: Plan, scratch: Path) -> None:
        self._open: tuple[Path, SafetensorsReader] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="merged-", dir=scratch))
        config = whole.source.local(f"{plan.component.folder}/config.json".lstrip("/"))
        dtype = next(t.dtype for t in plan.tensors if t.origin is None and t.action != "tied")
        self._places = transformers_models.merged_reader_index(
            plan.component,
            config.parent,
            self._folder,
            getattr(torch, dtype),
            variant=whole.variant,
            code_root=config.parent if whole.trust_remote_code else None,
        )

    def read(self, tensor: Readable, rows: Rows | None, into: torch.Tensor | None) -> torch.Tensor:
        place = self._places.get(tensor.name)
        if place is None:
            raise ReadError(f"transformers did not build {tensor.name}", hint=_HINT)
        path, name = place
        if self._open is None or self._open[0] != path:
            if self._open is not None:
                self._open[1].close()
            self._open = (path, SafetensorsReader(path))
        reader = self._open[1]
        return reader.read(name, into) if rows is None else reader.read_rows(name, *rows, into)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
        shutil.rmtree(self._folder, ignore_errors=True)
