"""What an input is before it is made: shapes and kinds of values, or what a library gave, nested as the argument is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["normal", "float32", "ids", "long", "mask", "bool", "positions", "given", "time", "complex"]
Path = tuple[Any, ...]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Blank:
    """A tensor to be made.

    Attributes:
        shape: its shape.
        kind: of its values: ``normal`` noise in the model's dtype, the same in ``float32``, token ``ids``, zeros that
            are ``long``, a ``mask`` of ones, the same as ``bool``, ``positions`` along the last axis, a ``time`` within
            a schedule, ``complex`` ones (of turns by nothing), or the ``given`` values.
        high: token ids are below it.
        given: the values, nested tuples of integers.
        last: the last token id, e.g. the end of a sequence; ``None``: as any other.
        run: how many of the ids, after the first, are ``filler`` (the place of an image among a text's tokens).
        filler: the id that stands for a part of an image, a video or a sound.
        avoid: ids that mean something.
    """

    shape: tuple[int, ...]
    kind: Kind = "normal"
    high: int = 0
    given: Any = None
    last: int | None = None
    run: int = 0
    filler: int | None = None
    avoid: tuple[int, ...] = ()

    @property
    def floating(self) -> bool:
        """Whether it is made of floating-point numbers."""
        return self.kind in ("normal", "float32", "time")


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor that a library made: it stays as it is."""

    tensor: torch.Tensor

    def __repr__(self) -> str:
        return f"Given({self.tensor.dtype}, {tuple(self.tensor.shape)}, {id(self.tensor)})"


def given(value: Any, dtype: torch.dtype | None = None) -> Any:
    """An argument that a library made, to be handed on as it is.

    Args:
        value: tensors, nested as the argument is, and whatever else there is.
        dtype: what becomes of its floating-point numbers; ``None``: they stay.
    """
    if isinstance(value, torch.Tensor):
        wanted = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
        return Given(value.detach().to("cpu", wanted, copy=True))
    if isinstance(value, Mapping):
        return {key: given(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(given(item, dtype) for item in value)
    return value


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Blank]]:
    """Every tensor in an argument that is still to be made, with the way to it."""
    if isinstance(value, Blank):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))


def replace_at(value: Any, path: Path, new: Any) -> Any:
    """The argument with another value at that place."""
    if not path:
        return new
    first, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        return {**value, first: replace_at(value.get(first), rest, new)}
    items = [replace_at(item, rest, new) if index == first else item for index, item in enumerate(value)]
    return type(value)(items)


def make(value: Any, dtype: torch.dtype, device: str) -> Any:
    """The argument itself: the same tensors each time, on ``device``; on ``meta`` without values."""
    if isinstance(value, Blank):
        if device == "meta":
            return torch.empty(value.shape, dtype=_dtype(value, dtype), device=device)
        return _values(value, dtype)
    if isinstance(value, Given):
        return value.tensor.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: make(item, dtype, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(make(item, dtype, device) for item in value)
    return value


def _dtype(blank: Blank, dtype: torch.dtype) -> torch.dtype:
    if blank.kind in ("normal", "time"):
        return dtype
    return {"float32": torch.float32, "bool": torch.bool, "complex": torch.complex64}.get(blank.kind, torch.long)


def _values(blank: Blank, dtype: torch.dtype) -> torch.Tensor:
    count = 1
    for size in blank.shape:
        count *= size
    if blank.kind in ("normal", "float32"):
        noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(count))
        return noise.to(_dtype(blank, dtype))
    if blank.kind == "time":
        return torch.full(blank.shape, 0.5, dtype=dtype)
    if blank.kind == "given":
        return torch.tensor(blank.given, dtype=torch.long).reshape(blank.shape)
    if blank.kind == "ids":
        return _ids(blank, count)
    if blank.kind == "positions":
        return (torch.arange(count) % blank.shape[-1] if blank.shape else torch.zeros(1, dtype=torch.long)).reshape(
            blank.shape
        )
    if blank.kind == "long":
        return torch.zeros(blank.shape, dtype=torch.long)
    return torch.ones(blank.shape, dtype=_dtype(blank, dtype))


def _ids(blank: Blank, count: int) -> torch.Tensor:
    """Ids from within the vocabulary, none of those that mean something, but for the run of fillers and the last."""
    plain = [token for token in range(min(blank.high, 200)) if token not in blank.avoid] or [0]
    ids = torch.tensor([plain[(7 * place + 3) % len(plain)] for place in range(count)]).reshape(blank.shape)
    if blank.run and blank.filler is not None and ids.dim():
        ids[..., 1 : 1 + blank.run] = blank.filler
    if blank.last is not None and ids.dim() and ids.shape[-1]:
        ids[..., -1] = blank.last
    return ids
