"""What a function does with tensors, written down without their data and done again later, a few rows at a time.

A library's converter for the names of another layout takes a dict of tensors and gives a dict of tensors. Run once on
``Recording`` tensors, which have no data, it leaves for each result the steps that lead to it: a renamed tensor none, a
fused projection a split, and so on. ``Replay`` takes the same steps with the same torch operations on the data. Steps
that keep rows apart are taken on the wanted rows alone; before any other the tensor is made whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from aoconvert.models.base import Load, Rows, SourceTensor

_SLICE_BYTES = 32 << 20  # what is read at once at most, ``planning.slices``

aten = torch.ops.aten
_COPIES = (aten.detach, aten.alias, aten.clone, aten._to_copy, aten.lift_fresh)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
_CUTS = (aten.slice, aten.select, aten.split, aten.split_with_sizes)


class CannotRecord(Exception):
    """A function that looks at the values of tensors, or changes them in place; the message says by what."""


@dataclass(frozen=True, eq=False)
class Step:
    """A tensor: as it is stored, or what an operation gives.

    Attributes:
        shape, dtype: of the tensor.
        source: the checkpoint's tensor; ``None`` for the result of an operation.
        operation: of torch.
        args, kwargs: that it is called with: steps in place of tensors.
        part: which of its results; ``None`` where it gives one tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: SourceTensor | None = None
    operation: Any = field(default=None, repr=False)
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    part: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def parents(self) -> tuple[Step, ...]:
        """The steps that it is made from, in order."""
        found: list[Step] = []
        tree_map(lambda item: found.append(item) if isinstance(item, Step) else None, (self.args, dict(self.kwargs)))
        return tuple(found)

    @property
    def sources(self) -> Iterator[SourceTensor]:
        """The checkpoint's tensors that it is made from."""
        if self.source is not None:
            yield self.source
        for parent in self.parents:
            yield from parent.sources

    def rows(self, rows: Rows) -> list[tuple[Step, Rows]] | None:
        """Which rows of its parents give these of its own; ``None`` where rows are not kept apart."""
        if self.source is not None:
            return []
        return _rows_of_parents(self, rows)

    @property
    def streams(self) -> bool:
        """Whether its rows can be made from rows of what is stored."""
        if not self.shape:
            return False
        needed = self.rows((0, self.shape[0]))
        return needed is not None and all(parent.streams for parent, _ in needed)


@dataclass(frozen=True, eq=False)
class _Constant:
    """An operation that gives a tensor of the function's own; ``overloadpacket``: it is not one of torch's."""

    value: torch.Tensor
    overloadpacket: None = None

    def __call__(self) -> torch.Tensor:
        return self.value


def constant(tensor: torch.Tensor) -> Step:
    """A tensor that a function makes of nothing that is stored, such as the unit matrix."""
    value = tensor.detach().clone()
    return Step(tuple(value.shape), value.dtype, None, _Constant(value))


class Recording(torch.Tensor):
    """A tensor without data that writes down what is done with it; ``step`` says how it came about."""

    step: Step

    @classmethod
    def of(cls, step: Step, strides: Sequence[int] | None = None) -> Recording:
        """The tensor that a step gives; contiguous by default."""
        strides = torch.empty(step.shape, device="meta").stride() if strides is None else strides
        made = torch.Tensor._make_wrapper_subclass(
            cls, step.shape, strides=strides, dtype=step.dtype, device=torch.device("cpu")
        )
        assert isinstance(made, cls)
        made.step = step
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which torch declares as a method that is switched off
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Write the operation down, and give what it would give."""
        if func._schema.is_mutable:
            raise CannotRecord(f"it changes a tensor in place ({func})")
        kwargs = dict(kwargs or {})
        here = {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else kwargs
        try:
            made = func(*tree_map(_on_meta, args), **tree_map(_on_meta, here))
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and "meta tensors" not in str(error):
                raise  # a mistake that it makes with any tensors
            raise CannotRecord(f"it looks at the values of a tensor ({func})") from error
        given, named = tree_map(_as_step, args), tree_map(_as_step, kwargs)
        if isinstance(made, torch.Tensor):
            return cls.of(Step(tuple(made.shape), made.dtype, None, func, given, named), made.stride())
        if isinstance(made, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in made):
            return type(made)(
                cls.of(Step(tuple(item.shape), item.dtype, None, func, given, named, part), item.stride())
                for part, item in enumerate(made)
            )
        raise CannotRecord(f"it looks at the values of a tensor ({func})")


def _on_meta(value: Any) -> Any:
    if isinstance(value, Recording):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _as_step(value: Any) -> Any:
    return value.step if isinstance(value, Recording) else value


def record(
    function: Callable[[dict[str, Any]], Mapping[str, Any]], tensors: Mapping[str, SourceTensor]
) -> dict[str, Step]:
    """Write down what a function does with a checkpoint.

    Args:
        function: takes tensors by name, and gives tensors by name; it may take things out of the dict.
        tensors: the checkpoint's.

    Returns:
        The steps to each tensor that it gives, by name; what is not a tensor is left out.

    Raises:
        CannotRecord: it looks at values, or works in place.
    """
    given = {name: Recording.of(Step(tensor.shape, tensor.dtype, tensor)) for name, tensor in tensors.items()}
    made = function({**given})
    return {name: value.step for name, value in made.items() if isinstance(value, Recording)}


def _rows_of_parents(step: Step, rows: Rows) -> list[tuple[Step, Rows]] | None:
    """As ``Step.rows``. Every operation that is not listed here may mix rows."""
    operation, args = step.operation.overloadpacket, step.args
    if operation is aten.cat:
        return _rows_of_cat(step, rows)
    parent = args[0] if args and isinstance(args[0], Step) else None
    if parent is None or not parent.shape or not step.shape:
        return None
    if operation in _CUTS:
        if not _is_along_rows(step):
            return [(parent, rows)]
        first = _first_row(step, parent)
        return None if first is None else [(parent, (rows[0] + first, rows[1] + first))]
    return [(parent, rows)] if _keeps_rows(step, parent) else None


def _keeps_rows(step: Step, parent: Step) -> bool:
    """Whether row by row the operation makes the same row, of operations with one tensor."""
    operation, args = step.operation.overloadpacket, step.args
    if operation in _COPIES:
        return True
    if operation in _VIEWS:
        return parent.shape[0] == step.shape[0]
    if operation is aten.permute:
        return bool(args[1][0] % len(parent.shape) == 0)
    if operation is aten.transpose:
        return all(dimension % len(parent.shape) for dimension in args[1:3])
    if operation in (aten.unsqueeze, aten.squeeze):
        dimension = args[1] if len(args) > 1 else None
        return isinstance(dimension, int) and dimension % max(len(parent.shape), len(step.shape)) > 0
    return False


def _is_along_rows(step: Step) -> bool:
    """Whether an operation cuts along dimension 0, or puts together along it."""
    at = 2 if step.operation.overloadpacket in (aten.split, aten.split_with_sizes) else 1
    dimension = step.args[at] if len(step.args) > at else step.kwargs.get("dim", 0)
    return bool(dimension % len(step.parents[0].shape) == 0)


def _first_row(step: Step, parent: Step) -> int | None:
    """The parent's row at which this one, cut out of it along dimension 0, begins."""
    operation, args = step.operation.overloadpacket, step.args
    if operation is aten.slice:
        start, _, stride = (*args[2:5], None, None, None)[:3]
        if stride not in (None, 1):
            return None
        return int(slice(start, None).indices(parent.shape[0])[0])
    if operation is aten.split:
        return int(args[1] * (step.part or 0))
    return int(sum(args[1][: step.part or 0])) if operation is aten.split_with_sizes else None


def _rows_of_cat(step: Step, rows: Rows) -> list[tuple[Step, Rows]] | None:
    parts = step.args[0]
    if not all(isinstance(part, Step) and part.shape for part in parts):
        return None
    if not _is_along_rows(step):
        return [(part, rows) for part in parts]
    needed, before = [], 0
    for part in parts:
        start, stop = max(rows[0] - before, 0), min(rows[1] - before, part.shape[0])
        if start < stop:
            needed.append((part, (start, stop)))
        before += part.shape[0]
    return needed


class Replay:
    """Takes recorded steps on the data.

    Args:
        load: gives a tensor of the checkpoint, or rows of it.
    """

    def __init__(self, load: Load) -> None:
        self._load = load

    def make(self, step: Step, rows: Rows | None = None) -> torch.Tensor:
        """The tensor, or rows (start, stop) of it; it may be a view, and not contiguous.

        Args:
            step: how it is made.
            rows: of dimension 0, where it ``streams``.
        """
        if step.source is not None:
            return self._load(step.source, rows)
        if rows is None:
            return self._run(step, {id(parent): self.make(parent) for parent in step.parents})
        needed = step.rows(rows)
        assert needed is not None
        parts = [self.make(parent, part) for parent, part in needed]
        operation = step.operation.overloadpacket
        if operation is aten.cat and _is_along_rows(step):
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if operation in _CUTS and _is_along_rows(step):
            return parts[0]
        if operation in _VIEWS:
            return parts[0].reshape(rows[1] - rows[0], *step.shape[1:])
        return self._run(step, {id(parent): part for (parent, _), part in zip(needed, parts, strict=True)})

    def _run(self, step: Step, made: Mapping[int, torch.Tensor]) -> torch.Tensor:
        def given(value: Any) -> Any:
            return made[id(value)] if isinstance(value, Step) else value

        operation, args = step.operation, tree_map(given, step.args)
        if operation.overloadpacket is aten.view:  # of what is not contiguous here
            args = (args[0].contiguous(), *args[1:])
        made_of = operation(*args, **tree_map(given, dict(step.kwargs)))
        result: torch.Tensor = made_of if step.part is None else made_of[step.part]
        return result


@dataclass(frozen=True)
class ReplayRecipe:
    """How a tensor of the model is made by recorded steps; beside ``conversions.MergeRecipe``.

    Attributes:
        name: its state-dict key.
        step: the last of the steps.
    """

    name: str
    step: Step = field(repr=False)

    def __iter__(self) -> Iterator[SourceTensor]:
        return iter(dict.fromkeys(self.step.sources))

    @property
    def dtype(self) -> torch.dtype:
        """Of what is made."""
        return self.step.dtype

    def bytes_in(self, target: str) -> int:
        """Bytes of what is made: of a source that gives several tensors, its share."""
        return self.step.nbytes

    def working_bytes(self, target: str, dtype: torch.dtype) -> int:
        """Host memory that is taken while it is made, beside what is handed out."""
        if self.step.streams:
            return 2 * min(self.step.nbytes, _SLICE_BYTES)
        return self.step.nbytes + sum(tensor.nbytes for tensor in self)
