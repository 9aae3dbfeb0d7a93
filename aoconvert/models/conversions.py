"""Tensors that transformers builds from others of the checkpoint, one at a time.

transformers 5 stacks the experts of a mixture, splits fused projections, transposes and so on while it loads. Which
tensors go through which of its converters is known from names; what comes out is tried on meta tensors; the real data
then go through the same converter's own ``convert``. So the arithmetic is the library's, and only one tensor (often
only some rows of it) has to be in memory.
Source of the steps: ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from aoconvert.models.base import Load, Rows, Skeleton, SourceTensor

if TYPE_CHECKING:
    import torch

# Operations make fresh tensors; below glibc's limit for mappings (engine/memory.py) that costs no page faults.
BLOCK_BYTES = 2 << 20


class CannotConvert(Exception):
    """A conversion that cannot be done tensor by tensor; the message says why.

    Attributes:
        for_want_of_data: it looks at values, so that nothing is known without them.
    """

    def __init__(self, message: str, *, for_want_of_data: bool = False) -> None:
        super().__init__(message)
        self.for_want_of_data = for_want_of_data


@dataclass(frozen=True)
class Conversion:
    """Checkpoint tensors that go through one of transformers' converters together.

    Attributes:
        layer: the state-dict key under which transformers files them; the first of what is made.
        converter: a ``WeightConverter``.
        sources: its source pattern → names in the checkpoint, both in transformers' order.
    """

    layer: str
    converter: Any = field(repr=False)
    sources: Mapping[str, tuple[str, ...]] = field(repr=False)


@dataclass(frozen=True)
class MergeRecipe:
    """How one or several tensors of the model are made.

    Attributes:
        layer: see ``Conversion``.
        converter: see ``Conversion``.
        sources: source pattern → tensors of the checkpoint.
        targets: state-dict key → shape of everything that is made.
        along: how the rows (dimension 0) of the only target follow from its sources: each list of sources is
            ``stacked``, the sources are ``concatenated``, or the rows of the only source are ``mapped`` one by one.
            ``None``: what is made cannot be made in rows.
        parts: of a stack, where a row is its sources one above the other: how many. Then any rows of the sources make
            the same rows of each part. 0 where that is not so.
    """

    layer: str
    converter: Any = field(repr=False)
    sources: Mapping[str, tuple[SourceTensor, ...]] = field(repr=False)
    targets: Mapping[str, tuple[int, ...]]
    along: Literal["stacked", "concatenated", "mapped"] | None = None
    parts: int = 0

    def __iter__(self) -> Iterator[SourceTensor]:
        return (tensor for tensors in self.sources.values() for tensor in tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every source exactly; nearly always they all have it."""
        import torch

        return reduce(torch.promote_types, (tensor.dtype for tensor in self))

    @property
    def block_rows(self) -> int:
        """How many rows are made at once."""
        if self.along == "stacked":
            return 1
        rows = next(iter(self.targets.values()))[0]
        return max(1, BLOCK_BYTES * rows // max(1, sum(tensor.read_bytes for tensor in self)))

    def bytes_in(self, target: str) -> int:
        """A target's share of the sources' bytes."""
        whole = sum(prod(shape) for shape in self.targets.values())
        return sum(tensor.nbytes for tensor in self) * prod(self.targets[target]) // max(1, whole)

    def working_bytes(self, target: str, dtype: torch.dtype) -> int:
        """Host memory that is taken while ``target`` is made, beside the rows of it that are handed out.

        An operation's input and its result exist together; of rows, that and one more copy; of a stack in parts, the
        sources of a row.
        """
        made = sum(prod(shape) for shape in self.targets.values()) * dtype.itemsize
        if self.along is None:
            return 2 * made
        if self.parts:
            return made // self.targets[target][0] + 4 * BLOCK_BYTES
        return 3 * made * self.block_rows // max(1, self.targets[target][0])


def resolve_conversions(
    skeleton: Skeleton, conversions: Sequence[Conversion], found: Mapping[str, SourceTensor]
) -> list[MergeRecipe]:
    """Try every conversion on meta tensors.

    Args:
        skeleton: the empty model.
        conversions: of its checkpoint.
        found: the checkpoint's tensors by name.

    Raises:
        CannotConvert: a converter fails, or makes something else than the model has.
    """
    shapes = {spec.name: spec.shape for spec in skeleton}
    recipes, made = [], set[str]()
    for item in conversions:
        sources = {pattern: tuple(found[name] for name in names) for pattern, names in item.sources.items()}
        recipe = MergeRecipe(item.layer, item.converter, sources, {})
        try:
            results = build(recipe, skeleton.model, None, _empty)
        except Exception as error:  # an operation may fail in its own way
            blind = isinstance(error, NotImplementedError) or "meta tensor" in str(error)
            raise CannotConvert(f"{item.layer}: {error}".splitlines()[0], for_want_of_data=blind) from error
        targets = {name: tuple(tensor.shape) for name, tensor in results.items()}
        wrong = [name for name, shape in targets.items() if shapes.get(name) != shape or name in made]
        if wrong or item.layer not in targets:
            raise CannotConvert(f"{(wrong or [item.layer])[0]} would not get the shape that the model expects")
        made |= set(targets)
        recipes.append(_with_rows(replace(recipe, targets=targets), skeleton.model))
    return recipes


def build(recipe: MergeRecipe, model: Any, rows: Rows | None, load: Load) -> dict[str, torch.Tensor]:
    """Run transformers' own converter.

    Args:
        recipe: what to make.
        model: the empty model; operations ask it for its config and for shapes.
        rows: of dimension 0, where ``recipe.along`` allows it; ``None`` for everything.
        load: gives a tensor of the checkpoint, or rows of it, in the dtype that the model wants.

    Returns:
        State-dict key → tensor; it may be a view, and not contiguous.
    """
    import torch

    converter = deepcopy(recipe.converter)
    for pattern, source, part in _select_sources(recipe, rows):
        converter.add_tensor(recipe.layer, source.name, pattern, _later(load, source, part))
    seen = model if rows is None else _RowsOf(model, rows)
    with torch.no_grad():
        made = converter.convert(recipe.layer, model=seen, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _RowsOf:
    """A model of whose parameters an operation sees the rows that are being made."""

    def __init__(self, model: Any, rows: Rows) -> None:
        self._model = model
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = self._model.get_parameter(name)
        return parameter[self._rows[0] : self._rows[1]]


def _later(load: Load, source: SourceTensor, rows: Rows | None) -> Callable[[], torch.Tensor]:
    """The converter calls it when it wants the tensor."""
    return lambda: load(source, rows)


def _empty(source: SourceTensor, rows: Rows | None) -> torch.Tensor:
    import torch

    shape = source.shape if rows is None else (rows[1] - rows[0], *source.shape[1:])
    return torch.empty(shape, dtype=source.dtype, device="meta")


def _select_sources(recipe: MergeRecipe, rows: Rows | None) -> Iterator[tuple[str, SourceTensor, Rows | None]]:
    """The sources (pattern, tensor, rows of it) that take part in the rows to make."""
    if rows is None or recipe.along == "stacked":
        for pattern, tensors in recipe.sources.items():
            for tensor in tensors if rows is None else tensors[rows[0] : rows[1]]:
                yield pattern, tensor, None
        return
    before = 0
    for pattern in recipe.converter.source_patterns:  # the order in which they are concatenated
        for tensor in recipe.sources.get(pattern, ()):
            start, stop = max(rows[0] - before, 0), min(rows[1] - before, tensor.shape[0])
            if start < stop:
                yield pattern, tensor, (start, stop)
            before += tensor.shape[0]


def _with_rows(recipe: MergeRecipe, model: Any) -> MergeRecipe:
    """The recipe with ``along``, where a single row comes out as one row of the target."""
    try:
        along = _along(recipe)
    except ImportError:  # a transformers whose operations have other names
        along = None
    if along is None:
        return recipe
    [(name, shape)] = recipe.targets.items()
    able = replace(recipe, along=along)
    if not all(_makes(able, model, row, _empty, {name: (1, *shape[1:])}) for row in (0, shape[0] - 1)):
        return recipe
    parts = _parts(able)
    if parts and _makes(able, model, 0, lambda source, _: _empty(source, (0, 1)), {name: (1, parts, *shape[2:])}):
        return replace(able, parts=parts)
    return able


def _makes(recipe: MergeRecipe, model: Any, row: int, load: Load, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        made = build(recipe, model, (row, row + 1), load)
    except Exception:  # as above; then it is made in another way
        return False
    return {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes


def _along(recipe: MergeRecipe) -> Literal["stacked", "concatenated", "mapped"] | None:
    """What the operations do to dimension 0. Only classes that are known, not classes made from them."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    shapes = list(recipe.targets.values())
    if len(shapes) != 1 or not shapes[0] or 0 in shapes[0]:
        return None
    rows = shapes[0][0]
    first, *rest = recipe.converter.operations
    lists = list(recipe.sources.values())
    if type(first) is MergeModulelist and first.dim == 0 and all(map(_keeps_rows, rest)):
        alike = all(len(tensors) == rows and len({tensor.shape for tensor in tensors}) == 1 for tensors in lists)
        return "stacked" if alike else None
    if any(not tensor.shape for tensor in recipe):
        return None
    if type(first) is Concatenate and first.dim == 0 and not rest:
        return "concatenated" if sum(tensor.shape[0] for tensor in recipe) == rows else None
    if len(lists) == len(lists[0]) == 1 and _keeps_rows(first) and all(map(_keeps_rows, rest)):
        return "mapped" if lists[0][0].shape[0] == rows else None
    return None


def _parts(recipe: MergeRecipe) -> int:
    """See ``MergeRecipe.parts``."""
    from transformers.core_model_loading import Concatenate

    if recipe.along != "stacked" or len({tensor.shape for tensor in recipe}) != 1 or not next(iter(recipe)).shape:
        return 0
    below = [type(operation) is Concatenate and operation.dim == 1 for operation in recipe.converter.operations[1:]]
    return len(recipe.sources) if below in ([], [True]) else 0


def _keeps_rows(operation: Any) -> bool:
    """Whether it works within each row of dimension 0."""
    from transformers.core_model_loading import Concatenate, Interleave, Transpose

    if type(operation) in (Concatenate, Interleave):
        return bool(operation.dim > 0)
    return type(operation) is Transpose and operation.dim0 > 0 and operation.dim1 > 0


def room(shape: tuple[int, ...], dtype: torch.dtype, into: torch.Tensor | None) -> torch.Tensor:
    """Memory for a tensor that is made: in ``into``, uint8 memory, where it fits, else fresh."""
    import torch

    nbytes = prod(shape) * dtype.itemsize
    if into is None or into.numel() < nbytes:
        return torch.empty(shape, dtype=dtype)
    return into[:nbytes].view(dtype).view(shape)
